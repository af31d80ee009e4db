"""Routes of one call as rows to sum: what each example gave each module, whatever the granularity."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..abstract import Context, Routing
from ._book import EXTRA

TINY = 1e-12


class Seen:
    """One routing, as it was made: detached, and not looked into before the call has ended."""

    def __init__(self, level: str, routing: Routing, c: Context, n: int):
        self.level, self.c, self.n = level, c, n
        self.index = None if routing.index is None else routing.index.detach()
        weights = None if routing.weights is None else routing.weights.detach()
        # A route of a set may be a parameter itself, which the optimiser moves before it is read.
        self.weights = weights.clone() if weights is not None and weights.ndim == 1 else weights
        first = self.weights if self.index is None else self.index
        self.shape, self.device = tuple(first.shape), first.device  # type: ignore[union-attr]

    @property
    def key(self) -> tuple:
        """Routings of one key are summed at once."""
        given = self.weights is not None, self.index is not None
        return id(self.c), self.n, self.shape, given, self.device


def by_example(some: Sequence[Seen], mask: Tensor | None) -> Tensor:
    """Rows (s, b, n + EXTRA, 2) of s routings that are alike: mean (weight, share) of each module over an example's
    positions, without padding, and at the end (entropy, 1) and (positions, 0)."""
    index = torch.stack([_positions(one.index) for one in some]) if some[0].index is not None else None
    if some[0].weights is None:
        w = (index >= 0).float()  # type: ignore[operator]
    else:
        w = torch.stack([_positions(one.weights) for one in some]).float()
        w = w if index is None else w * (index >= 0)
    s, b, t, k = w.shape
    p = w.abs()
    p = p / p.sum(-1, keepdim=True).clamp(min=TINY)
    both = torch.stack([w, p], -1)  # (s, b, t, k, 2)
    extra = torch.stack([torch.special.entr(p).sum(-1), torch.ones_like(p[..., 0])], -1)  # (s, b, t, 2)
    real = _real(mask, b, t)
    if real is not None:
        count = real.sum(1)  # (b,)
        part = real / count.clamp(min=1)[:, None]
        both, extra = both * part[..., None, None], (extra * part[..., None]).sum(2)
    else:
        count = w.new_full((b,), float(t))
        both, extra = (both, extra.squeeze(2)) if t == 1 else (both / t, extra.mean(2))
    if index is None:
        mine = both.sum(2)
    else:
        n = some[0].n
        mine = w.new_zeros(s, b, n + 1, 2)  # −1 falls into the last column, cut off
        at = (index % (n + 1)).reshape(s, b, t * k, 1).expand(-1, -1, -1, 2)
        mine = mine.scatter_add_(2, at, both.reshape(s, b, t * k, 2))[:, :, :n]
    seen = torch.stack([count, torch.zeros_like(count)], -1).expand(s, b, 2)
    return torch.cat([mine, extra.unsqueeze(2), seen.unsqueeze(2)], 2)


assert EXTRA == 2


def _positions(x: Tensor | None) -> Tensor:
    """(b, t, k) of (k,), (b, k), (b, t, k), (b, …, k)."""
    assert x is not None  # alike: all have what the first has
    return x[None, None] if x.ndim == 1 else x[:, None] if x.ndim == 2 else x.flatten(1, -2)


def _real(mask: Tensor | None, b: int, t: int) -> Tensor | None:
    """Which positions are no padding (b, t); None where the mask is not of these."""
    if t == 1 or mask is None or mask.shape[0] != b or mask.shape[1] < t:
        return None
    return mask[:, -t:].float()  # of a cached generation, the newest positions
