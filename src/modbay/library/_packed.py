"""What a fingerprint reads of a weight that is packed: a tensor that unpacks itself, or a layer's own buffers."""

from typing import Any

from torch import Tensor, nn

from ..core import quantised
from ..dequantise import held

# gptqmodel's kernels move the zero points between versions 1 and 2 of the format, in place.
MOVED = ("qzeros",)


class Packed(tuple[Tensor, ...]):
    """The tensors that together are one packed weight or bias."""

    requires_grad = False


def packed(body: nn.Module) -> dict[str, Packed]:
    """What is no plain parameter of a quantised layer, under the names that floats would have: "….weight", "….bias".

    bitsandbytes' weights are parameters, of integers: they are not here. A kernel that orders the numbers otherwise
    (Marlin, Exllama) has another digest than one that takes them as they are.
    """
    found: dict[str, Packed] = {}
    for path, module in body.named_modules():
        if "_bay" in path.split(".") or not quantised(module):
            continue
        own = module._parameters.get("weight")
        if own is not None and not own.is_floating_point():
            if getattr(getattr(own, "quant_state", None), "packing_format_for_cpu", False):
                module.state_dict()  # bitsandbytes orders the numbers anew as it runs on some CPUs, and back to save
            continue
        for name, tensors in (("weight", _weight(module)), ("bias", _bias(module))):
            if tensors:
                found[f"{path}.{name}" if path else name] = Packed(tensors)
    return found


def _weight(module: Any) -> list[Tensor]:
    weight = held(module, "weight")
    if weight is not None and (weight.is_floating_point() or weight.is_quantized):  # they have no bytes to be seen
        return [weight.dequantize()]
    own: dict[str, Any] = {**module._parameters, **module._buffers}
    passing = {*MOVED, "bias", *module._non_persistent_buffers_set}
    return [own[name] for name in sorted(own) if own[name] is not None and name not in passing]


def _bias(module: nn.Module) -> list[Tensor]:
    bias = held(module, "bias")
    return [] if bias is None or module._parameters.get("bias") is not None else [bias]
