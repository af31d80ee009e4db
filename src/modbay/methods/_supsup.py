"""SupSup: a sub-network of one random network for each task, and the task told from the input.

Wortsman, Ramanujan, Liu, Kembhavi, Rastegari, Yosinski and Farhadi, "Supermasks in Superposition", 2020 (arXiv
2006.14769).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..abstract import Routing
from ..attach import Bay
from ..errors import BayError, CompositionError
from ..types import System, systems


def signed_constant(weight: Tensor) -> Tensor:
    """±√(2/n) by the sign of each entry, n the inputs of one output: the random weights that masks like best, in place.

    weight: (o, i, …). Ramanujan et al., 2020 (arXiv 1911.13299), section 4.
    """
    gain, fan = nn.init.calculate_gain("relu"), nn.init._calculate_correct_fan(weight, "fan_in")
    with torch.no_grad():
        return weight.sign_().mul_(gain / fan**0.5)


@systems(
    System(
        (15,),
        'infer_task(bay, lambda: losses.superfluous(net(x), 10), search="binary")',
        (
            "tests/test_sparse.py::test_the_task_is_inferred_from_a_superposition",
            "tests/test_recipes.py::test_supermasks_tell_their_tasks",
        ),
        "SupSup",
        section="3.1",
    )
)
def infer_task(bay: Bay, objective: Callable[[], Tensor], search: str = "one-shot") -> str:
    """The module that argmin_i ∂G/∂α_i names, where all n run superposed, W ⊙ Σ α_i m_i, each at α_i = 1/n.

    bay: of `Masked` or `SubNetwork` modules, one a task, under a WeightedSum. objective: runs the model on rows of one
    unknown task, and returns G: `losses.entropy(logits)` or `losses.superfluous(logits, real)`. search: "one-shot" asks
    for one gradient; "binary" for log₂ n of them, each of which leaves the better half of the modules (of an odd number
    the larger part, as in the official code). The bay's route is as before afterwards.
    Raises CompositionError for another search, and BayError for a bay without modules.
    """
    if search not in ("one-shot", "binary"):
        raise CompositionError(f'infer_task(search={search!r}): it is "one-shot" or "binary".')
    names, before = bay.names(), bay.state.chosen
    if not names:
        raise BayError(f"infer_task: bay {bay.state.name!r} has no modules to choose from.")
    left = list(range(len(names)))
    try:
        while len(left) > 1:
            alpha = torch.full((len(left),), 1 / len(left), requires_grad=True)
            bay.state.chosen = Routing(index=torch.tensor(left), weights=alpha, host=(tuple(left),))
            with torch.enable_grad():
                (slope,) = torch.autograd.grad(objective(), alpha)
            keep = 1 if search == "one-shot" else (len(left) + 1) // 2
            left = [left[i] for i in slope.argsort()[:keep].tolist()]
    finally:
        bay.state.chosen = before
    return names[left[0]]
