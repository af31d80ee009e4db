"""Where ways of adapting are tried: a network with a place for one more module and head, and the few rows.

What is tried stands in that place by name, as tensors that may depend on others, such as weights: nothing is attached,
and nothing in the network changes, until `install`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ...attach import Bay
from ...data import Row
from .._base import TextModel
from .._build import Network
from .._config import Config
from .._encode import IGNORED
from .._loss import logits_of, row_losses
from .._predict import moved, predict
from ._mix import Tensors, alike, folds, row_score, stacked

TOGETHER = 64  # rows a pass where nothing learns


class Bench:
    """The few rows, in a network whose bay `arrivals` has a module for them, and where a head is, one for them.

    modules: what `source` has, by name; stack: their parameters, (n, …) each; fresh: a new module's. own: the head of a
    task that is known already; None for a new task's. keeps: whether that head stays as it is.
    """

    def __init__(
        self, network: Network, config: Config, rows: Sequence[Row], source: Bay, names: Sequence[str],
        arrival: tuple[Bay, str], head: tuple[Bay, str] | None = None, own: str | None = None,
        keeps: bool = False, steps: int = 60, k: int = 4, seed: int = 0,
    ):  # fmt: skip
        self.network, self.config, self.rows = network, config, list(rows)
        self.steps, self.k, self.seed = steps, k, seed
        at = {id(p): name for name, p in network.model.named_parameters()}
        self.slots = {key: at[id(p)] for key, p in parameters(*arrival).items()}
        self.fresh = copied(*arrival)
        self.modules = {name: copied(source, name) for name in names}
        alike({**self.modules, "a new one": self.fresh})
        self.stack = stacked(self.modules)
        self.head_slots = {} if head is None else {key: at[id(p)] for key, p in parameters(*head).items()}
        self.own = copied(head[0], own) if head is not None and own is not None else None
        self.keeps = keeps and self.own is not None
        self.examples = network.encoder.encode(rows, [network.routes.of(row, network.keywords) for row in rows])

    @property
    def measured(self) -> bool:
        """Whether the rows' targets are numbers."""
        return self.examples[0].measured

    @property
    def classes(self) -> int:
        """How many logits the rows' head has."""
        return 1 if self.measured else len(self.network.encoder.classes[self.rows[0].task])

    def folds(self, places: Sequence[int]) -> list[int]:
        """The fold of each of these rows: every class, or fifth of a number, has its share in each."""
        rows = [self.rows[i] for i in places]
        return folds(strata(rows), [row.normal for row in rows], self.k, self.seed)

    def batch(self, places: Sequence[int], seed: int = 0) -> tuple[dict[str, Any], Tensor, Tensor | None]:
        """(these rows as input, their targets, which of these are numbers)."""
        batch = moved(self.network.encoder.collate([self.examples[i] for i in places], seed), self.network.device)
        return batch, batch.pop("labels"), batch.pop("measured", None)

    def losses(self, module: Tensors, head: Tensors, places: Sequence[int], seed: int = 0) -> tuple[Tensor, Tensor]:
        """(Σ of the losses, how many targets) of each of these rows under a module and a head, both (b,)."""
        batch, labels, measured = self.batch(places, seed)
        tried = {self.slots[key]: value for key, value in module.items()}
        tried |= {self.head_slots[key]: value for key, value in head.items()}
        logits = logits_of(functional_call(self.network.model, tried, args=(), kwargs=batch))
        return row_losses(logits, labels, measured, self.network.encoder.kind)

    @torch.no_grad()
    def loss(self, module: Tensors, head: Tensors, places: Sequence[int]) -> float:
        """The mean loss of these rows."""
        several = [self.losses(module, head, places[at : at + TOGETHER]) for at in range(0, len(places), TOGETHER)]
        sums, counts = (torch.cat(each) for each in zip(*several, strict=True))
        return float(sums.sum() / counts.sum().clamp_min(1))

    @torch.no_grad()
    def features(self, module: Tensors, places: Sequence[int]) -> tuple[Tensor, Tensor, list[int]]:
        """(what the head sees (n, width), the targets (n,), whose place each is): of tagged texts, one a word."""
        model, seen = self.network.model, {}
        assert isinstance(model, TextModel)
        tried = {self.slots[key]: value for key, value in module.items()}
        xs, targets, owners = [], [], []
        hook = model.head.register_forward_pre_hook(lambda _, given: seen.update(x=given[0].detach()))
        try:
            for start in range(0, len(places), TOGETHER):
                now = places[start : start + TOGETHER]
                batch, labels, _ = self.batch(now)
                functional_call(model, tried, args=(), kwargs=batch)
                known = labels != IGNORED if model.tokens else torch.ones_like(labels, dtype=torch.bool)
                xs.append(seen["x"][known])
                targets.append(labels[known])
                owners += [i for i, count in zip(now, known.view(len(now), -1).sum(1).tolist(), strict=True)
                           for _ in range(count)]  # fmt: skip
        finally:
            hook.remove()
        return torch.cat(xs), torch.cat(targets).float(), owners

    @torch.no_grad()
    def install(self, module: Tensors, head: Tensors) -> None:
        """Put what was found into the network."""
        at = dict(self.network.model.named_parameters())
        for slots, found in ((self.slots, module), (self.head_slots, head)):
            for key, value in found.items():
                at[slots[key]].copy_(value)

    def scores(self, places: Sequence[int]) -> list[float]:
        """How well what is installed tells each of these rows: larger is better."""
        spread = deviation([row.target for row in self.rows]) if self.measured else 1.0
        kind = "regression" if self.measured else self.network.encoder.kind
        return [row_score(one, kind, spread) for one in predict(self.network, [self.rows[i] for i in places])]


def parameters(bay: Bay, name: str) -> dict[str, nn.Parameter]:
    """A module's parameters, by site and name."""
    parts: dict[str, Any] = {site: modular.parts._modules.get(name) for site, modular in bay.modulars.items()}
    return {f"{site}/{key}": p for site, part in parts.items() if part for key, p in part._parameters.items()}


def copied(bay: Bay, name: str) -> dict[str, Tensor]:
    """A module's parameters as they are now."""
    return {key: p.detach().clone() for key, p in parameters(bay, name).items()}


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Nothing in the model itself asks for gradients meanwhile, and nothing in it is dropped."""
    learning = [p for p in model.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    model.eval()
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def strata(rows: Sequence[Row]) -> list[Any]:
    """What folds share out: classes; the fifths of a number; nothing of texts and tags."""
    if rows and rows[0].kind == "classification":
        return [row.target for row in rows]
    if rows and rows[0].kind == "regression":
        order = sorted(range(len(rows)), key=lambda i: float(rows[i].target))  # type: ignore[arg-type]
        parts = min(5, max(1, len(rows) // 4))
        fifth = {i: place * parts // len(rows) for place, i in enumerate(order)}
        return [fifth[i] for i in range(len(rows))]
    return [""] * len(rows)


def deviation(targets: Sequence[Any]) -> float:
    """The standard deviation of numbers; 1 where they do not differ."""
    return float(torch.tensor([float(t) for t in targets], dtype=torch.float64).std(unbiased=False)) or 1.0
