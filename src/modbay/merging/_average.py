"""The average of parameters, uniform or weighted.

Uniform soups: Wortsman et al., "Model soups", 2022 (arXiv 2203.05482). Why models that begin alike can be averaged:
Frankle, Dziugaite, Roy and Carbin, "Linear Mode Connectivity and the Lottery Ticket Hypothesis", 2020 (arXiv
1912.05671).
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..types import System, systems
from ._models import State, each, weighing, wide

LAWS = "tests/test_merging.py::test_the_laws_of_merging"
LINEAR = "tests/test_merging.py::test_an_average_is_mergekit_s_linear"


@systems(
    System((116,), "merging.average(models, weights)", (LAWS, LINEAR), "weighted averaging", section="5.1"),
    System(
        (123,),
        "merging.average(models)",
        (LAWS,),
        "uniform soup",
        "1/n Σ_i θ_i",
        "Wortsman et al., 2022 (arXiv 2203.05482)",
        "5.1",
    ),
)
def average(
    models: Sequence[State], weights: Sequence[float] | None = None, normalise: bool = True
) -> dict[str, Tensor]:
    """Σ_i w_i θ_i / Σ_i w_i, of state dicts; without `normalise` Σ_i w_i θ_i. Without weights their mean.

    mergekit's `linear`, which computes in the models' own dtype, bfloat16 say, where this is float32 and rounds once.
    Raises MergeError for models that do not fit, and for weights that are not one a model, or whose sum is 0.
    """
    return each("average", models, None, lambda name, tensors, _: average_tensor(tensors, weights, normalise))


def average_tensor(tensors: Sequence[Tensor], weights: Sequence[float] | None = None, normalise: bool = True) -> Tensor:
    """`average`, of the tensors of one name."""
    weighing("average", weights, len(tensors), normalise or weights is None)
    given = weighing("average", weights, len(tensors))
    total = _sum(tensors, given)
    if (normalise or weights is None) and (below := _added(tuple(given), total.dtype)) != 1:
        if (
            abs(math.frexp(below)[0]) == 0.5
        ):  # of a power of two the inverse is exact, and multiplying takes half as long
            total.mul_(1 / below)
        else:
            total.div_(below)
    return total.to(tensors[0].dtype)


@lru_cache(maxsize=64)
def _added(weights: tuple[float, ...], dtype: torch.dtype) -> float:
    """Σ_i w_i, rounded as the tensors are; a checkpoint asks a thousand times."""
    return float(torch.tensor(weights, dtype=dtype).sum())


def _sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ_i w_i θ_i, each product rounded before it is added, as mergekit has it: `weighted_sum` rounds once for both."""
    live = [(t.to(wide(t)), w) for t, w in zip(tensors, weights, strict=True) if w]
    if not live:
        return torch.zeros_like(tensors[0], dtype=wide(tensors[0]))
    (first, w), *others = live
    if w == 1 and others:  # most often all are 1, and nothing need be multiplied
        (second, v), *others = others
        total = first + (second if v == 1 else second * v)
    else:
        total = first * w
    for tensor, weight in others:
        total += tensor if weight == 1 else tensor * weight
    return total
