"""Fisher merging: each entry is averaged by how sure each model is of it.

Matena and Raffel, "Merging Models with Fisher-Weighted Averaging", 2022 (arXiv 2111.09832).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import MergeError, listed
from ..types import System, systems
from ._models import State, each, fit, one_of, weighing, wide

FLOORS = ("first", "each", "added")


@systems(
    System(
        (125,),
        "merging.fisher(models, fishers)",
        (
            "tests/test_merging.py::test_the_laws_of_merging",
            "tests/test_merging.py::test_fisher_is_the_mean_by_precision",
            "tests/test_merging.py::test_fisher_is_the_paper_s_code_and_fusion_bench_s",
        ),
        "Fisher merging",
        section="5.1",
    )
)
def fisher(
    models: Sequence[State],
    fishers: Sequence[State],
    weights: Sequence[float] | None = None,
    normalise: bool = True,
    floor: str = "first",
    least: float = 1e-6,
) -> dict[str, Tensor]:
    """Σ_i λ_i F_i ⊙ θ_i / Σ_i λ_i F_i, F_i the diagonal of model i's Fisher information, λ_i its weight.

    fishers: one a model, its tensors named and shaped as the model's: 1/N Σ_x E_y (∂ log p(y | x)/∂θ)².
    `modbay.sparsity.fisher` finds them. Ones instead give the average.
    normalise: λ_i is divided by ‖F_i‖, over all tensors together, so that a model that is surer of everything counts no
    more. floor: "first", no F_i of the first model, the target, is below `least`, so that its entries stay where none
    is sure, as in the paper's code; "each", no F_i of any; "added", `least` is added to all, and to the norms, which is
    fusion_bench's.
    Raises MergeError for models or diagonals that do not fit, weights that are not one a model, a diagonal of zeros.
    """
    _fitting(models, fishers)
    given = weighing("fisher", weights, len(models))
    if normalise:
        given = [w / n for w, n in zip(given, norms(fishers, least if floor == "added" else 0.0), strict=True)]

    def core(name: str, tensors: list[Tensor], _: Tensor | None) -> Tensor:
        return fisher_tensor(tensors, [f[name] for f in fishers], given, floor, least)

    return each("fisher", models, None, core)


def fisher_tensor(
    tensors: Sequence[Tensor],
    fishers: Sequence[Tensor],
    weights: Sequence[float] | None = None,
    floor: str = "first",
    least: float = 1e-6,
) -> Tensor:
    """`fisher`, of the tensors of one name and their diagonals; weights as they are, by the `norms` if so wanted."""
    one_of("fisher", "floor", floor, FLOORS)
    given, sure = weighing("fisher", weights, len(tensors), normalise=True), []
    for i, (diagonal, w) in enumerate(zip(fishers, given, strict=True)):
        f = diagonal.to(wide(diagonal))
        if floor == "added":
            f = f + least
        elif floor == "each" or i == 0:
            f = f.clamp(min=least)
        sure.append(w * f)
    # Shares first, and then the sum: one model's share of what it alone knows is 1 to the bit.
    total = torch.stack(sure).sum(0)
    # Where no model is sure of an entry at all, their weights alone count.
    shares = [(torch.where(total == 0, w, s / total), t) for s, w, t in zip(sure, given, tensors, strict=True) if w]
    (share, first), *others = shares
    mean = share * first
    for share, tensor in others:
        mean = mean + share * tensor
    return mean.to(tensors[0].dtype)


def norms(fishers: Sequence[State], least: float = 0.0) -> list[float]:
    """‖F_i‖ + least, over all tensors of a model together: what weights are divided by."""
    found = [sum(float(t.double().square().sum()) for t in f.values()) ** 0.5 + least for f in fishers]
    if not all(found):
        empty = [i for i, n in enumerate(found) if not n]
        raise MergeError(
            f"fisher: fishers[{empty[0]}] is zero everywhere, and can't be normalised: it is of a model that learned "
            f"nothing from the data, or was made without gradients. Use normalise=False, or leave the model out."
        )
    return found


def _fitting(models: Sequence[State], fishers: Sequence[State]) -> None:
    """One diagonal a model, with a tensor as large for each of floating point."""
    fit("fisher", models)
    if len(fishers) != len(models):
        raise MergeError(f"fisher(fishers=…): there are {len(fishers)} for {len(models)} models. Give one a model.")
    need = {name: t.shape for name, t in models[0].items() if t.is_floating_point()}
    for i, given in enumerate(fishers):
        odd = [name for name, shape in need.items() if name not in given or given[name].shape != shape]
        if odd:
            raise MergeError(
                f"fisher: fishers[{i}] has no diagonal of the model's shape for {listed(odd)}. Give one, of ones for "
                f"what is to be averaged plainly, or take the tensors out of the models."
            )
