"""adapters' changes of weights: LoRA, VeRA, (IA)³."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...modules import IA3, LoRA
from ._source import Source


def lora(source: Source, method: Mapping[str, Any]) -> None:
    """LoRA and (IA)³, which is one that scales; VeRA's diagonals are whole matrices here, so that it is a LoRA."""
    mode = source.get(method, "composition_mode", str, "add")
    alpha, rank = (float(source.get(method, key, (int, float), default)) for key, default in (("alpha", 8), ("r", 8)))
    if source.older(1, 1) and mode == "add":
        alpha = rank  # scaled so then, whatever alpha said
    if source.get(method, "use_dora", bool, False):
        raise source.refuse("use_dora=True: its DoRA rescales the layer's bias, too, and norms without alpha/r")
    if mode not in ("add", "scale"):
        raise source.refuse(f"composition_mode={mode!r:.40}")
    for path, own in source.take("loras").items():
        site = source.site(path)
        gated = "gate.weight" in own
        source.gate(path, site, own)
        if mode == "scale":
            (scale,) = source.needs(path, own, "lora_B")
            source.keep(site, IA3(), l=scale.flatten() * alpha)
        else:
            a, b = _factors(source, path, own)
            r = len(a)
            source.keep(site, LoRA(r, float(r) if gated else alpha * r / rank), A=a, B=b)
        source.done(path, own)


def _factors(source: Source, path: str, own: dict[str, Tensor]) -> list[Tensor]:
    if "vera_D" not in own:
        return source.needs(path, own, "lora_A", "lora_B")
    d, b = source.needs(path, own, "vera_D", "vera_B")
    left, right = source.needs(path, dict(source.shared), "lora_A", "lora_B")
    return [d @ left, b @ right]
