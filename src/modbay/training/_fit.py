"""`train`: from a Config to a folder with a finished run."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from .. import data
from ..errors import ConfigError, Interrupted
from ..metrics import write_records
from ._about import about
from ._base import quiet
from ._best import Best
from ._build import Network, add_bays, add_heads, bare, groups, method_bays
from ._config import Config
from ._facts import facts
from ._new import Page, free
from ._plan import balance, plan, steps_of
from ._predict import predict
from ._probe import prepare
from ._processes import first, on_cpu, one_first, wait
from ._progress import Progress, Silent
from ._run import Run, open_run, read_json, unfinished, write_config, write_json, write_network
from ._sampling import order
from ._stream import Streamed
from ._tasks import Tasks, absolute, columns, read_tasks
from ._trainer import ModularTrainer, Ordered, checkpoints
from ._watched import telling, told, watched

EVALUATIONS = 10  # a run, unless it says how often


@dataclass
class Ready:
    """A run that could start: all that was asked for has been found sound."""

    config: Config
    tasks: Tasks
    network: Network
    plan: dict[str, Any]
    survey: data.Survey
    examples: list = field(repr=False)
    seen: dict[str, list[Any]] = field(default_factory=dict)  # of its routing, in training


def ready(
    config: Config, progress: Progress | None = None, folder: Path | None = None, tasks: Tasks | None = None
) -> Ready:
    """Read the data, open the base, attach the modules: everything but training. Raises before anything is written.

    **Arguments:** folder: where the run is written. With it the base's features are standardised and the heads learn
    on them, before the method's bays stand in the way; without it this is a plan alone. tasks: the data, where it has
    been read already.
    """
    progress = progress or Silent()
    if tasks is None:
        with progress.stage("Read the data"):
            tasks = read_tasks(config)
    with progress.stage("Open the base"):
        network = bare(config, tasks.known, tasks.values)
    torch.manual_seed(config.seed)
    add_heads(network, tasks)
    specs = method_bays(config, network)
    if folder is not None:
        prepare(network, config, tasks.splits.train, balance(config, tasks.splits.train), folder, progress)
    torch.manual_seed(config.seed)
    add_bays(network, specs)
    rows = tasks.splits.train
    with progress.stage("Encode"):
        examples = network.encoder.encode(rows, [network.routes.of(row, network.keywords) for row in rows])
    survey = data.survey(tasks.splits)
    return Ready(config, tasks, network, plan(config, tasks, network, examples, survey), survey, examples)


def train(
    config: Config,
    out: str | Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    command: str = "",
    tasks: Tasks | None = None,
    page: Page | None = None,
) -> Run:
    """Train as `config` says, and write the run to the folder `out`, which must not exist; returns it, opened.

    resume: go on where an unfinished run of `out` was. tasks: the data, where it has been read already. page: writes
    report.html from the facts. Raises ConfigError or DataError before anything is written, Interrupted after Ctrl-C,
    when all is saved, and OSError for a full disk, after which resuming goes on.
    """
    progress, out, began = progress or Silent(), Path(out), time.perf_counter()
    config = absolute(config)
    partial = unfinished(out)
    with one_first():
        if first():
            free(out, resume=resume)
        with atomic(partial):
            run = ready(config, progress, partial, tasks)
            if first():
                write_config(partial, config)
    curve = fit(run, partial, progress)
    trained = time.perf_counter() - began
    if first():
        write(run, partial, curve, command, {"train": trained}, progress)
        if page is not None:
            page(partial / "report.html", read_json(partial / "run.json"))
        finish(partial, out)
    wait()
    return open_run(out)


def write(
    run: Ready, partial: Path, curve: list[dict], command: str, seconds: dict[str, float], progress: Progress
) -> None:
    """Test the run, and write all of it."""
    began = time.perf_counter()
    by, network = list(run.config.by), run.network
    with watched(network.model) as recorder:
        rows = run.tasks.splits.test
        records = predict(network, rows, progress=progress, what="Test", before=telling(recorder, by))
    seen = told(recorder, by, network.encoder.tokenizer) | {"over_time": run.seen.get("over_time", [])}
    seconds["test"] = time.perf_counter() - began
    write_network(partial, network, run.tasks.known, about(run.config, network, run.tasks, records))
    write_records(partial / "predictions.jsonl", records)
    seconds["all"] = sum(seconds.values())
    write_json(partial / "run.json", facts(run, records, curve, command, seconds, seen))


@contextmanager
def atomic(partial: Path) -> Iterator[None]:
    """A new folder that is gone again, with those made for it, if what is prepared in it fails."""
    made = [path for path in (partial, *partial.parents) if not path.exists()]
    partial.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if made:
            shutil.rmtree(partial, ignore_errors=True)
        for path in made[1:]:
            with suppress(OSError):  # another run is in it by now
                path.rmdir()
        raise


def finish(partial: Path, out: Path) -> None:
    """What a finished run does not need is gone; then it takes its name."""
    for name in ("checkpoints", "best", "probe"):
        shutil.rmtree(partial / name, ignore_errors=True)
    os.replace(partial, out)


def fit(run: Ready, folder: Path, progress: Progress) -> list[dict[str, Any]]:
    """Train a run's modules; its checkpoints are in folder/checkpoints. Returns the curve."""
    config, network, tasks = run.config, run.network, run.tasks
    steps, saved = steps_of(config, len(run.examples)), folder / "checkpoints"
    if not steps:
        return []
    seen = examples_of(run, steps)
    best = Best(network, folder / "best", tasks, run.examples, list(config.by))
    validates = bool(tasks.splits.validation)
    watch = Watch(steps)
    with quiet():
        trainer = ModularTrainer(
            network.model, arguments(config, saved, steps, validates), kind=tasks.kind, encoder=network.encoder,
            groups=groups(network, config), data=seen, seed=config.seed,
            evaluator=best if validates else None, callbacks=[watch],
        )  # fmt: skip
        last = (checkpoints(saved) or [None])[-1]
        with progress.stage("Train", steps) as watch.bar, interruptible(watch), watched(network.model, "training") as r:
            trainer.train(resume_from_checkpoint=str(last) if last else None)
    run.seen = told(r, list(config.by))
    if watch.interrupted:
        raise Interrupted(f"stopped at step {trainer.state.global_step} of {steps}; all is saved in {folder}")
    if validates and config.keep == "best":
        wait()
        best.restore()
    network.model.eval()
    return curve(trainer.state.log_history)


def examples_of(run: Ready, steps: int) -> Ordered | Streamed:
    """What the steps see: examples that are held, in order, or such as are read when they are needed."""
    config, tasks = run.config, run.tasks
    if config.streaming:
        what = {name: columns(config, source) for name, source in config.sources.items()}
        return Streamed(config, what, tasks.sizes, run.network, steps)
    places = order(balance(config, tasks.splits.train), [len(e) for e in run.examples], steps, config.batch,
                   sampling=config.sampling, temperature=config.temperature, seed=config.seed)  # fmt: skip
    return Ordered(run.examples, places)


def arguments(config: Config, folder: Path, steps: int, validates: bool) -> transformers.TrainingArguments:
    """The run as Trainer knows it."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if config.batch % (processes * config.accumulate):
        raise ConfigError(
            f"batch={config.batch}: no multiple of {processes} processes × accumulate={config.accumulate}."
        )
    every = config.evaluate_every or max(1, steps // EVALUATIONS)
    return transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=config.batch // (processes * config.accumulate),
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.lr,
        weight_decay=config.weight_decay,
        max_grad_norm=config.clip,
        lr_scheduler_type="linear",
        warmup_steps=max(1, round(config.warmup * steps)) if config.warmup else 0,
        bf16=config.bf16,
        use_cpu=on_cpu(),
        eval_strategy="steps" if validates else "no",
        eval_steps=every,
        save_strategy="steps",
        save_steps=config.save_every or every,
        save_total_limit=1,
        logging_steps=max(1, min(10, steps // EVALUATIONS)),
        seed=config.seed,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


class Watch(transformers.TrainerCallback):
    """Moves the bar, and on Ctrl-C lets the step end and has all saved."""

    def __init__(self, steps: int):
        self.bar: Any = None
        self.interrupted, self.note = False, ""

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.step(state.global_step, self.note)
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs = logs or {}
        loss, validation = logs.get("loss"), logs.get("eval_score")
        if loss is not None:
            self.note = f"loss {loss:.3f}"
        if validation is not None:
            self.note += f", validation {validation:.3f}"


@contextmanager
def interruptible(watch: Watch) -> Iterator[None]:
    """Ctrl-C ends the run at the next step, saved; a second one ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        if watch.interrupted:
            raise KeyboardInterrupt
        watch.interrupted = True

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def curve(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Loss, rate and validation score by step."""
    steps: dict[int, dict[str, Any]] = {}
    for entry in history:
        at = steps.setdefault(entry["step"], {"step": entry["step"], "loss": None, "lr": None, "validation": None})
        for key, name in (("loss", "loss"), ("lr", "learning_rate"), ("validation", "eval_score")):
            at[key] = entry.get(name, at[key])
    return [steps[step] for step in sorted(steps) if any(steps[step][k] is not None for k in ("loss", "validation"))]
