"""`evaluate`: the table of a finished run, of its own test rows or of others, and how it stands against another run."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ... import data, metrics
from ...attach import bays
from ...data import Row
from ...errors import ConfigError, DataError, ModbayError
from ...metrics import Record
from .._build import Network
from .._facts import machine, peak
from .._predict import predict
from .._progress import Progress, Silent
from .._routes import HEADS
from .._run import Run, write_json
from .._tasks import read_tasks
from .._watched import reads, telling, told, watched
from ._given import Given, Reading, routed_by, routes

ROUTING = ("routing", "use", "collapse", "figures", "tokens", "over_time")
KEPT = ("seed", "method", "base", "config", "parameters", "similarity", *ROUTING)
MAIN = ("accuracy", "pearson", "span_f1", "perplexity")  # of each kind of task


@dataclass(frozen=True)
class Evaluation:
    """facts: as run.json has them, with the results. records: each row, and what was said of it. verdict: against."""

    facts: dict[str, Any]
    records: list[Record]
    verdict: str = ""


def evaluate(
    run: Run,
    files: Sequence[str] = (),
    *,
    against: Run | None = None,
    text: str | Sequence[str] | None = None,
    target: str | None = None,
    by: Mapping[str, str] | None = None,
    fixed: Mapping[str, str] | None = None,
    task: str | None = None,
    unknown: str = "error",
    progress: Progress | None = None,
    command: str = "",
) -> Evaluation:
    """The metrics of each task, by the values of each label, with bootstrap intervals.

    **Arguments:**
    - files: labelled data, FILE or TASK=FILE; without them the figures are of the run's own test rows.
    - against: another run, compared on the same rows; the differences are paired.
    - text, target, by, task: columns, labels and the task, where they differ from the run's own. by: also the labels
      that the table has; {"task": "task"} for none. fixed: {label: value} of all rows.
    - unknown: "base" lets rows of new label values through without modules.
    Raises ConfigError or DataError.
    """
    progress, began = progress or Silent(), time.perf_counter()
    if by and by.get("task", "task") != "task":
        raise ConfigError(f"by: task={by['task']}: rows of several tasks are told apart by files here, TASK=FILE.")
    columns = {label: column for label, column in (by or {}).items() if label != "task"}
    reading = Reading(run, text, target, columns, dict(fixed or {}))
    labels = list(dict.fromkeys(by or run.config.by))
    seen: dict[str, Any] = {}
    if files:
        network, rows, told = _new_rows(reading, reading.given(files, task), labels, progress)
        warnings = seen_before(run, rows)
        records, seen = observed(network, rows, labels, unknown, progress)
        _tellable(reading, records)
    else:
        records, told = _own_rows(run), [one for one in run.facts.get("data", []) if one.get("split") == "test"]
        rows, warnings = [], []
    kinds = dict(reading.kinds)
    with progress.stage("Bootstrap"):
        cells = metrics.table(records, kinds, labels)
    facts = {
        "title": f"{', '.join(dict.fromkeys(r.task for r in records))}: {run.folder.resolve().name}, evaluated",
        "command": command,
        "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **machine(),
        **{key: run.facts[key] for key in KEPT if key in run.facts},
        "run": str(run.folder),
        "data": told,
        "warnings": warnings,
        "results": [asdict(cell) for cell in cells],
    }
    facts |= _renewed(facts, seen)
    verdict = ""
    if against is not None:
        facts["against"] = beside(run, records, against, rows, labels, unknown, progress)
        verdict = facts["against"]["verdict"]
    took = time.perf_counter() - began
    facts |= {"time": {"evaluate": round(took, 2)}, "seconds": round(took, 1), "memory": {"peak_mib": peak()}}
    return Evaluation(facts, records, verdict)


def _new_rows(
    reading: Reading, given: Sequence[Given], labels: Sequence[str], progress: Progress
) -> tuple[Network, list[Row], list[dict[str, Any]]]:
    """(the run's network, the rows, what is to be said of them)."""
    with progress.stage("Open the run"):
        network = reading.run.network()
    wanted = list(dict.fromkeys([*routed_by(network), *labels]))
    rows, told = [], []
    with progress.stage("Read the data"):
        for one in given:
            mine = reading.read(one, wanted)
            rows += mine
            said = {"task": one.task, "split": "given", "path": ", ".join(one.files), "rows": len(mine)}
            told.append({**said, "sha256": data.digest(mine)})
    return network, rows, told


def seen_before(run: Run, rows: Sequence[Row]) -> list[str]:
    """A warning if texts among the rows are some that the run learned from: its figures on them say little."""
    try:
        learned = {(row.task, row.normal) for row in read_tasks(run.config).splits.train}
    except ModbayError as error:
        why = str(error).splitlines()[0]
        return [f"Whether the run learned from these rows is not known: its data can't be read again ({why})"]
    twice = [row.where for row in rows if (row.task, row.normal) in learned]
    if not twice:
        return []
    return [
        f"{len(twice):,} of the {len(rows):,} rows have texts that the run learned from (the first: {twice[0]}): "
        f"its figures on them say little of new ones."
    ]


def _own_rows(run: Run) -> list[Record]:
    """What the run said of its test rows."""
    records = metrics.records(run.folder / "predictions.jsonl")
    if not records:
        raise ConfigError(f"{run.folder}: the run was made without test rows; give labelled files to evaluate it on.")
    return records


def _tellable(reading: Reading, records: Sequence[Record]) -> None:
    """Texts of a language model must have something to be told."""
    silent = [r.where for r in records if reading.kinds[r.task] in ("causal", "masked") and r.nll is None]
    if silent and len(silent) == len(records):
        raise DataError(f"{silent[0]}: of none of the {len(records):,} texts is there a piece to tell: too short?")


def observed(
    network: Network, rows: Sequence[Row], labels: Sequence[str], unknown: str, progress: Progress
) -> tuple[list[Record], dict[str, list[Any]]]:
    """(what is said of each row; routing, use and collapse of the bays whose routers read more than one label)."""
    found = [routes(network, row, unknown) for row in rows]
    with watched(network.model) as recorder:
        records = predict(network, rows, progress=progress, routes=found, before=telling(recorder, labels))
    return records, told(recorder, labels, network.encoder.tokenizer)


def _renewed(facts: Mapping[str, Any], seen: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """The run's facts with what was seen of a bay now in place of what was seen of it then."""
    bays_seen = {row["bay"] for row in seen.get("use", [])}
    alarms = tuple(f"bay {bay!r}, " for bay in bays_seen)
    out = {}
    for key, several in seen.items():
        kept = facts.get(key, [])
        if key == "collapse":
            out[key] = [said for said in kept if not said.startswith(alarms)] + several
        elif several:
            out[key] = [row for row in kept if row["bay"] not in bays_seen] + several
    return out


def beside(
    run: Run, records: Sequence[Record], other: Run, rows: Sequence[Row], labels: Sequence[str], unknown: str,
    progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """The run against another on the same rows: the differences, the main metric alone, and what they show."""
    if rows:
        lost = sorted({row.task for row in rows} - set(other.known["kinds"]))
        if lost:
            raise ConfigError(f"against={str(other.folder)!r}: that run has no task {lost[0]!r}.")
        with progress.stage("Open the other run"):
            network = other.network()
        found = [routes(network, row, unknown) for row in rows]
        theirs = predict(network, rows, progress=progress, routes=found, what="Predict, the other run")
    else:
        theirs = _own_rows(other)
    own = {(r.task, r.where): r.labels for r in records}  # rows are grouped by the labels that this run's table has
    theirs = [replace(r, labels=own.get((r.task, r.where), r.labels)) for r in theirs]
    kinds, by = run.known["kinds"], [label for label in labels if label != "task"]
    with progress.stage("Paired differences"):
        head = metrics.paired(records, theirs, kinds, [], metrics=MAIN)
        split = metrics.paired(records, theirs, kinds, by, metrics=MAIN) if by else []
    differences = [*head, *(d for d in split if d.label)]
    names = [one.folder.name if run.folder.name != other.folder.name else str(one.folder) for one in (run, other)]
    return {
        "name": names[1],
        "rows": [asdict(d) for d in differences],
        "verdict": metrics.verdict(differences, *names),
    }


def own_routing(run: Run, labels: Sequence[str], progress: Progress | None = None) -> dict[str, list[Any]]:
    """Routes that a run's facts lack, because its routers read what comes: the test rows are read again for it.

    Nothing where all is known already. Raises DataError if the data are gone or are not what the run was tested on.
    """
    progress = progress or Silent()
    known = {row["bay"] for row in run.facts.get("routing", [])}
    if not {row["bay"] for row in run.facts.get("parameters", [])} - known - {HEADS}:
        return {}
    network = run.network()
    if not any(reads(bay.state.router) for name, bay in bays(network.model).items() if name not in (*known, HEADS)):
        return {}
    with progress.stage("Read the test rows again"):
        rows = read_tasks(run.config).splits.test
    mine = {(r.task, r.where) for r in _own_rows(run)}
    if {(row.task, row.where) for row in rows} != mine:
        raise DataError(f"{run.folder}: the data have changed since the run, so that its routes can't be recorded.")
    return observed(network, rows, labels, "error", progress)[1]


def write_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """evaluation.json and predictions.jsonl, into a folder that is there."""
    metrics.write_records(folder / "predictions.jsonl", evaluation.records)
    write_json(folder / "evaluation.json", evaluation.facts)
