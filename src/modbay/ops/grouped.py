"""Products for one module and for a group of modules: the same code, told apart by the parameters' leading axis."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on where x lives (never on the meta device, for which torch raises)."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def linear(
    x: Float[Tensor, "*rows i"], weight: Float[Tensor, "*g o i"], bias: Float[Tensor, "*g o"] | None = None
) -> Float[Tensor, "*rows o"]:
    """y = x Wᵀ + b for one module, W (o, i) and x (…, i), or for g of them, W (g, o, i) and x (g, …, i)."""
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    rows = x if x.ndim == 3 else x.reshape(len(x), -1, x.shape[-1])
    y = torch.bmm(rows, weight.mT) if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, weight.mT)
    return y if x.ndim == 3 else y.view(*x.shape[:-1], weight.shape[1])


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` for a group, one module at a time."""
    biases = [None] * len(weight) if bias is None else bias
    return torch.stack([F.linear(*group) for group in zip(x, weight, biases, strict=True)])


def shared_linear(
    x: Float[Tensor, "*rows i"], weight: Float[Tensor, "*g o i"], bias: Float[Tensor, "*g o"] | None = None
) -> Float[Tensor, "*out"]:
    """`linear` for g modules that all read the same rows x (…, i): one product. (g, …, o), or (…, o) for one module."""
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    y = F.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
    return y.unflatten(-1, weight.shape[:2]).movedim(-2, 0)


def shared_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`shared_linear` for a group: `linear` of as many copies of x."""
    return linear(x.expand(len(weight), *x.shape), weight, bias)


def add_linear(
    y: Float[Tensor, "*rows o"], x: Float[Tensor, "*rows i"], weight: Float[Tensor, "*g o i"]
) -> Float[Tensor, "*rows o"]:
    """y + x Wᵀ in one product, for one module or a group of them, as `linear`."""
    if weight.ndim == 2:
        return torch.addmm(y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), weight.mT).view(y.shape)
    g = len(weight)
    return torch.baddbmm(y.reshape(g, -1, y.shape[-1]), x.reshape(g, -1, x.shape[-1]), weight.mT).view(y.shape)


def align(vector: Float[Tensor, "*g d"], x: Tensor, axis: int = -1) -> Float[Tensor, "..."]:
    """A vector of features, (d,) or (g, d), shaped to broadcast against the feature `axis` of x: −1, −3 … from its end,
    or 1 … from its beginning, not counting the axis of a group."""
    group = vector.shape[:-1]
    after = -1 - axis if axis < 0 else x.ndim - len(group) - 1 - axis
    return vector.view(*group, *[1] * (x.ndim - len(group) - 1 - after), vector.shape[-1], *[1] * after)
