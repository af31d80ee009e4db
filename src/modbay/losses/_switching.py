"""Losses of switches, which say for each task and layer whether it runs.

Sun, Panda, Feris and Saenko, "AdaShare: Learning What To Share For Efficient Deep Multi-Task Learning", 2020 (arXiv
1911.12423), section 3.
"""

from itertools import combinations

import torch.nn.functional as F
from torch import Tensor


def skipping(logits: Tensor) -> Tensor:
    """Σ_t mean_l −log(1 − σ(z_lt)): small where few layers run. logits: (layers, tasks, …).

    As the official code has it; the paper writes Σ log σ(z), which has no lower bound.
    """
    return F.softplus(logits).mean(0).sum()


def sharing(probabilities: Tensor) -> Tensor:
    """Σ_{s<t} Σ_l (L − l)/L |p_ls − p_lt|, l from 0: small where tasks run the same layers, low ones most of all.

    probabilities: (layers, tasks, …). As in the paper; the official code takes logits, and weighs high layers most.
    """
    layers = len(probabilities)
    weight = probabilities.new_tensor([(layers - i) / layers for i in range(layers)])
    weight = weight.view(-1, *[1] * (probabilities.ndim - 2))
    by_task = probabilities.unbind(1)
    pairs = combinations(by_task, 2)
    return sum(((weight * (a - b).abs()).sum() for a, b in pairs), start=probabilities.new_zeros(()))
