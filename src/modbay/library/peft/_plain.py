"""Plain LoRA, as engines that serve it load it (vLLM, LoRAX, SGLang): two matrices a layer, one rank for all and a
factor of one, no biases, patterns or heads inside. What is no such update becomes the nearest one."""

import logging
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ...core import Part
from ...errors import CompositionError
from ...merge import Plain, as_lora
from ...modules import Full, Head, LoRA
from ...seams import Fitting
from .._files import write_tensors
from ._draft import Draft
from ._write import write

LOG = logging.getLogger("modbay")
HEADS = "heads.safetensors"


def write_plain(folder: Path, fitting: Fitting, name: str, rank: int | None, error: float) -> dict[str, float]:
    """Write FOLDER, and return the relative error of each site's update: 0 where it is exact.

    A task's head is no update of a weight that an engine would load: it goes to heads.safetensors, beside it.
    Raises CompositionError for what is no change of a weight, an offset of a bias, or an error that is too large.
    """
    made, heads = plain_parts(fitting, name, rank, error, "lora")
    dtype = {site: fitting.places[site].site.dtype for site in made}
    params = {site: {"A": one.a.to(dtype[site]), "B": one.b.to(dtype[site])} for site, one in made.items()}
    kind = LoRA(next(iter(made.values())).b.shape[-1])
    write(folder, Draft(name, fitting.model, fitting.places, dict.fromkeys(made, kind), params, served=True))
    if heads:
        write_tensors(folder / HEADS, heads)
        LOG.warning("%s: engines load no heads with a LoRA; %s has those of %s.", folder, HEADS, ", ".join(heads))
    return {site: one.error for site, one in made.items()}


def plain_parts(
    fitting: Fitting, name: str, rank: int | None, error: float, format: str
) -> tuple[dict[str, Plain], dict[str, Tensor]]:
    """(a low-rank update at each site, all of one rank; the tensors of heads)."""
    made: dict[str, Plain] = {}
    heads: dict[str, Tensor] = {}
    for site, modular in fitting.modulars.items():
        part: Part | None = modular.order[fitting.state.inventory.names.index(name)]
        if part is None:
            continue
        if isinstance(part.kind, Head) or (isinstance(part.kind, Full) and _is_head(fitting.model, site)):
            heads |= {f"{site}.{key.replace('/', '.')}": t.detach() for key, t in part.tensors().items()}
            continue
        made[site] = _one(fitting, site, part, rank, error, format)
    if not made:
        raise CompositionError(f"export of module {name!r} as {format}: it changes no weight.")
    r = max(one.b.shape[-1] for one in made.values())
    for site, one in made.items():
        a, b = _padded(one.a, r, one.b.ndim - 2), _padded(one.b, r, one.b.ndim - 1)
        made[site] = replace(one, a=a, b=b)
    return made, heads


def _one(fitting: Fitting, site: str, part: Part, rank: int | None, error: float, format: str) -> Plain:
    place = fitting.places[site]
    if place.site.form not in ("linear", "transposed", "embedding", "convolution", "experts"):
        raise CompositionError(
            f"export as {format} at site {site!r} ({type(place.target).__name__}): there is no weight there that a "
            f"LoRA could change. Serve it with modbay."
        )
    one = as_lora(place, part, rank, error)
    if one.bias is not None and bool(one.bias.any()):
        raise CompositionError(
            f"export as {format} at site {site!r}: {type(part.kind).__name__} moves the bias, which plain LoRA can't. "
            f"format='peft' keeps it; or fold it into the base."
        )
    return one


def _padded(tensor: Tensor, rank: int, axis: int) -> Tensor:
    """Zeros up to a rank, which is one for all layers."""
    shape = list(tensor.shape)
    shape[axis] = rank - shape[axis]
    return torch.cat([tensor, tensor.new_zeros(shape)], axis) if shape[axis] else tensor


def _is_head(model: nn.Module, site: str) -> bool:
    """Whether a copied layer stands above the trunk."""
    prefix = getattr(model, "base_model_prefix", "") or ""
    return bool(prefix) and hasattr(model, prefix) and not site.startswith(f"{prefix}.")
