"""What a router has learned for each module, kept by the module's name when modules come, go or change places."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import listed

log = logging.getLogger("modbay")


def rearranged(old: Tensor, before: Sequence[str], names: Sequence[str], new: Tensor, axis: int = 0) -> Tensor:
    """The entries of `old` by name along `axis`; a name that is new gets the mean of the others, or `new` if there are
    none.

    new: what a fresh tensor for all names would be, (…, len(names), …).
    """
    if not before:
        return new
    where = {name: i for i, name in enumerate(before)}
    mean = old.mean(axis)
    columns = [old.select(axis, where[name]) if name in where else mean for name in names]
    return torch.stack(columns, axis) if columns else new


def regrown(
    owner: nn.Module, key: str, before: Sequence[str], names: Sequence[str], new: Tensor, axis: int = 0
) -> nn.Parameter:
    """The parameter `key` of a router, for other modules than before; what replaces it is logged, for the optimisers.

    The same names in the same order leave the parameter that exists as it is.
    """
    old = getattr(owner, key, None)
    if old is None:
        return nn.Parameter(new)
    if tuple(before) == tuple(names):
        return old
    with torch.no_grad():
        tensor = rearranged(old, before, names, new.to(old), axis)
    log.warning(
        "%s.%s was made anew for the modules %s (before: %s), each keeping what was learned for it. An optimiser that "
        "exists must be given it: parameter_groups() has it.",
        type(owner).__name__, key, listed(names) or "none", listed(before) or "none",
    )  # fmt: skip
    return nn.Parameter(tensor, requires_grad=old.requires_grad)


def renamed(names: Sequence[str], old: str, new: str) -> tuple[str, ...]:
    """The names with one of them exchanged."""
    return tuple(new if name == old else name for name in names)
