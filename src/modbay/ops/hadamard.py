"""The Walsh–Hadamard transform, in a few products with small matrices."""

import torch
from jaxtyping import Float
from torch import Tensor

SMALL = 64  # rows of the largest matrix that is multiplied with


def hadamard(x: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
    """H x along the last axis, of a length n that is a power of two; H has entries ±1, and H H = n."""
    rest = x.shape[-1]
    y = x
    while rest > 1:  # H is a Kronecker product: digit by digit of the index, each moved to the front when it is done
        size = min(SMALL, rest)
        y = (y.unflatten(-1, (-1, size)) @ sylvester(size, y)).transpose(-1, -2).flatten(-2)
        rest //= size
    return y


def sylvester(n: int, like: Tensor) -> Tensor:
    """H (n, n), of the dtype and on the device of a tensor."""
    h = torch.ones(1, 1, dtype=like.dtype, device=like.device)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def hadamard_reference(x: Tensor) -> Tensor:
    """`hadamard`, by the whole matrix."""
    return x @ sylvester(x.shape[-1], x)
