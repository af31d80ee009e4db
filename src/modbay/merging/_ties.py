"""TIES: task vectors are trimmed, a sign is elected for each entry, and those that agree with it are averaged.

Yadav, Tam, Choshen, Raffel and Bansal, "TIES-Merging: Resolving Interference When Merging Models", 2023 (arXiv
2306.01708).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..types import System, systems
from ._arithmetic import onto, vectors
from ._models import State, alone, each, fit, one_of, share, weighing, wide

VOTES = ("mass", "count")
MEANS = ("weights", "count", "sum", "max")


@dataclass(frozen=True)
class Cut:
    """Where a task vector is trimmed: what is larger than `size` is kept, and what is as large up to a place.

    last: the place in the flat tensor of the last entry of just that size that is kept; None if all of them are.
    """

    size: float
    last: int | None = None


def cut(parts: Callable[[], Iterable[Tensor]], n: int, density: float) -> Cut | None:
    """Of the int(density · n) largest entries of a vector, which comes in parts, each time it is asked for.

    None if all are kept. Of those that are as large as the smallest that is kept, the first are.
    """
    k = int(density * n)
    if density >= 1 or n == 0:
        return None
    if k == 0:
        return Cut(float("inf"), -1)
    sizes, at = None, 0
    for part in parts():
        sizes = torch.empty(n, dtype=wide(part), device=part.device) if sizes is None else sizes
        torch.abs(part.detach().reshape(-1).to(sizes.dtype), out=sizes[at : at + part.numel()])
        at += part.numel()
    assert sizes is not None
    size, more = _select(sizes, k)
    if more is None:
        return Cut(size)
    at = 0
    for part in parts():  # several are as large: the first `more` of them are kept
        alike = (part.detach().abs() == size).flatten().nonzero().flatten()
        if len(alike) >= more:
            return Cut(size, at + int(alike[more - 1]))
        more, at = more - len(alike), at + part.numel()
    return Cut(size)  # not numbers, which are larger than all


def _select(sizes: Tensor, k: int) -> tuple[float, int | None]:
    """(the k-th largest, how many of its size are among the k largest, or None if all are); sizes are used up."""
    if sizes.device.type == "cpu":
        values = sizes.numpy()
        values.partition(len(values) - k)  # in linear time, where torch sorts
        size = values[len(values) - k]
        alike = bool((values[: len(values) - k] == size).any())
        return float(size), k - int((values[len(values) - k :] > size).sum()) if alike else None
    size = sizes.kthvalue(len(sizes) - k + 1).values
    more = k - int((sizes > size).sum())
    return float(size), more if int((sizes == size).sum()) > more else None


def trimmed(vector: Tensor, where: Cut | None, at: int = 0) -> Tensor:
    """A task vector, or the part of it that begins at the place `at`, with 0 where it is trimmed."""
    if where is None:
        return vector
    end = at + vector.numel()
    if where.last is not None and at <= where.last < end - 1:
        flat, middle = vector.reshape(-1), where.last + 1 - at
        parts = [trimmed(flat[:middle], Cut(where.size)), trimmed(flat[middle:], Cut(where.size, -1))]
        return torch.cat(parts).view_as(vector)
    # It is 0 where |x| ≤ λ, in one pass: with the number below λ, where |x| < λ. What is not a number stays.
    below = torch.tensor(where.size, dtype=vector.dtype)
    if where.last is None or where.last >= end - 1:
        below = torch.nextafter(below, torch.tensor(-1.0, dtype=vector.dtype))
    return torch.nn.functional.hardshrink(vector, float(below))


def trim(vector: Tensor, density: float, threshold: Tensor | float | None = None) -> Tensor:
    """True at the int(density · n) entries that are largest in size, or, with a threshold, at those not below it."""
    if threshold is not None:
        return vector.abs() >= threshold
    return mask(vector, cut(lambda: [vector], vector.numel(), density))


def mask(vector: Tensor, where: Cut | None, at: int = 0) -> Tensor:
    """True where `trimmed` keeps."""
    if where is None:
        return torch.ones_like(vector, dtype=torch.bool)
    sizes = vector.abs()
    if where.last is None:
        return ~(sizes < where.size)
    places = torch.arange(at, at + vector.numel(), device=vector.device).view_as(vector)
    return ~(sizes <= where.size) | ((sizes == where.size) & (places <= where.last))


def votes(deltas: Sequence[Tensor], weights: Sequence[float], elect: str, weighted: bool) -> Tensor:
    """Σ_i v_i ("mass") or Σ_i sign(v_i) ("count"), v_i = w_i τ_i, or τ_i if votes are not weighted."""
    total = torch.zeros_like(deltas[0])
    for delta, w in zip(deltas, weights, strict=True):
        vote = delta * w if weighted and w != 1 else delta
        total.add_(vote if elect == "mass" else vote.sign())
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
    # Signs are numbers, ±1, and not truths, which are slow: what agrees is above 0 when it is multiplied by its sign.
    elected = torch.copysign(torch.ones_like(cast), cast)
    if even != 1:
        elected = torch.where(cast == 0, float(even), elected)
    total, divisor = torch.zeros_like(cast), torch.zeros_like(cast)
    for delta, w in zip(deltas, weights, strict=True):
        agrees = (delta * elected if not weighted or w == 1 else (delta * w).mul_(elected)).clamp_(min=0)
        part = agrees if weighted or w == 1 else agrees * w
        total = torch.where(part.abs() > total.abs(), part, total) if mean == "max" else total.add_(part)
        if mean in ("weights", "count"):
            divisor.add_(agrees.sign_(), alpha=w if mean == "weights" else 1)
    total.mul_(elected)
    if mean in ("sum", "max"):
        return total
    least = min(weights) if mean == "weights" else 1.0
    if least > 0:  # where nothing agrees the total is 0
        return total.div_(divisor.clamp_(min=least))
    return total.div_(torch.where(divisor == 0, 1.0, divisor))


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
    cuts: Sequence[Tensor | Cut | None] | None = None,
    even: int = 1,
    at: int = 0,
) -> Tensor:
    """`ties`, of the tensors of one name. cuts: the `thresholds` of all tensors together, one a model.

    even: the sign where votes are even, 1 or −1. With a `Cut` a model, tensors may be the parts of larger ones that
    begin at the place `at`.
    """
    share("ties", density)
    given = weighing("ties", weights, len(tensors))
    deltas = vectors(tensors, base)
    if cuts is None:
        where = [cut(lambda d=d: [d], d.numel(), density) for d in deltas]
    else:
        where = [one if one is None or isinstance(one, Cut) else Cut(float(one)) for one in cuts]
    one = alone(given)
    if one is not None and scale == 1 and (weighted or len(tensors) == 1):
        kept = mask(deltas[one], where[one], at)
        return torch.where(kept, tensors[one], torch.zeros_like(tensors[one]) if base is None else base)
    small = [trimmed(d, c, at) for d, c in zip(deltas, where, strict=True)]
    mixed = resolve(small, given, elect, weighted, mean, even)
    return onto(base, mixed if scale == 1 else mixed.mul_(scale), tensors[0])


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
