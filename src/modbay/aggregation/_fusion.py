"""AdapterFusion: each position attends over what the modules say.

Pfeiffer, Kamath, Rücklé, Cho and Gurevych, "AdapterFusion: Non-Destructive Task Composition for Transfer Learning",
2021 (arXiv 2005.00247); details as in the authors' code (adapter-hub: BertFusion). Over whole outputs, and guided to a
language: Hou, Zhu, Wang, Wang, Qin, Xu and Shinozaki, "Exploiting Adapters for Cross-Lingual Low-Resource Speech
Recognition" (SimAdapter), 2021 (arXiv 2105.11905); the guide as in their code (NeuralSpeech: AdapterASR).
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..abstract import Aggregator, Context, Kind, Routing, Site
from ..errors import CompositionError, listed
from ..types import System
from ._folded import Attention, Kept

TESTS = "tests/test_guided_fusion.py::"


class AdapterFusion(Aggregator):
    """o = y + Σ_i s_i V Δ_i, with s = softmax_i((Q y) · (K Δ_i) / τ), y = f(x), and Δ_i what module i adds to y.

    Q and K (d, d) have a bias and start at N(0, 0.02²); V has none and starts as the identity, 1e-6 off its diagonal.
    dropout: on the scores. regularise: the coefficient of ||I − V||², added in training. Only modules with α_i ≠ 0 are
    attended; beyond that weights do not matter, and a row without any module is y. For every kind with an output.
    No key or value is made for a module alone: see _folded.py.
    over: "changes"; or "outputs", SimAdapter's o = Σ_i s_i V m_i(x) with keys K m_i(x), m_i(x) = y + Δ_i.
    temperature: τ. guide: the coefficient of −log softmax_i(exp s̄_i) of the module named `toward`, the language that is
    learned, added in training; s̄ is the mean of s over the positions where that module takes part.
    One set of parameters an object: pass aggregator=mb.AdapterFusion (the class) for a set at each site, as in the
    paper. Raises CompositionError for an input composition, a site of another width, or a bay without `toward`. Left
    out: the code's annealed temperature, off by default there; and the normed input of f, which SimAdapter's code, but
    not its paper, adds to o.
    """

    systems = (
        System(
            (135,), "mb.AdapterFusion()",
            ("tests/test_aggregators.py::test_fusion_attends_over_what_modules_add",
             "tests/test_aggregators.py::test_fusion_keeps_its_parameters_and_adds_its_loss"),
        ),
        System(
            (138,), 'mb.AdapterFusion(over="outputs", guide=0.1, toward="cs")',
            (TESTS + "test_outputs_are_attended_at_a_temperature", TESTS + "test_the_guide_is_as_in_the_authors_code",
             TESTS + "test_the_guide_learns_the_language", TESTS + "test_a_guide_of_several_routes"),
            "SimAdapter", "o = Σ_i s_i V m_i(x), s = softmax_i((Q f(x)) · (K m_i(x)) / τ)",
            "Hou et al., 2021 (arXiv 2105.11905)",
        ),
    )  # fmt: skip

    def __init__(
        self, dropout: float = 0.0, regularise: float = 0.01, over: Literal["changes", "outputs"] = "changes",
        temperature: float = 1.0, guide: float = 0.0, toward: str | None = None,
    ):  # fmt: skip
        super().__init__()
        if over not in ("changes", "outputs"):
            raise CompositionError(f'AdapterFusion(over={over!r}): it is "changes" or "outputs".')
        if not temperature > 0 or guide < 0 or bool(guide) != (toward is not None):
            raise CompositionError(
                f"AdapterFusion(temperature={temperature}, guide={guide}, toward={toward!r}): a positive temperature, "
                f"and a guide with the name of the module that it guides to, or neither."
            )
        self.dropout, self.regularise, self.over, self.temperature = dropout, regularise, over, temperature
        self.guide, self.toward = guide, toward
        self.width: int | None = None
        self._kept: dict[str, Kept] = {}

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
        y, changes = modules.differences(f, x, routing, c)
        odd = [change.shape for _, change in changes if isinstance(change, Tensor) and change.shape != y.shape]
        if odd or y.shape[self.axis] != self.width:
            raise CompositionError(
                f"AdapterFusion, built for {self.width} features, got changes {tuple((odd or [y.shape])[0])} of f(x) "
                f"{tuple(y.shape)} at site {modules.site.name!r}. Modules must keep the shape of f(x); pass "
                f"aggregator=mb.AdapterFusion, the class, for parameters at each site."
            )
        there = self._there(routing, ids, len(modules))
        axis = self.axis if self.axis < 0 else self.axis - y.ndim
        if axis != -1:  # there no change is in factors
            y = y.movedim(axis, -1)
            changes = [(places, change.movedim(axis, -1)) for places, change in changes]
        out, shares = self._attend(y, changes, there, modules.site.name)
        if self.guide and self.training:
            self._guide(shares, there, modules, routing, ids, c)
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

    def _guide(self, shares: Tensor, there: Tensor, modules: Any, routing: Routing, ids: list[int], c: Context) -> None:
        """Add the loss of `toward`, given the shares (…, k) of the stacked outputs, and which take part."""
        if self.toward not in modules.names:
            raise CompositionError(
                f"AdapterFusion(toward={self.toward!r}) at site {modules.site.name!r}: no such module; there are "
                f"{listed(modules.names)}."
            )
        n, own = len(modules), modules.names.index(self.toward)
        slots = routing.index if routing.axes and routing.index is not None else torch.tensor(ids)
        slots, there = (_spread(t.to(shares.device), shares).expand(shares.shape) for t in (slots, there))
        full = Routing(index=slots, weights=shares.float()).dense(n).flatten(0, -2)
        part = ((slots == own) & there).any(-1).flatten().to(full.dtype)
        mean = (part @ full) / part.sum().clamp(min=1)  # (n,)
        taken = torch.zeros(n, dtype=torch.bool, device=mean.device)
        taken[ids] = True
        loss = -mean.exp().masked_fill(~taken, torch.finfo(mean.dtype).min).log_softmax(0)[own]
        c.add_loss(f"{modules.prefix}guide", self.guide * torch.where(part.any(), loss, 0.0))

    def _attend(self, y: Tensor, changes: Any, there: Tensor, site: str) -> tuple[Tensor, Tensor]:
        """(out (…, d), shares (…, k)); changes as `Modules.differences` gives them; there (k,), (b, k) or (b, t, k)."""
        own, there = y.to(self.value.weight.dtype), _spread(there.to(y.device), y)
        attention = Attention(self.query, self.key, self.value, self._kept, site)
        scores = attention.read(y, changes)
        if self.over == "outputs" and self.dropout and self.training:  # (Q y) · (K y), the same of all, else no matter
            scores = scores + (self.query(own) @ self.key.weight * own).sum(-1, keepdim=True)
        scores = nn.functional.dropout(scores / self.temperature, self.dropout, self.training)
        shares = torch.softmax(scores.masked_fill(~there, torch.finfo(scores.dtype).min), -1) * there
        out = attention.write(shares)
        if self.over == "changes":
            return y + out.to(y.dtype), shares
        return torch.where(there.any(-1, keepdim=True), (self.value(own) + out).to(y.dtype), y), shares

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}  # a copy, or a file, does without what was folded


def _spread(routed: Tensor, y: Tensor) -> Tensor:
    """(…, k) of a routing, with an axis for each of y's that it has not told apart; of the shape of shares (…, k)."""
    return routed.view(*routed.shape[:-1], *[1] * (y.ndim - routed.ndim), routed.shape[-1])
