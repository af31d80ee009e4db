"""What several kinds share: non-linear functions by name, and a projection drawn as nn.Linear draws its own."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..abstract import Site
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
