"""What a teacher thinks of each answer, as a target.

Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015 (arXiv 1503.02531).
"""

import torch
from torch import Tensor


def distillation(logits: Tensor, teacher: Tensor, targets: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """T² mean KL(p ‖ q), p = softmax(teacher / T), q = softmax(logits / T), both (…, v); teacher has no gradient.

    targets: (…), of which −100 does not count; None: all do. Computed in float32 at least.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    p, q = ((one.to(wide) / temperature).log_softmax(-1) for one in (teacher.detach(), logits))
    each = (p.exp() * (p - q)).sum(-1) * temperature**2
    if targets is None:
        return each.mean()
    seen = targets != -100
    return (each * seen).sum() / seen.sum().clamp(min=1)
