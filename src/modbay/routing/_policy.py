"""A policy over modules: a hard choice, drawn in training, that learns from a reward or through a relaxation.

Score function and values: Rosenbaum, Cases, Riemer and Klinger, 2019 (arXiv 1904.12774). Gumbel-softmax: Jang, Gu and
Poole, 2017 (arXiv 1611.01144); Maddison, Mnih and Teh, "The Concrete Distribution", 2017 (arXiv 1611.00712).
Straight-through: Bengio, Léonard and Courville, 2013 (arXiv 1308.3432).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..abstract import Context, Router, Routing, Site
from ..errors import CompositionError, listed
from ..losses import information
from ..ops import straight_through
from ..types import System
from . import _reading
from ._columns import regrown, renamed
from ._tasks import declared
from ._tasks import tasks as tasks_of

MODES = ("sample", "value", "gumbel", "straight-through")
NONE = "."  # the column of choosing no module; no module has this name
TESTS = "tests/test_hard.py::"


class Policy(Router):
    """a ~ π = softmax((B_task + W x)/τ): one module a row, drawn in training, and the likeliest outside it.

        mb.Policy()                                                          # by example, for losses.reinforce
        mb.Policy(by=None, label="task", labels=["ner", "pos"])              # a table: an agent for each task
        mb.Policy(mode="gumbel", temperature=1.0)                            # by gradients through a relaxation

    by: "example", x averaged over its positions without padding; "token"; or None, x is not read. label, labels: the
    keyword that says the task, and the tasks, each with a row of B; None as a label is no module.
    mode: in training
    - "sample" draws a, and log_prob is of the draw. With probability epsilon it is drawn evenly instead, and log_prob
      is of the mixture of both, so that the score function stays unbiased for it.
    - "value": the scores are values Q, in `routing.value` (…, n): the best is chosen, or with epsilon any.
    - "gumbel": weights are one-hot, the argmax of log π and Gumbel noise, with the gradient of their softmax at τ; π
      itself is of τ = 1.
    - "straight-through": weights are one-hot, drawn from π, with the gradient of π.
    dense: of the last two, whether all modules run, so that every weight has its gradient; without, only the module
    that was chosen runs, and its weight alone has one.
    critic: `routing.value` is V(x), learned beside (for losses.actor_critic), of x without gradient.
    none: choosing no module is one choice more: to pass on, or to halt. depth: a policy for each step of `Recursion`.
    path: one object for all sites has a policy for each of them, on the same input, and log_prob is of the whole path.
    entropy, information: coefficients of bonuses that training adds as losses, −H(π) and −`losses.information`.
    Under `given(choices)` these (b, …) are taken, and log_prob is of them. `routing.state` holds π's logits, and with
    noise what chose ("noisy", for losses.relax). Computes in fp32; W starts at N(0, 0.02²), B at zero.
    Raises CompositionError for another mode, or where there is nothing to read.
    """

    systems = (
        System(
            (78,),
            'mb.Policy(mode="gumbel")',
            (
                TESTS + "test_gumbel_weights_are_one_hot_with_the_gradient_of_the_relaxation",
                TESTS + "test_a_colder_relaxation_is_nearer_to_a_choice",
            ),
            "Gumbel-softmax routing",
            "α = one-hot(argmax(z + g)), ∂α = ∂ softmax((z + g)/τ), g Gumbel noise",
        ),
        System(
            (82,),
            'mb.Policy(mode="straight-through")',
            (TESTS + "test_straight_through_weights_are_one_hot_with_the_gradient_of_the_policy",),
            "Straight-through routing",
            "α = one-hot(a), a ~ π, ∂α = ∂π",
        ),
        System(
            (75,),
            'mb.Policy(by=None, label="task", labels=["ner", "pos"], depth=3, none=True)',
            (
                TESTS + "test_an_agent_a_task_routes_by_depth_and_passes_on",
                TESTS + "test_agents_learn_which_modules_their_tasks_need",
            ),
            "Routing network: an agent a task",
            "v_{t+1} = f_{a_t}(v_t), a_t ~ π_task,t; PASS leaves v as it is",
        ),
        System(
            (97,),
            "mb.Policy(epsilon=0.3, temperature=5.0)",
            (
                TESTS + "test_epsilon_mixes_even_choices_in_and_log_prob_says_so",
                TESTS + "test_annealing_goes_from_first_to_last",
            ),
            "ε-greedy routing",
            "π_ε = (1 − ε) π + ε/n",
        ),
        System(
            (84,),
            "methods.ModularNetwork(bay, size=len(x))",
            (
                TESTS + "test_em_keeps_the_best_choice_of_each_example",
                "tests/test_recipes.py::test_em_finds_two_rules",
            ),
            "Modular networks (EM)",
            "max Σ_n log p(y_n | x_n, a_n) + log π(a_n | x_n), a_n the best of S draws and the best so far",
            "Kirsch, Kunze and Barber, 2018 (arXiv 1811.05249)",
        ),
    )

    def __init__(
        self,
        by: str | None = "example",
        label: str | None = None,
        labels: Sequence[str] | None = None,
        mode: str = "sample",
        temperature: float = 1.0,
        epsilon: float = 0.0,
        dense: bool = True,
        critic: bool = False,
        none: bool = False,
        depth: int = 1,
        path: bool = False,
        entropy: float = 0.0,
        information: float = 0.0,
    ):
        super().__init__()
        if mode not in MODES:
            raise CompositionError(f"Policy(mode={mode!r}): it is one of {listed(MODES)}.")
        if temperature <= 0 or not 0 <= epsilon <= 1 or depth < 1:
            raise CompositionError(
                f"Policy(temperature={temperature}, epsilon={epsilon}, depth={depth}): a temperature is above 0, "
                f"epsilon a probability, and there is a step at least."
            )
        if critic and mode == "value":
            raise CompositionError("Policy(mode='value', critic=True): its values are those of choices; take one.")
        self.by, self.label = _reading.by("Policy", by, ("example", "token", None)), label
        self.keywords, self.labels = declared("Policy", label, labels)
        self.mode, self.temperature, self.epsilon, self.dense = mode, temperature, epsilon, dense
        self.critic, self.none, self.depth, self.path = critic, none, depth, path
        self.entropy, self.information = entropy, information
        self.axis, self.columns, self.choices = -1, (), None
        self.table: Tensor
        self.gate: Tensor

    @property
    def reads_x(self) -> bool:  # type: ignore[override]
        return self.by is not None

    def build(self, names: Sequence[str], site: Site) -> None:
        columns = (*names, NONE) if self.none else tuple(names)
        places, tasks = max(1, len(self.sites)) if self.path else 1, max(1, len(self.labels or ()))
        table = torch.zeros(places, self.depth, tasks, len(columns), device=site.device)
        old = getattr(self, "table", None)
        if old is not None and len(old) != places:
            raise CompositionError(f"Policy(path=True) has {len(old)} sites, and is to have {places}: make another.")
        self.table = regrown(self, "table", self.columns, columns, table, axis=-1)
        if self.critic and not hasattr(self, "worth"):
            self.worth = nn.Parameter(torch.zeros(self.depth, tasks, device=site.device))
        if self.by is not None:
            self._build_gate(columns, site, places)
        self.names, self.columns = tuple(names), columns

    def _build_gate(self, columns: Sequence[str], site: Site, places: int) -> None:
        width = _reading.width(self, site, getattr(self, "gate", None))
        self.axis = site.axis
        gate = torch.empty(places, self.depth, len(columns), width, device=site.device).normal_(std=0.02)
        self.gate = regrown(self, "gate", self.columns, columns, gate, axis=-2)
        if self.critic and not hasattr(self, "read"):
            self.read = nn.Parameter(torch.zeros(self.depth, width, device=site.device))

    def rename(self, old: str, new: str) -> None:
        self.names, self.columns = renamed(self.names, old, new), renamed(self.columns, old, new)

    @contextmanager
    def given(self, choices: Tensor | None) -> Iterator[None]:
        """Within the block these are chosen, whatever the policy says: indices as in `routing.index[..., 0]`."""
        before, self.choices = self.choices, choices
        try:
            yield
        finally:
            self.choices = before

    def forward(self, x: Tensor, c: Context) -> Routing:
        step = min(int(c.state.get("step", 0)), self.depth - 1)
        tasks = None
        if self.label is not None:
            tasks = tasks_of(c.label(self.label), self.labels or (), self.label, self.table.device)
        rows, mask = (None, None) if self.by is None else _reading.rows(self, x, c, self.by, self.axis)
        with torch.autocast(self.table.device.type, enabled=False):
            logits = self._scores(rows, tasks, step)
            logits = logits / self.temperature if self.mode in ("sample", "straight-through") else logits
            choice, state = self._choose(logits)
            weights = self._weights(logits, choice, state)
            log_prob = self._log_prob(logits, choice) if self.mode == "sample" else None
            value = self._value(rows, tasks, step, logits)
            losses = self._losses(logits, mask) if self.training else {}
        return self._routing(choice, weights, log_prob, value, losses, state, tasks)

    def _scores(self, rows: Tensor | None, tasks: Tensor | None, step: int) -> Tensor:
        """(places, …, n): of each place on the path, of rows or of all."""
        table = self.table[:, step].float()
        scores = table[:, 0] if tasks is None else table[:, tasks.clamp(min=0)]  # (places, n) or (places, b, n)
        if rows is None:
            return scores
        read = torch.einsum("pnd,...d->p...n", self.gate[:, step].float(), rows.float())
        while scores.ndim < read.ndim:
            scores = scores.unsqueeze(-2)
        return read + scores

    def _choose(self, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(what is chosen (places, …), π's logits and what noise made of them)."""
        state, noisy = {"logits": logits}, logits
        if self.training and self.mode != "value":
            noisy = torch.log_softmax(logits, -1) - torch.empty_like(logits).exponential_().log()
            state["noisy"] = noisy
        choice = noisy.argmax(-1)
        if self.choices is not None:
            choice = (self.choices % logits.shape[-1]).expand_as(choice)
        elif self.training and self.epsilon and self.mode in ("sample", "value"):
            evenly = torch.rand_like(logits[..., 0]) < self.epsilon
            choice = torch.where(evenly, torch.randint_like(choice, logits.shape[-1]), choice)
        return choice, state

    def _weights(self, logits: Tensor, choice: Tensor, state: dict[str, Tensor]) -> Tensor | None:
        """(places, …, n), one-hot to the bit, with a relaxation's gradient; None where choices have no gradient."""
        if not self.training or self.mode in ("sample", "value"):
            return None
        soft = state["noisy"] / self.temperature if self.mode == "gumbel" else logits
        hard = torch.zeros_like(logits).scatter(-1, choice.unsqueeze(-1), 1.0)
        return straight_through(hard, torch.softmax(soft, -1))

    def _log_prob(self, logits: Tensor, choice: Tensor) -> Tensor:
        log_p = torch.log_softmax(logits, -1).gather(-1, choice.unsqueeze(-1)).squeeze(-1)
        if self.training and self.epsilon and self.choices is None:
            log_p = torch.log((1 - self.epsilon) * log_p.exp() + self.epsilon / logits.shape[-1])
        return log_p

    def _value(self, rows: Tensor | None, tasks: Tensor | None, step: int, logits: Tensor) -> Tensor | None:
        if self.mode == "value":
            return logits if self._is_path() else logits[0]
        if not self.critic:
            return None
        worth = self.worth[step].float()
        worth = worth[0] if tasks is None else worth[tasks.clamp(min=0)]
        if rows is None:
            return worth
        read = rows.detach().float() @ self.read[step].float()
        return read + (worth.unsqueeze(-1) if worth.ndim and read.ndim == 2 else worth)

    def _losses(self, logits: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        losses = {}
        if self.entropy:
            log_p = torch.log_softmax(logits, -1)
            each = -(log_p.exp() * log_p).sum(-1)
            seen = torch.ones_like(each) if mask is None else mask.to(each.dtype).expand_as(each)
            losses["entropy"] = -self.entropy * (each * seen).sum() / seen.sum().clamp(min=1)
        if self.information:
            each = [information(place, mask) for place in logits]
            losses["information"] = -self.information * torch.stack(each).mean()
        return losses

    def _is_path(self) -> bool:
        return self.path and bool(self.sites)

    def _routing(
        self,
        choice: Tensor,
        weights: Tensor | None,
        log_prob: Tensor | None,
        value: Tensor | None,
        losses: dict[str, Tensor],
        state: dict[str, Tensor],
        tasks: Tensor | None,
    ) -> Routing:
        """What was chosen, as a routing: for rows without a task, and for the choice of none, no module."""
        there = torch.ones((), dtype=torch.bool, device=choice.device) if tasks is None else tasks >= 0
        if there.ndim and choice.ndim == 3:  # tasks by example, choices by token
            there = there.unsqueeze(-1)
        index = torch.where(there & (choice < len(self.names)), choice, -1).unsqueeze(-1)
        if log_prob is not None:
            log_prob = (log_prob * there).sum(0)
        if weights is not None and self.dense:
            weights, dense = weights[..., : len(self.names)] * there.unsqueeze(-1), True
        else:
            dense = False
            weights = None if weights is None else weights.gather(-1, choice.unsqueeze(-1))
        given: dict[str, Any] = {"log_prob": log_prob, "value": value, "losses": losses}
        if self._is_path():
            return Routing(weights, None if dense else index, **given, state=state, sites=self.sites)
        state = {name: tensor[0] for name, tensor in state.items()}
        return Routing(None if weights is None else weights[0], None if dense else index[0], **given, state=state)
