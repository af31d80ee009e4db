"""The losses of T-Few, for examples with several answers to choose from, of which one is right.

Liu, Tam, Muqeeth, Mohta, Huang, Bansal and Raffel, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
In-Context Learning", 2022 (arXiv 2205.05638), equations 1 and 2. Unlikelihood: Welleck, Kulikov, Roller, Dinan, Cho and
Weston, 2020 (arXiv 1908.04319).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Logits = Float[Tensor, "b n t v"]
Targets = Int[Tensor, "b n t"]
Right = Int[Tensor, "b"]


def likelihood(logits: Logits, targets: Targets, right: Right) -> Tensor:
    """L_LM = −mean log p(y_t | x, y_<t) over the tokens of the right answers.

    logits: (b, n, t, vocabulary) of n answers to each example; targets: (b, n, t), −100 where an answer has no token;
    right: (b,), which of the n it is. The mean is over the tokens of the batch, as in the authors' code.
    """
    said, there = _said(logits, targets)
    rows = torch.arange(len(right), device=right.device)
    return -said[rows, right].sum() / there[rows, right].sum()


def unlikelihood(logits: Logits, targets: Targets, right: Right, eps: float = 1e-2) -> Tensor:
    """L_UL = −mean log(1 − p(ŷ_t | x, ŷ_<t) + ε) over the tokens of the wrong answers; shapes as `likelihood`.

    eps: ε of the authors' code, which keeps the logarithm finite; the paper has none.
    """
    said, there = _said(logits, targets)
    wrong = there & (torch.arange(there.shape[1], device=right.device) != right.unsqueeze(-1)).unsqueeze(-1)
    each = torch.log(1 - said.exp() + eps) * wrong
    return -each.sum() / wrong.sum().clamp(min=1)


def length_normalised(logits: Logits, targets: Targets, right: Right) -> Tensor:
    """L_LN = −mean log softmax_n(β)_right, where β is an answer's mean log p(y_t | x, y_<t); shapes as `likelihood`."""
    said, there = _said(logits, targets)
    return F.cross_entropy(said.sum(-1) / there.sum(-1).clamp(min=1), right)


def t_few(logits: Logits, targets: Targets, right: Right) -> Tensor:
    """L_LM + L_UL + L_LN, by which T-Few trains (IA)³; shapes as `likelihood`."""
    losses = (likelihood, unlikelihood, length_normalised)
    return torch.stack([loss(logits, targets, right) for loss in losses]).sum()


def _said(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(log p of each target, 0 where there is none; where there is one), (b, n, t)."""
    there = targets >= 0
    said = torch.log_softmax(logits, -1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return said * there, there
