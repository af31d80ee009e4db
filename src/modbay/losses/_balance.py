"""Losses that keep a learned gate balanced and its logits small.

Load balance: Fedus, Zoph and Shazeer, "Switch Transformers", 2021 (arXiv 2101.03961), equations 4 to 6; GShard's
(Lepikhin et al., 2020, arXiv 2006.16668) is the same product, divided by n². z-loss: Zoph et al., "ST-MoE", 2022
(arXiv 2202.08906).
"""

import torch
from torch import Tensor


def load_balance(probabilities: Tensor, index: Tensor, mask: Tensor | None = None) -> Tensor:
    """n Σ_i f_i P_i: f_i the share of all choices that fell on module i, P_i its mean probability. 1 if balanced, at
    most n.

    probabilities: (…, n). index: (…, k), the modules chosen. mask: (…), 0 for rows that do not count (padding).
    With k > 1 the share is of all k choices, so that balance is 1 for every k.
    """
    n, k = probabilities.shape[-1], index.shape[-1]
    probabilities, index = probabilities.reshape(-1, n), index.reshape(-1, k)
    count = probabilities.new_ones(len(index)) if mask is None else mask.reshape(-1).to(probabilities.dtype)
    total = count.sum().clamp(min=1)
    chosen = probabilities.new_zeros(n).scatter_add(0, index.flatten(), count.repeat_interleave(k))
    mean = (probabilities * count.unsqueeze(-1)).sum(0) / total
    return n * (chosen / (total * k) * mean).sum()


def z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean of log²(Σ_i exp z_i) over the rows that count. logits: (…, n); mask: (…)."""
    squares = torch.logsumexp(logits, -1).square()
    if mask is None:
        return squares.mean()
    count = mask.to(squares.dtype)
    return (squares * count).sum() / count.sum().clamp(min=1)
