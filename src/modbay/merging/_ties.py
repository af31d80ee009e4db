"""TIES: task vectors are trimmed, a sign is elected for each entry, and those that agree with it are averaged.

Yadav, Tam, Choshen, Raffel and Bansal, "TIES-Merging: Resolving Interference When Merging Models", 2023 (arXiv
2306.01708).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..types import System, systems
from ._arithmetic import onto, vectors
from ._models import State, alone, each, fit, one_of, share, weighing

VOTES = ("mass", "count")
MEANS = ("weights", "count", "sum", "max")


def trim(vector: Tensor, density: float, threshold: Tensor | float | None = None) -> Tensor:
    """True at the int(density · n) entries that are largest in size, or, with a threshold, at those not below it."""
    if threshold is not None:
        return vector.abs() >= threshold
    if density >= 1:
        return torch.ones_like(vector, dtype=torch.bool)
    top = vector.abs().flatten().topk(int(density * vector.numel())).indices
    return torch.zeros(vector.numel(), dtype=torch.bool, device=vector.device).index_fill(0, top, True).view_as(vector)


def votes(deltas: Sequence[Tensor], weights: Sequence[float], elect: str, weighted: bool) -> Tensor:
    """Σ_i v_i ("mass") or Σ_i sign(v_i) ("count"), v_i = w_i τ_i, or τ_i if votes are not weighted."""
    total = torch.zeros_like(deltas[0])
    for delta, w in zip(deltas, weights, strict=True):
        vote = delta * w if weighted else delta
        total = total + (vote if elect == "mass" else vote.sign())
    return total


def resolve(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    elect: str = "mass",
    weighted: bool = True,
    mean: str = "weights",
    even: int = 1,
) -> Tensor:
    """The signs elected, and what agrees with them put together: TIES' second and third step. Arguments as `ties`'.

    even: the sign where the votes are even.
    """
    one_of("ties", "elect", elect, VOTES)
    one_of("ties", "mean", mean, MEANS)
    cast = votes(deltas, weights, elect, weighted)
    elected = torch.where(cast == 0, float(even), cast.sign())
    total, divisor = torch.zeros_like(cast), torch.zeros_like(cast)
    for delta, w in zip(deltas, weights, strict=True):
        part = delta * w
        agrees = (part if weighted else delta).sign() == elected
        part = part * agrees
        total = torch.where(part.abs() > total.abs(), part, total) if mean == "max" else total + part
        divisor = divisor + (agrees * w if mean == "weights" else agrees)
    if mean in ("sum", "max"):
        return total
    return total / (torch.where(divisor == 0, 1.0, divisor) if mean == "weights" else divisor.clamp(min=1))


@systems(
    System(
        (127,),
        "merging.ties(models, base, density=0.2)",
        (
            "tests/test_merging.py::test_the_laws_of_merging",
            "tests/test_merging.py::test_ties_is_peft_s",
            "tests/test_merging.py::test_ties_is_mergekit_s",
            "tests/test_merging.py::test_ties_is_the_paper_s_code_and_fusion_bench_s",
        ),
        "TIES",
        section="5.1",
    )
)
def ties(
    models: Sequence[State],
    base: State | None,
    weights: Sequence[float] | None = None,
    density: float = 0.2,
    scale: float = 1.0,
    over: str = "tensor",
    elect: str = "mass",
    weighted: bool = True,
    mean: str = "weights",
) -> dict[str, Tensor]:
    """θ₀ + λ Σ_i w_i τ_i m_i / Σ_i w_i m_i, m_i: where τ_i is large and has the sign of Σ_j w_j τ_j; λ is `scale`.

    density: the share of a task vector that is kept, the largest; 0.2 in the paper. base: None if the models are task
    vectors already, as is the result then. Libraries differ in four things, each an argument:

    over: "tensor" keeps so many of each tensor, "all" of all tensors together.
    elect: "mass", the sign of the sum, or "count", that of most. weighted: whether votes are w_i τ_i, or τ_i.
    mean: what agrees is summed and divided by its "weights", or its "count", or not ("sum"); or is the largest ("max").

    | as in | arguments |
    | --- | --- |
    | mergekit `ties` | the defaults; consensus "count": elect="count"; normalize=False: mean="sum" |
    | peft `ties` | base=None, weighted=False, mean="count"; "frequency": elect="count" |
    | the paper's code, dis-mean | over="all", mean="count" |
    | fusion_bench | over="all", mean="sum", scale=0.3 |

    mergekit and peft compute in the tensors' own dtype, here it is float32 at least. With over="all", as in the paper's
    code, what is as large as the last that is kept stays, too, and even votes go to the sign that most entries have;
    else to plus. A tensor so small that no entry of it is kept stays as the base has it; mergekit raises then.
    Raises MergeError for models that do not fit, weights that are not one a model, or an argument that there is not.
    """
    one_of("ties", "over", over, ("tensor", "all"))
    given, cuts, even = weighing("ties", weights, len(models)), None, 1
    if over == "all":
        cuts = thresholds(models, base, density)
        even = majority(models, base, given, cuts, elect, weighted)
    return each(
        "ties",
        models,
        base,
        lambda _, ts, b: ties_tensor(ts, b, given, density, scale, elect, weighted, mean, cuts, even),
    )


def ties_tensor(
    tensors: Sequence[Tensor],
    base: Tensor | None,
    weights: Sequence[float] | None = None,
    density: float = 0.2,
    scale: float = 1.0,
    elect: str = "mass",
    weighted: bool = True,
    mean: str = "weights",
    cuts: Sequence[Tensor] | None = None,
    even: int = 1,
) -> Tensor:
    """`ties`, of the tensors of one name. cuts: the `thresholds` of all tensors together, one a model.

    even: the sign where votes are even, 1 or −1.
    """
    share("ties", density)
    given = weighing("ties", weights, len(tensors))
    deltas = vectors(tensors, base)
    kept = [trim(d, density, None if cuts is None else cuts[i]) for i, d in enumerate(deltas)]
    one = alone(given)
    if one is not None and scale == 1 and (weighted or len(tensors) == 1):
        return torch.where(kept[one], tensors[one], torch.zeros_like(tensors[one]) if base is None else base)
    trimmed = [d * k for d, k in zip(deltas, kept, strict=True)]
    return onto(base, scale * resolve(trimmed, given, elect, weighted, mean, even), tensors[0])


def thresholds(models: Sequence[State], base: State | None, density: float) -> list[Tensor]:
    """The size from which a task vector's entries are kept, of all tensors together: one a model.

    The paper's code takes the k-th smallest, k = n − int(density · n), and keeps it: one entry more than the share.
    """
    share("ties", density)
    fit("ties", models, base)
    found = []
    for model in models:
        sizes = torch.cat([vectors([t], b)[0].abs().flatten() for t, b in _floating(model, base)])
        k = len(sizes) - int(density * len(sizes))
        found.append(sizes.kthvalue(k).values if k else sizes.new_zeros(()))
    return found


def majority(
    models: Sequence[State],
    base: State | None,
    weights: Sequence[float],
    cuts: Sequence[Tensor],
    elect: str,
    weighted: bool,
) -> int:
    """The sign, 1 or −1, that most entries of all tensors together elect: where votes are even, they go to it."""
    one_of("ties", "elect", elect, VOTES)
    total = 0.0
    for name, first in models[0].items():
        if first.is_floating_point():
            deltas = vectors([model[name] for model in models], None if base is None else base[name])
            trimmed = [d * trim(d, 1.0, cut) for d, cut in zip(deltas, cuts, strict=True)]
            total += float(votes(trimmed, weights, elect, weighted).sign().sum(dtype=torch.float64))
    return 1 if total > 0 else -1


def _floating(model: State, base: State | None) -> list[tuple[Tensor, Tensor | None]]:
    return [(t, None if base is None else base[name]) for name, t in model.items() if t.is_floating_point()]
