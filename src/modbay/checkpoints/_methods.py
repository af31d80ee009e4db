"""The methods of `merging`, as a recipe names them, on the tensors of one name."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import merging

PIECE = 1 << 16  # numbers: 256 KiB of float32, of which the processor's cache holds several
RESCALE = {True: "l1", False: None, "l1": "l1", "density": "density"}


@dataclass(frozen=True)
class Values:
    """Parameters for one tensor. each: one mapping a model; whole: for the merge; seed: of what is drawn for it."""

    each: tuple[Mapping[str, Any], ...]
    whole: Mapping[str, Any]
    seed: int = 0

    def of(self, parameter: str) -> list[float]:
        return [float(one[parameter]) for one in self.each]


@dataclass(frozen=True)
class Core:
    """A method that knows its parameters for one tensor, and what it must know of the whole of it.

    run(tensors, base, at) → tensor, of pieces that begin at the place `at` of that tensor.
    kept(i, vector, at) → tensor: what is left of a piece of the i-th task vector before it is weighed; None: all of it.
    """

    run: Callable[[Sequence[Tensor], Tensor | None, int], Tensor]
    kept: Callable[[int, Tensor, int], Tensor] | None = None


@dataclass(frozen=True)
class Method:
    """core(tensors, base, values) → Core, of whole tensors of one name.

    each: what parameters a model has, and their defaults; whole: the merge. vectors: it merges differences from a base,
    which therefore must be given. normalises: the weights' sum must not be 0 then.
    exactly: how many models it takes, the base among them.
    """

    core: Callable[[Sequence[Tensor], Tensor | None, Values], Core]
    each: Mapping[str, Any] = field(default_factory=dict)
    whole: Mapping[str, Any] = field(default_factory=dict)
    vectors: bool = True
    normalises: bool = False
    exactly: int | None = None


def _linear(tensors: Sequence[Tensor], base: Tensor | None, v: Values) -> Core:
    weights, normalise = v.of("weight"), bool(v.whole["normalize"])
    return Core(lambda own, _, at: merging.average_tensor(own, weights, normalise))


def _arithmetic(tensors: Sequence[Tensor], base: Tensor | None, v: Values) -> Core:
    weights, scale, normalise = v.of("weight"), float(v.whole["lambda"]), bool(v.whole["normalize"])
    return Core(lambda own, start, at: merging.task_arithmetic_tensor(own, start, weights, scale, normalise))


def _slerp(tensors: Sequence[Tensor], base: Tensor | None, v: Values) -> Core:
    """The angle is of whole tensors; once it is known, so is each one's weight."""
    weights = merging.shares(*merging.products(*tensors), float(v.whole["t"]))
    return Core(lambda own, _, at: merging.task_arithmetic_tensor(own, None, weights))


def _ties(tensors: Sequence[Tensor], base: Tensor | None, v: Values) -> Core:
    weights, scale, mean = v.of("weight"), float(v.whole["lambda"]), _mean(v)
    parts = lambda t: lambda: (part for part, _ in _vector(t, base))
    pairs = zip(tensors, v.of("density"), strict=True)
    cuts = [merging.cut(parts(t), t.numel(), density) for t, density in pairs]
    return Core(
        lambda own, start, at: merging.ties_tensor(own, start, weights, scale=scale, mean=mean, cuts=cuts, at=at),
        lambda i, vector, at: merging.trimmed(vector, cuts[i], at),
    )


def _dare(elect: str | None) -> Callable[[Sequence[Tensor], Tensor | None, Values], Core]:
    def core(tensors: Sequence[Tensor], base: Tensor | None, v: Values) -> Core:
        weights, scale, mean = v.of("weight"), float(v.whole["lambda"]), _mean(v)
        if elect is None and mean == "weights" and abs(total := sum(weights)) >= 1e-8:
            weights = [w / total for w in weights]
        shares = enumerate(zip(tensors, v.of("density"), strict=True))
        masks, factors = zip(*(_drawn(i, t, base, density, v) for i, (t, density) in shares), strict=True)

        def left(i: int, vector: Tensor, at: int) -> Tensor:
            if masks[i] is None:
                return vector
            return vector * merging.numbers(masks[i][at : at + len(vector)], vector.dtype)

        def kept(i: int, vector: Tensor, at: int) -> Tensor:
            return left(i, vector, at) * factors[i]

        def run(own: Sequence[Tensor], start: Tensor | None, at: int) -> Tensor:
            assert start is not None
            if all(mask is None for mask in masks):
                return merging.dare_tensor(own, start, weights, 1.0, scale, None, elect, mean=mean)
            begin = start.to(torch.promote_types(start.dtype, torch.float32))
            if elect is not None:
                parts = [kept(i, t.to(begin.dtype) - begin, at) for i, t in enumerate(own)]
                return merging.ties_tensor(parts, None, weights, 1.0, scale, elect, mean=mean).add_(begin)
            total = torch.zeros_like(begin)
            for i, t in enumerate(own):  # one in memory at a time
                total.add_(left(i, t.to(begin.dtype) - begin, at), alpha=scale * weights[i] * factors[i])
            return total.add_(begin)

        return Core(run, kept)

    return core


def _drawn(i: int, tensor: Tensor, base: Tensor | None, density: float, v: Values) -> tuple[Tensor | None, float]:
    """(what is kept of the i-th task vector, or None if all is; what it is multiplied by)."""
    if density == 1:
        return None, 1.0
    rescale, mask = RESCALE[v.whole["rescale"]], merging.draw(tensor.numel(), density, v.seed, i)
    if rescale != "l1":
        return mask, 1 / density if rescale == "density" else 1.0
    before = after = 0.0
    for part, at in _vector(tensor, base):
        sizes = part.abs_()
        before += float(sizes.sum())
        after += float(sizes.dot(merging.numbers(mask[at : at + len(part)], sizes.dtype)))
    return mask, float(merging.factor(torch.tensor(before), torch.tensor(after)))


def _mean(v: Values) -> str:
    return "weights" if v.whole["normalize"] else "sum"


def _vector(tensor: Tensor, base: Tensor | None) -> Iterator[tuple[Tensor, int]]:
    """A task vector, in pieces, each with its place."""
    assert base is not None
    kind, at = torch.promote_types(base.dtype, torch.float32), 0
    for piece, start in zip(tensor.view(-1).split(PIECE), base.view(-1).split(PIECE), strict=True):
        yield piece.to(kind) - start.to(kind), at
        at += len(piece)


_SUM = {"normalize": False, "lambda": 1.0, "int8_mask": False}  # int8_mask: mergekit's memory; nothing depends on it
_SPARSE = {"weight": 1.0, "density": 1.0}

METHODS: dict[str, Method] = {
    "linear": Method(_linear, {"weight": 1.0}, {"normalize": True}, vectors=False, normalises=True),
    "task_arithmetic": Method(_arithmetic, {"weight": 1.0}, _SUM, normalises=True),
    "ties": Method(_ties, _SPARSE, _SUM | {"normalize": True}),
    "dare_linear": Method(_dare(None), _SPARSE, _SUM | {"rescale": True}),
    "dare_ties": Method(_dare("mass"), _SPARSE, _SUM | {"rescale": True}),
    "slerp": Method(_slerp, {}, {"t": None}, vectors=False, exactly=2),
}
