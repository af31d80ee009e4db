"""Expert choice: modules choose their tokens, so that all have as many, and tokens as many modules as want them.

Zhou, Lei, Liu, Du, Huang, Zhao, Dai, Chen, Le and Laudon, "Mixture-of-Experts with Expert Choice Routing", 2022 (arXiv
2202.09368).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..abstract import Context, Router, Routing, Site
from ..errors import CompositionError
from ..ops import capacity
from ..types import System
from . import _reading
from ._columns import regrown, renamed


class ExpertChoice(Router):
    """S = softmax(W x); module i counts for the ⌈capacity · tokens / n⌉ tokens with the highest S_i, at S_i.

    capacity: modules a token, in the mean (the paper's c). over: the tokens among which a module chooses, "batch", all
    of a call in training, as in the paper; or "example", those of each example apart. Outside training it is always
    "example", so that an example's output does not depend on its batch. Padding is never chosen, nor counted.

    x: (b, t, d). Index and weights: (b, t, n), −1 where a module did not choose the token. The gate runs in fp32; W
    (n, d) starts normal with deviation 0.02, as in the authors' code. The choice has no gradient, the weight has.
    A token is chosen in the light of those that follow: not for generation. Raises CompositionError for an input that
    has no tokens.
    """

    systems = (
        System(
            (88,),
            "mb.ExpertChoice(capacity=2.0)",
            (
                "tests/test_experts.py::test_experts_choose_as_many_tokens_each_and_the_best",
                "tests/test_experts.py::test_an_expert_s_choice_leaves_padding_out",
            ),
            "Expert choice",
        ),
    )

    def __init__(self, capacity: float = 2.0, over: str = "batch"):
        super().__init__()
        if over not in ("batch", "example"):
            raise CompositionError(f"ExpertChoice(over={over!r}): tokens are chosen in a 'batch' or an 'example'.")
        if not capacity > 0:
            raise CompositionError(f"ExpertChoice(capacity={capacity}): how many modules a token has, above 0.")
        self.capacity, self.over = capacity, over
        self.gate: Tensor

    def build(self, names: Sequence[str], site: Site) -> None:
        width = _reading.width(self, site, getattr(self, "gate", None))
        if site.axis != -1:
            raise CompositionError(f"ExpertChoice at site {site.name!r}: its features are not last: it has no tokens.")
        new = torch.empty(len(names), width, device=site.device, dtype=torch.float32)
        if not hasattr(self, "gate"):
            nn.init.normal_(new, std=0.02)
        self.gate = regrown(self, "gate", self.names, names, new)
        self.names = tuple(names)

    def rename(self, old: str, new: str) -> None:
        self.names = renamed(self.names, old, new)

    def forward(self, x: Tensor, c: Context) -> Routing:
        if x.ndim != 3:
            raise CompositionError(
                f"ExpertChoice at an input {tuple(x.shape)}: modules choose among the tokens of (batch, time, "
                f"features). Use TopK for rows without tokens."
            )
        rows, mask = _reading.rows(self, x, c, "token", -1)
        with torch.autocast(x.device.type, enabled=False):
            p = torch.softmax(_reading.linear(_reading.full(rows), self.gate), -1)
            scores = p.detach() if mask is None else torch.where(mask.bool().unsqueeze(-1), p.detach(), -1.0)
            whole = self.training and self.over == "batch"
            scores = scores.flatten(0, 1).unsqueeze(0) if whole else scores  # (groups, tokens, n)
            chosen = self._chosen(scores).view(p.shape)
            index = torch.where(chosen, torch.arange(p.shape[-1], device=p.device), -1)
            return Routing(index=index, weights=p * chosen)

    def _chosen(self, scores: Tensor) -> Tensor:
        """Whether a token is among the highest of its group for a module, (groups, tokens, n); never where below 0."""
        real = scores[..., 0] >= 0
        most = capacity(self.capacity, real.sum(-1), scores.shape[-1])
        rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return (rank < most.view(-1, 1, 1)) & real.unsqueeze(-1)  # type: ignore[union-attr]
