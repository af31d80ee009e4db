"""`modbay extend`, as it is typed."""

from pathlib import Path
from typing import Annotated

import typer

from .. import _options as options


def extend(
    run: Annotated[Path | None, typer.Argument(help="The folder of a finished run; or one extend.yaml.")] = None,
    data: Annotated[list[str] | None, typer.Argument(help="The newcomer's rows; NAME=FILE for a task.")] = None,
    out: options.Out = None,
    task: Annotated[
        str | None, typer.Option("--task", help="The rows are of this task; a new name is a new task.")
    ] = None,
    value: options.Value = None,
    on: Annotated[
        str | None, typer.Option("--on", help="The run's modules under its own: MODULE, nearest, average or none.")
    ] = None,
    ways: Annotated[
        str | None, typer.Option("--ways", help="What it gets of its own: both, module or head [both].")
    ] = None,
    shots: Annotated[int | None, typer.Option("--shots", help="Learn from so many rows of each class.")] = None,
    text: options.Text = None,
    target: options.Target = None,
    by: options.By = None,
    kind: options.Kind = None,
    module: options.Module = None,
    steps: options.Steps = None,
    epochs: options.Epochs = None,
    batch: options.Batch = None,
    lr: options.Rate = None,
    validation: options.Validation = None,
    test: options.Test = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of splits, draws and initialisation [the run's].")] = None,
    sets: options.Sets = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", help="Go on with the unfinished work of this folder.")
    ] = None,
    dry: options.Dry = False,
    json: options.Json = False,
) -> None:
    """Add a task, or a value of a label (a language, a customer), to a finished run; the others stay bit for bit.

    \b
    modbay extend runs/mail portuguese.csv --out runs/mail-pt          a new value in the column of the language
    modbay extend runs/mail pt.csv --value language=pt --shots 16 --out runs/mail-pt      no column, few rows
    modbay extend runs/mail spam=spam.csv --target spam --out runs/mail-spam              a new task, of its own classes
    modbay extend runs/mail pt.csv --on nearest --out runs/mail-pt     on the module of the language that is nearest
    modbay extend runs/mail pt.csv --ways head --out runs/mail-pt      a head alone: cheap, and often enough
    modbay extend --resume runs/mail-pt

    Who is new is found from the rows. The newcomer gets a head and a module of its own, on what all rows use; all else
    is frozen. The logits of the run's own test rows are compared before and after, bit by bit: if one differs, nothing
    is written. Columns are the run's own where nothing is said; without --steps, ten passes, 100 steps at least.
    """
    from .._extend import run as extended

    flags = {
        "task": task, "fixed": value or None, "on": on, "ways": ways, "shots": shots, "text": options.texts(text),
        "target": target, "by": by or None, "kind": kind, "module": module, "steps": steps, "epochs": epochs,
        "batch": batch, "lr": lr, "validation": options.share(validation), "test": options.share(test), "seed": seed,
    }  # fmt: skip
    extended(run, data or [], flags, sets or [], out, resume, dry, json)
