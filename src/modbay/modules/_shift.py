"""Learned positions that begin later, as if something stood in front of the text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..abstract import Context, Replacement, Site
from ..core import base_type
from ..errors import CallError, CompositionError
from ..types import Params


@dataclass(frozen=True)
class Shift(Replacement):
    """f(t + n) instead of f(t), f a table of learned positions: the text begins at position n.

        mb.attach(gpt2, modules={"de": {"*.attn": mb.Prefix(8), "*wpe": mb.Shift(8)}})

    by: n. It has no parameters. Padding that has a position of its own (`padding_idx`, RoBERTa's) keeps it. peft has
    texts begin behind their prefix; modbay's `Prefix` leaves them where they are, and reads one of peft's as both.
    x: positions (b, t); or (1, t) or (t), looked up once for a whole batch: where examples are routed apart, each then
    has a row of its own. Or what a class of Embeddings of its own makes positions from, a mask (OPT) or ids (BART): the
    first n rows of its table are passed over. Raises CompositionError at what is no Embedding, and where nothing would
    be left of the table, CallError where a text reaches beyond it.
    """

    batched: ClassVar[bool] = True
    positions: ClassVar[bool] = True
    by: int = 1

    def __post_init__(self):
        if self.by < 1:
            raise CompositionError(f"Shift(by={self.by}): a text begins at position 1 or later.")

    def init(self, sites: Sequence[Site]) -> dict[str, dict[str, Tensor]]:
        for site in sites:
            table: Any = site.module
            if not issubclass(base_type(table), nn.Embedding):
                raise CompositionError(
                    f"Shift at site {site.name!r} ({base_type(table).__name__}): positions are shifted at the "
                    f"Embedding that is looked up by them; this model finds them in another way."
                )
            if (rows := table.num_embeddings) <= self.by:
                raise CompositionError(
                    f"Shift(by={self.by}) at site {site.name!r}: it has {rows} positions, and no text would fit."
                )
        return {site.name: {} for site in sites}

    def forward(self, params: Params, x: Tensor, f: Callable | None, c: Context) -> Tensor:
        table: nn.Embedding = f.module  # type: ignore[union-attr]
        plain = base_type(table) is nn.Embedding
        first = getattr(table, "offset", 0) if table.padding_idx is None else table.padding_idx + 1
        if x.shape[-1] + self.by + first > table.num_embeddings:
            raise CallError(
                f"Shift(by={self.by}): a text of {x.shape[-1]} would end at position {x.shape[-1] + self.by} of "
                f"{table.num_embeddings - first}: cut it at {table.num_embeddings - first - self.by}."
            )
        if not plain:
            own, rows = x.reshape(-1, x.shape[-1]), None if c.rows is None else c.rows.reshape(-1)
            y = f.under({"weight": table.weight[self.by :]}, own, rows)  # type: ignore[union-attr]
            return y.expand(len(own), -1, -1).reshape(*x.shape[:-1], *y.shape[-2:])
        moved = x + self.by
        return f(moved if table.padding_idx is None else torch.where(x == table.padding_idx, x, moved))  # type: ignore[misc]
