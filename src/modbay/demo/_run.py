"""The demo's course: twelve languages learn together, each way; two arrive; modules are written and read back."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor

import modbay as mb

from ._arrivals import ARRIVALS, MODULE, ROUTING, Arrival, arrive
from ._baselines import majority, tfidf_all, tfidf_each
from ._data import SIZES, Utterance, few_shot, load
from ._encode import Assistant
from ._files import assistant, keep, mixed
from ._score import Scores, score
from ._task import Task, prepare
from ._train import by_language, logits, plain
from ._ways import WAYS, learning, train


@dataclass(frozen=True)
class Scale:
    """How large a run is."""

    sizes: dict[str, int]
    shots: tuple[int, ...]
    held_out: int
    looks: int
    probe_steps: int
    steps: int
    few_steps: int


FULL = Scale(SIZES, (1, 4, 16), 150, 16, 600, 200, 50)
SMOKE = Scale({"es": 60, "el": 40, "eu": 30}, (2,), 12, 2, 40, 3, 2)


@dataclass(frozen=True)
class Joint:
    """A row of the joint table."""

    title: str
    scores: Scores
    seconds: float
    trained: int | None = None


@dataclass(frozen=True)
class Cost:
    """What an arrival did to the languages that were there: rows whose logits changed, of how many, and points lost.

    `changed` is None for what has no logits to compare.
    """

    newcomers: tuple[str, ...]
    shots: int
    changed: int | None
    rows: int
    points: float


@dataclass
class Arrived:
    """A row of the table of arrivals: accuracy by (language, utterances an intent); `seconds` of training, in all."""

    title: str
    accuracy: dict[tuple[str, int], float] = field(default_factory=dict)
    costs: list[Cost] = field(default_factory=list)
    trained: int | None = None
    seconds: float = 0.0


@dataclass
class Results:
    """All that a run found."""

    scale: Scale
    smallest: list[str]
    joint: list[Joint] = field(default_factory=list)
    arrived: list[Arrived] = field(default_factory=list)
    loaded: dict[str, float] = field(default_factory=dict)  # by folder: the largest difference after loading
    beside: float = 0.0  # the largest difference of the twelve's logits where newcomers' rows share their batch
    mixed: list[str] = field(default_factory=list)  # the languages of the batch in which that was looked at
    examples: list[Utterance] = field(default_factory=list)  # of the first language and of the first newcomer
    seconds: float = 0.0


class Stages:
    """Says what is being done now, and what took how long."""

    def __init__(self, console: Console, total: int):
        self.progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(),
            console=console, transient=True,
        )  # fmt: skip
        self.task = self.progress.add_task("", total=total)
        self.began = perf_counter()

    @contextmanager
    def stage(self, what: str) -> Iterator[None]:
        self.progress.update(self.task, description=what)
        before = perf_counter()
        yield
        now = perf_counter()
        self.progress.advance(self.task)
        self.progress.console.print(f"{now - self.began:6.1f} s  {what} ({now - before:.1f} s)")


def course(scale: Scale, out: Path, seed: int, console: Console) -> Results:
    """The whole run; modules are written to `out`."""
    began = perf_counter()
    stages = Stages(console, 6 + len(WAYS) + len(ARRIVALS))
    with stages.progress:
        with stages.stage("Data and base: sample grammars, encode, train the linear probe"):
            data = load(seed, sizes=scale.sizes, held_out=scale.held_out)
            before = perf_counter()
            task = prepare(data, scale.probe_steps, seed, looks=scale.looks)
        results = Results(scale, task.smallest)
        _baselines(task, results, perf_counter() - before, stages)
        models = _together(task, scale, seed, results, stages)
        final = _arrivals(task, scale, seed, models, results, stages)
        with stages.stage("Write modules, load them into a fresh model"):
            keep(out, task.base, data.intents, final)
            _reload(task, out, final, results)
            results.beside = _beside(task, models[MODULE.start], final[MODULE.start])
        results.examples = [split.test[0] for s in (data.languages, data.arrivals) for split in list(s.values())[:1]]
    results.seconds = perf_counter() - began
    return results


def _baselines(task: Task, results: Results, probe_seconds: float, stages: Stages) -> None:
    """What has no modules."""
    train = task.data.joint("train")
    before = perf_counter()
    scores = score(majority(train, task.truth), task.truth)
    results.joint.append(Joint("Majority of the language", scores, perf_counter() - before))
    for title, learn in (("TF-IDF, a model a language", tfidf_each), ("TF-IDF, all languages in one", tfidf_all)):
        with stages.stage(title):
            before = perf_counter()
            said, weights = learn(train, task.truth)
            results.joint.append(Joint(title, score(said, task.truth), perf_counter() - before, weights))
    probe = task.score(logits(task.base, task.test, call=plain))
    trained = sum(p.numel() for p in task.base.head.parameters())
    results.joint.append(Joint("Linear probe", probe, probe_seconds, trained))


def _together(task: Task, scale: Scale, seed: int, results: Results, stages: Stages) -> dict[str, Assistant]:
    """The twelve learn, once a way."""
    models = {"base": task.base}
    for way in WAYS:
        with stages.stage(f"{way.title}: {scale.steps} steps"):
            before = perf_counter()
            models[way.name] = model = train(way, task.base, task.train, scale.steps, seed)
            seconds = perf_counter() - before
            said = task.score(logits(model, task.test, call=by_language))
            results.joint.append(Joint(way.title, said, seconds, learning(model)))
    return models


def _arrivals(
    task: Task, scale: Scale, seed: int, models: dict[str, Assistant], results: Results, stages: Stages
) -> dict[str, Assistant]:
    """The newcomers come, each way and each number of utterances; returns the models as they are with the most."""
    final, known = {name: model for name, model in models.items() if name != "base"}, {}
    for way in ARRIVALS:
        row = Arrived(way.title)
        results.arrived.append(row)
        with stages.stage(f"Arrivals: {way.title}"):
            if way.start != "base" and way.start not in known:
                known[way.start] = logits(models[way.start], task.test, call=by_language)
            for k in scale.shots:
                model = _arrive(way, k, task, scale, seed, models[way.start], known.get(way.start), row)
                if way in (MODULE, ROUTING):
                    final[way.start] = model
    alone, again = Arrived("TF-IDF on it alone"), Arrived("TF-IDF retrained on all")
    results.arrived += [alone, again]
    before = next(row for row in results.joint if row.title.startswith("TF-IDF, all")).scores.mean()
    with stages.stage("Arrivals: TF-IDF"):
        for k in scale.shots:
            _tfidf(k, task, seed, alone, again, before)
    return final


def _arrive(
    way: Arrival, k: int, task: Task, scale: Scale, seed: int, start: Assistant, known: Tensor | None, row: Arrived
) -> Assistant:
    """Both newcomers, with k utterances an intent: into one model if they may join, else into a copy each."""
    model, joined = copy.deepcopy(start), []
    for language, split in task.data.arrivals.items():
        if joined and not way.joins:
            model, joined = copy.deepcopy(start), []
        few, before = task.rows(few_shot(split.train, k, seed)), perf_counter()
        arrive(way, model, language, few, scale.few_steps, seed)
        row.seconds += perf_counter() - before
        joined.append(language)
        row.trained = learning(model) if way is not ROUTING else len(mb.bays(model)["language"].names())
        row.accuracy[language, k] = task.accuracy(model, split.test)
        if known is not None and not way.joins:
            row.costs.append(_cost(task, model, known, tuple(joined), k))
    if known is not None and way.joins:
        row.costs.append(_cost(task, model, known, tuple(joined), k))
    return model


def _cost(task: Task, model: Assistant, known: Tensor, newcomers: tuple[str, ...], k: int) -> Cost:
    """The twelve's logits before and after, row by row, bit by bit."""
    now = logits(model, task.test, call=by_language)
    changed = int((now.view(torch.int32) != known.view(torch.int32)).any(dim=-1).sum())
    points = 100 * (task.score(now).mean() - task.score(known).mean())
    return Cost(newcomers, k, changed, len(now), points)


def _tfidf(k: int, task: Task, seed: int, alone: Arrived, again: Arrived, before: float) -> None:
    """TF-IDF with k utterances an intent: of the newcomer alone, and of everything once more."""
    languages = task.data.arrivals
    few = {language: few_shot(split.train, k, seed) for language, split in languages.items()}
    for language, split in languages.items():
        start = perf_counter()
        said, alone.trained = tfidf_each(few[language], split.test)
        alone.seconds += perf_counter() - start
        alone.accuracy[language, k] = score(said, split.test).mean()
    truth = [*task.truth, *(u for split in languages.values() for u in split.test)]
    train = [*task.data.joint("train"), *(u for chosen in few.values() for u in chosen)]
    start = perf_counter()
    said, again.trained = tfidf_all(train, truth)
    again.seconds += perf_counter() - start
    scores = score(said, truth)
    again.accuracy |= {(language, k): scores.accuracy[language] for language in languages}
    points = 100 * (scores.over(task.languages) - before)
    again.costs.append(Cost(tuple(languages), k, None, len(task.truth), points))


def _reload(task: Task, out: Path, final: dict[str, Assistant], results: Results) -> None:
    """Load every way's modules into a fresh model, and compare logits in one batch of all its languages."""
    for name, model in final.items():
        knows = [*task.languages, *(task.data.arrivals if name in (MODULE.start, ROUTING.start) else ())]
        splits = {**task.data.languages, **task.data.arrivals}
        batch = task.rows([u for i in range(3) for language in knows for u in splits[language].test[i : i + 1]])
        fresh = assistant(out)
        mb.load(fresh, out / name)
        results.loaded[name] = (mixed(fresh, batch) - mixed(model, batch)).abs().max().item()
        if name == MODULE.start:
            results.mixed = knows


def _beside(task: Task, before: Assistant, after: Assistant) -> float:
    """The twelve's logits alone before the newcomers came, and after, with newcomers' rows in the same batch."""
    ours, theirs = (
        task.rows([split.test[0] for split in several.values()])
        for several in (task.data.languages, task.data.arrivals)
    )
    return (mixed(before, ours) - mixed(after, [*ours, *theirs])[: len(ours)]).abs().max().item()
