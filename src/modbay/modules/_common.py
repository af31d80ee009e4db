"""What several kinds share: non-linear functions by name, and a projection drawn as nn.Linear draws its own."""

import math
import zlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..abstract import Site
from ..core import quantised
from ..errors import CompositionError, listed

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
    "identity": lambda x: x,
}


def known(activation: str, kind: str) -> None:
    """Raise CompositionError if there is no non-linear function of this name."""
    if activation not in ACTIVATIONS:
        raise CompositionError(
            f"{kind}(activation={activation!r}): there is no such function; there are {listed(ACTIVATIONS, 20)}."
        )


def positive(kind: str, **sizes: int | float | None) -> None:
    """Raise CompositionError for a size that is neither None nor positive."""
    for name, size in sizes.items():
        if size is not None and not size > 0:
            raise CompositionError(f"{kind}({name}={size!r}): a size is a positive number.")


def drawn(site: Site, outputs: int, inputs: int) -> Tensor:
    """A weight (outputs, inputs), uniform within ±1/√inputs."""
    return nn.init.kaiming_uniform_(site.empty(outputs, inputs), a=math.sqrt(5))


def drawn_bias(site: Site, outputs: int, inputs: int) -> Tensor:
    """Its bias (outputs,), drawn from the same range."""
    return nn.init.uniform_(site.empty(outputs), -1 / math.sqrt(inputs), 1 / math.sqrt(inputs))


def features_last(site: Site, kind: str) -> None:
    """Raise CompositionError if the site's x has no features on its last axis."""
    if site.axis != -1 or site.form == "embedding":
        raise CompositionError(
            f"{kind} at site {site.name!r} ({type(site.module).__name__}): its input has no features on the last axis. "
            f"Attach at a Linear, a norm or a block."
        )


UPDATED = ("linear", "transposed", "convolution", "embedding")  # the forms of a weight that an update may have


def factors(site: Site, rank: int, kind: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of A and B in ΔW = B A at a site; raises CompositionError where there is no weight to update."""
    if site.form not in UPDATED:
        raise CompositionError(
            f"{kind} at site {site.name!r} ({type(site.module).__name__}): there is no weight to update. Attach at the "
            f"Linear, Conv1D, Conv or Embedding inside it."
        )
    inputs = site.weight.shape[1:] if site.form == "convolution" else (site.features("inputs"),)
    return (rank, *inputs), (site.features("outputs"), rank)


def uniform(site: Site, shape: Sequence[int]) -> Tensor:
    """A tensor drawn as a Linear's or Conv's weight of that shape."""
    return nn.init.kaiming_uniform_(site.empty(*shape), a=math.sqrt(5))


def matrix(site: Site, kind: str) -> Tensor:
    """The site's weight as (outputs, inputs · kernel), no narrower than float32; raises CompositionError if the site is
    a slice of it, or a convolution with groups, whose weight is no such matrix, or a quantised one."""
    if quantised(site.module, site.parameter):
        raise CompositionError(
            f"{kind} at site {site.name!r} ({type(site.module).__name__}): it reads the weight, and that is quantised. "
            f"Use mb.LoRA, which doesn't, or dequantise the base."
        )
    weight = site.weight.detach()
    weight = weight.mT if site.form in ("transposed", "embedding") else weight.flatten(1)
    if weight.shape[0] != site.outputs or getattr(site.module, "groups", 1) > 1:
        raise CompositionError(
            f"{kind} at site {site.name!r} ({type(site.module).__name__}): it starts from the whole weight, and this "
            f"is a slice of an output, or a convolution with groups. Attach at a whole layer, or use mb.LoRA."
        )
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def weighted(site: Site, kind: str) -> None:
    """Raise CompositionError if the site has no plain weight, one entry of which could change."""
    known = site.form in UPDATED
    if not known or quantised(site.module, site.parameter):
        why = "its weight is quantised" if known else "there is no weight to update"
        raise CompositionError(
            f"{kind} at site {site.name!r} ({type(site.module).__name__}): {why}. Attach at the Linear, Conv1D, Conv "
            f"or Embedding inside it, unquantised."
        )


def at_random(site: Site, density: float, seed: int) -> Tensor:
    """Flat indices (k,) of a share of the site's weight, in order, by the seed and the site's name alone."""
    n = site.weight.numel()
    generator = torch.Generator().manual_seed(seed + zlib.crc32(site.name.encode()))
    return torch.randperm(n, generator=generator)[: max(1, round(density * n))].sort().values


def drawing(site: Site, learned: Tensor) -> bool:
    """Whether noise is drawn at the site: in training mode, with gradients on, for what learns."""
    return bool(getattr(site.module, "training", False)) and torch.is_grad_enabled() and learned.requires_grad
