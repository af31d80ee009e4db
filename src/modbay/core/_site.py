"""What can be read from a module before it runs: how its weight acts, and how wide its input and output are."""

from typing import Any

import torch
from torch import Tensor, nn

from ..abstract import Site


def base_type(module: nn.Module) -> type:
    """The class that a module had before modbay was attached to it."""
    return type(module).__dict__.get("_base", type(module))


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's Conv1D: a linear map whose weight is stored (in, out)."""
    return base_type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "weight")


def quantised(module: nn.Module | None, parameter: str = "weight") -> bool:
    """Whether a weight is kept in fewer bits than it acts in: as integers (bitsandbytes), as a tensor that unpacks
    itself (torchao), behind a call (torch's dynamic quantisation), or under another name (GPTQ, AWQ)."""
    weight = getattr(module, parameter, None)
    if not isinstance(weight, Tensor):
        return hasattr(module, "qweight") or (callable(weight) and hasattr(module, "_packed_params"))
    own = type(weight)
    return not weight.is_floating_point() or (own is not nn.Parameter and own.dequantize is not Tensor.dequantize)


def _shape(module: nn.Module) -> tuple[str, int | None, int | None, int]:
    """(form, inputs, outputs, feature axis) of one module."""
    if is_conv1d(module):
        shape: Any = module.weight.shape
        return "transposed", shape[0], shape[1], -1
    if isinstance(module, nn.Embedding):
        return "embedding", module.num_embeddings, module.embedding_dim, -1
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return "convolution", module.in_channels, module.out_channels, -1 - len(module.kernel_size)
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(inputs, int) and isinstance(outputs, int):  # Linear, and quantised ones that only resemble it
        return "linear", inputs, outputs, -1
    shape = getattr(module, "normalized_shape", None)
    if shape is not None:
        return "other", shape[-1], shape[-1], -1
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        axis = {nn.BatchNorm2d: -3, nn.BatchNorm3d: -4}.get(base_type(module), 1)  # BatchNorm1d: of (b, d), (b, d, t)
        return "other", module.num_features, module.num_features, axis
    if isinstance(module, nn.GroupNorm):  # of x (b, d), (b, d, t), (b, d, h, w) …
        return "other", module.num_channels, module.num_channels, 1
    if isinstance(module, nn.MultiheadAttention):
        return "other", module.embed_dim, module.embed_dim, -1
    return _inner(module)


def _inner(module: nn.Module) -> tuple[str, int | None, int | None, int]:
    """A container: as wide as its first linear map is at its input, and its last one at its output."""
    leaves = [m for name, m in module.named_modules() if name and "_bay" not in name and not list(m.children())]
    inner = [_shape(m) for m in leaves]
    maps = [s for s in inner if s[0] in ("linear", "transposed", "convolution")]
    if maps:
        return "other", maps[0][1], maps[-1][2], maps[-1][3]
    weight = getattr(module, "weight", None)  # an RMSNorm, say, that names its width nowhere
    if isinstance(weight, Tensor) and weight.ndim == 1:
        return "other", len(weight), len(weight), -1
    return "other", None, None, -1


def describe(name: str, module: nn.Module | None, features: int | None = None) -> Site:
    """The site at a module; `features` overrides the widths that can't be read."""
    form, inputs, outputs, axis = _shape(module) if module is not None else ("other", None, None, -1)
    if features is not None:
        inputs, outputs = (inputs, outputs) if form != "other" else (features, features)
    own = [] if module is None else [*module.parameters(), *module.buffers()]  # GPTQ keeps its weight in buffers
    device = own[0].device if own else torch.device("cpu")
    floats = (p for p in own if p.is_floating_point() and isinstance(p, nn.Parameter))
    dtype = next((p.dtype for p in floats), torch.get_default_dtype())
    return Site(name, form, inputs, outputs, axis, device, dtype, module)
