"""AdapterFusion: each position attends over what the modules say.

Pfeiffer, Kamath, Rücklé, Cho and Gurevych, "AdapterFusion: Non-Destructive Task Composition for Transfer Learning",
2021 (arXiv 2005.00247); details as in the authors' code (adapter-hub: BertFusion).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..abstract import Aggregator, Context, Kind, Routing, Site
from ..errors import CompositionError
from ..types import System


class AdapterFusion(Aggregator):
    """o = y + Σ_i s_i V Δ_i, with s = softmax_i((Q y) · (K Δ_i)), y = f(x), and Δ_i what module i adds to y.

    Q and K (d, d) have a bias and start at N(0, 0.02²); V has none and starts as the identity, 1e-6 off its diagonal.
    dropout: on the scores. regularise: the coefficient of ||I − V||², added in training. Only modules with α_i ≠ 0 are
    attended; beyond that weights do not matter, and a row without any module is y. For every kind with an output.
    One set of parameters an object: pass aggregator=mb.AdapterFusion (the class) for a set at each site, as in the
    paper. Raises CompositionError for an input composition, or for a site of another width. The code's annealed
    temperature, off by default there, is left out.
    """

    systems = (
        System(
            (135,), "mb.AdapterFusion()",
            ("tests/test_aggregators.py::test_fusion_attends_over_what_modules_add",
             "tests/test_aggregators.py::test_fusion_keeps_its_parameters_and_adds_its_loss"),
        ),
    )  # fmt: skip

    def __init__(self, dropout: float = 0.0, regularise: float = 0.01):
        super().__init__()
        self.dropout, self.regularise = dropout, regularise
        self.width: int | None = None

    def build(self, site: Site) -> None:
        d = site.features("outputs")
        if self.width is not None:
            if d != self.width:
                raise CompositionError(
                    f"AdapterFusion attends over {self.width} features, but site {site.name!r} has {d}: one object is "
                    f"one set of parameters. Pass aggregator=mb.AdapterFusion, the class, for a set at each site."
                )
            return
        self.width, self.axis = d, site.axis
        place = {"device": site.device, "dtype": site.dtype}
        self.query, self.key = nn.Linear(d, d, **place), nn.Linear(d, d, **place)
        self.value = nn.Linear(d, d, bias=False, **place)
        with torch.no_grad():
            for layer in (self.query, self.key):
                layer.weight.normal_(0, 0.02)
                layer.bias.zero_()
            self.value.weight.fill_(1e-6).fill_diagonal_(1.0)

    def admit(self, kind: Kind, site: Site) -> None:
        if kind.place:
            raise CompositionError(
                f"AdapterFusion at site {site.name!r}: {type(kind).__name__} has no output that could be attended "
                f"over. Use Concatenate."
            )

    def forward(self, f: Callable | None, x: Tensor, modules: Any, routing: Routing, c: Context) -> Tensor:
        if self.regularise and self.training:
            eye = torch.eye(self.width, device=x.device, dtype=self.value.weight.dtype)  # type: ignore[arg-type]
            c.add_loss(f"{modules.prefix}fusion", self.regularise * (eye - self.value.weight).square().sum())
        ids = modules.active(routing)
        if not ids:
            return f(x) if f is not None else torch.zeros_like(x)
        outputs, y = modules.outputs(f, x, routing, c)
        y = torch.zeros_like(outputs[0]) if y is None else y
        if outputs.shape[1:] != y.shape or y.shape[self.axis] != self.width:
            raise CompositionError(
                f"AdapterFusion, built for {self.width} features, got outputs {tuple(outputs.shape[1:])} beside f(x) "
                f"{tuple(y.shape)} at site {modules.site.name!r}. Modules must keep the shape of f(x); pass "
                f"aggregator=mb.AdapterFusion, the class, for parameters at each site."
            )
        there = self._there(routing, ids, len(modules))
        axis = self.axis if self.axis < 0 else self.axis - y.ndim
        if axis != -1:
            outputs, y = outputs.movedim(axis, -1), y.movedim(axis, -1)
        out = self._attend(y, outputs - y, there)
        return out if axis == -1 else out.movedim(-1, axis)

    def _there(self, routing: Routing, ids: list[int], n: int) -> Tensor:
        """Which of the stacked outputs take part, (…, k)."""
        if routing.axes and routing.index is not None:
            there = routing.index >= 0
            absent = [i for i in range(n) if i not in ids] if routing.host is None else []
            if absent:  # no part at this site
                there = there & ~torch.isin(routing.index, torch.tensor(absent, device=routing.index.device))
            return there if routing.weights is None else there & (routing.weights != 0)
        return (routing.dense(n) != 0)[..., ids]

    def _attend(self, y: Tensor, changes: Tensor, there: Tensor) -> Tensor:
        """y and out (…, d); changes (k, …, d); there (k,), (b, k) or (b, t, k)."""
        own = self.value.weight.dtype  # perhaps not that of a base in bfloat16
        changes = changes.movedim(0, -2).to(own)  # (…, k, d)
        there = there.view(*there.shape[:-1], *[1] * (y.ndim - there.ndim), there.shape[-1]).to(y.device)
        scores = (self.key(changes) @ self.query(y.to(own)).unsqueeze(-1)).squeeze(-1)  # (…, k)
        scores = nn.functional.dropout(scores, self.dropout, self.training)
        shares = torch.softmax(scores.masked_fill(~there, torch.finfo(scores.dtype).min), -1) * there
        return y + (shares.to(own).unsqueeze(-2) @ self.value(changes)).squeeze(-2).to(y.dtype)
