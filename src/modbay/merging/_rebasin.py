"""Git Re-Basin: the permutation of one network's units that brings it nearest to another.

Ainsworth, Hayase and Srinivasa, "Git Re-Basin: Merging Models modulo Permutation Symmetries", 2023 (arXiv 2209.04836),
sections 3.1 and 3.2; correlations: Li, Yosinski, Clune, Lipson and Hopcroft, 2015 (arXiv 1511.07543).
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch

import torch
from torch import Tensor

from ..errors import CompositionError, listed
from ..types import Params, System, systems
from ._permutations import Permutations, PermutationSpec, full, moved, owners, permutation_sizes, rows

STATISTICS = ("*running_mean", "*running_var")
TESTS = "tests/test_alignment.py::"


@systems(
    System(
        (120,),
        "merging.permuted(b, spec, merging.match_weights(a, b, spec))",
        (
            TESTS + "test_weights_that_were_permuted_are_mapped_back",
            TESTS + "test_the_agreement_never_falls",
            "tests/test_recipes.py::test_permuted_networks_have_no_barrier",
        ),
        "Git Re-Basin (weights)",
        section="5.1",
    )
)
def match_weights(
    a: Params,
    b: Params,
    spec: PermutationSpec,
    most: int = 100,
    seed: int = 0,
    start: Permutations | None = None,
    skip: Sequence[str] = STATISTICS,
) -> dict[str, Tensor]:
    """π = arg max Σ_w ⟨w_a, π(w_b)⟩, one group's linear assignment at a time, until none gains: for `permuted(b, …)`.

        spec = methods.permutation_spec(net_a)
        moved = merging.permuted(b, spec, merging.match_weights(a, b, spec))

    a, b: state dicts. most: sweeps over all groups at most, each in a new random order (seed). start: permutations to
    begin from; the identity if None. skip: parameters that do not count, as fnmatch patterns; batch norm's running
    statistics, though they are moved. Sums are in float64 on the host. The maximum is a local one: finding the best is
    NP-hard from three layers on. Wants scipy. Raises CompositionError for a spec that does not fit both states, and
    for a group that owns two axes of one parameter, which makes the problem none of linear assignment.
    """
    sizes, owned = permutation_sizes(spec, a, b), owners(spec)
    twice = [name for name, axes in owned.items() if len({group for group, *_ in axes}) < len(axes)]
    if twice:
        raise CompositionError(
            f"match_weights: a group owns two axes of {listed(twice)}, so that its gain is not linear in its "
            f"permutation. Match by activations."
        )
    found = {group: torch.arange(n) for group, n in sizes.items()}
    found |= {group: p.cpu() for group, p in (start or {}).items()}
    counted = {g: [x for x in map(full, axes) if not matches(x[0], skip)] for g, axes in spec.items()}
    draw, groups = torch.Generator().manual_seed(seed), list(sizes)
    for _ in range(most):
        gained = False
        for i in torch.randperm(len(groups), generator=draw).tolist():
            group = groups[i]
            gain = torch.zeros(sizes[group], sizes[group], dtype=torch.float64)
            for name, axis, block in counted[group]:
                others = [axes for axes in owned[name] if axes[0] != group]
                gain += rows(a[name], axis, block) @ rows(moved(b[name], others, found), axis, block).mT
            was, new = found[group], assigned(gain)
            place = torch.arange(len(was))
            if gain[place, new].sum() > gain[place, was].sum() + 1e-12 * gain.abs().max() * len(was):
                gained, found[group] = True, new
        if not gained:
            break
    return found


@systems(
    System(
        (120,),
        "merging.match_activations(z_a, z_b)",
        (
            TESTS + "test_activations_find_the_permutation",
            "tests/test_recipes.py::test_permuted_networks_have_no_barrier",
        ),
        "Git Re-Basin (activations)",
        section="5.1",
    )
)
def match_activations(a: Mapping[str, Tensor], b: Mapping[str, Tensor], correlation: bool = False) -> dict[str, Tensor]:
    """P = arg max ⟨P, Z_aᵀ Z_b⟩ of each group by itself: the units of b that respond as those of a, for `permuted(b)`.

    a, b: activations of the same rows by group, (rows, n): see `methods.activations`. correlation: of activations less
    their means and divided by their deviations, as Li et al. and REPAIR match; a unit that never changes has 0 with
    all. Wants scipy. Raises CompositionError for groups or shapes that differ.
    """
    if set(a) != set(b):
        raise CompositionError(f"match_activations: the groups {listed(a)} of a, and {listed(b)} of b.")
    found = {}
    for group, z in a.items():
        other = b[group]
        if z.ndim != 2 or z.shape != other.shape:
            raise CompositionError(
                f"match_activations: {group!r} is {tuple(z.shape)} in a, {tuple(other.shape)} in b; both are (rows, n)."
            )
        z, other = z.detach().cpu().double(), other.detach().cpu().double()
        found[group] = assigned(_standard(z).mT @ _standard(other) if correlation else z.mT @ other)
    return found


def assigned(gain: Tensor) -> Tensor:
    """arg max_p Σ_i gain[i, p_i] over permutations; gain: (n, n)."""
    from scipy.optimize import linear_sum_assignment  # noqa: PLC0415

    return torch.as_tensor(linear_sum_assignment(gain.cpu().numpy(), maximize=True)[1])


def _standard(z: Tensor) -> Tensor:
    z = z - z.mean(0)
    norm = z.norm(dim=0)
    return z / torch.where(norm > 0, norm, 1.0)


def matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
