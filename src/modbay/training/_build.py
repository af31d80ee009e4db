"""A network with a run's bays in it: the base, the method's modules, and a head for each task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from ..attach import attach, bays
from ..errors import ConfigError, listed
from ..methods import METHODS, BaySpec, Method, parse_bays, parse_kind
from ..modules import Head
from ..routing import ByLabel
from ._base import TextModel, open_base
from ._config import Config
from ._encode import Encoder
from ._routes import HEAD, HEADS, Routes
from ._tasks import Tasks, read_tasks

DEFAULT = "shared"


@dataclass
class Network:
    """A model, how rows become its input, and which modules they go to."""

    model: nn.Module
    encoder: Encoder
    routes: Routes

    @property
    def keywords(self) -> tuple[str, ...]:
        """The labels that its bays read."""
        return keywords(self.model)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def keywords(model: nn.Module) -> tuple[str, ...]:
    """The labels that a model's bays read, in the order attached."""
    return tuple(dict.fromkeys(word for bay in bays(model).values() for word in (*bay.state.keywords, *bay.state.read)))


def encoder_of(config: Config, model: nn.Module, tokenizer: Any, known: Mapping[str, Any]) -> Encoder:
    """How rows become numbers for a model."""
    measured = frozenset(task for task, kind in known["kinds"].items() if kind == "regression")
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    return Encoder(tokenizer, known["kind"], known["classes"], measured, config.max_length, shift)


def bare(config: Config, known: Mapping[str, Any], values: dict[str, dict[str, str]]) -> Network:
    """The base without modules; rows are routed once there are some."""
    model, tokenizer = open_base(config, known["kind"])
    heads = {task: values["task"][task] for task in known["kinds"]} if isinstance(model, TextModel) else {}
    return Network(model, encoder_of(config, model, tokenizer, known), Routes(values, heads))


def add_heads(network: Network, tasks: Tasks) -> None:
    """A head for each task, in a bay of their own, routed by the task."""
    if not isinstance(network.model, TextModel):
        return
    labels = {task: len(tasks.classes.get(task, "1")) for task in tasks.kinds}
    heads = {network.routes.heads[task]: Head(n) for task, n in labels.items()}
    attach(network.model, "head", heads, ByLabel(HEAD), name=HEADS, add_losses=False)


def method_of(config: Config) -> Method | None:
    """The named method of a run; None where its bays are spelled out. Raises ConfigError for a name that is none."""
    if config.bays is not None:
        return None
    name = config.method or DEFAULT
    if name not in METHODS:
        near = get_close_matches(name, METHODS, 1)
        more = f"did you mean {near[0]!r}?" if near else f"there are {listed(METHODS, 20)}."
        raise ConfigError(f"method={name!r}: there is no such method; {more}")
    return METHODS[name]


def method_bays(config: Config, network: Network) -> list[BaySpec]:
    """The bays that a run's method, or its own list, asks for."""
    values = {label: list(names.values()) for label, names in network.routes.values.items()}
    method = method_of(config)
    if method is None:
        return parse_bays(config.bays, values)
    by = next(iter(config.by), "task")
    at = method.sites(network.model) if config.at is None else config.at
    kind = None if config.module is None else parse_kind(config.module)
    return method.build(values, by, kind, at, **config.options)


def add_bays(network: Network, specs: Sequence[BaySpec]) -> None:
    """Attach them in order."""
    for spec in specs:
        attach(network.model, spec.at, spec.modules, spec.router, spec.aggregator, name=spec.name, add_losses=False)


def groups(network: Network, config: Config) -> list[dict[str, Any]]:
    """What learns, with its rates: modules at lr, routers at router_lr, heads at head_lr."""
    out: list[dict[str, Any]] = []
    method = method_of(config)
    router_lr = config.router_lr or config.lr * (1.0 if method is None else method.router_lr)
    for name, bay in bays(network.model).items():
        lr = (config.head_lr or config.lr) if name == HEADS else config.lr
        out += bay.parameter_groups(lr, router_lr)
    return out


def learning(network: Network) -> int:
    """How many parameters learn."""
    return sum(p.numel() for p in network.model.parameters() if p.requires_grad)


def bare_network(config: Config) -> Network:
    """The base of a run as it is without modules, reading the run's data for what there is to tell."""
    tasks = read_tasks(config)
    return bare(config, tasks.known, tasks.values)
