"""Losses that keep a learned gate balanced and its logits small.

Load balance: Fedus, Zoph and Shazeer, "Switch Transformers", 2021 (arXiv 2101.03961), equations 4 to 6; GShard's
(Lepikhin et al., 2020, arXiv 2006.16668) is the same product, divided by n². z-loss: Zoph et al., "ST-MoE", 2022
(arXiv 2202.08906). Importance and load: Shazeer et al., "Outrageously Large Neural Networks", 2017 (arXiv 1701.06538),
equations 6 to 11; Riquelme et al., 2021 (arXiv 2106.05974), appendix A. Bias: Wang et al., "Auxiliary-Loss-Free Load
Balancing Strategy for Mixture-of-Experts", 2024 (arXiv 2408.15664), algorithm 1.
"""

import torch
from torch import Tensor

from ..types import System, systems


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


def cv_squared(x: Tensor) -> Tensor:
    """CV(x)² = Var(x) / mean(x)², the variance that of the whole population. x: (n,)."""
    return x.var(correction=0) / x.mean().square().clamp(min=1e-10)


@systems(
    System(
        (112,),
        "losses.importance(weights)",
        ("tests/test_experts.py::test_importance_and_load_are_the_paper_s_formulas_written_out",),
        "Importance loss",
    )
)
def importance(weights: Tensor, mask: Tensor | None = None) -> Tensor:
    """CV(Σ_x G(x))²: zero if all modules have the same weight in the batch.

    weights: (…, n), zero for a module that a row does not use. mask: (…), 0 for rows that do not count (padding).
    """
    return cv_squared(_total(weights, mask))


@systems(
    System(
        (112,),
        "losses.load(losses.in_top_k(clean, noisy, spread, k))",
        ("tests/test_experts.py::test_importance_and_load_are_the_paper_s_formulas_written_out",),
        "Load loss",
        "CV(Σ_x P(x))², P(x, i) = Φ((z_i − kth_excluding(z + noise, k, i)) / σ_i)",
    )
)
def load(chances: Tensor, mask: Tensor | None = None) -> Tensor:
    """CV(Σ_x P(x))²: zero if all modules can expect as many rows, by the chances of `in_top_k` (…, n). mask: (…)."""
    return cv_squared(_total(chances, mask))


def in_top_k(clean: Tensor, noisy: Tensor, spread: Tensor, k: int, excluding: bool = True) -> Tensor:
    """P(x, i) = Φ((clean_i − threshold_i) / spread_i): the chance that i is among the top k if its noise is drawn anew.

    clean, noisy: logits (…, n) before and after noise of standard deviation `spread` (…, n). The threshold is the k-th
    highest noisy logit of the others (Shazeer), or of all (excluding=False, V-MoE). With k = n, the chance is one.
    """
    if k >= clean.shape[-1]:
        return torch.ones_like(clean)
    top = noisy.topk(k + 1, -1).values
    kth, next_ = top[..., k - 1 : k], top[..., k:]
    threshold = torch.where(noisy > next_, next_, kth) if excluding else kth
    return torch.special.ndtr((clean - threshold) / spread)


@systems(
    System(
        (112,),
        "mb.TopK(8, bias=1e-3, score='sigmoid')",
        ("tests/test_experts.py::test_the_bias_moves_to_who_has_less_and_weighs_nothing",),
        "Loss-free balancing",
        "b_i ← b_i + u sign(c̄ − c_i); the k highest of s_i + b_i count, at s_i",
    )
)
def balancing_bias(bias: Tensor, index: Tensor, rate: float = 1e-3, mask: Tensor | None = None) -> Tensor:
    """b_i + rate · sign(c̄ − c_i), c_i how many choices fell on module i, and c̄ their mean: the next bias (n,).

    index: (…, k), the modules chosen. mask: (…), 0 for rows that do not count (padding).
    """
    flat, k = index.flatten(), index.shape[-1]
    count = bias.new_ones(len(flat)) if mask is None else mask.reshape(-1).to(bias.dtype).repeat_interleave(k)
    chosen = torch.zeros_like(bias).scatter_add(0, flat, count)
    return bias + rate * (chosen.mean() - chosen).sign()


def _total(x: Tensor, mask: Tensor | None) -> Tensor:
    """The sum over rows that count, (n,)."""
    x = x if mask is None else x * mask.to(x.dtype).unsqueeze(-1)
    return x.reshape(-1, x.shape[-1]).sum(0)
