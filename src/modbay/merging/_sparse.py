"""Sparse fine-tunings as differences from the base, added up: languages and tasks learned apart, used together.

Ansell, Ponti, Korhonen and Vulić, "Composable Sparse Fine-Tuning for Cross-Lingual Transfer", 2022 (arXiv 2110.07560).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import MergeError, listed
from ..types import System, systems
from ._models import State, each, fit, weighing, wide

Sparse = tuple[Tensor, Tensor]
"""Flat indices (k,) into a tensor, and what is added there (k,)."""


@systems(
    System(
        (130,),
        "merging.add_sparse(base, [language, task])",
        (
            "tests/test_merging.py::test_sparse_differences_add_up",
            "tests/test_merging.py::test_the_laws_of_merging",
        ),
        "LT-SFT sum",
        section="5.1",
    )
)
def add_sparse(
    base: State, deltas: Sequence[Mapping[str, Sparse]], weights: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """θ₀ + Σ_i w_i φ_i, φ_i sparse: flat indices and values by a tensor's name; entries that several change add up.

    A delta need not name every tensor. The base's integers stay. Raises MergeError for a name that the base has not, an
    index outside its tensor, and weights that are not one a delta.
    """
    given = weighing("add_sparse", weights, len(deltas))
    for i, delta in enumerate(deltas):
        strange = [n for n in delta if n not in base or not base[n].is_floating_point()]
        if strange:
            raise MergeError(f"add_sparse: deltas[{i}] changes {listed(strange)}, which the base has not to change.")
        for name, (indices, values) in delta.items():
            n = base[name].numel()
            inside = not len(indices) or 0 <= int(indices.min()) <= int(indices.max()) < n
            if indices.shape != values.shape or not inside:
                raise MergeError(
                    f"add_sparse: deltas[{i}][{name!r}] has {len(indices)} indices for {len(values)} values, or one "
                    f"that is not among the {n} entries of the base's. It is of another base."
                )

    def core(name: str, tensors: list[Tensor], _: Tensor | None) -> Tensor:
        parts = [(delta[name], w) for delta, w in zip(deltas, given, strict=True) if name in delta]
        return add_sparse_tensor(tensors[0], [part for part, _ in parts], [w for _, w in parts])

    return each("add_sparse", [base], None, core)


def add_sparse_tensor(base: Tensor, deltas: Sequence[Sparse], weights: Sequence[float] | None = None) -> Tensor:
    """`add_sparse`, of the tensors of one name. The changes are added up before the base is."""
    given, total = weighing("add_sparse", weights, len(deltas)), torch.zeros(base.numel(), device=base.device)
    total = total.to(wide(base))
    for (indices, values), w in zip(deltas, given, strict=True):
        total = total.index_add(0, indices.to(base.device), values.to(total), alpha=w)
    return (base.to(total.dtype) + total.view_as(base)).to(base.dtype)


def sparse_difference(model: State, base: State) -> dict[str, Sparse]:
    """θ − θ₀ where it is not zero, in float32 at least: flat indices and values by a tensor's name.

    Tensors that are as in the base are left out. Raises MergeError for models that do not fit.
    """
    fit("sparse_difference", [model, base])
    found = {}
    for name, tensor in model.items():
        if tensor.is_floating_point():
            change = (tensor.to(wide(tensor)) - base[name].to(wide(tensor))).flatten()
            indices = change.nonzero().squeeze(-1)
            if len(indices):
                found[name] = (indices, change[indices])
    return found


def sum_sparse(deltas: Sequence[Mapping[str, Sparse]], weights: Sequence[float] | None = None) -> dict[str, Sparse]:
    """Σ_i w_i φ_i, sparse as they are: the indices that any of them has, in order; those that several have add up."""
    given, found = weighing("sum_sparse", weights, len(deltas)), {}
    for name in {name: None for delta in deltas for name in delta}:
        parts = [(*delta[name], w) for delta, w in zip(deltas, given, strict=True) if name in delta]
        indices, place = torch.cat([i for i, _, _ in parts]).unique(return_inverse=True)
        values = torch.cat([v.to(wide(v)) * w for _, v, w in parts])
        found[name] = (indices, values.new_zeros(len(indices)).index_add(0, place, values))
    return found
