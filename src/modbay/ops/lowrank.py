"""Low-rank updates: one, a group, and a weighted sum of many, none of them materialised."""

import torch
from jaxtyping import Float
from torch import Tensor

from .grouped import linear


def lowrank(
    x: Float[Tensor, "*rows i"], a: Float[Tensor, "*g r i"], b: Float[Tensor, "*g o r"]
) -> Float[Tensor, "*rows o"]:
    """B A x for A (r, i), B (o, r), x (…, i); or for a group, A (g, r, i), B (g, o, r), x (g, …, i)."""
    return linear(linear(x, a), b)


def lowrank_mixture(
    x: Float[Tensor, "*rows i"],
    a: Float[Tensor, "s r i"],
    b: Float[Tensor, "s o r"],
    weights: Float[Tensor, "*routed s"],
) -> Float[Tensor, "*rows o"]:
    """Σ_s w_s B_s A_s x, exactly, as one product of rank S·r.

    A (S, r, i), B (S, o, r), x (…, i); the weights are (S,) for all rows or lead with axes of x: (b, S), (b, t, S).
    """
    s, r, _ = a.shape
    hidden = torch.nn.functional.linear(x, a.flatten(0, 1)).unflatten(-1, (s, r))  # (…, S, r)
    missing = x.ndim - weights.ndim
    weights = weights if weights.ndim == 1 else weights.view(*weights.shape[:-1], *[1] * missing, s)
    hidden = (hidden * weights.unsqueeze(-1)).flatten(-2)
    return hidden @ b.permute(0, 2, 1).flatten(0, 1)  # (S·r, o)


def lowrank_mixture_reference(x: Tensor, a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """`lowrank_mixture`, one module at a time."""
    total = torch.zeros(*x.shape[:-1], b.shape[1], dtype=x.dtype, device=x.device)
    for s in range(len(a)):
        w = weights[..., s]
        total = total + w.reshape(*w.shape, *[1] * (total.ndim - w.ndim)) * (x @ a[s].mT @ b[s].mT)
    return total
