"""Low-rank updates: their sum at the sum of their ranks, exactly, and the nearest of a lower rank.

Eckart and Young, "The approximation of one matrix by another of lower rank", 1936 (Psychometrika 1): the largest
singular values are the nearest, and what is left out is the error.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..deltas import LowRank


def concatenated(leaves: Sequence[LowRank], groups: int = 1) -> tuple[Tensor, Tensor]:
    """(A, B) with B A = Σ_i s_i B_i A_i: ranks side by side, the factors s_i in B.

    groups: of a convolution, whose A maps each group of inputs to its own part of the rank: parts of one group go
    together.
    """
    axis = leaves[0].b.ndim - 2  # that of the rank in A: 1 of fused experts
    a, b = [leaf.a for leaf in leaves], [leaf.b * leaf.s for leaf in leaves]
    if groups == 1:
        return torch.cat(a, axis), torch.cat(b, -1)
    apart = torch.cat([t.unflatten(0, (groups, -1)) for t in a], 1)
    return apart.flatten(0, 1), torch.cat([t.unflatten(-1, (groups, -1)) for t in b], -1).flatten(-2)


def truncated(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """(A', B', relative error) of the nearest B' A' to B A of that rank: A (…, R, n), B (…, o, R), never multiplied.

    B = Q₁ R₁ and Aᵀ = Q₂ R₂, so that the singular values are those of R₁ R₂ᵀ, a matrix as large as the rank.
    """
    left, upper = torch.linalg.qr(b)
    right, lower = torch.linalg.qr(a.mT)
    down, up, error = split(upper @ lower.mT, rank)
    return down @ right.mT, left @ up, error


def split(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """(A, B, relative error) of the nearest B A to a matrix (…, o, n), singular values halved between the two."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    root = s[..., :rank].sqrt()
    lost, whole = s[..., rank:].norm(), s.norm()
    a, b = root.unsqueeze(-1) * v[..., :rank, :], u[..., :rank] * root.unsqueeze(-2)
    return a, b, float(lost / whole) if whole > 0 else 0.0
