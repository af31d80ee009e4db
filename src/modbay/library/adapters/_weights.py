"""adapters' changes of weights: LoRA, VeRA, (IA)³."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...core import describe
from ...errors import FileError, listed
from ...modules import IA3, LoRA
from ._names import kind
from ._places import FUSED
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
    for site, (path, own) in _loras(source, method, mode).items():
        gated = "gate.weight" in own
        if gated and mode == "scale":
            raise source.refuse("use_gating=True with composition_mode='scale': its gate scales the output itself")
        source.gate(path, site, own)
        if mode == "scale":
            (scale,) = source.needs(path, own, "lora_B")
            source.keep(site, IA3(), l=scale.flatten() * alpha)
        else:
            a, b = _factors(source, path, own)
            r = len(a)
            source.keep(site, LoRA(r, float(r) if gated else alpha * r / rank), A=a, B=b)
        source.done(path, own)


def _loras(source: Source, method: Mapping[str, Any], mode: str) -> dict[str, tuple[str, dict[str, Tensor]]]:
    """(path, tensors) by site: where one weight is query, key and value in one (GPT-2), by the parts of its output."""
    out: dict[str, tuple[str, dict[str, Tensor]]] = {}
    for path, own in source.take("loras").items():
        site = source.site(path)
        if kind(source.model) == "deberta" and site.endswith(".in_proj"):
            raise source.refuse(
                "it changes parts of a query, key and value that lie head by head in one, as adapters counts them"
            )
        if not (kind(source.model) == "gpt2" and site.endswith(f".{FUSED}")):
            out[site] = (path, own)
            continue
        width = describe(site, source.modules[site]).features("outputs") // 3
        said = source.get(method, "attn_matrices", list, ["q", "v"])
        parts = [f"{site}[{i * width}:{(i + 1) * width}]" for i, one in enumerate("qkv") if one in said]
        if mode == "scale" and len(parts) < 3 and source.get(method, "alpha", (int, float), 8) != 1:
            raise source.refuse("an alpha, not 1, by which adapters scales the rest of query, key and value, too")
        if not parts or any(len(tensor) % len(parts) for tensor in own.values()) or "vera_D" in own:
            raise FileError(f"{source.file}: {path!r} is no LoRA of {len(parts)} parts of equal size, {listed(said)}.")
        for i, part in enumerate(parts):
            out[part] = (path, {key: tensor.chunk(len(parts))[i] for key, tensor in own.items()})
    return out


def _factors(source: Source, path: str, own: dict[str, Tensor]) -> list[Tensor]:
    if "vera_D" not in own:
        return source.needs(path, own, "lora_A", "lora_B")
    d, b = source.needs(path, own, "vera_D", "vera_B")
    left, right = source.needs(path, dict(source.shared), "lora_A", "lora_B")
    return [d @ left, b @ right]
