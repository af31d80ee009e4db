"""Which axes of which parameters a permutation of a network's units moves, and moving them.

Ainsworth, Hayase and Srinivasa, "Git Re-Basin: Merging Models modulo Permutation Symmetries", 2023 (arXiv 2209.04836),
section 2.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import CompositionError, listed
from ..types import Params

PermutationSpec = Mapping[str, Sequence[tuple[str, int] | tuple[str, int, int]]]
"""The axes that each group of units owns: {"P1": [("fc1.weight", 0), ("fc1.bias", 0), ("fc2.weight", 1)], …}.

(name, axis, block): the axis has `block` places a unit, side by side, as a linear map behind a flattened convolution.
"""

Permutations = Mapping[str, Tensor]
"""For each group p, (n,): the unit that comes to place i is p[i]."""

Owned = dict[str, list[tuple[str, int, int]]]  # by parameter: (group, axis, block)


def permutation_sizes(spec: PermutationSpec, *states: Params) -> dict[str, int]:
    """How many units each group has, once the spec is checked against the states.

    Raises CompositionError for a group without axes, a parameter or an axis that isn't there, an axis named twice, and
    axes of one group that have different numbers of units, in one state or between two.
    """
    seen: dict[tuple[str, int], str] = {}
    sizes: dict[str, int] = {}
    for group, axes in spec.items():
        if not axes:
            raise CompositionError(f"spec: the group {group!r} owns no axis; leave it out.")
        for name, axis, block in map(full, axes):
            if (name, axis) in seen:
                raise CompositionError(
                    f"spec: axis {axis} of {name!r} is named by {seen[name, axis]!r} and again by {group!r}; an axis "
                    f"belongs to one group, once."
                )
            seen[name, axis] = group
            for state in states:
                units = _units(state, group, name, axis, block)
                if sizes.setdefault(group, units) != units:
                    raise CompositionError(
                        f"spec: axis {axis} of {name!r}, {tuple(state[name].shape)}, has {units} units, the group "
                        f"{group!r} has {sizes[group]}: its axes are of one length, and so are both networks'."
                    )
    return sizes


def permuted(state: Params, spec: PermutationSpec, permutations: Permutations) -> dict[str, Tensor]:
    """π(θ): every axis of a group in that group's order, w'[…, i, …] = w[…, p[i], …]; the function is the same.

        same = permuted(net.state_dict(), spec, {"P1": torch.randperm(512), "P2": torch.randperm(512)})

    Groups without a permutation stay, as do parameters outside the spec. Raises CompositionError for a spec that does
    not fit the state, a permutation of an unknown group, or one that is none.
    """
    sizes = permutation_sizes(spec, state)
    for group, p in permutations.items():
        if group not in sizes:
            raise CompositionError(f"permutations: no group {group!r} in the spec, which has {listed(sizes)}.")
        if p.is_floating_point() or p.ndim != 1 or p.sort().values.tolist() != list(range(sizes[group])):
            raise CompositionError(
                f"permutations[{group!r}], {tuple(p.shape)} of {p.dtype}: not each of 0 … {sizes[group] - 1} once."
            )
    owned = owners(spec)
    return {name: moved(tensor, owned.get(name, []), permutations) for name, tensor in state.items()}


def unpermuted(permutations: Permutations) -> dict[str, Tensor]:
    """π⁻¹: what brings back what these permutations moved."""
    return {group: p.argsort() for group, p in permutations.items()}


def owners(spec: PermutationSpec) -> Owned:
    """The spec turned round: (group, axis, block) by parameter."""
    owned: Owned = {}
    for group, axes in spec.items():
        for name, axis, block in map(full, axes):
            owned.setdefault(name, []).append((group, axis, block))
    return owned


def moved(tensor: Tensor, axes: Sequence[tuple[str, int, int]], permutations: Permutations) -> Tensor:
    """A tensor with these axes permuted, where their group has a permutation."""
    for group, axis, block in axes:
        if group in permutations:
            p = permutations[group].to(tensor.device)
            if block > 1:
                p = (p[:, None] * block + torch.arange(block, device=p.device)).flatten()
            tensor = tensor.index_select(axis, p)
    return tensor


def rows(tensor: Tensor, axis: int, block: int) -> Tensor:
    """(n, …): what a parameter has for each unit along an axis, in float64 on the host."""
    return tensor.detach().movedim(axis, 0).reshape(tensor.shape[axis] // block, -1).cpu().double()


def full(axis: tuple) -> tuple[str, int, int]:
    return axis if len(axis) == 3 else (*axis, 1)


def _units(state: Params, group: str, name: str, axis: int, block: int) -> int:
    if name not in state:
        raise CompositionError(f"spec: the group {group!r} names {name!r}, which is not in the state: {listed(state)}.")
    shape = tuple(state[name].shape)
    if not 0 <= axis < len(shape):
        raise CompositionError(f"spec: the group {group!r} names axis {axis} of {name!r}, whose shape is {shape}.")
    if block < 1 or shape[axis] % block:
        raise CompositionError(
            f"spec: the group {group!r} names axis {axis} of {name!r} in blocks of {block}, which do not divide its "
            f"length {shape[axis]}."
        )
    return shape[axis] // block
