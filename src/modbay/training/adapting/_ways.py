"""Ways to serve a new task with few rows, given the modules of others. Each ends in one module, and a head.

Routing alone: Ponti et al., Polytropon, 2022 (arXiv 2202.13914), section 3: a new task's gates over skills that are
frozen. Average: Caccia et al., "Multi-Head Adapter Routing", 2023 (arXiv 2211.03831), MHR-μ: the modules' mean, then
tuned. Nearest: as Vu et al., "SPoT", 2022 (arXiv 2110.07904) start a prompt from that of a task which is alike.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor, nn

from ...methods import search_weights
from ._bench import Bench
from ._head import start_head, zero_shot
from ._mix import Tensors, mixed, sigmoid_weights, softmax_weights

GATES = 0.2  # Adam's rate of gates: they start at nothing, and have but few steps


@dataclass(frozen=True)
class Found:
    """A module and a head; weights: of the modules that it was made of; trained: how many numbers were learned."""

    module: Tensors
    head: Tensors
    trained: int
    weights: dict[str, float]


@dataclass(frozen=True)
class Way:
    """A way by name, with a title for tables."""

    name: str
    title: str
    find: Callable[[Bench, Sequence[int]], Found]


def routed(bench: Bench, places: Sequence[int], weigh: Callable[[Tensor], Tensor]) -> Found:
    """Gates z over frozen modules, φ = Σ_i weigh(z)_i φ_i, learned with the head."""
    gates = torch.zeros(len(bench.modules), device=bench.network.device, requires_grad=True)
    made = lambda: mixed(bench.stack, weigh(gates))
    head = start_head(bench, {k: v.detach() for k, v in made().items()}, places)
    learned = {} if bench.keeps else learning(head)
    descend(bench, made, {**head, **learned}, [{"params": [gates], "lr": GATES}, *rates(bench, learned)], places)
    weights = weigh(gates).detach()
    trained = gates.numel() + sum(p.numel() for p in learned.values())
    return Found(mixed(bench.stack, weights), {**head, **detached(learned)}, trained, named(bench, weights.tolist()))


def lorahub(bench: Bench, places: Sequence[int]) -> Found:
    """Weights within ±1.5 by search, without a gradient; the loss is of the known head, or of one probed at each try.

    Then the head learns under the module that was found: the paper's models have none.
    """
    device = bench.network.device
    mix = lambda weights: mixed(bench.stack, torch.tensor(weights, device=device))
    weights = search_weights(lambda w: zero_shot(bench, mix(w), places), len(bench.modules), bench.steps)
    module = mix(weights)
    head = start_head(bench, module, places)
    learned = {} if bench.keeps else learning(head)
    if learned:
        descend(bench, lambda: module, learned, rates(bench, learned), places)
    trained = len(weights) + sum(p.numel() for p in learned.values())
    return Found(module, {**head, **detached(learned)}, trained, named(bench, weights))


def tuned(bench: Bench, places: Sequence[int], start: Tensors, weights: dict[str, float]) -> Found:
    """A module that starts somewhere, and the head, learn together."""
    module, head = learning(start), start_head(bench, start, places)
    learned = {} if bench.keeps else learning(head)
    groups = [{"params": list(module.values()), "lr": bench.config.lr}, *rates(bench, learned)]
    descend(bench, lambda: module, {**head, **learned}, groups, places)
    trained = sum(p.numel() for p in [*module.values(), *learned.values()])
    return Found(detached(module), {**head, **detached(learned)}, trained, weights)


def average(bench: Bench, places: Sequence[int]) -> Found:
    """φ_0 = Σ_i φ_i / n, then tuned."""
    n = len(bench.modules)
    weights = torch.full((n,), 1 / n, device=bench.network.device)
    return tuned(bench, places, mixed(bench.stack, weights), named(bench, weights.tolist()))


def nearest(bench: Bench, places: Sequence[int]) -> Found:
    """The module under which the rows have the lowest loss before anything is tuned; then tuned."""
    losses = {name: zero_shot(bench, module, places) for name, module in bench.modules.items()}
    name = min(losses, key=lambda one: losses[one])
    return tuned(bench, places, bench.modules[name], {name: 1.0})


def scratch(bench: Bench, places: Sequence[int]) -> Found:
    """A new module, drawn as all are."""
    return tuned(bench, places, bench.fresh, {})


WAYS: dict[str, Way] = {
    way.name: way
    for way in (
        Way("routing-sigmoid", "Routing, sigmoid gates", lambda b, p: routed(b, p, sigmoid_weights)),
        Way("routing-softmax", "Routing, softmax", lambda b, p: routed(b, p, softmax_weights)),
        Way("lorahub", "Weights by search", lorahub),
        Way("average", "Average, then tuned", average),
        Way("nearest", "Nearest, then tuned", nearest),
        Way("scratch", "A new module", scratch),
    )
}


def descend(
    bench: Bench, made: Callable[[], Tensors], head: Tensors, groups: list[dict], places: Sequence[int]
) -> None:
    """Adam on the groups' tensors, in place, rates falling to zero. made: the module as these tensors have it."""
    learned = [tensor for group in groups for tensor in group["params"]]
    optimiser = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / bench.steps)
    draws, size = rounds(places, bench.seed), min(bench.config.batch, len(places))
    for step in range(bench.steps):
        sums, counts = bench.losses(made(), head, [next(draws) for _ in range(size)], step)
        optimiser.zero_grad()
        (sums.sum() / counts.sum().clamp_min(1)).backward()
        nn.utils.clip_grad_norm_(learned, bench.config.clip)
        optimiser.step()
        schedule.step()


def rounds(places: Sequence[int], seed: int) -> Iterator[int]:
    """The places in random order, again and again."""
    rng = Random(f"adapt-{seed}")
    while True:
        yield from rng.sample(list(places), len(places))


def learning(tensors: Tensors) -> dict[str, Tensor]:
    """Copies that learn."""
    return {key: tensor.detach().clone().requires_grad_() for key, tensor in tensors.items()}


def detached(tensors: Tensors) -> dict[str, Tensor]:
    return {key: tensor.detach() for key, tensor in tensors.items()}


def rates(bench: Bench, head: Tensors) -> list[dict]:
    """The parameter group of a head that learns."""
    return [{"params": list(head.values()), "lr": bench.config.head_lr or bench.config.lr}] if head else []


def named(bench: Bench, weights: Sequence[float]) -> dict[str, float]:
    """Weights by the names of the modules."""
    return dict(zip(bench.modules, weights, strict=True))
