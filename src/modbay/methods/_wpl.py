"""Routing networks: an agent for each task learns by the weighted policy learner.

Rosenbaum, Klinger and Riemer, "Routing Networks: Adaptive Selection of Non-linear Functions for Multi-Task Learning",
2018 (arXiv 1711.01239); Abdallah and Lesser, 2006 (AAMAS).
"""

import torch
from torch import Tensor

from ..errors import CompositionError
from ..losses import weighted_policy
from ..routing import Policy


class WeightedPolicyLearner:
    """π ← Π(π + η Δ), with Δ of `losses.weighted_policy` and R̄ ← R̄ + η_R (R − R̄), for each agent of a table.

        agents = mb.Policy(by=None, label="task", labels=tasks, depth=3, none=True)
        layer = mb.Modular(None, blocks, agents, mb.Recursion(3), features=32)
        learner = methods.WeightedPolicyLearner(agents, rate=0.01)
        with methods.drawn(layer) as routings:
            y = layer(x, task=task)
        learner.step(routings, task, reward)

    router: a `Policy` by label alone, drawing by "sample" at temperature 1: π is its table, as log-probabilities. An
    agent is a task at a step. reward: (b,), ±1 for right or wrong in the paper, with `losses.collaboration` added.
    Raises CompositionError for another router.
    """

    def __init__(self, router: Policy, rate: float = 0.01, average: float = 0.1):
        if router.by is not None or router.label is None or router.mode != "sample" or router.temperature != 1:
            raise CompositionError(
                "WeightedPolicyLearner: agents are a table of tasks: mb.Policy(by=None, label=…, labels=…), which "
                "samples at temperature 1."
            )
        self.router, self.rate, self.average = router, rate, average
        self.mean: Tensor = torch.zeros(router.table.shape[:-1])  # R̄ (sites, depth, tasks)

    @torch.no_grad()
    def step(self, routings, task, reward: Tensor) -> None:
        """Move the agents by what they chose. routings: of `drawn`, a step each. task: names or indices (b,)."""
        known = self.router.labels or []
        agents = task if isinstance(task, Tensor) else torch.tensor([known.index(name) for name in task])
        table = self.router.table
        for t, routing in enumerate(routings):
            step, chosen = min(t, self.router.depth - 1), routing.index[..., 0].cpu() % table.shape[-1]
            for agent in agents.unique().tolist():
                rows = agents == agent
                g = reward[rows].cpu() - self.mean[0, step, agent]
                p = weighted_policy(table[0, step, agent].softmax(-1).cpu(), chosen[rows], g, self.rate)
                table[0, step, agent] = p.clamp(min=1e-6).log().to(table)
                self.mean[0, step, agent] += self.average * g.mean()
