"""`adapt`: a new task, or a new value of a label, from few rows, over the modules that a finished run has."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ... import metrics
from ...data import Row
from ...errors import ConfigError, ModbayError, ProofError, listed
from ...metrics import Record
from .._build import Network
from .._facts import instruments, machine, peak
from .._new import Page, free, new_folder
from .._predict import predict
from .._progress import Progress, Silent
from .._run import Run, open_run, write_json, write_network
from ..extending._extension import ARRIVED, arrived
from ..extending._newcomers import tested
from ..extending._proof import prints, proof
from ._bench import Bench, frozen
from ._mix import choose, mean_and_error
from ._place import Source, keep_own_head, make_place, source_of
from ._rows import Newcomer, read_newcomer
from ._told import made_of, told_of
from ._ways import WAYS, Found

METRICS = {"classification": "accuracy", "tagging": "accuracy", "regression": "1 − |error| / deviation"}
STEPS, PROOF = 60, 2000  # of each training or search; old rows that are told before and after


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
    value: str | None = None, shots: int | None = None, folds: int = 4, steps: int = STEPS, lr: float | None = None,
    test: str | float | None = None, text: Any = None, target: str | None = None, kind: str | None = None,
    head: str = "tuned", seed: int = 0, progress: Progress | None = None, command: str = "",
    page: Page | None = None,
) -> Run:  # fmt: skip
    """Try ways to serve what is new, take one by cross-validation, and write the run with it to the folder `out`.

    **Arguments:** source: the rows, as `train` reads them. task: the name of a new task (default: the file's);
    value: "language=pt", rows of a known task with a new value of a label. ways: of WAYS; with one, nothing is tried.
    shots: rows of each class that are used. folds, steps, lr: of cross-validation, and of each training, alike for all
    ways; the rate is the run's if none is given.
    test: a share of the rows, or a file, to judge by; without it there are the figures of cross-validation alone.
    text, target, kind: columns and kind, where they are not the run's. head: of a known task, "tuned", a copy of it
    learns with every way, or "kept". A new task's starts as a linear probe, and learns.

    The old rows' logits stay bit for bit, as is seen on what was written: facts["proof"]. Raises ConfigError or
    DataError for what can't be done, ProofError if a bit changed; then nothing is left behind.
    """
    progress, out, began = progress or Silent(), free(Path(out)), time.perf_counter()
    run = run if isinstance(run, Run) else open_run(run)
    asked = wanted(ways, folds, steps, head)
    with progress.stage("Read the data"):
        who = read_newcomer(run, source, task=task, value=value, text=text, target=target, kind=kind, test=test,
                            shots=shots, seed=seed)  # fmt: skip
    with progress.stage("Open the run"):
        network = run.network()
        modules = source_of(network)
    old, what = old_rows(run, who)
    before = prints(network, old, progress, "Before: rows of old")
    torch.manual_seed(seed)
    place = make_place(network, run, modules, who)
    config = run.config if lr is None else run.config.model_copy(update={"lr": lr, "head_lr": None})
    bench = Bench(network, config, who.few, modules.bay, modules.names, place.arrival, place.head, place.own,
                  head == "kept", steps, folds, seed)  # fmt: skip
    with frozen(network.model):
        trials = compare(bench, asked, progress)
        way, verdict = decide(trials, asked)
        with progress.stage(f"Train: {way}"):
            found = WAYS[way].find(bench, range(len(who.few)))
            bench.install(found.module, found.head)
    if bench.keeps:
        keep_own_head(network, place)
    records = predict(network, who.test, progress=progress, what="Test") if who.test else []
    said = facts(run, network, who, trials, way, verdict, found, modules) | {"command": command, "seed": seed}
    known = {**run.known, "kinds": {**run.known["kinds"], who.task: who.kind},
             "classes": {task: list(names) for task, names in network.encoder.classes.items()}}  # fmt: skip
    tried = next((f"{one.score:.3f} ± {one.error:.3f} on {one.n} rows" for one in trials if one.way == way), "")
    how = f"adapt: {way}" + (f", cross-validated {metric_of(who)} {tried}" if tried else "")
    told = told_of(network, run.config, known, who, records, seed, how, made_of(place, modules, found, bench.keeps))
    with new_folder(out) as partial:
        write(run, network, known, told, who, records, partial)
        after = prints(Run(partial, run.config, known, network.routes, {}).network(), old, progress, "After: the same")
        said["proof"] = [*run.facts.get("proof", []), proved(before, after, what)]
        if who.test:
            every = metrics.records(partial / "predictions.jsonl")
            said["results"] = [asdict(one) for one in metrics.table(every, known["kinds"], list(run.config.by))]
        seconds = time.perf_counter() - began
        said |= {"time": {"adapt": round(seconds, 2)}, "seconds": round(seconds, 1), "memory": {"peak_mib": peak()}}
        write_json(partial / "run.json", said)
        if page is not None:
            page(partial / "report.html", said)
    return open_run(out)


def proved(before: Sequence[bytes], after: Sequence[bytes], what: str) -> dict[str, Any]:
    """The proof; raises ProofError if it fails."""
    said = {**proof(before, after, ""), "what": what}
    if said["changed"]:
        raise ProofError(
            f"{said['changed']:,} of {said['rows']:,} rows of old are answered with other logits than before. Nothing "
            f"was written. Something in the run is not what this command leaves alone, or the machine does not repeat "
            f"itself."
        )
    return said


def wanted(ways: Sequence[str] | None, folds: int, steps: int, head: str) -> list[str]:
    """The ways by name; raises ConfigError for one that there is not, and for numbers that can't be."""
    asked = list(dict.fromkeys(ways)) if ways else list(WAYS)
    unknown = [way for way in asked if way not in WAYS]
    if unknown:
        raise ConfigError(f"ways: there are no {listed(unknown)}; there are {listed(WAYS)}.")
    if head not in ("tuned", "kept"):
        raise ConfigError(f"head={head!r}: 'tuned' or 'kept'.")
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


def old_rows(run: Run, who: Newcomer) -> tuple[list[Row], str]:
    """(rows that the run served before, what they are): its test rows, or, where these can't be read, the new texts."""
    how = f"logits of {{}} {run.folder}, before and after, in the same batches, bit by bit"
    try:
        return tested(run)[0][:PROOF], how.format("the test rows of")
    except (ModbayError, OSError):
        pass
    tasks, labels = list(run.known["kinds"]), {name: list(run.routes.values[name]) for name in run.config.by}
    wide = max([len(tasks), *map(len, labels.values())])
    made = [
        replace(row, task=tasks[i % len(tasks)], target=None,
                labels={"task": tasks[i % len(tasks)], **{name: v[i % len(v)] for name, v in labels.items()}})
        for row in who.few for i in range(wide)
    ]  # fmt: skip
    return made[:PROOF], how.format("the new texts as rows of each task and label of")


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
        "metric": f"{metric_of(who)}, cross-validated",
        "rows": rows,
        "verdict": verdict,
        "budget": f"{len(who.few)} rows",
    }
    own = network.routes.own[-1]
    known = {"label": who.label, "value": who.value, "task": who.task, "rows": len(who.few), "tested": len(who.test),
             "way": way, "trained": found.trained, "bay": source.bay.state.name, "from": found.weights,
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


def metric_of(who: Newcomer) -> str:
    """What cross-validation measures."""
    return METRICS.get(who.kind, "− loss a piece")


def write(
    run: Run, network: Network, known: dict[str, Any], told: dict[str, Any], who: Newcomer, records: Sequence[Record],
    folder: Path,
) -> None:  # fmt: skip
    """All of the run's folder but its facts."""
    shutil.copyfile(run.folder / "run.yaml", folder / "run.yaml")
    write_network(folder, network, known, told)
    file = run.folder / "predictions.jsonl"
    old = metrics.records(file) if file.is_file() else []
    metrics.write_records(folder / "predictions.jsonl", [*old, *records])
    came = [{"fixed": fixed, "config": one.dump()} for fixed, one in [*arrived(run), (who.fixed, who.read)]]
    write_json(folder / ARRIVED, {"format": 1, "arrivals": came})
