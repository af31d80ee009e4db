"""LoraHub: how much each module counts in the average, from a few examples of a new task, without a gradient or by one.

Huang, Liu, Lin, Pang, Du and Lin, "LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition", 2023
(arXiv 2307.13269); penalty, bounds and start as in the authors' code.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..abstract import Routing
from ..attach import Bay
from ..errors import CompositionError
from ..types import System, systems
from ._weighed import as_before, members, slope

LIMIT, L1 = 1.5, 0.05  # weights within ±1.5; the coefficient of their mean absolute value
RADIUS, FAR = 0.5, 1e9  # how far the first tries are from w = 0; what is said of a loss that is not finite

TESTS = "tests/test_soups.py::"


@systems(
    System(
        (),
        "bay.use(methods.lora_hub(bay, lambda: model(**batch).loss))",
        (
            TESTS + "test_lora_hub_finds_the_weights_that_made_the_examples",
            TESTS + "test_lora_hub_minimises_the_penalised_loss_of_the_average",
            TESTS + "test_the_search_keeps_its_bounds_and_its_budget",
        ),
        "LoraHub",
        "φ = Σ_i w_i φ_i, w = arg min L(φ; examples) + 0.05/n Σ_i |w_i| within ±1.5, by 40 tries",
        section="5.1",
    ),
    System(
        (),
        'bay.use(methods.lora_hub(bay, lambda: model(**batch).loss, by="gradient"))',
        (
            TESTS + "test_weights_by_gradient_are_these_steps",
            TESTS + "test_lora_hub_finds_the_weights_that_made_the_examples",
        ),
        "learned interpolation of modules",
        "φ = Σ_i softmax(z)_i φ_i, z by the gradient of L(φ; examples), φ_i as they are",
        section="5.1",
    ),
)
def lora_hub(
    bay: Bay,
    objective: Callable[[], Tensor],
    names: Sequence[str] | None = None,
    steps: int = 40,
    by: str = "search",
    l1: float = L1,
    limit: float = LIMIT,
    lr: float = 0.2,
) -> dict[str, float]:
    """φ = Σ_i w_i φ_i, w = arg min L(φ) + l1/n Σ_i |w_i| within ±limit: weights for `bay.use`, by name.

        bay = mb.attach(model, modules={"nli": mb.LoRA(16), "qa": mb.LoRA(16), …}, aggregator=mb.ParameterAverage())
        bay.use(methods.lora_hub(bay, lambda: model(**examples).loss))

    bay: under ParameterAverage, A and B are averaged each, as in the authors' code, so that w and −w give one LoRA, and
    L is flat at w = 0; under ParameterAverage("deltas") or WeightedSum their products are. objective: runs the model on
    the few examples, and gives L. names: the modules that take part, all if None; the paper draws 20. by: "search",
    `search_weights`, which runs the model forwards alone, `steps` times; or "gradient", w = softmax(z), z by so many
    steps of Adam at `lr` from z = 0, for which neither bounds nor penalty are of use. Modules stay as they are, and get
    no gradient. Put the model into evaluation mode, and give the bay no label in the objective, which would go before.
    Raises BayError for a name that is no module, CompositionError for another `by`, or an L without use.
    """
    if by not in ("search", "gradient") or steps < 1 or l1 < 0 or not limit > 0 or not lr > 0:
        raise CompositionError(
            f"lora_hub(steps={steps}, by={by!r}, l1={l1}, limit={limit}, lr={lr}): by 'search' or 'gradient', in one "
            f"step or more, with an l1 that is not negative, a limit and a rate above 0."
        )
    taking = members("lora_hub", bay, names)
    with as_before(bay):
        if by == "gradient":
            return dict(zip(taking, _by_gradient(bay, objective, tuple(taking.values()), steps, lr), strict=True))

        @torch.no_grad()
        def loss(w: list[float]) -> float:
            bay.use(dict(zip(taking, w, strict=True)))
            return float(objective())

        return dict(zip(taking, search_weights(loss, len(taking), steps, l1, limit), strict=True))


def _by_gradient(bay: Bay, objective: Callable[[], Tensor], ids: tuple[int, ...], steps: int, lr: float) -> list[float]:
    device = next(iter(bay.modulars.values())).site.device
    index, z = torch.tensor(ids, device=device), torch.zeros(len(ids), device=device)
    route = lambda z: Routing(index=index, weights=z.softmax(0), host=(ids,))
    optimiser = torch.optim.Adam([z], lr)
    for _ in range(steps):
        z.grad = slope("lora_hub", bay, objective, z, route)
        optimiser.step()
    return z.softmax(0).tolist()


def search_weights(
    loss: Callable[[list[float]], float], n: int, steps: int, l1: float = L1, limit: float = LIMIT
) -> list[float]:
    """w (n,) within ±limit that minimises loss(w) + l1 · Σ_i |w_i| / n, from w = 0, without a gradient.

    steps: how often the loss is asked for, n + 2 times at least. The best point that was tried is given back. By
    COBYLA, a trust region of linear models, of scipy, which this wants; the authors' nevergrad takes NGOpt, which, for
    so few tries, came to the same values on averages of 3, 8 and 20 random LoRAs (means over problems, after 40 tries:
    0.119, 0.181 and 0.363 by both; Nelder–Mead 0.120, 0.491 and 0.797, differential evolution 0.393, 0.937 and 1).
    Raises CompositionError for a loss that is finite nowhere.
    """
    import numpy  # noqa: PLC0415
    from scipy.optimize import minimize  # noqa: PLC0415

    seen: list[tuple[float, list[float]]] = []

    def penalised(tried: Any) -> float:
        w = numpy.clip(tried, -limit, limit)
        value = loss(w.tolist()) + l1 * float(numpy.abs(w).mean())
        seen.append((value if math.isfinite(value) else FAR, w.tolist()))
        return seen[-1][0]

    options = {"rhobeg": min(RADIUS, limit), "maxiter": max(steps, n + 2)}
    minimize(penalised, numpy.zeros(n), method="COBYLA", bounds=[(-limit, limit)] * n, tol=1e-3, options=options)
    value, w = min(seen, key=lambda one: one[0])
    if value >= FAR:
        raise CompositionError(
            f"search_weights: the loss was not finite in any of {len(seen)} tries, w = 0 among them."
        )
    return w
