"""The methods of `merging`, as a recipe names them, on the tensors of one name."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .. import merging

PIECE = 1 << 16  # numbers: 256 KiB of float32, of which the processor's cache holds several
RESCALE = {True: "l1", False: None, "l1": "l1", "density": "density"}


@dataclass(frozen=True)
class Values:
    """Parameters for one tensor. each: one mapping a model; whole: for the merge; seed: of what is drawn for it.

    found: what was found of whole tensors, one thing a model.
    """

    each: tuple[Mapping[str, Any], ...]
    whole: Mapping[str, Any]
    seed: int = 0
    found: tuple[Any, ...] = ()

    def of(self, parameter: str) -> list[float]:
        return [float(one[parameter]) for one in self.each]


Run = Callable[[Sequence[Tensor], Tensor | None, Values, int], Tensor]


@dataclass(frozen=True)
class Method:
    """run(tensors, base, values, at) → tensor, of pieces of tensors that begin at one place, entry by entry.

    each: what parameters a model has, and their defaults; whole: the merge. vectors: it merges differences from a base,
    which therefore must be given. normalises: the weights' sum must not be 0 then. first(tensors, base, values) →
    values: what must be known of whole tensors before a piece of them is merged.
    exactly: how many models it takes, the base among them.
    """

    run: Run
    each: Mapping[str, Any] = field(default_factory=dict)
    whole: Mapping[str, Any] = field(default_factory=dict)
    vectors: bool = True
    normalises: bool = False
    first: Callable[[Sequence[Tensor], Tensor | None, Values], Values] | None = None
    exactly: int | None = None


def _linear(tensors: Sequence[Tensor], base: Tensor | None, v: Values, at: int) -> Tensor:
    return merging.average_tensor(tensors, v.of("weight"), bool(v.whole["normalize"]))


def _arithmetic(tensors: Sequence[Tensor], base: Tensor | None, v: Values, at: int) -> Tensor:
    weights, scale, normalise = v.of("weight"), float(v.whole["lambda"]), bool(v.whole["normalize"])
    return merging.task_arithmetic_tensor(tensors, base, weights, scale, normalise)


def _cuts(tensors: Sequence[Tensor], base: Tensor | None, v: Values) -> Values:
    """Where each task vector is trimmed."""
    parts = lambda t: lambda: (part for part, _ in _vector(t, base))
    pairs = zip(tensors, v.of("density"), strict=True)
    return replace(v, found=tuple(merging.cut(parts(t), t.numel(), density) for t, density in pairs))


def _ties(tensors: Sequence[Tensor], base: Tensor | None, v: Values, at: int) -> Tensor:
    more: dict[str, Any] = {"scale": float(v.whole["lambda"]), "mean": "weights" if v.whole["normalize"] else "sum"}
    return merging.ties_tensor(tensors, base, v.of("weight"), **more, cuts=v.found, at=at)


def _draws(tensors: Sequence[Tensor], base: Tensor | None, v: Values) -> Values:
    """What is kept of each task vector, and what it is multiplied by."""
    rescale, found = RESCALE[v.whole["rescale"]], []
    for i, (t, density) in enumerate(zip(tensors, v.of("density"), strict=True)):
        if density == 1:
            found.append((None, 1.0))
            continue
        mask, factor = merging.draw(t.numel(), density, v.seed, i), 1 / density if rescale == "density" else 1.0
        if rescale == "l1":
            sums = torch.zeros(2, dtype=torch.float64)
            for part, at in _vector(t, base):
                sizes = part.abs_()
                before = sizes.sum()
                sums += torch.stack([before, sizes.mul_(mask[at : at + len(sizes)].to(sizes)).sum()])
            factor = float(merging.factor(*sums))
        found.append((mask, factor))
    return replace(v, found=tuple(found))


def _dare(elect: str | None) -> Run:
    def run(tensors: Sequence[Tensor], base: Tensor | None, v: Values, at: int) -> Tensor:
        scale, weights, normalise = float(v.whole["lambda"]), v.of("weight"), bool(v.whole["normalize"])
        if elect is None and normalise and abs(total := sum(weights)) >= 1e-8:
            weights = [w / total for w in weights]
        if all(mask is None for mask, _ in v.found):
            return merging.dare_tensor(tensors, base, weights, 1.0, scale, None, elect, mean=_mean(normalise))
        assert base is not None
        kept, start = [], base.to(torch.promote_types(base.dtype, torch.float32))
        for t, (mask, factor) in zip(tensors, v.found, strict=True):
            delta = t.to(start.dtype) - start
            if mask is not None:
                delta.mul_(mask[at : at + len(t)].to(delta))
            kept.append(delta.mul_(factor) if factor != 1 else delta)
        if elect is None:
            change = merging.task_arithmetic_tensor(kept, None, weights, scale)
        else:
            change = merging.ties_tensor(kept, None, weights, 1.0, scale, elect, mean=_mean(normalise))
        return change.add_(base)

    return run


def _mean(normalise: bool) -> str:
    return "weights" if normalise else "sum"


def _vector(tensor: Tensor, base: Tensor | None) -> Iterator[tuple[Tensor, int]]:
    """A task vector, in pieces, each with its place."""
    assert base is not None
    kind, at = torch.promote_types(base.dtype, torch.float32), 0
    for piece, start in zip(tensor.view(-1).split(PIECE), base.view(-1).split(PIECE), strict=True):
        yield piece.to(kind) - start.to(kind), at
        at += len(piece)


def _arc(tensors: Sequence[Tensor], base: Tensor | None, v: Values) -> Values:
    """The angle is of whole tensors; after it is known, so is each one's weight."""
    a, b = merging.shares(*merging.products(*tensors), float(v.whole["t"]))
    return replace(v, each=({"weight": a}, {"weight": b}))


def _slerp(tensors: Sequence[Tensor], base: Tensor | None, v: Values, at: int) -> Tensor:
    return merging.task_arithmetic_tensor(tensors, None, v.of("weight"))  # their weighted sum, in one pass for each


_SUM = {"normalize": False, "lambda": 1.0, "int8_mask": False}  # int8_mask: mergekit's memory; nothing depends on it
_SPARSE = {"weight": 1.0, "density": 1.0}

METHODS: dict[str, Method] = {
    "linear": Method(_linear, {"weight": 1.0}, {"normalize": True}, vectors=False, normalises=True),
    "task_arithmetic": Method(_arithmetic, {"weight": 1.0}, _SUM, normalises=True),
    "ties": Method(_ties, _SPARSE, _SUM | {"normalize": True}, first=_cuts),
    "dare_linear": Method(_dare(None), _SPARSE, _SUM | {"rescale": True}, first=_draws),
    "dare_ties": Method(_dare("mass"), _SPARSE, _SUM | {"rescale": True}, first=_draws),
    "slerp": Method(_slerp, {}, {"t": None}, vectors=False, first=_arc, exactly=2),
}
