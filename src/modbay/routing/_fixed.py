"""Fixed routing: one set of weights for all inputs, given or learned (survey sections 3.1 and 4.1)."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..abstract import Context, Router, Routing, Site
from ..errors import CompositionError, listed
from ._columns import regrown, renamed


class Fixed(Router):
    """α = w, or softmax(w): the same modules at the same weights for every input.

        mb.Fixed({"news": 0.7, "law": 0.3})            # modules that are not named take no part
        mb.Fixed([0.5, 0.5])                           # one weight a module, in order
        mb.Fixed([0.0, 0.0], learned=True, softmax=True)

    weights: w by name, or a sequence of one a module. learned: w is a parameter, and is where it starts. softmax: α is
    the softmax of w over the modules that take part. A module that is added later takes no part, or, if w is learned
    for all modules, starts at their mean; one that is removed leaves.
    Raises CompositionError for a name that is no module, or for too few or too many weights.
    """

    reads_x: ClassVar[bool] = False

    def __init__(self, weights: Mapping[str, float] | Sequence[float], learned: bool = False, softmax: bool = False):
        super().__init__()
        self.weights = dict(weights) if isinstance(weights, Mapping) else [float(w) for w in weights]
        self.learned, self.softmax = learned, softmax
        self.chosen: tuple[str, ...] = ()  # the modules that take part
        self.built = False
        self.w: Tensor

    def build(self, names: Sequence[str], site: Site) -> None:
        if not self.built:
            self._start(names, site)
        grows = self.learned and set(self.chosen) == set(self.names)  # it learns a weight for every module
        chosen = tuple(name for name in names if grows or name in self.chosen)
        if self.learned:
            self.w = regrown(self, "w", self.chosen, chosen, torch.zeros(len(chosen), device=site.device))
        else:
            kept = [self.chosen.index(name) for name in chosen]
            self.register_buffer("w", self.w[kept], persistent=False)
        self.names, self.chosen = tuple(names), chosen
        self.weights = dict(zip(chosen, self.w.tolist(), strict=True))  # by name from now on, so that it can be saved
        self.whole = not self.learned and not self.softmax and set(self.weights.values()) == {1.0}  # nothing to weigh
        self.ids = tuple(self.names.index(name) for name in chosen)
        self.register_buffer("index", torch.tensor(self.ids, dtype=torch.long, device=self.w.device), persistent=False)

    def _start(self, names: Sequence[str], site: Site) -> None:
        """The first weights, now that it is known which modules there are."""
        if isinstance(self.weights, dict):
            unknown = [name for name in self.weights if name not in names]
            if unknown:
                raise CompositionError(
                    f"Fixed(weights={self.weights!r}) names {listed(unknown)}; the modules are {listed(names)}."
                )
            chosen = tuple(name for name in names if name in self.weights)
            values = [float(self.weights[name]) for name in chosen]
        else:
            if len(self.weights) != len(names):
                raise CompositionError(
                    f"Fixed(weights={self.weights!r}) has {len(self.weights)} weights for {len(names)} modules, "
                    f"{listed(names)}: give one a module, or a mapping from names to weights."
                )
            pairs = zip(names, self.weights, strict=True)
            here = [(name, w) for name, w in pairs if w or self.learned or self.softmax]  # a plain zero takes no part
            chosen, values = tuple(name for name, _ in here), [w for _, w in here]
        w = torch.tensor(values, dtype=torch.float32, device=site.device)
        self.chosen, self.names, self.built = chosen, tuple(names), True
        if self.learned:
            self.w = nn.Parameter(w)
        else:
            self.register_buffer("w", w, persistent=False)

    def rename(self, old: str, new: str) -> None:
        self.names, self.chosen = renamed(self.names, old, new), renamed(self.chosen, old, new)
        self.weights = dict(zip(self.chosen, self.w.tolist(), strict=True))

    def arguments(self) -> dict[str, Any]:
        """As the router is now: by the names of the modules that take part, which may have changed."""
        start = self.weights if isinstance(self.weights, dict) else {}
        now = self.w.tolist() if self.built and not self.learned else [start.get(name, 0.0) for name in self.chosen]
        weights = dict(zip(self.chosen, now, strict=True)) if self.built else self.weights
        return {"weights": weights, "learned": self.learned, "softmax": self.softmax}

    def forward(self, x: Tensor | None, c: Context) -> Routing:
        if self.whole:
            return Routing(index=self.index, host=(self.ids,))  # type: ignore[arg-type]
        weights = torch.softmax(self.w, 0) if self.softmax else self.w
        return Routing(index=self.index, weights=weights, host=(self.ids,))  # type: ignore[arg-type]
