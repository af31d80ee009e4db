"""What prompts read from a model: its token embeddings, and how its patches are drawn."""

import math

import torch
from torch import Tensor, nn

from ..abstract import Site
from ..core import base_type


def embedding(site: Site) -> tuple[nn.Module | None, int]:
    """(the module that embeds the tokens of the model here, or None if it is no such model; how wide a prompt is)."""
    try:
        found = site.module.get_input_embeddings()  # type: ignore[union-attr, operator]
    except (AttributeError, NotImplementedError):
        found = None
    weight = getattr(found, "weight", None)
    if isinstance(weight, Tensor) and weight.ndim == 2:
        return found, weight.shape[1]
    return None, site.features("outputs")


def xavier(module: nn.Module | None, width: int) -> float:
    """√(6 / (k + d)), with k the inputs of the module's convolution, 3 p² of a patch's, or d where there is none."""
    convolution = (m for m in ([] if module is None else module.modules()) if isinstance(m, nn.Conv2d))
    inputs = next((m.weight[0].numel() for m in convolution), width)
    return math.sqrt(6 / (inputs + width))


def embedded(table: nn.Module, ids: int | tuple[int, ...]) -> Tensor:
    """The embeddings of some ids (k, d), as the model has them: scaled, if it scales them."""
    ids = (ids,) if isinstance(ids, int) else ids
    where: Tensor = table.weight  # type: ignore[assignment]
    return base_type(table).forward(table, torch.tensor(ids, device=where.device)).detach()
