"""Git Re-Basin by gradients: permutations that lower the loss of the middle, learned by a straight-through estimate.

Ainsworth, Hayase and Srinivasa, "Git Re-Basin: Merging Models modulo Permutation Symmetries", 2023 (arXiv 2209.04836),
section 3.3; straight through: Bengio, Léonard and Courville, 2013 (arXiv 1308.3432).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..merging import PermutationSpec, interpolated, match_weights, permuted
from ..types import Params, System, systems
from ._connect import Loss, over_again
from ._swapped import called_with


@systems(
    System(
        (120,),
        "methods.match_by_gradient(model, a, b, spec, batches, loss)",
        ("tests/test_alignment.py::test_permutations_are_learned_straight_through",),
        "Git Re-Basin (straight through)",
        section="5.1",
    )
)
def match_by_gradient(
    model: nn.Module,
    a: Params,
    b: Params,
    spec: PermutationSpec,
    batches: Iterable[Any],
    loss: Loss,
    steps: int = 1000,
    optimiser: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """π = arg min L(½ (θ_a + π(θ_b))), π = arg max ⟨θ̃, π(θ_b)⟩ of θ̃ that learns, from θ_a on: for `permuted(b, …)`.

        p = methods.match_by_gradient(net, a, b, spec, batches, loss, steps=200)

    Forward, the middle has π(θ_b); backward, the gradient passes to θ̃ as if it were that. Each step matches anew by
    `merging.match_weights`, from the last permutations. Those of the lowest loss of a batch are given, as in the
    paper's code, whose optimiser, SGD(lr=0.01, momentum=0.9), is the default; it takes 250 epochs. Wants scipy. Raises
    CompositionError for a spec or states that do not fit, and for batches that are none.
    """
    moving = {name for name, _ in model.named_parameters()} & set(a)
    free = {name: w.detach().clone().requires_grad_(name in moving) for name, w in a.items()}
    learns = [free[name] for name in free if name in moving]
    step = (optimiser or (lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9)))(learns)
    best, lowest, found = {}, float("inf"), None
    for i, batch in zip(range(steps), over_again(batches), strict=False):
        found = match_weights(free, b, spec, seed=seed + i, start=found)
        moved = {name: w.detach() for name, w in permuted(b, spec, found).items()}
        through = {n: w + (free[n] - free[n].detach()) if n in moving else w for n, w in moved.items()}
        value = loss(called_with(model, interpolated(a, through, 0.5)), batch)
        if (now := value.item()) < lowest:
            best, lowest = found, now
        for w, gradient in zip(learns, torch.autograd.grad(value, learns, allow_unused=True), strict=True):
            w.grad = gradient
        step.step()
    return best
