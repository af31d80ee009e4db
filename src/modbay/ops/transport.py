"""Balanced assignment: every module gets its share of the rows, and the rows together the highest scores.

Exact, up to a step: Bertsekas's auction, "The Auction Algorithm for Assignment and Other Network Flow Problems", 1990;
of tokens to experts: Lewis et al., "BASE Layers", 2021 (arXiv 2103.16716). Relaxed: Sinkhorn and Knopp, 1967; Cuturi,
2013 (arXiv 1306.0895).
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def sinkhorn(
    scores: Float[Tensor, "rows n"], mask: Bool[Tensor, "rows"] | None = None, iterations: int = 20
) -> Float[Tensor, "rows n"]:
    """P = diag(u) exp(scores) diag(v) whose rows sum to 1, and columns to rows/n: arg max ⟨P, scores⟩ + H(P).

    mask: False for rows that have no share, and are zero. Columns and rows are scaled in turn, rows last: theirs is
    exact, that of the columns approached with every iteration.
    """
    if mask is not None:
        scores = torch.where(mask.unsqueeze(-1), scores, -math.inf)
    rows = scores.new_tensor(float(len(scores))) if mask is None else mask.sum().to(scores.dtype)
    share = (rows / scores.shape[-1]).log()
    for _ in range(iterations):
        scores = scores - scores.logsumexp(0, keepdim=True) + share
        total = scores.logsumexp(-1, keepdim=True)
        scores = scores - torch.where(total.isfinite(), total, 0.0)
    return scores.exp()


def shares(wanted: Int[Tensor, "rows"], n: int) -> list[int]:
    """How many rows each module gets: as many as any other, or one more if more want it. wanted: a module a row."""
    each, more = divmod(len(wanted), n)
    demand = torch.bincount(wanted, minlength=n)
    sizes = [each] * n
    for i in demand.argsort(descending=True, stable=True)[:more].tolist():
        sizes[i] += 1
    return sizes


@torch.no_grad()
def assignment(scores: Float[Tensor, "rows n"], sizes: list[int], step: float = 1e-2) -> Int[Tensor, "rows"]:
    """arg max_a Σ_t scores[t, a_t] where module i gets sizes[i] rows, within rows · step · (max − min) of the maximum.

    The sizes sum to the number of rows. An auction: each row without a place bids for the module that gives it most
    above its price, as much as makes it no better than the second best, and a step more; a module keeps its sizes[i]
    highest bidders, the lowest of whose bids is its price. Every round reads one number back to the host. A score that
    is not finite counts as the lowest.
    """
    live = [i for i, size in enumerate(sizes) if size]
    index = torch.tensor(live, dtype=torch.long, device=scores.device)
    if len(live) < 2:
        return index.expand(len(scores)) if live else index
    scores, (rows, n) = _finite(scores[:, index].float()), (len(scores), len(live))
    size = torch.tensor([sizes[i] for i in live], device=scores.device)
    more = (scores.max() - scores.min()).clamp(min=1e-6) * step
    price, bids = scores.new_zeros(n), scores.new_zeros(rows)
    at = torch.full((rows,), -1, dtype=torch.long, device=scores.device)
    numbers = torch.arange(rows, device=scores.device).expand(n, rows)
    while len(free := (at < 0).nonzero()[:, 0]):
        value, best = (scores[free] - price).topk(2, -1)
        at[free] = best[:, 0]
        bids[free] = price[best[:, 0]] + value[:, 0] - value[:, 1] + more
        book = scores.new_full((n, rows), -math.inf).scatter(0, at.unsqueeze(0), bids.unsqueeze(0)).sort(-1, True)
        low = book.values.gather(1, size.unsqueeze(-1) - 1)[:, 0]
        price = torch.where(low.isfinite(), low, price)  # of a module that has places left, what it was
        rank = torch.empty_like(book.indices).scatter(1, book.indices, numbers).gather(0, at.unsqueeze(0))[0]
        at = torch.where(rank < size[at], at, -1)
    return index[at]


def _finite(scores: Tensor) -> Tensor:
    finite = scores.isfinite()
    return torch.where(finite, scores, torch.where(finite, scores, math.inf).min().nan_to_num(posinf=0.0))
