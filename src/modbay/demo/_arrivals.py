"""A language that arrives later, with a few utterances an intent: what can be done, and what it costs the others.

Each way takes a model that the twelve have trained and makes it know the newcomer as well. Where it must leave
the twelve alone, what they use is frozen; that their logits stay as they were is measured afterwards, not assumed.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

import modbay as mb

from ._encode import Assistant, Row, sample
from ._train import by_language, fit
from ._ways import SITES, groups, lora

Open = Callable[[Assistant, str], Assistant]
"""Makes a place for a newcomer in a model; what learns there requires gradients."""


@dataclass(frozen=True)
class Arrival:
    """One way to take a newcomer in.

    `start`: which trained way it starts from, "base" for none of them. `joins`: newcomers come into one model, one
    after the other, since none touches what another uses. `lr` is of what learns in the encoder, gates or modules,
    `head_lr` of the head.
    """

    name: str
    title: str
    start: str
    open: Open
    lr: float
    head_lr: float
    joins: bool = True


def assign(bay: mb.Bay, label: str, *modules: str) -> None:
    """From now on a label of the call means these modules."""
    router = bay.state.router
    assert isinstance(router, mb.ByLabel)
    router.allocate(label, *modules)


def _frozen(model: Assistant) -> tuple[mb.Bay, mb.Bay]:
    """The two bays of a model, all that is in them frozen."""
    bays = mb.bays(model)
    return bays["language"].freeze(), bays["head"].freeze()


def own_head(model: Assistant, language: str) -> Assistant:
    """The shared module as it is, under a copy of the twelve's head for the newcomer alone."""
    bay, head = _frozen(model)
    assign(bay, language, "shared")
    head.add(language, mb.Full())
    assign(head, language, language)
    with torch.no_grad():
        for new, old in zip(head.parameters(language), head.parameters("twelve"), strict=True):
            new.copy_(old)
    return model


def own_module(model: Assistant, language: str) -> Assistant:
    """A new module on the shared one, and a copy of the head."""
    own_head(model, language)
    bay = mb.bays(model)["language"].add(language, lora())
    assign(bay, language, "shared", language)
    return model


def in_place(model: Assistant, language: str) -> Assistant:
    """The twelve's own shared module and head, tuned."""
    bay, head = _frozen(model)
    assign(bay, language, "shared")
    assign(head, language, "twelve")
    bay.unfreeze("shared")
    head.unfreeze("twelve")
    return model


def from_scratch(base: Assistant, language: str) -> Assistant:
    """A new module and a new head on the bare base: nothing of the twelve."""
    mb.attach(base, SITES, {language: lora()}, name="language")
    mb.attach(base, "head", {language: mb.Head(base.head.out_features)}, mb.ByLabel("language"), name="head")
    return base


def routing_only(model: Assistant, language: str) -> Assistant:
    """Gates on the skills that are there: eight numbers."""
    bay, head = _frozen(model)
    skills = bay.state.router
    assert isinstance(skills, mb.Skills)
    quiet(lambda: skills.extend(language))
    skills.requires_grad_(True)
    assign(head, language, "twelve")
    return model


def quiet(run: Callable[[], object]) -> None:
    """Run without modbay's word to those who have an optimiser already: here it is made afterwards."""
    log = logging.getLogger("modbay")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        run()
    finally:
        log.setLevel(before)


# Rates: the best on development of those in benchmarks/_demo_settings.py, k = 4, the mean of the newcomers, seed 0.
MODULE = Arrival("module", "New module, own head", "shared-and-language", own_module, 1e-3, 3e-3)
HEAD = Arrival("head", "Own head alone", "shared-and-language", own_head, 0.0, 3e-3)
IN_PLACE = Arrival("in-place", "Shared tuned in place", "shared-and-language", in_place, 1e-3, 3e-3, joins=False)
SCRATCH = Arrival("scratch", "From scratch", "base", from_scratch, 3e-3, 3e-3, joins=False)
ROUTING = Arrival("routing", "Routing only (Polytropon)", "polytropon", routing_only, 3e-2, 0.0)
ARRIVALS = (MODULE, HEAD, IN_PLACE, SCRATCH, ROUTING)


def arrive(way: Arrival, model: Assistant, language: str, few: Sequence[Row], steps: int, seed: int) -> Assistant:
    """Take a newcomer into the model by its few rows."""
    torch.manual_seed(seed)
    way.open(model, language)
    learns = groups(model, way.lr, way.head_lr, router_lr=way.lr)
    return fit(model, sample(few, steps, size=16, seed=seed), learns, steps, call=by_language)  # type: ignore[return-value]
