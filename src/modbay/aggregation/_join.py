"""Outputs side by side, and a linear map of them: the modules' features stay apart from the base's.

Wang, Tang, Duan, Wei, Huang, Ji, Cao, Jiang and Zhou, "K-Adapter: Infusing Knowledge into Pre-Trained Models with
Adapters", 2021 (arXiv 2002.01808).
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..abstract import Aggregator, Context, Kind, Routing, Site
from ..errors import CompositionError, listed
from ..types import System

TESTS = "tests/test_outputs.py::"


class Join(Aggregator):
    """y = W [f(x); α_1 z_1; …; α_n z_n] + b: outputs side by side, z_i what module i adds to f(x), or gives instead.

        mb.attach(model, "*.encoder", {"facts": mb.Bottleneck(64), "syntax": mb.Bottleneck(64)}, mb.Uniform(),
                  mb.Join(["facts", "syntax"]))

    names: the modules, in the order of W's blocks, (d, d (n + 1)); one that is not routed to, or has left the bay,
    gives zeros. start: "drawn", as nn.Linear draws, the paper's; or "identity", y = f(x) at first.
    One set of parameters an object: pass a callable for a set at each site. Differs: the code joins each adapter to
    f(x) by a map of its own, and the results by another, which is one linear map in all.
    Raises CompositionError for an active module without a name here, or an output of another width.
    """

    systems = (
        System(
            (136,), 'mb.Join(["facts", "syntax"])',
            (TESTS + "test_joined_outputs_go_through_a_linear_map",
             TESTS + "test_a_join_starts_as_f_and_keeps_its_blocks"),
            "K-Adapter's concatenation",
        ),
    )  # fmt: skip

    def __init__(self, names: Sequence[str], start: Literal["drawn", "identity"] = "drawn"):
        super().__init__()
        if isinstance(names, str) or not names or len(set(names)) < len(names):
            raise CompositionError(f"Join(names={names!r}): different names of modules, one at least.")
        if start not in ("drawn", "identity"):
            raise CompositionError(f'Join(start={start!r}): it is "drawn" or "identity".')
        self.names, self.start = list(names), start
        self.map: nn.Linear | None = None

    def build(self, site: Site) -> None:
        d = site.features("outputs")
        if self.map is not None:
            if d != self.map.out_features:
                raise CompositionError(
                    f"Join maps to {self.map.out_features} features, but site {site.name!r} has {d}: one object is one "
                    f"set of parameters. Pass a callable, aggregator=lambda: mb.Join(…), for a set at each site."
                )
            return
        self.map = nn.Linear(d * (len(self.names) + 1), d, device=site.device, dtype=site.dtype)
        if self.start == "identity":
            with torch.no_grad():
                self.map.weight.copy_(torch.eye(*self.map.weight.shape))
                self.map.bias.zero_()

    def admit(self, kind: Kind, site: Site) -> None:
        if kind.place:
            raise CompositionError(f"Join at site {site.name!r}: {type(kind).__name__} has no output of its own.")

    def forward(self, f: Callable | None, x: Tensor, modules: Any, routing: Routing, c: Context) -> Tensor:
        ids = modules.active(routing)
        strange = [modules.names[i] for i in ids if modules.names[i] not in self.names]
        if strange:
            raise CompositionError(
                f"Join(names={self.names}) at site {modules.site.name!r}: {listed(strange)}, which may be active, have "
                f"no block of W. Make it with their names, and route to the others meanwhile."
            )
        y = f(x) if f is not None else torch.zeros_like(x)
        alpha = routing.dense(len(modules)).to(y.device)
        blocks = [y, *[torch.zeros_like(y)] * len(self.names)]
        for i in ids:
            kind = modules.parts[i].kind
            z = modules.output(i, f, x, c, y) - y if kind.enters else modules.one(i, f, x, y, c)
            if z.shape != y.shape:
                raise CompositionError(
                    f"Join at site {modules.site.name!r}: module {modules.names[i]!r} gives {tuple(z.shape)} beside "
                    f"f(x) {tuple(y.shape)}, and W is for outputs of one shape."
                )
            w = alpha[..., i].to(z.dtype)
            blocks[1 + self.names.index(modules.names[i])] = w.view(*w.shape, *[1] * (z.ndim - w.ndim)) * z
        assert self.map is not None
        axis = modules.site.axis
        joined = torch.cat([block.movedim(axis, -1) for block in blocks], -1).to(self.map.weight.dtype)
        return self.map(joined).to(y.dtype).movedim(-1, axis)
