"""Dequantising: a linear layer that keeps its weight in few bits becomes a Linear with a weight of floats.

    W = f(I)ᵀ,   and y = x Wᵀ + b

A layer is what it does to the identity, so that no format is read here: GPTQ, AWQ and bitsandbytes are told from each
other by nobody, nor the kernels that repack them. A weight that unpacks itself (torchao) says its own values.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .core import base_type, quantised
from .errors import CompositionError
from .seams import named, swap

LOG = logging.getLogger("modbay")

ROWS = 1024  # of the identity at a time: its products with a wide layer are as large as its weight
TRIED = 64  # rows of noise, on which the error is measured
LINEAR = 0.25  # a relative error above this is no rounding: the layer is not what it does to the identity


@dataclass(eq=False)
class Unpacked:
    """A layer as it was, for `repack`, and the relative error of what it became."""

    module: nn.Module
    was: type
    tables: tuple[dict[str, Any], dict[str, Any], dict[str, Any]]  # of parameters, buffers and modules
    error: float = 0.0

    def repack(self) -> None:
        """Put the packed weight back, bit for bit."""
        _become(self.module, self.was, self.tables)


def dequantise(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, float]:
    """Give every quantised linear layer of a model a weight of floats, in place; returns the relative errors by name.

        error = ‖g(x) − f(x)‖ / ‖f(x)‖   for f the layer as it was, g what it became, x normal (64, inputs)

    dtype: of the weights; that of the model's own floats unless told. A transformers model forgets that it was
    quantised, so that `save_pretrained` writes a plain checkpoint. Bays that are attached stay. What a layer acted in
    fewer bits beside the weight (activations as integers) is lost: the error has it. Raises CompositionError, and
    changes nothing, for quantised layers that are not linear, or under accelerate's hooks.
    """
    dtype = acts_in(model) if dtype is None else dtype
    found = {name: module for name, module in named(model).items() if quantised(module)}
    done: dict[str, Unpacked] = {}
    try:
        for name, module in found.items():
            done[name] = unpack(name, module, dtype, "dequantise")
    except BaseException:
        for one in done.values():
            one.repack()
        raise
    report("dequantise", done)
    forget: Callable | None = getattr(getattr(model, "hf_quantizer", None), "remove_quantization_config", None)
    if forget is not None:
        forget(model)
    return {name: one.error for name, one in done.items()}


def acts_in(model: nn.Module) -> torch.dtype:
    """The dtype of the model's first float that is kept as it is."""
    plain = (p for p in model.parameters() if type(p) is nn.Parameter and p.is_floating_point())
    return next((p.dtype for p in plain), torch.get_default_dtype())


def unpack(name: str, module: nn.Module, dtype: torch.dtype, verb: str = "fold") -> Unpacked:
    """Make one quantised layer a Linear; raises CompositionError where it can't become one."""
    _can(name, module, verb)
    was = base_type(module)
    done = Unpacked(module, was, _tables(module))
    weight, bias = _values(module, was, dtype)
    noise = torch.randn(TRIED, weight.shape[1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = was.forward(module, noise.to(weight)).float()
        after = nn.functional.linear(noise.to(weight), weight, bias).float()
    done.error = float((after - before).norm() / before.norm().clamp(min=1e-30))
    if not done.error < LINEAR:  # not a number, too
        raise CompositionError(
            f"{verb} at {name!r}: as a Linear with what this {was.__name__} does to the identity for a weight, the "
            f"layer acts otherwise by a relative {done.error:.1e}, so that it is no linear map. Serve the model with "
            f"the bay attached."
        )
    frozen = nn.Parameter(weight, requires_grad=False)
    own = {"weight": frozen, "bias": None if bias is None else nn.Parameter(bias, requires_grad=False)}
    _become(module, nn.Linear, (own, {}, {}))
    return done


def report(verb: str, done: Mapping[str, Unpacked]) -> None:
    """Log by how much layers act otherwise than they did when they were quantised."""
    if done:
        worst = max(done, key=lambda name: done[name].error)
        LOG.warning("%s: %d quantised layers are Linears of floats now, and act otherwise by a relative %.1e at most "
                    "(%r).", verb, len(done), done[worst].error, worst)  # fmt: skip


def held(module: nn.Module, name: str) -> Tensor | None:
    """A layer's weight or bias as a tensor, which torch's own quantised layers keep behind a call."""
    tensor: Any = getattr(module, name, None)
    tensor = tensor() if callable(tensor) and not isinstance(tensor, Tensor) else tensor
    return tensor if isinstance(tensor, Tensor) else None


def linear(module: nn.Module) -> bool:
    """Whether a layer says that it maps features to features, as Linear does and quantised ones that resemble it."""
    return all(isinstance(getattr(module, side, None), int) for side in ("in_features", "out_features"))


def _can(name: str, module: nn.Module, verb: str) -> None:
    what = f"{verb} at {name!r}: the weight of this {base_type(module).__name__} is quantised"
    if not linear(module):
        raise CompositionError(f"{what}, and only linear layers can be dequantised. Start from the base as it was.")
    if getattr(module._modules.get("_bay"), "is_root", False):
        raise CompositionError(f"{what}, and it is the whole model. Attach to a model that holds it.")
    if any(key in module.__dict__ for key in ("forward", "_bay_inner")):
        raise CompositionError(
            f"{what}, and its forward is another library's (accelerate's hooks). Load the model on one device, without "
            f"device_map."
        )


def _values(module: nn.Module, was: type, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """(W, b) in floats, without its bias seen: rounded beside it, small weights would lose their digits."""
    packed, bias = held(module, "weight"), held(module, "bias")
    bias = None if bias is None else bias.detach().to(dtype)
    if packed is not None and (packed.is_floating_point() or packed.is_quantized):
        return packed.dequantize().detach().to(dtype), bias
    device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    inputs: int = module.in_features  # type: ignore[assignment]
    tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    own: Any = next((table for table in tables if table.get("bias") is not None), {})
    hidden = own.get("bias")
    zero = torch.zeros(1, inputs, dtype=dtype, device=device)
    with torch.no_grad():
        try:
            if hidden is not None:
                own["bias"] = None
            rows = torch.arange(inputs, device=device).split(ROWS)
            parts = [was.forward(module, nn.functional.one_hot(some, inputs).to(dtype)) for some in rows]
            offset = was.forward(module, zero)  # a bias that is kept elsewhere
        finally:
            if hidden is not None:
                own["bias"] = hidden
    return (torch.cat(parts) - offset).mT.to(dtype).contiguous(), bias


def _tables(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What a layer holds, without modbay's own."""
    inner = {name: one for name, one in module._modules.items() if name != "_bay"}
    return dict(module._parameters), dict(module._buffers), inner


def _become(module: nn.Module, cls: type, tables: tuple[dict[str, Any], dict[str, Any], dict[str, Any]]) -> None:
    """Another class and other tensors, under the same seat."""
    seat = module._modules.get("_bay")
    module.__class__ = cls
    for table, new in zip((module._parameters, module._buffers, module._modules), tables, strict=True):
        table.clear()
        table.update(new)
    if seat is not None:
        module._modules["_bay"] = seat
        swap(module)
