"""`compare`: several methods on the same data, splits, steps and seeds, in one folder and one table.

    compare.yaml        reruns it: modbay compare FOLDER/compare.yaml --out ANOTHER
    compare.json        the facts: the table, the verdict, transfer; `report.html` shows them
    METHOD-SEED/        a run of each method and seed; of baselines, which have no modules, what they said

While it is written it is FOLDER.partial, in which runs that are finished stay finished.
"""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ... import data
from ...attach import bays
from ...errors import ConfigError, ModbayError
from ...methods import METHODS
from ...metrics import records, write_records
from .._build import Network, add_bays, add_heads, bare, learning, method_bays
from .._config import Config, read_config
from .._facts import machine, peak
from .._fit import atomic, train
from .._new import Page, free
from .._plan import balance, steps_of
from .._probe import prepare
from .._processes import several
from .._progress import Bar, Progress, Silent
from .._run import read_json, unfinished, write_json
from .._tasks import Tasks, absolute, read_tasks
from ._baselines import BASELINES
from ._comparison import Comparison, Entry, comparison, write_comparison
from ._several import told


@dataclass(frozen=True)
class Compared:
    """A comparison that is finished, as its folder has it."""

    folder: Path
    facts: dict[str, Any]


@dataclass
class Planned:
    """A comparison that could start. entries: what is run. left_out: why others are not. learning: parameters."""

    asked: Comparison
    tasks: Tasks
    entries: dict[str, Entry]
    left_out: dict[str, str]
    learning: dict[str, int]
    survey: data.Survey


def planned(asked: Comparison, progress: Progress | None = None) -> Planned:
    """Read the data and try each method's modules on the base; raises before anything is written."""
    progress = progress or Silent()
    asked = replace(asked, config=absolute(asked.config))
    with progress.stage("Read the data"):
        tasks = read_tasks(asked.config)
    if not tasks.splits.test:
        raise ConfigError("test: there are no test rows, and without them nothing can be compared.")
    why = {name: reason for name, entry in asked.entries.items() if (reason := unfit(entry, tasks, asked.config))}
    entries = {name: entry for name, entry in asked.entries.items() if name not in why}
    if len(entries) < 2:
        raise ConfigError("methods: fewer than two can be compared: " + "; ".join(f"{n}: {r}" for n, r in why.items()))
    with progress.stage("Try each method on the base"):
        network = bare(asked.config, tasks.known, tasks.values)
        add_heads(network, tasks)
        size = {
            name: tried(network, asked.run(entry, asked.seeds[0]), name)
            for name, entry in entries.items()
            if not entry.baseline
        }
    if asked.reference in why:
        asked = replace(asked, reference=next(iter(entries)))
    return Planned(asked, tasks, entries, why, size, data.survey(tasks.splits))


def unfit(entry: Entry, tasks: Tasks, config: Config) -> str | None:
    """Why a method can't be compared on these data; None if it can."""
    routes = ["task", *config.by]
    several = [label for label in routes if len({row.labels.get(label) for row in tasks.splits.train}) > 1]
    if entry.baseline:
        baseline = BASELINES[entry.method]
        if not set(tasks.kinds.values()) <= set(baseline.kinds):
            return f"there is none for {tasks.kind}"
        return "no label has two values to part rows by" if baseline.each and not several else None
    wanted = METHODS[entry.method].labels if entry.method in METHODS else 0
    if wanted > len(several):
        have = f"only {several[0]!r} has" if several else "none has"
        return f"it routes by {'two labels' if wanted == 2 else 'a label'} with two values or more, and {have}"
    return None


def tried(network: Network, config: Config, name: str) -> int:
    """How many parameters learn with a method's modules, which are then gone again."""
    before = set(bays(network.model))
    try:
        add_bays(network, method_bays(config, network))
        return learning(network)
    except ModbayError as error:
        raise ConfigError(f"method {name!r}: {error}") from None
    finally:
        for bay in [bay for key, bay in bays(network.model).items() if key not in before]:
            bay.detach()


def compare(
    asked: Comparison, out: str | Path, *, resume: bool = False, progress: Progress | None = None, command: str = "",
    page: Page | None = None,
) -> Compared:  # fmt: skip
    """Run every method with every seed, and write the comparison to the folder `out`, which must not exist.

    resume: go on where an unfinished comparison of `out` was. Raises ConfigError or DataError before anything is
    written, Interrupted after Ctrl-C, when all is saved.
    """
    progress, out = progress or Silent(), Path(out)
    if several():
        raise ConfigError("compare: it runs in one process; `modbay train` takes several, a method at a time.")
    partial = unfinished(free(out, resume=resume))
    plan = planned(asked, progress)
    with atomic(partial):
        write_comparison(partial, plan.asked, out.name)
    total, done = len(plan.asked.seeds) * len(plan.entries), 0
    for seed in plan.asked.seeds:
        start = Start(plan, seed, partial, progress)
        for name, entry in plan.entries.items():
            done += 1
            folder, said = partial / f"{name}-{seed}", f"[{done}/{total}] {entry.title}, seed {seed}"
            if folder.exists():
                progress.say(f"{said}: finished before")
            elif entry.baseline:
                with progress.stage(said):
                    answer(start, entry, folder)
            else:
                place = unfinished(folder) / "probe"
                if not place.exists() and start.folder.exists():
                    shutil.copytree(start.folder / "probe", place)
                again = f"modbay train {out / folder.name}/run.yaml --out ANOTHER"
                config = plan.asked.run(entry, seed)
                train(config, folder, resume=True, progress=Within(progress, said), command=again, tasks=start.tasks)
    facts = gathered(plan, partial, command, progress)
    write_json(partial / "compare.json", facts)
    if page is not None:
        for told in [partial / "compare.json", *sorted(partial.glob("*/run.json"))]:
            page(told.parent / "report.html", read_json(told))
    for seed in plan.asked.seeds:
        shutil.rmtree(partial / f"start-{seed}", ignore_errors=True)
    os.replace(partial, out)
    return Compared(out, facts)


def begun(out: Path) -> Comparison:
    """What the unfinished comparison of a folder was asked for."""
    partial = unfinished(out)
    if out.exists():
        raise ConfigError(f"--resume {out}: that comparison is finished.")
    if not (partial / "compare.yaml").is_file():
        raise ConfigError(f"--resume {out}: there is no {partial}/compare.yaml, so none of that name was begun.")
    return comparison(read_config(partial / "compare.yaml"), str(partial / "compare.yaml"))


class Start:
    """What all methods of a seed begin with: the rows, and standardised features with heads that learned on them."""

    def __init__(self, plan: Planned, seed: int, partial: Path, progress: Progress):
        self.config = plan.asked.config.model_copy(update={"seed": seed})
        self.tasks = plan.tasks if seed == plan.asked.seeds[0] else read_tasks(self.config)
        self.folder = partial / f"start-{seed}"
        began = time.perf_counter()
        self.network = bare(self.config, self.tasks.known, self.tasks.values)
        torch.manual_seed(seed)
        add_heads(self.network, self.tasks)
        rows = self.tasks.splits.train
        prepare(self.network, self.config, rows, balance(self.config, rows), self.folder, progress)
        if self.folder.exists() and not (self.folder / "start.json").exists():
            write_json(self.folder / "start.json", {"seconds": time.perf_counter() - began})


def answer(start: Start, entry: Entry, folder: Path) -> None:
    """A baseline's folder, which appears whole."""
    began = time.perf_counter()
    label = next((one for one in (*start.config.by, "task") if len(start.tasks.values.get(one, {})) > 1), None)
    said = BASELINES[entry.method].run(start.tasks, label, start.network)
    seconds = round(time.perf_counter() - began, 2)
    aside = unfinished(folder)
    shutil.rmtree(aside, ignore_errors=True)
    write_records(aside / "predictions.jsonl", said.records)
    row = {"bay": "", "module": entry.name, "kind": entry.title, "parameters": said.parameters}
    facts = {
        "title": entry.title,
        "method": entry.method,
        "seed": start.config.seed,
        **machine(),
        "data": start.tasks.files,
        "config": {"baseline": entry.method, **said.chosen},
        "parameters": [{**row, "learning": said.parameters}],
        "seconds": seconds,
        "time": {"train": seconds},
    }
    write_json(aside / "run.json", facts)
    os.replace(aside, folder)


def gathered(plan: Planned, partial: Path, command: str, progress: Progress) -> dict[str, Any]:
    """The facts of a comparison whose runs are all finished."""
    seeds, config = plan.asked.seeds, plan.asked.config
    runs, each = {}, {}
    for name in plan.entries:
        folders = [partial / f"{name}-{seed}" for seed in seeds]
        runs[name] = [records(folder / "predictions.jsonl") for folder in folders]
        each[name] = [read_json(folder / "run.json") for folder in folders]
    starts = [partial / f"start-{seed}" / "start.json" for seed in seeds]
    shared = sum(read_json(path)["seconds"] for path in starts if path.exists()) / len(seeds)
    with progress.stage("Compare"):
        said = told(plan.entries, runs, each, plan.tasks, list(config.by), plan.asked.reference, shared)
    left = [f"{name} is left out: {why}." for name, why in plan.left_out.items()]
    base = next((one[0]["base"] for one in each.values() if "base" in one[0]), {"name": config.base})
    steps = steps_of(config.model_copy(update={"method": None}), len(plan.tasks.splits.train))
    seconds = {name: round(sum(one["time"]["train"] for one in several), 2) for name, several in each.items()}
    return {
        "title": f"{', '.join(plan.tasks.kinds)}: {len(plan.entries)} methods",
        "command": command,
        "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **machine(),
        "seed": seeds[0] if len(seeds) == 1 else list(seeds),
        "method": "comparison",
        "base": base,
        "data": plan.tasks.files,
        "warnings": [*plan.survey.warnings, *left],
        "left_out": plan.left_out,
        "config": plan.asked.dump(),
        **said,
        "time": seconds,
        "seconds": round(sum(seconds.values()) + shared * len(seeds), 1),
        "memory": {"peak_mib": peak()},
        "compare": {**said["compare"], "budget": f"{steps:,} steps of {config.batch} rows"
                    + (f", {len(seeds)} seeds" if len(seeds) > 1 else ", one seed")},
    }  # fmt: skip


class Within:
    """The progress of one run among several: its long pieces of work, under its name."""

    def __init__(self, progress: Progress, name: str):
        self.progress, self.name = progress, name

    @contextmanager
    def stage(self, what: str, total: int | None = None) -> Iterator[Bar]:
        with (self.progress if what in ("Train", "Test") else Silent()).stage(f"{self.name}: {what}", total) as bar:
            yield bar

    def say(self, line: str) -> None:
        self.progress.say(line)
