"""Soft parameter sharing: losses that keep the networks of several tasks near each other.

Distance: Duong, Cohn, Bird and Cook, "Low Resource Dependency Parsing: Cross-lingual Parameter Sharing in a Neural
Network Parser", 2015 (ACL). Trace norm: Yang and Hospedales, "Trace Norm Regularised Deep Multi-Task Learning", 2017
(arXiv 1606.04038). Orthogonal subspaces: Ruder, Bingel, Augenstein and Søgaard, 2019 (arXiv 1705.08142).
"""

from collections.abc import Iterable
from itertools import combinations

import torch
from torch import Tensor

from ..types import System, systems

WRITTEN = "tests/test_networks.py::test_the_losses_of_soft_sharing_are_written_out"
NEAR = "tests/test_networks.py::test_soft_sharing_keeps_the_networks_of_two_tasks_near"


@systems(System((33,), "losses.distance(weights)", (WRITTEN, NEAR), "soft sharing by distance"))
def distance(weights: Iterable[Tensor]) -> Tensor:
    """Σ_{a<b} ‖θ_a − θ_b‖², of one parameter in the networks of several tasks; tensors of one shape."""
    pairs = combinations(list(weights), 2)
    return sum(((a - b).square().sum() for a, b in pairs), start=torch.zeros(()))


@systems(System((33,), "losses.trace_norm(weights)", (WRITTEN, NEAR), "soft sharing by trace norm"))
def trace_norm(weights: Iterable[Tensor], unfoldings: str = "last") -> Tensor:
    """‖W‖_*, the sum of the singular values of the tasks' parameters (…) stacked and flattened to a matrix.

    unfoldings: "last", one row a task, so that all are combined of few (the paper's LAF); or "tucker", the sum over all
    axes of the stack, each of which is the rows once.
    """
    stack = torch.stack(list(weights))
    axes = range(1 if unfoldings == "last" else stack.ndim)
    norms = [torch.linalg.matrix_norm(stack.movedim(axis, 0).flatten(1), "nuc") for axis in axes]
    return torch.stack(norms).sum()


def orthogonality(weight: Tensor, subspaces: int = 2) -> Tensor:
    """Σ_{k<l} ‖W_kᵀ W_l‖²_F over the parts W_k (o/S, i) of a layer's weight (o, i), which give the S subspaces of its
    output."""
    parts = weight.flatten(1).unflatten(0, (subspaces, -1))
    return sum(((a.mT @ b).square().sum() for a, b in combinations(parts, 2)), start=weight.new_zeros(()))
