"""The methods of `merging` that modules can be merged by, on the tensors of one site."""

import inspect
import math
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .. import merging
from ..errors import MergeError, listed

LINEAR = ("linear", "task_arithmetic")
RUN: dict[str, Callable[..., Tensor]] = {
    "linear": merging.task_arithmetic_tensor,
    "task_arithmetic": merging.task_arithmetic_tensor,
    "ties": merging.ties_tensor,
    "dare": merging.dare_tensor,
    "slerp": merging.slerp_tensor,
}
INNER = ("tensors", "base", "weights", "cuts", "even", "generator")  # what is not the user's to say


def arguments(method: str) -> dict[str, Any]:
    """What may be said of a method, and what holds if it is not."""
    given = inspect.signature(RUN[method]).parameters.values()
    known = {p.name: p.default for p in given if p.name not in INNER}
    return known | ({"seed": 0} if method == "dare" else {}) if method != "linear" else {"normalise": False}


@dataclass(frozen=True)
class Method:
    """A method with its arguments, and one weight a module."""

    name: str
    weights: Mapping[str, float]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def linear(self) -> bool:
        """Whether it is Σ_i w_i Δ_i."""
        return self.name in LINEAR

    @property
    def weighed(self) -> bool:
        """Whether a module without weight counts for nothing."""
        return self.name != "slerp" and bool(self.options.get("weighted", True))

    def at(self, have: Collection[str]) -> "Method":
        """This method at a site that only some of the modules have: the others change nothing there."""
        if self.name == "slerp" and self.options["t"] in (0, 1):
            chosen = list(self.weights)[int(self.options["t"])]
            return Method("linear", {chosen: 1.0} if chosen in have else {})
        return replace(self, weights={n: w for n, w in self.weights.items() if n in have and (w or not self.weighed)})

    def alone(self) -> str | None:
        """The module that the result is, bit for bit, if it is one."""
        live = [name for name, w in self.weights.items() if w]
        if self.name == "slerp" or len(live) != 1 or self.weights[live[0]] != 1:
            return None
        whole = self.options.get("density", 1) == 1 and self.options.get("scale", 1) == 1
        votes = self.name == "ties" or self.options.get("elect") is not None
        counted = not votes or self.options["weighted"] or len(self.weights) == 1
        return live[0] if whole and counted else None

    def merged(
        self, site: str, names: Sequence[str], *several: Sequence[Tensor | None], bases: Sequence[Tensor] | None = None
    ) -> list[Tensor | None]:
        """Each of several lists of tensors, one a module of `names`, merged; of a list without any tensor, None.

        bases: what each list began from; without, the tensors are differences.
        """
        weights, options = [self.weights[name] for name in names], dict(self.options)
        if self.name == "dare":
            seed = zlib.crc32(f"{options.pop('seed')} {site}".encode())
            options["generator"] = torch.Generator().manual_seed(seed)
        out: list[Tensor | None] = []
        for i, tensors in enumerate(several):
            like = next((t for t in tensors if t is not None), None)
            if like is None:
                out.append(None)
                continue
            given, base = [torch.zeros_like(like) if t is None else t for t in tensors], bases[i] if bases else None
            if self.name == "slerp":
                out.append(_slerp(given, base, options))
            else:
                out.append(RUN[self.name](given, base, weights, **options))
        return out

    def arc(self, site: str, several: Sequence[Sequence[Tensor]]) -> tuple[float, ...]:
        """SLERP's weights of two modules, all that each changes of a site being one vector."""
        if len(several) != 2:
            raise MergeError(
                f"slerp at site {site!r}: an arc lies between two modules, and one of them has no part here. Use "
                f"method='linear', for which that is no change."
            )
        found = [merging.products(a, b) for a, b in zip(*several, strict=True)]
        sums = [math.fsum(column) for column in zip(*found, strict=True)]
        return merging.shares(sums[0], sums[1], sums[2], self.options["t"], self.options["threshold"])


def _slerp(tensors: Sequence[Tensor], base: Tensor | None, options: Mapping[str, Any]) -> Tensor:
    if base is None:
        return merging.slerp_tensor(tensors, **options)
    start = base.to(torch.promote_types(base.dtype, torch.float32))
    return (start + merging.slerp_tensor([t.to(start.dtype) - start for t in tensors], **options)).to(tensors[0].dtype)


def method_of(name: str, which: Mapping[str, float] | Sequence[str], given: Mapping[str, Any]) -> Method:
    """The method as asked for; raises MergeError for one that there is not, and arguments or weights that don't fit."""
    merging_of = f"merge(method={name!r})"
    if name not in RUN:
        raise MergeError(f"{merging_of}: there is no such method of modules; there are {listed(RUN)}.")
    known = arguments(name)
    strange = [key for key in given if key not in known]
    if strange:
        raise MergeError(f"{merging_of}: it has no arguments {listed(strange)}; it has {listed(known)}.")
    options = {**known, **given}
    if isinstance(which, str) or not isinstance(which, (Mapping, Sequence)) or not which:
        raise MergeError(f"merge({which!r}): several modules are wanted: a list of names, or {{name: weight}}.")
    names = list(which)
    if len(set(names)) != len(names):
        raise MergeError(f"merge({names!r}): a module is named twice; give it one weight.")
    if name == "slerp" and (len(names) != 2 or isinstance(which, Mapping)):
        raise MergeError(f"{merging_of}: it goes from one module to another: two names in a list, and t=….")
    share = 1 / len(names) if name == "linear" else 1.0
    weights = {one: float(which[one]) if isinstance(which, Mapping) else share for one in names}
    odd = [one for one, w in weights.items() if not math.isfinite(w)]
    if odd or not any(weights.values()):
        raise MergeError(f"merge({weights!r}): weights are finite numbers, and not all 0.")
    return Method(name, *_effective(name, weights, options))


def _effective(
    name: str, weights: dict[str, float], options: dict[str, Any]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Weights and options with what is linear done: `normalise`, and the `scale` of task arithmetic."""
    if name not in LINEAR:
        return weights, options
    total = sum(weights.values())
    if options["normalise"] and abs(total) < 1e-8:
        raise MergeError(f"merge({weights!r}, normalise=True): their sum is 0, so that they can't be normalised.")
    factor = options.get("scale", 1.0) / (total if options["normalise"] else 1.0)
    return {one: w * factor for one, w in weights.items()}, {}
