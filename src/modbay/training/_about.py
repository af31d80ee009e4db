"""What a run's modules say of their making, so that a library finds them: what for, on what, and how well they do."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import metrics
from ..attach import bays
from ..data import Row
from ..metrics import Record
from ._best import Module, used
from ._build import Network
from ._config import Config
from ._embedding import embeddings
from ._tasks import Tasks


def about(
    config: Config, network: Network, tasks: Tasks, records: Sequence[Record], how: str = "",
    made: Mapping[Module, Sequence[str]] | None = None,
) -> dict[str, dict[str, dict[str, Any]]]:  # fmt: skip
    """{bay: {module: its `about`}} of the modules that learned, or of those alone that were made.

    **Arguments:** records: of the test rows, in their order; none without test rows. how: the command, and what it did,
    if not `train` by the config's method. made: the modules, each with the contents of those it was made of.

    - labels: the task, and each label of `by`, with the values of the training rows that the module counts for: where
      a bay is routed by a label, those of that label; otherwise all.
    - metrics: of the test rows that it counts for, with all that counts for them beside it; of several tasks, the mean.
    - data: the files of its tasks, as they were split; parents; licence: the run's. notes: how, seed, number of test
      rows. embedding: the mean of 64 of its training rows, by the base alone.
    """
    splits = tasks.splits
    held = [*splits.train, *splits.validation, *splits.test] if config.streaming else splits.train
    tested = _by_module(network, zip(splits.test, records, strict=True))
    how = how or f"train: method {config.method or ('bays' if config.bays is not None else 'shared')}"
    found = _by_module(network, zip(held, range(len(held)), strict=True))
    found = {module: places for module, places in found.items() if made is None or module in made}
    learned = {module: [i for i in places if i < len(splits.train)] for module, places in found.items()}
    vectors = embeddings(network, splits.train, learned, config.seed)
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for module, places in found.items():
        rows, mine = [held[i] for i in places], tested.get(module, [])
        own = {row.task for row in rows}
        said = {
            "labels": _labels(rows, config.by),
            "metrics": _metrics(mine, tasks.kinds),
            "data": [_file(one) for one in tasks.files if one["task"] in own],
            "parents": list(made[module]) if made else [],
            "licence": config.licence,
            "notes": f"modbay {how}, seed {config.seed}; metrics of {len(mine)} test rows.",
            "embedding": vectors.get(module),
        }
        bay, name = module
        out.setdefault(bay, {})[name] = {key: value for key, value in said.items() if value}
    return out


def _by_module(network: Network, rows: Iterable[tuple[Row, Any]]) -> dict[Module, list[Any]]:
    """What comes with the rows that a module counts for, in their order."""
    handles, words = bays(network.model), network.keywords
    known: dict[tuple, list[Module]] = {}
    out: dict[Module, list[Any]] = {}
    for row, what in rows:
        route = network.routes.of(row, words)
        key = tuple(route.items())
        if key not in known:
            known[key] = list(used(handles, route))
        for module in known[key]:
            out.setdefault(module, []).append(what)
    return out


def _labels(rows: Sequence[Row], by: Iterable[str]) -> dict[str, list[str]]:
    found = {"task": {row.task for row in rows}}
    found |= {label: {row.labels[label] for row in rows if row.labels.get(label)} for label in by}
    return {label: sorted(values) for label, values in found.items() if values}


def _metrics(records: Sequence[Record], kinds: Mapping[str, str]) -> dict[str, float]:
    """The means over tasks stand last in the table, and take the place of theirs."""
    cells = metrics.table(records, kinds, (), draws=1) if records else []
    return {cell.metric: round(cell.estimate, 6) for cell in cells if cell.label == "" and math.isfinite(cell.estimate)}


def _file(said: Mapping[str, Any]) -> dict[str, Any]:
    """A file of the data by its name alone: where it lay is nobody else's business."""
    names = [Path(one).name if Path(one).exists() else one for one in said["path"].split(", ")]
    return {"name": ", ".join(names), **{key: said[key] for key in ("sha256", "rows", "split")}}
