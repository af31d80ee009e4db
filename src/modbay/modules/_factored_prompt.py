"""Prompts of low rank, as one task's part of a prompt that tasks share.

Wang, Panda, Karlinsky, Feris, Sun and Kim, "Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning",
2023 (arXiv 2303.02861); its start as in peft, where the authors' laboratory keeps it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from ..abstract import Context, InputComposition, Site
from ..errors import CompositionError
from ..types import Params
from ._common import positive
from ._embedding import embedding


@dataclass(frozen=True)
class FactoredPrompt(InputComposition):
    """f([W, E(x)]), W = U V (n, d), with U (n, r) and V (r, d) learned: a prompt of low rank, or a task's part of one.

        shared = {"shared": mb.Prompt(100), **dict.fromkeys(["mnli", "rte"], mb.FactoredPrompt(100))}
        mb.attach(t5, modules=shared, aggregator=mb.PromptProduct("shared"), name="task")           # MPT

    length: n. rank: r. start: "drawn", both from N(0, std²), as peft does; or "ones", W = 1, so that under
    mb.PromptProduct a new task starts with the shared prompt itself: a first column and row of ones, and beyond them U
    drawn, V zero. after, and where it can be attached: as for Prompt. Raises CompositionError for a bad argument.
    """

    batched: ClassVar[bool] = True
    place: ClassVar[str] = "input"
    length: int = 100
    rank: int = 1
    start: Literal["drawn", "ones"] = "drawn"
    std: float = 0.02
    after: int = 0

    def __post_init__(self):
        positive("FactoredPrompt", length=self.length, rank=self.rank, std=self.std)
        if self.start not in ("drawn", "ones"):
            raise CompositionError(f'FactoredPrompt(start={self.start!r}): it is "drawn" or "ones".')

    def init(self, sites: Sequence[Site]) -> dict[str, dict[str, Tensor]]:
        return {site.name: self._one(site) for site in sites}

    def _one(self, site: Site) -> dict[str, Tensor]:
        d = embedding(site)[1]
        u = nn.init.normal_(site.empty(self.length, self.rank), std=self.std)
        if self.start == "drawn":
            return {"U": u, "V": nn.init.normal_(site.empty(self.rank, d), std=self.std)}
        v = site.zeros(self.rank, d)
        u[:, 0], v[0] = 1.0, 1.0
        return {"U": u, "V": v}

    def extend(self, params: Params, c: Context) -> Tensor:
        return params["U"] @ params["V"]
