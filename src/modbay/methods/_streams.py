"""Networks of several streams, which every layer of modules mixes anew: PLE, and soft modularisation.

Tang, Liu, Zhao and Gong, "Progressive Layered Extraction (PLE)", 2020 (RecSys). Yang, Xu, Wu and Wang, "Multi-Task
Reinforcement Learning with Soft Modularization", 2020 (arXiv 2003.13661); the last layer as in the authors' code.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..abstract import Kind, Routing
from ..aggregation import Exchange
from ..core import Modular
from ..errors import CompositionError
from ..routing import SoftGate
from ..routing._tasks import distinct
from ..routing._tasks import tasks as numbers
from ..types import Labels, System, systems

SHARED = "shared"


class Extraction(nn.Module):
    """x_k = Σ_i softmax(W_k x_k)_i m_i(x_of(i)) in each layer, over a task's own experts and the shared; the shared
    stream, over all. x (b, d), which all streams get → one output (b, d) a task, by its name."""

    def __init__(self, levels: Sequence[Mapping[str, Mapping[str, Kind | nn.Module]]], features: int | None):
        super().__init__()
        self.tasks = [task for task in levels[0] if task != SHARED] if levels else []
        streams = [*self.tasks, SHARED]
        if not self.tasks or any(set(level) != set(streams) for level in levels):
            raise CompositionError(f"ple: each layer has experts of the same tasks and of {SHARED!r}: {streams}.")
        self.levels = nn.ModuleList(self._level(level, streams, features) for level in levels)

    def _level(self, level: Mapping[str, Mapping[str, Any]], streams: list[str], features: int | None) -> Modular:
        experts = {f"{stream}-{name}": kind for stream in streams for name, kind in level[stream].items()}
        own = {stream: [f"{stream}-{name}" for name in level[stream]] for stream in streams}
        table = {task: own[task] + own[SHARED] for task in self.tasks} | {SHARED: list(experts)}
        of = [i for i, stream in enumerate(streams) for _ in own[stream]]
        gate = SoftGate("stream", streams, by="token", table=table)
        return Modular(None, experts, gate, Exchange(of), features=features)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        streams = [*self.tasks, SHARED]
        h = x.expand(len(streams), *x.shape)
        for level in self.levels:
            h = level(h, stream=streams)
        return dict(zip(self.tasks, h, strict=False))  # the last layer's shared stream goes nowhere


@systems(
    System(
        (100,),
        'methods.ple([{"ner": {"a": kind}, "pos": {"a": kind}, "shared": {"a": kind}}], features=64)',
        ("tests/test_tasks.py::test_ple_is_written_out",),
        "PLE",
        section="4.2.3",
    )
)
def ple(levels: Sequence[Mapping[str, Mapping[str, Kind | nn.Module]]], features: int | None = None) -> Extraction:
    """x_k ← Σ_i softmax(W_k x_k)_i m_i over the experts of task k and the shared, in every layer.

    levels: of each layer, the experts by name of each task, and of "shared". features: the width of x, where networks
    of your own do not tell it. Raises CompositionError for layers of different tasks.
    """
    return Extraction(levels, features)


class SoftModules(nn.Module):
    """g_i ← Σ_j p_ij m_j(g_j) from layer to layer, with p^{l+1} = softmax_j(W_d relu(W_u p̂^l ⊙ x ⊙ z_task)), of the
    logits p̂^l before; the last layer has one p for its sum. x (b, d), the state's features → (b, d)."""

    def __init__(
        self, layers: Sequence[Mapping[str, Kind | nn.Module]], labels: Sequence[str], features: int, label: str
    ):
        super().__init__()
        n = {len(layer) for layer in layers}
        if len(n) != 1 or not labels:
            raise CompositionError(f"soft_modularisation: layers of {sorted(n)} modules, {len(labels)} tasks: as many.")
        self.n, self.label = n.pop(), label
        self.codes, self.labels = (
            nn.Parameter(torch.randn(len(labels), features)),
            distinct("SoftModules", label, labels),
        )
        self.layers = nn.ModuleList(
            Modular(None, layer, None, Exchange(range(self.n)), features=features) for layer in layers
        )
        wide = [self.n**2] * (len(layers) - 1)
        self.down = nn.ModuleList(nn.Linear(features, k) for k in [*wide, self.n])
        self.up = nn.ModuleList(nn.Linear(k, features) for k in wide)

    def routes(self, x: Tensor, task: Tensor) -> list[Tensor]:
        """p of each layer, (b, n, n): what the modules of the next take of this one's; of the last, (b, 1, n)."""
        told = x * self.codes[task]
        logits = [self.down[0](F.relu(told))]
        for up, down in zip(self.up, list(self.down)[1:], strict=True):
            logits.append(down(F.relu(up(logits[-1]) * told)))
        return [torch.softmax(one.unflatten(-1, (-1, self.n)), -1) for one in logits]

    def forward(self, x: Tensor, **labels: Labels) -> Tensor:
        task = numbers(labels[self.label], self.labels, self.label, x.device)
        h = x.expand(self.n, *x.shape)
        for layer, p in zip(self.layers, self.routes(x, task.expand(len(x))), strict=True):
            h = layer(h, routing=Routing(weights=p.movedim(1, 0).expand(self.n, -1, -1)))
        return h[0]


@systems(
    System(
        (108,),
        'methods.soft_modularisation([{"a": kind, "b": kind}] * 4, ("reach", "push"), features=400)',
        ("tests/test_tasks.py::test_soft_modularisation_is_written_out",),
        "soft modularisation",
        section="4.2.3",
    )
)
def soft_modularisation(
    layers: Sequence[Mapping[str, Kind | nn.Module]], labels: Sequence[str], features: int, label: str = "task"
) -> SoftModules:
    """g_i ← Σ_j p_ij m_j(g_j): which module feeds which, from layer to layer, follows from the task and the state.

    layers: modules by name, as many in each. labels: the tasks, each with an embedding z; label: the keyword of a call.
    features: the width of x, which is the state's encoding, of the modules, and of the routing network. Heads and
    encoders are the caller's. Raises CompositionError for layers of different sizes.
    """
    return SoftModules(layers, labels, features, label)
