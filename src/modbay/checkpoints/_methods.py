"""The methods of `merging`, as a recipe names them, on the tensors of one name."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .. import merging

RESCALE = {True: "l1", False: None, "l1": "l1", "density": "density"}


@dataclass(frozen=True)
class Values:
    """Parameters for one tensor. each: one mapping a model; whole: for the merge; seed: of what is drawn for it."""

    each: tuple[Mapping[str, Any], ...]
    whole: Mapping[str, Any]
    seed: int = 0

    def of(self, parameter: str) -> list[float]:
        return [float(one[parameter]) for one in self.each]

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


Run = Callable[[Sequence[Tensor], Tensor | None, Values], Tensor]


@dataclass(frozen=True)
class Method:
    """run(tensors, base, values) → tensor. each: what parameters a model has, and their defaults; whole: the merge.

    vectors: it merges differences from a base, which therefore must be given. piecewise: entry by entry, so that a
    large tensor can be merged in pieces; first(tensors, base, values) → values, what must be known of all of it before.
    exactly: how many models it takes, the base among them.
    """

    run: Run
    each: Mapping[str, Any] = field(default_factory=dict)
    whole: Mapping[str, Any] = field(default_factory=dict)
    vectors: bool = True
    piecewise: bool = False
    first: Callable[[Sequence[Tensor], Tensor | None, Values], Values] | None = None
    exactly: int | None = None


def named(seed: int, name: str) -> int:
    """The seed of one tensor's draws, whatever else is merged; `merging.dare`'s."""
    return zlib.crc32(f"{seed} {name}".encode())


def _linear(tensors: Sequence[Tensor], base: Tensor | None, v: Values) -> Tensor:
    return merging.average_tensor(tensors, v.of("weight"), bool(v.whole["normalize"]))


def _arithmetic(tensors: Sequence[Tensor], base: Tensor | None, v: Values) -> Tensor:
    weights, scale, normalise = v.of("weight"), float(v.whole["lambda"]), bool(v.whole["normalize"])
    return merging.task_arithmetic_tensor(tensors, base, weights, scale, normalise)


def _ties(tensors: Sequence[Tensor], base: Tensor | None, v: Values) -> Tensor:
    density, given = v.of("density"), (v.of("weight"),)
    more: dict[str, Any] = {"scale": float(v.whole["lambda"]), "mean": "weights" if v.whole["normalize"] else "sum"}
    if len(set(density)) == 1:
        return merging.ties_tensor(tensors, base, *given, density[0], **more)
    trimmed = [t * merging.trim(t, d) for t, d in zip(_vectors(tensors, base), density, strict=True)]
    return _back(base, merging.ties_tensor(trimmed, None, *given, 1.0, **more))


def _dare(elect: str | None) -> Run:
    def run(tensors: Sequence[Tensor], base: Tensor | None, v: Values) -> Tensor:
        density, rescale, draws = v.of("density"), RESCALE[v.whole["rescale"]], v.generator()
        scale, normalise = float(v.whole["lambda"]), bool(v.whole["normalize"])
        mean = "weights" if normalise else "sum"
        weights = v.of("weight")
        if elect is None and normalise and abs(total := sum(weights)) >= 1e-8:
            weights = [w / total for w in weights]
        if len(set(density)) == 1:
            more = {"elect": elect, "mean": mean, "generator": draws}
            return merging.dare_tensor(tensors, base, weights, density[0], scale, rescale, **more)
        kept = [merging.drop(t, d, rescale, draws) for t, d in zip(_vectors(tensors, base), density, strict=True)]
        if elect is None:
            return _back(base, merging.task_arithmetic_tensor(kept, None, weights, scale))
        return _back(base, merging.ties_tensor(kept, None, weights, 1.0, scale, elect, mean=mean))

    return run


def _vectors(tensors: Sequence[Tensor], base: Tensor | None) -> list[Tensor]:
    assert base is not None
    start = base.to(torch.promote_types(base.dtype, torch.float32))
    return [t.to(start.dtype) - start for t in tensors]


def _back(base: Tensor | None, change: Tensor) -> Tensor:
    assert base is not None
    return change + base.to(change.dtype)


def _arc(tensors: Sequence[Tensor], base: Tensor | None, v: Values) -> Values:
    """The angle is of whole tensors; after it is known, so is each one's weight."""
    a, b = merging.shares(*merging.products(*tensors), float(v.whole["t"]))
    return replace(v, each=({"weight": a}, {"weight": b}))


def _slerp(tensors: Sequence[Tensor], base: Tensor | None, v: Values) -> Tensor:
    return merging.average_tensor(tensors, v.of("weight"), False)


_SUM = {"normalize": False, "lambda": 1.0, "int8_mask": False}  # int8_mask: mergekit's memory; nothing depends on it
_SPARSE = {"weight": 1.0, "density": 1.0}

METHODS: dict[str, Method] = {
    "linear": Method(_linear, {"weight": 1.0}, {"normalize": True}, vectors=False, piecewise=True),
    "task_arithmetic": Method(_arithmetic, {"weight": 1.0}, _SUM, piecewise=True),
    "ties": Method(_ties, _SPARSE, _SUM | {"normalize": True}),
    "dare_linear": Method(_dare(None), _SPARSE, _SUM | {"rescale": True}),
    "dare_ties": Method(_dare("mass"), _SPARSE, _SUM | {"rescale": True}),
    "slerp": Method(_slerp, {}, {"t": None}, vectors=False, piecewise=True, first=_arc, exactly=2),
}
