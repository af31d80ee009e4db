"""Hypernetworks: a module's parameters generated from the embedding of a label.

Platanios, Sachan, Neubig and Mitchell, "Contextual Parameter Generation", 2018 (arXiv 1808.08493); Üstün, Bisazza,
Bouma and van Noord, "UDapter", 2020 (arXiv 2004.14327); Mahabadi, Ruder, Dehghani and Henderson, "HyperFormer", 2021
(arXiv 2106.04489); the factor 1/√d: Baziotis, Artetxe, Cross and Bhosale, "Hyper-adapters", 2022 (arXiv 2205.10835).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..abstract import Context, Generator, Kind, Site
from ..errors import CompositionError, LabelError, listed
from ..types import Params
from ._common import positive

STARTS, WEIGHTS = "start/", "weight/"


class Starts(tuple):
    """The names of what the inner kind drew: whatever begins with "start/"."""

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name.startswith(STARTS)


@dataclass(frozen=True)
class Hyper(Generator):
    """φ = φ₀ + W h / √d, with h = [e_label ; e_site], or with `hidden` h = relu(V [e_label ; e_site] + v); d = |h|.

        mb.Hyper(mb.Bottleneck(48), "language", ("en", "de", "sw"), size=32)

    kind: the inner kind, which φ parametrises. label: the keyword of a call that chooses e_label (size,) of `labels`;
    an index tensor points into them; None or −1: φ₀, for a kind that is neutral. e_site (size,): one a site. W, V, v
    and e_label are shared by all sites (W by those where φ has the same shapes). φ₀ is what the inner kind drew, fixed,
    and W starts at zero: a new module is the inner kind's new module. Differs: HyperFormer and UDapter draw W, not φ₀.
    Raises CompositionError for labels that are none or not distinct; LabelError for an unknown label, or none at all.
    """

    tokenwise: ClassVar[bool] = False
    kind: Kind
    label: str
    labels: tuple[str, ...] | list[str]
    size: int = 32
    hidden: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "labels", tuple(self.labels))  # from JSON, or a user's list
        positive("Hyper", size=self.size, hidden=self.hidden)
        if not self.labels or len(set(self.labels)) < len(self.labels):
            raise CompositionError(f"Hyper(labels={self.labels!r}): one distinct name or more.")
        if isinstance(self.kind, Generator) or not isinstance(self.kind, Kind):
            raise CompositionError(f"Hyper(kind={self.kind!r}): a kind, as mb.LoRA(8), that is no generator.")

    @property
    def neutral(self) -> bool:  # type: ignore[override]
        return self.kind.neutral

    @property
    def enters(self) -> bool:  # type: ignore[override]
        return self.kind.enters

    @property
    def keywords(self) -> tuple[str, ...]:
        """The labels of a call that it reads."""
        return (self.label,)

    @property
    def constants(self) -> tuple[str, ...]:  # type: ignore[override]
        return Starts()

    def init(self, sites: Sequence[Site]) -> dict[str, dict[str, Tensor]]:
        first, inner = sites[0], self.kind.init(sites)
        width = self.hidden or 2 * self.size
        shared = {"labels": nn.init.normal_(first.empty(len(self.labels), self.size))}
        if self.hidden:
            shared["project"] = nn.init.kaiming_uniform_(first.empty(self.hidden, 2 * self.size), a=math.sqrt(5))
            shared["project_bias"] = first.zeros(self.hidden)
        weights: dict[tuple, Tensor] = {}
        made: dict[str, dict[str, Tensor]] = {}
        for site in sites:
            made[site.name] = own = {**shared, "site": nn.init.normal_(site.empty(self.size))}
            shapes = tuple(sorted((name, tuple(t.shape)) for name, t in inner[site.name].items()))
            for name, start in inner[site.name].items():
                own[STARTS + name] = start
                if start.is_floating_point() and name not in self.kind.constants:
                    key = (shapes, name)
                    if key not in weights:
                        weights[key] = start.new_zeros(*start.shape, width)
                    own[WEIGHTS + name] = weights[key]
        return made

    def generate(self, params: Params, x: Tensor, c: Context) -> Params:
        ids = self._ids(c, x.device)
        known = ids >= 0
        code = torch.cat([params["labels"][ids.clamp(min=0)], params["site"].expand(len(ids), -1)], -1)
        if self.hidden:
            code = torch.relu(nn.functional.linear(code, params["project"], params["project_bias"]))
        code = code * known.unsqueeze(-1) / math.sqrt(code.shape[-1])  # (b or 1, d)
        starts = {name.removeprefix(STARTS): t for name, t in params.items() if name.startswith(STARTS)}
        made = {name: start.expand(len(x), *start.shape) for name, start in starts.items()}
        for name, start in starts.items():
            if WEIGHTS + name in params:
                weight = params[WEIGHTS + name].flatten(0, -2)
                made[name] = made[name] + (code @ weight.mT).view(-1, *start.shape)
        return made

    def _ids(self, c: Context, device: torch.device) -> Tensor:
        """(b,), or (1,) where one label holds for all: indices into `labels`, −1 for none."""
        given = c.label(self.label)
        if isinstance(given, Tensor):
            return given.to(device).reshape(-1)
        names = [given] if isinstance(given, str) else list(given)
        unknown = [name for name in names if name is not None and name not in self.labels]
        if unknown:
            raise LabelError(f"{self.label}={unknown[0]!r}: Hyper has no such label; it has {listed(self.labels)}.")
        if None in names and not self.neutral:
            raise LabelError(
                f"{self.label}=[…, None, …]: {self.kind!r} starts with a change of its own, so that there is no "
                f"generated module without any. Route those examples to no module instead."
            )
        return torch.tensor([-1 if name is None else self.labels.index(name) for name in names], device=device)
