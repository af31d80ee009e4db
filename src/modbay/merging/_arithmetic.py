"""Task vectors, what models change of the base that they began from: added, taken away, put in analogy.

Ilharco et al., "Editing Models with Task Arithmetic", 2023 (arXiv 2212.04089).
"""

from collections.abc import Sequence

from torch import Tensor

from ..types import System, systems
from ._models import State, alone, each, weighing, weighted_sum, wide

LAWS = "tests/test_merging.py::test_the_laws_of_merging"
PEFT = "tests/test_merging.py::test_task_arithmetic_is_peft_s_and_mergekit_s"


def vectors(tensors: Sequence[Tensor], base: Tensor | None) -> list[Tensor]:
    """τ_i = θ_i − θ₀, in float32 at least; without a base the tensors themselves, which are task vectors then."""
    if base is None:
        return [t.to(wide(t)) for t in tensors]
    start = base.to(wide(base))
    return [t.to(start.dtype) - start for t in tensors]


def onto(base: Tensor | None, change: Tensor, like: Tensor) -> Tensor:
    """θ₀ + change, or the change alone without a base, rounded to the dtype of `like`. The change is used up."""
    return (change if base is None else change.add_(base)).to(like.dtype)


@systems(
    System((124,), "merging.task_arithmetic(models, base, scale=0.3)", (LAWS, PEFT), "task arithmetic", section="5.1"),
    System(
        (124,),
        "merging.task_arithmetic([toxic], base, weights=[-1.0])",
        ("tests/test_merging.py::test_what_is_negated_and_what_is_in_analogy",),
        "task negation",
        "θ₀ − λ (θ₁ − θ₀)",
        section="5.1",
    ),
)
def task_arithmetic(
    models: Sequence[State],
    base: State | None,
    weights: Sequence[float] | None = None,
    scale: float = 1.0,
    normalise: bool = False,
) -> dict[str, Tensor]:
    """θ₀ + λ Σ_i w_i τ_i, τ_i = θ_i − θ₀, of state dicts; negative weights forget. `scale` is λ.

    weights: one a model, 1 if None. normalise: the weights' sum is made 1. base: None if the models are task vectors
    already, as is the result then. λ is tuned on held-out data, 0 to 1 in steps of 0.05 in the paper.
    mergekit's `task_arithmetic`, which computes in the models' own dtype; on deltas (base=None) peft's.
    Raises MergeError for models that do not fit, and for weights that are not one a model.
    """
    return each(
        "task_arithmetic", models, base, lambda _, ts, b: task_arithmetic_tensor(ts, b, weights, scale, normalise)
    )


def task_arithmetic_tensor(
    tensors: Sequence[Tensor],
    base: Tensor | None,
    weights: Sequence[float] | None = None,
    scale: float = 1.0,
    normalise: bool = False,
) -> Tensor:
    """`task_arithmetic`, of the tensors of one name."""
    given = [scale * w for w in weighing("task_arithmetic", weights, len(tensors), normalise)]
    one = alone(given)
    if one is not None:
        return tensors[one].clone()
    return onto(base, weighted_sum(tensors, given, base), tensors[0])


@systems(
    System(
        (124,),
        "merging.analogy(a, b, c, base)",
        ("tests/test_merging.py::test_what_is_negated_and_what_is_in_analogy",),
        "task analogy",
        section="5.1",
    )
)
def analogy(a: State, b: State, c: State, base: State, scale: float = 1.0) -> dict[str, Tensor]:
    """θ₀ + λ (τ_c + τ_b − τ_a): a is to b as c is to what is sought, a task without data.

    With λ = 1 the base cancels: θ_c + θ_b − θ_a. Raises MergeError for models that do not fit.
    """
    return task_arithmetic([a, b, c], base, [-1.0, 1.0, 1.0], scale)
