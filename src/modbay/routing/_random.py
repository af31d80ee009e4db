"""Random routing: any module will do in training, and all together outside it.

Zuo, Liu, Jiao, Kim, Hassan, Zhang, Zhao and Gao, "Taming Sparsely Activated Transformer with Stochastic Experts"
(THOR), 2022 (arXiv 2110.04260); Wang et al., "AdaMix", 2022 (arXiv 2205.12410).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..abstract import Context, Router, Routing, Site
from ..errors import CompositionError
from ..types import System

TESTS = "tests/test_hard.py::"


class Random(Router):
    """α = one module at random in training, each as likely; outside it α_i = 1/n, all of them.

        mb.attach(model, at, experts, router=mb.Random, aggregator=mb.Mixture())   # a draw of its own at each site

    by: one draw for the whole "call" (as THOR and AdaMix train), for each "example", or each "token".
    drop: None; or in place of one module, each is left out with this probability, and those that stay count
    1/(n (1 − drop)): module dropout, of which the mean is what runs outside training.
    evaluate: "mean", all of them; or "random", a draw again (THOR's, by "token" or "example").
    Train two passes towards each other with losses.consistency. Raises CompositionError for anything else.
    """

    systems = (
        System(
            (85,),
            "mb.Random()",
            (
                TESTS + "test_random_experts_are_drawn_evenly_and_averaged_outside_training",
                TESTS + "test_random_experts_come_to_agree",
            ),
            "THOR: stochastic experts",
            "y = m_i(x), i ~ U{1 … n}, with ½ [KL(p‖q) + KL(q‖p)] between two draws (losses.consistency)",
        ),
        System(
            (85,),
            "mb.Random(drop=0.2)",
            (TESTS + "test_module_dropout_has_the_mean_of_all_modules",),
            "Module dropout",
            "α_i = b_i / (n (1 − p)), b_i ~ Bernoulli(1 − p)",
        ),
    )

    def __init__(self, by: str = "call", drop: float | None = None, evaluate: str = "mean"):
        super().__init__()
        if by not in ("call", "example", "token") or evaluate not in ("mean", "random"):
            raise CompositionError(
                f"Random(by={by!r}, evaluate={evaluate!r}): by is 'call', 'example' or 'token'; evaluate 'mean' or "
                f"'random'."
            )
        if drop is not None and not 0 <= drop < 1:
            raise CompositionError(f"Random(drop={drop}): the probability that a module is left out, below 1.")
        self.by, self.drop, self.evaluate = by, drop, evaluate

    @property
    def reads_x(self) -> bool:  # type: ignore[override]
        return self.by != "call"

    def build(self, names: Sequence[str], site: Site) -> None:
        self.names, n = tuple(names), len(names)
        self.axis = site.axis
        self.register_buffer("mean", torch.full((n,), 1 / max(n, 1), device=site.device), persistent=False)

    def forward(self, x: Tensor, c: Context) -> Routing:
        mean: Tensor = self.mean  # type: ignore[assignment]
        if not self.training and self.evaluate == "mean":
            return Routing(weights=mean)
        shape = {"call": (), "example": 1, "token": 2}[self.by]
        if self.by == "token" and (self.axis != -1 or x.ndim < 3):
            raise CompositionError(f"Random(by='token') at an input {tuple(x.shape)}: it has no tokens. Use 'example'.")
        rows = tuple(x.shape[:shape]) if isinstance(shape, int) else ()
        if self.drop is not None:
            stays = torch.rand(*rows, len(mean), device=mean.device) >= self.drop
            return Routing(weights=stays * mean / (1 - self.drop))
        if not rows and mean.device.type == "cpu":
            return Routing(index=torch.randint(len(mean), (1,)))  # the host knows it, so that only one runs
        return Routing(index=torch.randint(len(mean), (*rows, 1), device=mean.device))
