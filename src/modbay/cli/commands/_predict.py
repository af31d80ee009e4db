"""`modbay predict`, as it is typed."""

from pathlib import Path
from typing import Annotated

import typer

from .. import _options as options


def predict(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    files: Annotated[list[str], typer.Argument(help="Files or folders of them; TASK=FILE for one of several tasks.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A file, a folder for several, or - [JSON lines, printed].")
    ] = None,
    text: options.OwnText = None,
    by: Annotated[
        list[str] | None, typer.Option("--by", help="LABEL=COLUMN [the run's]; task=COLUMN for mixed tasks.")
    ] = None,
    value: options.Value = None,
    task: Annotated[str | None, typer.Option("--task", help="The task that FILES are of.")] = None,
    unknown: options.Unknown = "error",
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
    json: options.Json = False,
) -> None:
    """Write files again, in their own formats, with a prediction beside each row.

    \b
    modbay predict runs/mail-private inbox.csv --out told.csv
    modbay predict runs/mail-private inbox/*.jsonl --out told/
    modbay predict runs/two mixed.parquet --by task=job --out told.parquet
    modbay predict runs/mail-private inbox.csv | jq 'select(.confidence < 0.5)'
    modbay predict runs/mail-private pt.csv --value language=pt --out told.csv      no column names the language
    modbay predict runs/mail-private new.csv --unknown base

    No target is needed. Rows of all tasks and labels go through in one pass, and files may be larger than memory. What
    is added: prediction and confidence; a list of tags; a number; of a language model nll, tokens and perplexity.
    """
    from .._predict import run as go

    go(run, files, out, options.texts(text), by or [], value or [], task, unknown, force, json)
