"""The plan of a run, told before it starts: data, sites, what learns, memory, steps."""

import math
from collections.abc import Sequence
from typing import Any

from .. import data, metrics
from ..attach import bays
from ._build import Network, groups
from ._config import Config
from ._encode import Example
from ._sampling import shares
from ._tasks import Tasks

MIB = 2**20


def steps_of(config: Config, rows: int) -> int:
    """Steps of a run: as asked for, or as many as its epochs take."""
    if config.method == "probe":
        return 0
    return config.steps if config.steps is not None else max(1, math.ceil(config.epochs * rows / config.batch))


def balance(config: Config, rows: Sequence) -> list[tuple[str, str]]:
    """What sampling balances: the task, and the first label, of each row."""
    by = next(iter(config.by), None)
    return [(row.task, row.labels.get(by, "") if by else "") for row in rows]


def plan(
    config: Config, tasks: Tasks, network: Network, examples: Sequence[Example], survey: data.Survey
) -> dict[str, Any]:
    """All that can be said before the first step, as JSON takes it."""
    balanced = balance(config, tasks.splits.train)
    names = list(dict.fromkeys(balanced))
    drawn = shares([balanced.count(name) for name in names], config.sampling, config.temperature)
    cut = sum(example.cut for example in examples)
    return {
        "data": survey.as_dict(),
        "warnings": list(survey.warnings),
        "sampling": [
            {"task": task, "value": value, "share": share} for (task, value), share in zip(names, drawn, strict=True)
        ],
        "truncated": {"rows": cut, "of": len(examples), "max_length": config.max_length},
        "length": sorted(len(example) for example in examples)[len(examples) // 2] if examples else 0,
        "parameters": parameters(network),
        "rates": [
            {"name": g["name"], "lr": g["lr"], "parameters": sum(p.numel() for p in g["params"])}
            for g in groups(network, config)
        ],
        "sites": {name: list(bay.modulars) for name, bay in bays(network.model).items()},
        "memory_mib": memory(network),
        "steps": steps_of(config, len(tasks.splits.train)),
        "batch": config.batch,
    }


def parameters(network: Network) -> list[dict[str, Any]]:
    """Parameters of each module, and of what routes and joins them, and how many of them learn."""
    rows = []
    for name, bay in bays(network.model).items():
        rows += metrics.parameters(bay)
        parts = [bay.state.router, bay.state.aggregator, *[m.router for m in bay.modulars.values()]]
        own = {id(p): p for part in parts if part is not None for p in part.parameters()}.values()
        if own:
            learning = sum(p.numel() for p in own if p.requires_grad)
            row = {
                "bay": name,
                "module": "(routing)",
                "kind": type(next(part for part in parts if part is not None)).__name__,
                "sites": len(bay.modulars),
            }
            rows.append({**row, "parameters": sum(p.numel() for p in own), "learning": learning, "norm": None})
    return rows


def memory(network: Network) -> int:
    """MiB of weights, and of gradients and Adam's two moments of what learns; activations come on top."""
    weights = sum(p.numel() * p.element_size() for p in network.model.parameters())
    learned = sum(p.numel() * p.element_size() for p in network.model.parameters() if p.requires_grad)
    return round((weights + 3 * learned) / MIB)
