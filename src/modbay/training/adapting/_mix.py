"""The mathematics of adapting: weights over modules, their weighted parameters, folds, and a choice.

Sigmoid gates: Ponti et al., "Combining Modular Skills in Multitask Learning" (Polytropon), 2022 (arXiv 2202.13914).
One standard error: Breiman, Friedman, Olshen and Stone, "Classification and Regression Trees", 1984, section 3.4.3.
"""

from collections.abc import Hashable, Mapping, Sequence
from random import Random
from statistics import fmean, stdev

import torch
from torch import Tensor

from ...errors import CompositionError
from ...metrics import Record

Tensors = Mapping[str, Tensor]
"""A module's parameters at all its sites, by name."""


def sigmoid_weights(z: Tensor) -> Tensor:
    """α_i = σ(z_i) / Σ_j σ(z_j): Polytropon's, without its Gumbel noise. z, α: (n,)."""
    gates = torch.sigmoid(z)
    return gates / gates.sum()


def softmax_weights(z: Tensor) -> Tensor:
    """α_i = exp z_i / Σ_j exp z_j. z, α: (n,)."""
    return torch.softmax(z, 0)


def stacked(modules: Mapping[str, Tensors]) -> dict[str, Tensor]:
    """{parameter: (n, …)} of modules of one kind, in order."""
    several = list(modules.values())
    return {name: torch.stack([one[name] for one in several]) for name in several[0]}


def mixed(stack: Tensors, weights: Tensor) -> dict[str, Tensor]:
    """φ = Σ_i α_i φ_i, as `mb.ParameterAverage` has it: of LoRA, A and B each. stack: {parameter: (n, …)}; α: (n,)."""
    return {
        name: (weights.to(several.dtype) @ several.flatten(1)).view(several.shape[1:])
        for name, several in stack.items()
    }


def folds(strata: Sequence[Hashable], units: Sequence[Hashable], k: int, seed: int) -> list[int]:
    """The fold, 0 to k − 1, in which each row is held out; −1 where it is in training always.

    strata: of each row, what every fold has its share of. units: rows of one unit are held out together. A stratum with
    one unit alone stays in training: it could not be told by who never saw it. Without two units nothing is held out.
    """
    members: dict[Hashable, dict[Hashable, list[int]]] = {}
    seen: dict[Hashable, Hashable] = {}
    for i, unit in enumerate(units):
        stratum = seen.setdefault(unit, strata[i])
        members.setdefault(stratum, {}).setdefault(unit, []).append(i)
    out, rng, turn = [-1] * len(units), Random(f"folds-{seed}"), 0
    k = min(k, max((len(several) for several in members.values()), default=0))
    for stratum in sorted(members, key=repr):
        several = list(members[stratum].values())
        if len(several) < 2:
            continue
        for rows in rng.sample(several, len(several)):
            for i in rows:
                out[i] = turn % k
            turn += 1
    return out


def mean_and_error(scores: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error."""
    return fmean(scores), stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else 0.0


def choose(scores: Mapping[str, tuple[float, float]], costs: Mapping[str, int]) -> tuple[str, str]:
    """(the cheapest way whose score is within one standard error of the best way's, the best way).

    scores: {way: (mean, standard error)}; costs: parameters trained. Of equals the better goes first, then the one that
    is named first.
    """
    best = max(scores, key=lambda way: (scores[way][0], -costs[way]))
    floor = scores[best][0] - scores[best][1]
    near = [way for way in scores if scores[way][0] >= floor]
    return min(near, key=lambda way: (costs[way], -scores[way][0])), best


def alike(modules: Mapping[str, Tensors]) -> None:
    """Raise CompositionError for modules whose parameters differ in name or shape."""
    shapes = {name: {key: tuple(tensor.shape) for key, tensor in one.items()} for name, one in modules.items()}
    first = next(iter(shapes))
    for name, said in shapes.items():
        if said != shapes[first]:
            raise CompositionError(
                f"modules {first!r} and {name!r} have parameters of different names or shapes: they have no average."
            )


def row_score(record: Record, kind: str, spread: float) -> float:
    """How well one row was told, larger being better: right or wrong; the share of right tags; 1 − |error| / spread; −
    the loss a piece.
    """
    said, true = record.prediction, record.target
    if kind == "classification":
        return float(said == true)
    if kind == "tagging":
        return fmean(one == other for one, other in zip(said, true, strict=True))  # type: ignore[arg-type]
    if kind == "regression":
        return 1 - abs(float(said) - float(true)) / spread  # type: ignore[arg-type]
    return -(record.nll or 0.0) / max(1, record.tokens)
