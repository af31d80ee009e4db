"""`modbay evaluate`, as it is typed."""

from pathlib import Path
from typing import Annotated

import typer

from .. import _options as options


def evaluate(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    data: Annotated[
        list[str] | None, typer.Argument(help="Labelled files, TASK=FILE where the run has several tasks.")
    ] = None,
    against: Annotated[Path | None, typer.Option("--against", help="Another run, on the same rows.")] = None,
    by: Annotated[
        list[str] | None, typer.Option("--by", help="LABEL or LABEL=COLUMN of the table; --by task for none.")
    ] = None,
    text: options.OwnText = None,
    target: Annotated[str | None, typer.Option("--target", help="The column of the target [the run's].")] = None,
    value: options.Value = None,
    task: Annotated[str | None, typer.Option("--task", help="The task that DATA is of.")] = None,
    unknown: options.Unknown = "error",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A new folder: report, facts, predictions.")] = None,
    json: options.Json = False,
) -> None:
    """Print how right a run is, by task and label, with intervals; and how it stands against another run.

    \b
    modbay evaluate runs/mail-private                       on its own test rows
    modbay evaluate runs/mail-private new.csv --out runs/mail-new
    modbay evaluate runs/mail-private --against runs/mail-shared
    modbay evaluate runs/two news=a.csv spam=b.csv --by language
    modbay evaluate runs/mail-shared --json | jq '.results[0]'

    Columns are the run's own unless told; a class that the run does not know is an error that names the row. Against
    another run, both are compared row by row: an interval and a corrected p for each difference, and a sentence.
    """
    from .._evaluate import run as go

    go(run, data or [], against, by or [], value or [], options.texts(text), target, task, unknown, out, json)
