"""The average of parameters, uniform or weighted.

Uniform soups: Wortsman et al., "Model soups", 2022 (arXiv 2203.05482). Why models that begin alike can be averaged:
Frankle, Dziugaite, Roy and Carbin, "Linear Mode Connectivity and the Lottery Ticket Hypothesis", 2020 (arXiv
1912.05671).
"""

from collections.abc import Sequence

from torch import Tensor

from ..types import System, systems
from ._models import State, each, weighing, weighted_sum

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
    given = weighing("average", weights, len(tensors), normalise or weights is None)
    return weighted_sum(tensors, given).to(tensors[0].dtype)
