"""`adapt`: a new task, or a new value of a label, from few rows, over the modules that a finished run has."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import metrics
from ..data import Row
from ..errors import ConfigError, ModbayError, listed
from ..metrics import Record
from ._adapt_bench import Bench, frozen
from ._adapt_mix import choose, mean_and_error
from ._adapt_place import Source, keep_own_head, make_place, source_of
from ._adapt_rows import Newcomer, read_newcomer
from ._adapt_ways import WAYS, Found
from ._build import Network
from ._facts import instruments, machine, peak
from ._new import free, new_folder
from ._predict import all_logits, changed, predict
from ._progress import Progress, Silent
from ._run import Run, open_run, write_config, write_json, write_network
from ._tasks import read_tasks

METRICS = {"classification": "accuracy", "tagging": "accuracy", "regression": "1 − |error| / deviation"}
PROOF = 1000  # old rows that are told before and after


@dataclass(frozen=True)
class Trial:
    """What cross-validation says of a way: mean score of the rows held out, its standard error, how many they are."""

    way: str
    score: float
    error: float
    n: int
    trained: int
    seconds: float


def adapt(
    run: Run | str | Path, source: str, out: str | Path, *, ways: Sequence[str] | None = None, task: str | None = None,
    value: str | None = None, shots: int | None = None, folds: int = 4, steps: int = 100,
    test: str | float | None = None, text: Any = None, target: str | None = None, kind: str | None = None,
    seed: int = 0, progress: Progress | None = None, command: str = "",
) -> Run:  # fmt: skip
    """Try ways to serve what is new, take one by cross-validation, and write the run with it to the folder `out`.

    **Arguments:** source: the rows, as `train` reads them. task: the name of a new task (default: the file's);
    value: "language=pt", rows of a known task with a new value of a label. ways: of WAYS; with one, nothing is tried.
    shots: rows of each class that are used. folds, steps: of cross-validation and of each training, alike for all ways.
    test: a share of the rows, or a file, to judge by; without it there are the figures of cross-validation alone.
    text, target, kind: columns and kind, where they are not the run's.

    The old rows' logits stay bit for bit; facts["proof"] says of how many that was seen. Raises ConfigError or
    DataError, and then nothing was written.
    """
    progress, out, began = progress or Silent(), free(Path(out)), time.perf_counter()
    run = run if isinstance(run, Run) else open_run(run)
    asked = wanted(ways, folds, steps)
    with progress.stage("Read the data"):
        who = read_newcomer(run, source, task=task, value=value, text=text, target=target, kind=kind, test=test,
                            shots=shots, seed=seed)  # fmt: skip
    with progress.stage("Open the run"):
        network = run.network()
        modules = source_of(network)
    with progress.stage("Old rows before"):
        old = old_rows(run, who)
        before = all_logits(network, old)
    torch.manual_seed(seed)
    place = make_place(network, run, modules, who)
    bench = Bench(network, run.config, who.few, modules.bay, modules.names, place.arrival, place.head, place.own,
                  steps, folds, seed)  # fmt: skip
    with frozen(network.model):
        trials = compare(bench, asked, progress)
        way, verdict = decide(trials, asked)
        with progress.stage(f"Train: {way}"):
            found = WAYS[way].find(bench, range(len(who.few)))
            bench.install(found.module, found.head)
    if not WAYS[way].tunes:
        keep_own_head(network, place)
    records = predict(network, who.test, progress=progress, what="Test") if who.test else []
    with progress.stage("Old rows after"):
        moved = changed(before, all_logits(network, old))
    said = facts(run, network, who, trials, way, verdict, found, modules)
    said |= {"proof": [{"what": "old rows, told before and after", "rows": len(old), "changed": moved}],
             "command": command, "seed": seed}  # fmt: skip
    write(run, network, who, records, said, Path(out), began)
    return open_run(out)


def wanted(ways: Sequence[str] | None, folds: int, steps: int) -> list[str]:
    """The ways by name; raises ConfigError for one that there is not, and for numbers that can't be."""
    asked = list(dict.fromkeys(ways)) if ways else list(WAYS)
    unknown = [way for way in asked if way not in WAYS]
    if unknown:
        raise ConfigError(f"ways: there are no {listed(unknown)}; there are {listed(WAYS)}.")
    if folds < 2 or steps < 1:
        raise ConfigError(f"folds={folds}, steps={steps}: two folds or more, and one step or more.")
    return asked


def compare(bench: Bench, ways: Sequence[str], progress: Progress) -> list[Trial]:
    """Cross-validate the ways on the same folds; nothing is tried where there is one alone."""
    if len(ways) < 2:
        return []
    fold = bench.folds(range(len(bench.rows)))
    count = max(fold) + 1
    if count < 2:
        raise ConfigError(
            f"{len(fold)} rows, no class with two different texts: nothing can be held out, so that ways can't be "
            f"compared. Give more rows, or one way to take (--ways nearest)."
        )
    trials = []
    with progress.stage("Cross-validation", len(ways) * count) as bar:
        for way in ways:
            began, scores, trained = time.perf_counter(), [], 0
            for j in range(count):
                found = WAYS[way].find(bench, [i for i, one in enumerate(fold) if one != j])
                bench.install(found.module, found.head)
                scores += bench.scores([i for i, one in enumerate(fold) if one == j])
                trained = found.trained
                bar.step(len(trials) * count + j + 1, way)
            mean, error = mean_and_error(scores)
            trials.append(Trial(way, mean, error, len(scores), trained, time.perf_counter() - began))
    return trials


def decide(trials: Sequence[Trial], ways: Sequence[str]) -> tuple[str, str]:
    """(the way to take, one sentence that says why)."""
    if not trials:
        return ways[0], f"{ways[0]} is the one way that was asked for; it was not compared with others."
    of = {one.way: one for one in trials}
    way, best = choose({t.way: (t.score, t.error) for t in trials}, {t.way: t.trained for t in trials})
    figure = f"{of[best].score:.3f} ± {of[best].error:.3f} on {of[best].n} rows held out"
    if way == best:
        return way, f"{way} is taken: it does best ({figure}), and nothing cheaper is within one standard error of it."
    cost = f"{of[way].trained:,} numbers instead of {of[best].trained:,}"
    if of[way].trained == of[best].trained:
        cost = "as few numbers"
    return way, (
        f"{way} is taken: {of[way].score:.3f} is within one standard error of the best, {best} ({figure}), and it "
        f"trains {cost}."
    )


def old_rows(run: Run, who: Newcomer) -> list[Row]:
    """Rows that the run served before: of its test, or, if these can't be read any more, the new texts as old ones."""
    try:
        rows = read_tasks(run.config).splits.test
    except (ModbayError, OSError):
        rows = []
    if rows:
        return rows[:PROOF]
    tasks, labels = list(run.known["kinds"]), {name: list(run.routes.values[name]) for name in run.config.by}
    wide = max([len(tasks), *map(len, labels.values())])
    made = [
        replace(row, task=tasks[i % len(tasks)], target=None,
                labels={"task": tasks[i % len(tasks)], **{name: v[i % len(v)] for name, v in labels.items()}})
        for row in who.few for i in range(wide)
    ]  # fmt: skip
    return made[:PROOF]


def facts(
    run: Run, network: Network, who: Newcomer, trials: Sequence[Trial], way: str, verdict: str, found: Found,
    source: Source,
) -> dict[str, Any]:  # fmt: skip
    """The run's facts, with those of what came."""
    rows = [
        {"method": one.way, "title": WAYS[one.way].title, "estimate": one.score, "low": one.score - 1.96 * one.error,
         "high": one.score + 1.96 * one.error, "error": one.error, "n": one.n, "parameters": one.trained,
         "seconds": round(one.seconds, 1)} for one in trials
    ]  # fmt: skip
    compared = {
        "metric": f"{METRICS.get(who.kind, '− loss a piece')}, cross-validated",
        "rows": rows,
        "verdict": verdict,
        "budget": f"{len(who.few)} rows",
    }
    own = network.routes.own[-1]
    known = {"label": who.label, "value": who.value, "task": who.task, "rows": len(who.few), "way": way,
             "trained": found.trained, "bay": source.bay.state.name, "from": found.weights,
             "always": list(source.always), "module": own.arrival,
             "head": own.head or network.routes.heads.get(who.task)}  # fmt: skip
    kept = {key: value for key, value in run.facts.items() if key not in ("against", "compare")}
    return {
        **kept,
        **machine(),
        **instruments(network),
        "title": f"{run.facts.get('title', run.folder.name)} + {who.value}",
        "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "data": [*run.facts.get("data", []), *who.files],
        "warnings": [*run.facts.get("warnings", []), *who.warnings],
        "adapt": known,
        **({"compare": compared} if trials else {"verdict": verdict}),
    }


def write(
    run: Run, network: Network, who: Newcomer, records: Sequence[Record], said: dict[str, Any], out: Path, began: float
) -> None:
    """The run's folder, whole or not at all."""
    known = {**run.known, "kinds": {**run.known["kinds"], who.task: who.kind},
             "classes": {task: list(names) for task, names in network.encoder.classes.items()}}  # fmt: skip
    file = run.folder / "predictions.jsonl"
    every = [*(metrics.records(file) if file.is_file() else []), *records]
    by = list(run.config.by)
    if records:
        said["results"] = [asdict(cell) for cell in metrics.table(every, known["kinds"], by)]
    with new_folder(out) as partial:
        write_config(partial, run.config)
        write_network(partial, network, known)
        metrics.write_records(partial / "predictions.jsonl", every)
        seconds = time.perf_counter() - began
        said |= {"time": {"adapt": round(seconds, 2)}, "seconds": round(seconds, 1), "memory": {"peak_mib": peak()}}
        write_json(partial / "run.json", said)
