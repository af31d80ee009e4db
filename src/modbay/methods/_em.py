"""Modular networks: which module each example needs is a latent variable, found by expectation maximisation.

Kirsch, Kunze and Barber, "Modular Networks: Learning to Decompose Neural Computation", 2018 (arXiv 1811.05249).
"""

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ..attach import Bay
from ..errors import CompositionError
from ..routing import Policy
from ._drawn import drawn

LogLikelihood = Callable[[], Tensor]


class ModularNetwork:
    """max_θ,φ Σ_n log p(y_n | x_n, a_n, θ) + log p(a_n | x_n, φ), with a_n the best choice found so far for example n.

        em = methods.ModularNetwork(model, size=len(x), samples=10)
        for t in range(steps):
            rows = torch.randint(len(x), (32,))
            log_likelihood = lambda: -F.mse_loss(model(x[rows]), y[rows], reduction="none").sum(-1)
            if t % 10 == 0:
                em.expect(rows, log_likelihood)                 # partial E-step: better choices for these rows
            else:
                loss = em.loss(rows, log_likelihood)            # M-step: a gradient step on modules and controller
                loss.backward(); optimiser.step(); optimiser.zero_grad()

    where: a bay, or a module, whose routers are `Policy("example", mode="sample")`, the controllers. size: how many
    examples there are. samples: S, candidates a row in an E-step: the best so far, and S − 1 draws of the controllers.
    log_likelihood: runs the model on these rows, and gives log p(y | x, a), (b,). Choices start at random.
    No regulariser is needed against collapse; outside training the likeliest modules run. E-steps one in ten and S =
    10 as in the official code. Raises CompositionError where there is no such router.
    """

    def __init__(self, where: Bay | nn.Module, size: int, samples: int = 10):
        root = where.model if isinstance(where, Bay) else where
        self.where, self.samples = where, samples
        self.routers = list({id(m): m for m in root.modules() if isinstance(m, Policy)}.values())
        if isinstance(where, Bay):
            own = {id(r) for r in (where.state.router, *[m.router for m in where.modulars.values()])}
            self.routers = [router for router in self.routers if id(router) in own]
        wrong = [r for r in self.routers if r.mode != "sample" or r.by == "token" or r.depth > 1 or r.path]
        if wrong or not self.routers:
            raise CompositionError(
                f"ModularNetwork: {len(self.routers)} routers, of which {len(wrong)} do not draw one module an example "
                f"and site. Route by mb.Policy('example'), pass a callable for one at each site."
            )
        device = self.routers[0].table.device
        self.best = [torch.randint(len(r.columns), (size,), device=device) for r in self.routers]

    @torch.no_grad()
    def expect(self, rows: Tensor, log_likelihood: LogLikelihood) -> Tensor:
        """Keep, for each row (b,), the best of S candidates under log p(y | x, a) + log p(a | x), which is returned."""
        choices, score = self._tried([best[rows] for best in self.best], log_likelihood)
        for _ in range(self.samples - 1):
            others, other = self._tried([None] * len(self.routers), log_likelihood)
            better = other > score
            choices = [torch.where(better, b, a) for a, b in zip(choices, others, strict=True)]
            score = torch.where(better, other, score)
        for best, chosen in zip(self.best, choices, strict=True):
            best[rows] = chosen
        return score

    def loss(self, rows: Tensor, log_likelihood: LogLikelihood) -> Tensor:
        """−mean [log p(y | x, a*) + log p(a* | x)] of the best choices of these rows."""
        return -self._tried([best[rows] for best in self.best], log_likelihood, scored=True)[1].mean()

    def _tried(self, given: list, log_likelihood: LogLikelihood, scored: bool = False) -> tuple[list[Tensor], Tensor]:
        """(what each router chose (b,), log p(y | x, a) + log p(a | x)) of one run, with these choices or new draws."""
        with ExitStack() as stack:
            for router, choices in zip(self.routers, given, strict=True):
                stack.enter_context(router.given(choices))
            routings = stack.enter_context(drawn(self.where))
            value = log_likelihood() + routings.log_prob
        if len(routings) != len(self.routers):
            raise CompositionError(
                f"ModularNetwork: {len(self.routers)} controllers made {len(routings)} routings in one run; each must "
                f"be asked once."
            )
        return [
            self._numbers(index, router) for index, router in zip(routings.choices(), self.routers, strict=True)
        ], value

    def _numbers(self, index: Tensor | None, router: Policy) -> Tensor:
        assert index is not None
        return index % len(router.columns)  # none is the last
