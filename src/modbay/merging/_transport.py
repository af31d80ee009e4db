"""OT fusion: the units of one network, carried to another's by optimal transport, layer after layer, then averaged.

Singh and Jaggi, "Model Fusion via Optimal Transport", 2020 (arXiv 1910.05653), algorithm 1.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .. import ops
from ..errors import CompositionError, listed
from ..types import Params, System, systems
from ._curve import interpolated
from ._permutations import PermutationSpec, full, owners, permutation_sizes, rows
from ._rebasin import STATISTICS, assigned, matches

TESTS = "tests/test_alignment.py::"


@systems(
    System(
        (121,),
        "merging.ot_fusion(a, b, spec)",
        (
            TESTS + "test_fusion_with_a_permuted_copy_is_the_original",
            TESTS + "test_a_transport_plan_is_optimal",
            TESTS + "test_networks_of_unequal_width_fuse",
        ),
        "OT fusion",
        section="5.1",
    )
)
def ot_fusion(
    a: Params,
    b: Params,
    spec: PermutationSpec,
    share: float = 0.5,
    activations: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None = None,
    squared: bool = False,
    entropy: float | None = None,
    skip: Sequence[str] = STATISTICS,
) -> dict[str, Tensor]:
    """θ = (1 − s) a + s b̃, b̃ = diag(1/μ_ℓ) T_ℓᵀ W_ℓ T_{ℓ−1} diag(1/μ_{ℓ−1}): b's units carried to a's, averaged.

    share: s. The rest is as for `transport_plans`. The fused network has a's widths; b may be wider or narrower, though
    not deeper. Whole numbers, as counters, are a's. Raises CompositionError where `transport_plans` does.
    """
    plans = transport_plans(a, b, spec, activations, squared, entropy, skip)
    return interpolated(a, transported(b, spec, plans), share)


def transport_plans(
    a: Params,
    b: Params,
    spec: PermutationSpec,
    activations: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None = None,
    squared: bool = False,
    entropy: float | None = None,
    skip: Sequence[str] = STATISTICS,
) -> dict[str, Tensor]:
    """T = arg min ⟨T, C⟩ − ε H(T) of each group, (n_b, n_a): uniform mass of b's units to a's, columns divided by it.

    C: the distance of two units. By their own weights, on axis 0 as torch has them, and biases, where those of b
    already take what they read from the groups before (so that the spec is in the order of the forward pass); or by
    their activations (of a, of b), (rows, n) by group, of the same rows. Columns sum to 1: how a's unit is made of
    b's. squared: of squared distances; the published runs are of plain ones. entropy: ε, relative to the mean of C, for
    Sinkhorn; None: exact, which is a permutation where the widths agree. skip: parameters that do not count.

    Differs from the code of the paper in that biases and norms count and are carried too (its networks have none), and
    the outputs keep their places. Wants scipy. Raises CompositionError for a spec that does not fit, or a group that
    owns no weights on axis 0 whose inputs are known.
    """
    sizes, theirs, owned = permutation_sizes(spec, a), permutation_sizes(spec, b), owners(spec)
    plans: dict[str, Tensor] = {}
    for group, axes in spec.items():
        if activations is None:
            own = [
                name
                for name, axis, _ in map(full, axes)
                if axis == 0 and not matches(name, skip) and all(g in plans for g, at, _ in owned[name] if at > 0)
            ]
            if not any(a[name].ndim > 1 for name in own):
                raise CompositionError(
                    f"spec: the group {group!r} owns no axis 0 of a weight whose inputs come from groups before it. "
                    f"Give groups in the order of the forward pass, or activations=."
                )
            x = torch.cat([rows(a[name], 0, 1) for name in own], -1)
            y = torch.cat([rows(_carried(b[name], owned[name], plans), 0, 1) for name in own], -1)
        else:
            x, y = (_responses(z, group, n) for z, n in zip(activations, (sizes[group], theirs[group]), strict=True))
            if x.shape[-1] != y.shape[-1]:
                raise CompositionError(f"activations[{group!r}]: {x.shape[-1]} rows of a, and {y.shape[-1]} of b.")
        cost = torch.cdist(y, x, compute_mode="donot_use_mm_for_euclid_dist")  # like units are at 0
        plans[group] = _plan(cost.square() if squared else cost, entropy)
    return plans


def transported(state: Params, spec: PermutationSpec, plans: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every axis of a group, carried: w'[…, j, …] = Σ_i T_ij w[…, i, …], T (n, m) with columns that sum to 1."""
    owned = owners(spec)
    return {name: _carried(tensor, owned.get(name, []), plans) for name, tensor in state.items()}


def _carried(tensor: Tensor, axes: Sequence[tuple[str, int, int]], plans: Mapping[str, Tensor]) -> Tensor:
    for group, axis, block in axes:
        if group in plans:
            plan = plans[group].to(tensor)
            cut = tensor.movedim(axis, -1)
            cut = cut.unflatten(-1, (len(plan), block)).mT @ plan  # (…, block, m)
            tensor = cut.mT.flatten(-2).movedim(-1, axis)
    return tensor


def _responses(activations: Mapping[str, Tensor], group: str, n: int) -> Tensor:
    z = activations.get(group)
    if z is None or z.ndim != 2 or z.shape[-1] != n:
        raise CompositionError(
            f"activations: {group!r} is {None if z is None else tuple(z.shape)}, of {listed(activations)}; it must be "
            f"(rows, {n})."
        )
    return z.detach().cpu().double().mT


def _plan(cost: Tensor, entropy: float | None) -> Tensor:
    """(n, m) of a cost (n, m): uniform masses, columns that sum to 1."""
    n, m = cost.shape
    if entropy is not None:
        return ops.sinkhorn(-cost.mT / (entropy * cost.mean().clamp(min=1e-30)), iterations=200).mT
    if n == m:
        return torch.eye(n, dtype=cost.dtype, device=cost.device)[assigned(-cost.mT)].mT
    from scipy.optimize import linprog  # noqa: PLC0415
    from scipy.sparse import eye_array, kron, vstack  # noqa: PLC0415

    ones = torch.ones(1, max(n, m), dtype=cost.dtype).numpy()
    sums = vstack([kron(eye_array(n), ones[:, :m]), kron(ones[:, :n], eye_array(m))])
    # Columns take 1 each, so that rows give m / n: no number is as small as a mass of 1 / (n m).
    mass = [m / n] * n + [1.0] * m
    found = linprog(cost.flatten().cpu().numpy(), A_eq=sums, b_eq=mass, method="highs")
    return torch.as_tensor(found.x).view(n, m).to(cost)
