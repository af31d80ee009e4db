"""AdaLoRA's budget: which singular values of a bay's modules stay, by how much the loss depends on them.

Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", 2023 (arXiv 2303.10512).
"""

from typing import Any

import torch
from torch import Tensor

from ..attach import Bay
from ..errors import BayError
from ..modules import AdaLoRA


class RankBudget:
    """Sets the least important entries of Λ to zero, at all sites together, until `rank` of a site are left on average.

        budget = RankBudget(bay, "task", rank=4, steps=1000, warm=100, final=300, every=10)
        loss.backward(); optimiser.step(); budget.step(); optimiser.zero_grad()

    How many stay goes from all, b₀, to rank · sites, b₁, as b₁ + (b₀ − b₁) (1 − (t − warm)/(steps − final − warm))³.
    Every so many steps that many keep their values, the best; from steps − final on the choice stands. An importance is
    that of a triplet: of the entry of Λ, and the means of its column of P and its row of Q; each the product of two
    running means, of |w · ∂L/∂w| (by `smooth`) and of how far it strays from that (`unsure`). `kept`, by site: what
    stays (r,). Raises BayError for a module that is not AdaLoRA everywhere, for times that do not fit, or where
    gradients lack.
    """

    def __init__(
        self,
        bay: Bay,
        name: str,
        *,
        rank: int,
        steps: int,
        warm: int = 0,
        final: int = 0,
        every: int = 1,
        smooth: float = 0.85,
        unsure: float = 0.85,
    ):
        self.parts: dict[str, Any] = {}
        for site, modular in bay.modulars.items():
            part: Any = modular.parts._modules.get(name)
            if part is not None:
                self.parts[site] = part
        wrong = [site for site, part in self.parts.items() if not isinstance(part.kind, AdaLoRA)]
        if wrong or not self.parts:
            at = f"at {wrong[0]!r} it is {self.parts[wrong[0]].kind!r}" if wrong else "the bay has no such module"
            raise BayError(f"RankBudget(bay, {name!r}): a budget is for a module that is mb.AdaLoRA everywhere; {at}.")
        if min(warm, final) < 0 or warm >= steps - final or min(every, rank) < 1:
            raise BayError(
                f"RankBudget(rank={rank}, steps={steps}, warm={warm}, final={final}, every={every}): there must be "
                f"steps between the first `warm` and the last `final`, and a rank."
            )
        self.steps, self.warm, self.last, self.every, self.rates = steps, warm, steps - final, every, (smooth, unsure)
        self.most = sum(part.kind.rank for part in self.parts.values())
        self.least = min(rank * len(self.parts), self.most)
        self.means: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
        self.kept: dict[str, Tensor] = {}
        self.t = 0

    def budget(self, t: int) -> int:
        """How many entries stay at step t."""
        left = 1 - min(max(t - self.warm, 0) / (self.last - self.warm), 1)
        return int(self.least + (self.most - self.least) * left**3)

    @torch.no_grad()
    def step(self) -> None:
        """After the optimiser's step, before gradients are cleared."""
        t, self.t = self.t, self.t + 1
        if t < self.last:
            self._watch()
        if t == self.last or (self.warm < t < self.last and t % self.every == 0):
            self._choose(self.budget(t))
        elif t < self.last:
            return
        for site, part in self.parts.items():
            part.tensors()["values"].masked_fill_(~self.kept[site], 0.0)

    def _watch(self) -> None:
        """Take the last gradients into the running means."""
        smooth, unsure = self.rates
        for site, part in self.parts.items():
            for name in ("P", "values", "Q"):
                w = part.tensors()[name]
                if w.grad is None:
                    raise BayError(
                        f"RankBudget.step(): {name} at {site!r} has no gradient: call it after the optimiser's step "
                        f"and before gradients are cleared, on a module that learns and was used."
                    )
                now = (w * w.grad).abs()
                mean, strays = self.means.get((site, name), (torch.zeros_like(w), torch.zeros_like(w)))
                mean = smooth * mean + (1 - smooth) * now
                self.means[site, name] = mean, unsure * strays + (1 - unsure) * (now - mean).abs()

    def _choose(self, budget: int) -> None:
        scores = [self._importance(site) for site in self.parts]
        flat = torch.cat(scores)
        best = torch.zeros_like(flat, dtype=torch.bool).scatter(0, flat.topk(budget).indices, True)
        self.kept = dict(zip(self.parts, best.split([len(score) for score in scores]), strict=True))

    def _importance(self, site: str) -> Tensor:
        """Of each of a site's entries (r,)."""
        p, values, q = (mean * strays for mean, strays in (self.means[site, name] for name in ("P", "values", "Q")))
        return values + p.mean(0) + q.flatten(1).mean(1)
