"""A switch for each module: on or off, so that how many run is learned, too.

Gumbel-matrix routing: Maziarz, Kokiopoulou, Gesmundo, Sbaiz, Bartok and Berent, 2019 (arXiv 1910.04915). AdaShare: Sun,
Panda, Feris and Saenko, 2020 (arXiv 1911.12423). SpotTune: Guo, Shi, Kumar, Grauman, Rosing and Feris, 2019 (arXiv
1811.08737).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..abstract import Context, Router, Routing, Site
from ..errors import CompositionError, listed
from ..losses import sharing, skipping
from ..ops import logistic, straight_through
from ..types import System
from . import _reading
from ._columns import regrown, renamed
from ._tasks import declared
from ._tasks import tasks as tasks_of

MODES = ("gumbel", "soft", "straight-through", "sample")
TESTS = "tests/test_hard.py::"


class Switches(Router):
    """α_i = 1 if σ(z_i) > ½, else 0, with z = B_task + W x: any number of modules a row, from none to all.

        mb.Switches(label="task", labels=["ner", "pos"], normalise=True)   # a matrix of tasks by modules
        mb.Switches(by="example", mode="gumbel")                           # each example has what it needs

    by: None, x is not read; "example", x averaged over its positions without padding; or "token". label, labels: the
    keyword that says the task, and the tasks; None as a label is no module.
    mode: in training, with u = logistic noise,
    - "gumbel": 1[z + u > 0], with the gradient of σ((z + u)/τ), a Gumbel-softmax of two;
    - "soft": σ((z + u)/τ) itself;
    - "straight-through": 1[z > 0], with the gradient of σ(z);
    - "sample": 1[z + u > 0], without a gradient; log_prob is of all the switches (for losses.reinforce).
    start: σ(B) at first; W at N(0, 0.02²), if x is read, and B with noise of 1e−3. normalise: the mean of those that
    are on, instead of their sum. path: one object for all sites has switches for each of them, on the same input.
    last: of a path, only the last so many sites switch, and the others are on (AdaShare adds sites one by one); None:
    all. sparsity, sharing: coefficients of `losses.skipping` and `losses.sharing`, of a path by tasks, in training.
    Computes in fp32. Raises CompositionError for another mode, or a start that is no probability.
    """

    systems = (
        System(
            (94,),
            'mb.Switches(by="example")',
            (
                TESTS + "test_switches_are_on_above_one_half",
                TESTS + "test_switches_are_drawn_with_their_probability",
            ),
            equation="α_i = 1[σ(z_i) > ½]: as many modules as a row or a task needs",
        ),
        System(
            (79,),
            'mb.Switches(label="task", labels=["ner", "pos"], normalise=True)',
            (
                TESTS + "test_a_matrix_of_tasks_by_modules_is_the_mean_of_those_on",
                TESTS + "test_switches_have_the_gradient_of_their_relaxation",
            ),
            "Gumbel-matrix routing",
            "y = Σ_i α_ti m_i(x) / Σ_i α_ti, α_ti ~ Bernoulli(σ(B_ti)), straight-through Gumbel",
        ),
        System(
            (80,),
            'mb.Switches(label="task", labels=["seg", "depth"], mode="soft", temperature=5.0, path=True, '
            "sparsity=1e-3, sharing=0.05)",
            (
                TESTS + "test_ada_share_skips_layers_by_task_and_adds_its_losses",
                TESTS + "test_ada_share_opens_its_layers_from_the_last",
            ),
            "AdaShare",
            "y_l = α_tl F_l(x), skips outside; + λ₁ Σ −log(1 − σ(z)) + λ₂ Σ (L − l)/L |σ(z_sl) − σ(z_tl)|",
        ),
        System(
            (81,),
            'mb.Switches(by="example", temperature=5.0, path=True)',
            (TESTS + "test_spot_tune_runs_a_block_as_it_was_or_tuned_by_example",),
            "SpotTune",
            "y = (1 − α(x)) F(x) + α(x) F'(x), F' a tuned copy (mb.Full) of the frozen block F",
        ),
    )

    def __init__(
        self,
        by: str | None = None,
        label: str | None = None,
        labels: Sequence[str] | None = None,
        mode: str = "gumbel",
        temperature: float = 1.0,
        start: float = 0.5,
        normalise: bool = False,
        path: bool = False,
        last: int | None = None,
        sparsity: float = 0.0,
        sharing: float = 0.0,
    ):
        super().__init__()
        if mode not in MODES:
            raise CompositionError(f"Switches(mode={mode!r}): it is one of {listed(MODES)}.")
        if not 0 < start < 1 or temperature <= 0 or (last is not None and last < 0):
            raise CompositionError(
                f"Switches(start={start}, temperature={temperature}, last={last}): start is a probability between 0 "
                f"and 1, the temperature is above 0, and last a number of sites."
            )
        if (sparsity or sharing) and (label is None or not path):
            raise CompositionError(
                f"Switches(sparsity={sparsity}, sharing={sharing}): these are of tasks and layers: give label, labels "
                f"and path=True."
            )
        self.by, self.label = _reading.by("Switches", by, ("example", "token", None)), label
        self.keywords, self.labels = declared("Switches", label, labels)
        self.mode, self.temperature, self.start, self.normalise = mode, temperature, start, normalise
        self.path, self.last, self.sparsity, self.sharing = path, last, sparsity, sharing
        self.axis = -1
        self.table: Tensor
        self.gate: Tensor

    @property
    def reads_x(self) -> bool:  # type: ignore[override]
        return self.by is not None

    def build(self, names: Sequence[str], site: Site) -> None:
        places, tasks = max(1, len(self.sites)) if self.path else 1, max(1, len(self.labels or ()))
        old = getattr(self, "table", None)
        if old is not None and len(old) != places:
            raise CompositionError(f"Switches(path=True) has {len(old)} sites, and is to have {places}: make another.")
        logit = math.log(self.start / (1 - self.start))
        table = torch.empty(places, tasks, len(names), device=site.device).normal_(logit, 1e-3)
        self.table = regrown(self, "table", self.names, names, table, axis=-1)
        if self.by is not None:
            width = _reading.width(self, site, getattr(self, "gate", None))
            self.axis = site.axis
            gate = torch.empty(places, len(names), width, device=site.device).normal_(std=0.02)
            self.gate = regrown(self, "gate", self.names, names, gate, axis=-2)
        self.names = tuple(names)

    def rename(self, old: str, new: str) -> None:
        self.names = renamed(self.names, old, new)

    def forward(self, x: Tensor, c: Context) -> Routing:
        tasks = None
        if self.label is not None:
            tasks = tasks_of(c.label(self.label), self.labels or (), self.label, self.table.device)
        rows = None if self.by is None else _reading.rows(self, x, c, self.by, self.axis)[0]
        with torch.autocast(self.table.device.type, enabled=False):
            z = self._scores(rows, tasks)  # (places, …, n)
            alpha = self._alpha(z)
            log_prob = None
            if self.mode == "sample":
                bits = nn.functional.binary_cross_entropy_with_logits(z, alpha.detach(), reduction="none")
                log_prob = -(bits * self._open(bits)).sum(-1)
            alpha = torch.where(self._open(alpha), alpha, 1.0)
            there = None if tasks is None else self._there(tasks, alpha)
            if there is not None:
                alpha = alpha * there
                log_prob = None if log_prob is None else log_prob * there[..., 0]
            losses = self._losses() if self.training else {}
        return self._routing(alpha, None if log_prob is None else log_prob.sum(0), losses, {"logits": z})

    def _scores(self, rows: Tensor | None, tasks: Tensor | None) -> Tensor:
        table = self.table.float()
        z = table[:, 0] if tasks is None else table[:, tasks.clamp(min=0)]  # (places, n) or (places, b, n)
        if rows is None:
            return z
        read = torch.einsum("pnd,...d->p...n", self.gate.float(), rows.float())
        while z.ndim < read.ndim:
            z = z.unsqueeze(-2)
        return read + z

    def _alpha(self, z: Tensor) -> Tensor:
        if not self.training:
            return (z > 0).to(z.dtype)
        noisy = z if self.mode == "straight-through" else z + logistic(z)
        if self.mode == "sample":
            return (noisy > 0).to(z.dtype)
        soft = torch.sigmoid(noisy if self.mode == "straight-through" else noisy / self.temperature)
        return soft if self.mode == "soft" else straight_through(noisy > 0, soft)

    def _open(self, like: Tensor) -> Tensor:
        """Which sites' switches are in play, to broadcast with (places, …)."""
        first = 0 if self.last is None or not self.path else max(0, len(self.table) - self.last)
        place = torch.arange(len(self.table), device=like.device)
        return (place >= first).view(-1, *[1] * (like.ndim - 1))

    def _there(self, tasks: Tensor, alpha: Tensor) -> Tensor:
        """1 for rows that have a task, to broadcast with (places, …, n)."""
        there = (tasks >= 0).to(alpha.dtype).unsqueeze(-1)
        return there.unsqueeze(-1) if there.ndim == 2 and alpha.ndim == 4 else there

    def _losses(self) -> dict[str, Tensor]:
        z = self.table.float()
        z = z if self.last is None else z[max(0, len(z) - self.last) :]
        losses = {"sparsity": self.sparsity * skipping(z).mean()} if self.sparsity and len(z) else {}
        share = {"sharing": self.sharing * sharing(torch.sigmoid(self.table.float()))} if self.sharing else {}
        return losses | share

    def _routing(self, alpha: Tensor, log_prob: Tensor | None, losses: dict, state: dict[str, Tensor]) -> Routing:
        """Dense weights where they have a gradient; else the modules that are on, so that only they run."""
        whole = self.path and bool(self.sites)
        weights = alpha / alpha.sum(-1, keepdim=True).clamp(min=1e-12) if self.normalise else alpha
        index = None
        if not self.training or self.mode == "sample":
            places = torch.arange(alpha.shape[-1], device=alpha.device)
            index = torch.where(alpha > 0, places, -1)
        ones = index is not None and not self.normalise
        if not whole:
            weights, index = weights[0], None if index is None else index[0]
            state = {name: tensor[0] for name, tensor in state.items()}
        sites = self.sites if whole else None
        return Routing(None if ones else weights, index, log_prob, losses=losses, state=state, sites=sites)
