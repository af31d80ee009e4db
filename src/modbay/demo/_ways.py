"""The ways to share among languages, each as what `mb.attach` is given: modules, a router, an aggregator.

A call's label `language` routes two bays: "language" in the encoder, and "head" over it, where the twelve share one
trained copy of the base's head. All that is learned is in modules, so the base stays as it was, and any way can be put
on it from its files.

Polytropon: Ponti, Sordoni, Bengio and Reddy, 2022 (arXiv 2202.13914). A module a language: Pfeiffer, Vulić, Gurevych
and Ruder, "MAD-X", 2020 (arXiv 2005.00052), with the two modules added here rather than one after the other.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import modbay as mb

from ._encode import Assistant, Row, sample
from ._train import by_language, fit

SITES = (mb.role.query, mb.role.value, mb.role.ffn_in, mb.role.ffn_out)
ROUTER_LR = 3e-2  # of Polytropon's gates, which start at nothing and are few


def lora(rank: int = 8) -> mb.LoRA:
    """A module of the encoder; the factor α/r is 2 at any rank, so that ranks learn alike."""
    return mb.LoRA(rank, alpha=2.0 * rank)


@dataclass(frozen=True)
class Way:
    """One way to share. `lr` is of its modules, `head_lr` of the head's copy: chosen on development, each way alike."""

    name: str
    title: str
    modules: Callable[[Sequence[str]], dict[str, mb.Kind]]
    router: Callable[[Sequence[str]], mb.Router]
    lr: float
    head_lr: float = 3e-4
    averages: bool = False


def _table(*always: str, own: bool) -> Callable[[Sequence[str]], mb.Router]:
    """Each language gets the modules that all have, and its own."""
    return lambda languages: mb.ByLabel("language", {l: [*always, l] if own else list(always) for l in languages})


# Rates: the best on development of those in benchmarks/_demo_settings.py, 150 steps, seed 0.
SHARED = Way("shared", "One shared module, rank 8", lambda _: {"shared": lora()}, _table("shared", own=False), 3e-3)
WIDER = Way(
    "shared-16", "One shared module, rank 16", lambda _: {"shared": lora(16)}, _table("shared", own=False), 3e-3
)
PRIVATE = Way("private", "A module a language", lambda names: {name: lora() for name in names}, _table(own=True), 1e-3)
POLYTROPON = Way(
    "polytropon",
    "Polytropon, 8 skills",
    lambda _: {f"skill{i}": lora() for i in range(8)},
    lambda languages: mb.Skills("language", list(languages)),
    3e-3,
    averages=True,
)
BOTH = Way(
    "shared-and-language",
    "Shared + a module a language",
    lambda names: {"shared": lora(), **{name: lora() for name in names}},
    _table("shared", own=True),
    3e-3,
)
WAYS = (SHARED, WIDER, PRIVATE, POLYTROPON, BOTH)


def attached(way: Way, base: Assistant, languages: Sequence[str]) -> Assistant:
    """A copy of the base with the bays of a way, new."""
    model = copy.deepcopy(base)
    aggregator = mb.ParameterAverage() if way.averages else mb.WeightedSum()
    mb.attach(model, SITES, way.modules(languages), way.router(languages), aggregator, name="language")
    head = mb.ByLabel("language", dict.fromkeys(languages, "twelve"))
    mb.attach(model, "head", {"twelve": mb.Full()}, head, name="head")
    return model


def groups(model: Assistant, lr: float, head_lr: float, router_lr: float = ROUTER_LR) -> list[dict[str, Any]]:
    """All that learns in a model's bays, as an optimiser takes it."""
    bays = mb.bays(model)
    return [*bays["language"].parameter_groups(lr, router_lr), *bays["head"].parameter_groups(head_lr)]


def learning(model: Assistant) -> int:
    """How many parameters learn."""
    return sum(p.numel() for group in groups(model, 0.0, 0.0) for p in group["params"])


def train(way: Way, base: Assistant, chosen: Sequence[Row], steps: int, seed: int) -> Assistant:
    """A way, trained on all the languages together; languages drawn ∝ √(their utterances)."""
    torch.manual_seed(seed)
    model = attached(way, base, list(dict.fromkeys(row.language for row in chosen)))
    return fit(model, sample(chosen, steps, seed=seed), groups(model, way.lr, way.head_lr), steps, call=by_language)  # type: ignore[return-value]
