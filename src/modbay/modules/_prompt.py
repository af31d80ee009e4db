"""Prompt tuning: learned tokens in front of the input.

Lester, Al-Rfou and Constant, "The Power of Scale for Parameter-Efficient Prompt Tuning", 2021 (arXiv 2104.08691);
inserted in a vision transformer: Jia et al., "Visual Prompt Tuning", 2022 (arXiv 2203.12119, its shallow form).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..abstract import Context, InputComposition, Site
from ..errors import CompositionError
from ..types import Params


@dataclass(frozen=True)
class Prompt(InputComposition):
    """f([P, E(x)]) with P (n, d) learned: n virtual tokens in front of the embedded input E(x) (b, t, d).

    length: n. start: "vocabulary", the embeddings of tokens drawn at random (the paper draws from the 5,000 most common
    ones, which a tokenizer need not tell); "uniform", U(−½, ½); or ids of tokens, whose embeddings are repeated to
    length (the paper's default is such a start, from the words of the class labels). after: how many of the input's
    own positions stay in front: 1 keeps a [CLS] where a pooler looks for it.
    At the model itself (at="", the default), the call is rewritten: mask, positions, labels and cache are seen to, and
    the virtual positions are cut from the output. At another module, whose output is a sequence (the embeddings of a
    vision transformer), P is inserted there, and outputs stay longer. Raises CompositionError where neither can be.
    """

    batched: ClassVar[bool] = True
    place: ClassVar[str] = "input"
    length: int = 100
    start: str | tuple[int, ...] = "vocabulary"
    after: int = 0

    def __post_init__(self):
        if self.length < 1:
            raise CompositionError(f"Prompt(length={self.length}): a prompt has at least one token.")
        if isinstance(self.start, str) and self.start not in ("vocabulary", "uniform"):
            raise CompositionError(
                f"Prompt(start={self.start!r}): a prompt starts from 'vocabulary', 'uniform', or a tuple of token ids."
            )
        if not isinstance(self.start, str):
            object.__setattr__(self, "start", tuple(self.start))  # a list, as from JSON, can't be hashed

    def init(self, sites: Sequence[Site]) -> dict[str, dict[str, Tensor]]:
        return {site.name: {"prompt": self._one(site)} for site in sites}

    def _one(self, site: Site) -> Tensor:
        table = embedding(site.module)
        width = site.features("outputs") if table is None else table.shape[1]
        if self.start == "uniform" or (table is None and self.start == "vocabulary"):
            return site.empty(self.length, width).uniform_(-0.5, 0.5)
        if table is None:
            raise CompositionError(
                f"Prompt(start={self.start!r}) at {site.name!r}: there are no token embeddings here."
            )
        if self.start == "vocabulary":
            ids = torch.randint(len(table), (self.length,), device=table.device)
        else:
            ids = torch.tensor(self.start, device=table.device).repeat(-(-self.length // len(self.start)))
        return table[ids[: self.length]].detach().to(site.dtype)

    def extend(self, params: Params, c: Context) -> Tensor:
        return params["prompt"]


def embedding(module: nn.Module | None) -> Tensor | None:
    """The (vocabulary, d) weight of a model's token embeddings; None if the module is no such model."""
    try:
        found = module.get_input_embeddings()  # type: ignore[union-attr, operator]
    except (AttributeError, NotImplementedError):
        return None
    weight = getattr(found, "weight", None)
    return weight if isinstance(weight, Tensor) and weight.ndim == 2 else None
