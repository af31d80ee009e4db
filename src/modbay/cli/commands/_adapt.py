"""`modbay adapt`, as it is typed."""

from pathlib import Path
from typing import Annotated

import typer

from .. import _options as options


def adapt(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    data: Annotated[str, typer.Argument(help="The few rows: a file, a folder, or a datasets id; or NAME=FILE.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the run with what is new is written.")],
    ways: Annotated[str | None, typer.Option("--ways", help="Only these, with commas between; one is taken.")] = None,
    task: Annotated[str | None, typer.Option("--task", help="The new task's name [the file's].")] = None,
    value: Annotated[
        str | None, typer.Option("--value", help="LABEL=VALUE: rows of a known task, of a new language, say.")
    ] = None,
    shots: Annotated[int | None, typer.Option("--shots", help="Use so many rows of each class.")] = None,
    folds: Annotated[int, typer.Option("--folds", help="Of the cross-validation.")] = 4,
    steps: Annotated[int, typer.Option("--steps", help="Of each training or search, alike for all ways.")] = 60,
    lr: Annotated[float | None, typer.Option("--lr", help="Of modules and heads that learn [the run's].")] = None,
    test: Annotated[str | None, typer.Option("--test", help="A share of the rows, or a file, to judge by.")] = None,
    text: options.OwnText = None,
    target: options.Target = None,
    kind: Annotated[str | None, typer.Option("--kind", help="Of a new task: classification, regression …")] = None,
    head: Annotated[
        str, typer.Option("--head", help="A known task's: tuned, a copy learns with every way; or kept.")
    ] = "tuned",
    seed: Annotated[int, typer.Option("--seed", help="Of draws, folds and initialisation.")] = 0,
    json: options.Json = False,
) -> None:
    """Serve a new task or label value from few rows, over the modules that a run has; the old ones stay bit for bit.

    \b
    modbay adapt runs/mail orders.csv --out runs/mail-orders           a new task, named as the file
    modbay adapt runs/mail pt.csv --value language=pt --shots 16 --out runs/mail-pt
    modbay adapt runs/mail pt.csv --value language=pt --test 0.5 --ways nearest,scratch --out runs/mail-pt

    \b
    routing-sigmoid, routing-softmax   weights over the modules, which are frozen
    lorahub                            such weights by search, without a gradient
    average, nearest                   the modules' mean, or the one that suits best, and then tuned
    scratch                            a new module

    Each way is cross-validated on the rows, all on the same folds and with the same steps. The cheapest that is within
    one standard error of the best is trained on all rows and added as one module to a copy of the run.
    """
    from .._adapt import run as adapted

    given = {
        "task": task, "value": value, "shots": shots, "folds": folds, "steps": steps, "lr": lr,
        "test": test, "text": options.texts(text), "target": target, "kind": kind, "head": head,
        "seed": seed,
    }  # fmt: skip
    adapted(run, data, out, ways, given, json)
