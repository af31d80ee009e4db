"""Heads for a few rows: linear probes on what the base says under a module that stays as it is.

Kumar et al., 2022 (arXiv 2202.10054): probe first, then tune.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._bench import Bench
from ._mix import Tensors

STEPS, RATE = 100, 6e-3  # a search tries many: as far as the run's own probe goes, in a third of its steps


def probe(features: Tensor, target: Tensor, shares: Tensor, classes: int, measured: bool) -> dict[str, Tensor]:
    """k linear heads on fixed features (n, d), all by Adam on all rows at once, from zero, the rate falling to zero.

    target: (n,), classes as numbers, or what is measured. shares: (k, n), how much a row counts for each head, each
    summing to one. Gives weight (k, classes, d) and bias (k, classes).
    """
    weight = features.new_zeros(len(shares), classes, features.shape[1])
    bias = features.new_zeros(len(shares), classes)
    head = {"weight": weight, "bias": bias + (shares @ target).unsqueeze(1) if measured else bias}
    learned = [tensor.requires_grad_() for tensor in head.values()]
    optimiser = torch.optim.Adam(learned, RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / STEPS)
    with torch.enable_grad():
        for _ in range(STEPS):
            loss = (probed(head, features, target, measured) * shares).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return {key: tensor.detach() for key, tensor in head.items()}


def probed(head: Mapping[str, Tensor], features: Tensor, target: Tensor, measured: bool) -> Tensor:
    """The loss of each of n rows under each of k heads, (k, n)."""
    logits = torch.einsum("nd,kcd->knc", features, head["weight"]) + head["bias"].unsqueeze(1)
    if measured:
        return 0.5 * (logits[..., 0] - target) ** 2
    wanted = target.long().expand(logits.shape[:2])
    return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view(wanted.shape)


def start_head(bench: Bench, module: Tensors, places: Sequence[int]) -> dict[str, Tensor]:
    """The head that tuning begins with: a known task's own; of a new task, a probe on these rows under the module."""
    if not bench.head_slots or bench.own is not None:
        return dict(bench.own or {})
    features, target, _ = bench.features(module, places)
    shares = torch.full((1, len(target)), 1 / len(target), device=target.device)
    made = probe(features, target, shares, bench.classes, bench.measured)
    return {f"head/{key}": tensor[0] for key, tensor in made.items()}


def zero_shot(bench: Bench, module: Tensors, places: Sequence[int]) -> float:
    """The loss of these rows under a module that is not tuned: with the known head, or else with a probed one.

    A probe is judged by rows that it did not see, in folds; where none can be held out, by its own.
    """
    if not bench.head_slots or bench.own is not None:
        return bench.loss(module, bench.own or {}, places)
    features, target, owners = bench.features(module, places)
    fold = dict(zip(places, bench.folds(places), strict=True))
    each = torch.tensor([fold[i] for i in owners], device=target.device)
    held = torch.stack([each == j for j in range(max(1, int(each.max()) + 1))])
    seen = ~held if bool(held.any()) else torch.ones_like(held)
    shares = seen / seen.sum(1, keepdim=True)
    said = probed(probe(features, target, shares, bench.classes, bench.measured), features, target, bench.measured)
    return float(said[held].mean() if bool(held.any()) else said.mean())
