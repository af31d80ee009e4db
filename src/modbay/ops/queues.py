"""Capacity: how many rows a module takes at most, and which choices that leaves.

Lepikhin et al., "GShard", 2020 (arXiv 2006.16668), algorithm 1; Fedus, Zoph and Shazeer, "Switch Transformers", 2021
(arXiv 2101.03961); by priority: Riquelme et al., "Scaling Vision with Sparse Mixture of Experts", 2021 (2106.05974).
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def places(
    index: Int[Tensor, "rows k"], n: int, priority: Float[Tensor, "rows"] | None = None
) -> Int[Tensor, "rows k"]:
    """The place of each choice in the queue of its module, from 0: all first choices before the second, rows in order.

    index: the modules chosen, −1 for none, whose places mean nothing. priority: rows stand by it, the highest first.
    """
    rows, k = index.shape
    order = None if priority is None else priority.argsort(descending=True, stable=True)
    queue = (index if order is None else index[order]).mT.reshape(-1) % (n + 1)  # −1 becomes n: a queue of its own
    sort = queue.argsort(stable=True)
    counts = torch.zeros(n + 1, dtype=torch.long, device=index.device).scatter_add(0, queue, torch.ones_like(queue))
    first = counts.cumsum(0) - counts
    place = torch.arange(rows * k, device=index.device) - first[queue[sort]]
    place = torch.empty_like(place).scatter(0, sort, place).view(k, rows).mT
    return place if order is None else torch.empty_like(place).scatter(0, order.unsqueeze(-1).expand(-1, k), place)


def places_reference(index: Tensor, n: int, priority: Tensor | None = None) -> Tensor:
    """`places`, one choice at a time."""
    rows, k = index.shape
    order = range(rows) if priority is None else sorted(range(rows), key=lambda row: -float(priority[row]))
    out, length = torch.zeros_like(index), [0] * (n + 1)
    for slot in range(k):
        for row in order:
            module = int(index[row, slot])
            out[row, slot] = length[module]
            length[module] += 1
    return out


def capacity(factor: float, rows: int | Int[Tensor, "*groups"], n: int) -> int | Float[Tensor, "*groups"]:
    """⌈factor · rows / n⌉, at least one; a tensor for numbers in a tensor, so that no device is waited for."""
    if isinstance(rows, Tensor):
        return (rows * (factor / n) - 1e-4).ceil().clamp(min=1)  # 10 · 1.1 is a little more than 11
    return max(1, math.ceil(rows * factor / n - 1e-4))
