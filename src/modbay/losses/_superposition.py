"""What a network's logits say of whether it runs the right task, without a label.

Wortsman, Ramanujan, Liu, Kembhavi, Rastegari, Yosinski and Farhadi, "Supermasks in Superposition", 2020 (arXiv
2006.14769), sections 3.3 and 3.4.
"""

import torch
from torch import Tensor


def entropy(logits: Tensor) -> Tensor:
    """H = −Σ p log p, the mean over rows: low where the network is sure. logits: (…, n)."""
    log_p = torch.log_softmax(logits, -1)
    return -(log_p.exp() * log_p).sum(-1).mean()


def superfluous(logits: Tensor, real: int) -> Tensor:
    """G = log Σ exp z, the mean over rows, with a gradient to the superfluous logits alone: those after `real` classes.

    Training has pushed these down for its own task, so that a mask's share in G falls where it is the right one.
    """
    return torch.cat([logits[..., :real].detach(), logits[..., real:]], -1).logsumexp(-1).mean()
