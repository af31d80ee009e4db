"""Likelihoods summed over what was retrieved.

Lewis et al., "Retrieval-Augmented Generation for Knowledge-Intensive NLP Tasks", 2020 (arXiv 2005.11401).
"""

import torch
from torch import Tensor


def marginal_tokens(logits: Tensor, log_prob: Tensor) -> Tensor:
    """log p(y_t | x, y_<t) = log Σ_z p(z | x) p(y_t | x, z, y_<t), (b, t, v): a document may explain each token.

    logits: (b, k, t, v), one for each of k documents. log_prob: (b, k), of each document.
    """
    return torch.logsumexp(log_prob[..., None, None] + logits.log_softmax(-1), 1)


def marginal_sequence(logits: Tensor, log_prob: Tensor, targets: Tensor) -> Tensor:
    """log p(y | x) = log Σ_z p(z | x) Π_t p(y_t | x, z, y_<t), (b,): one document explains all.

    targets: (b, t), what logits (b, k, t, v) at t predict; −100 does not count. log_prob: (b, k), of each document.
    """
    seen = targets != -100
    index = targets.masked_fill(~seen, 0)[:, None, :, None].expand(-1, logits.shape[1], -1, -1)
    each = logits.log_softmax(-1).gather(-1, index).squeeze(-1) * seen.unsqueeze(1)
    return torch.logsumexp(log_prob + each.sum(-1), 1)
