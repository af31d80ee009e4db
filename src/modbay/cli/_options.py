"""Options that commands have in common."""

from pathlib import Path
from typing import Annotated

import typer

Data = Annotated[list[str] | None, typer.Argument(help="Files, folders, a datasets id; NAME=FILE a task; or one YAML.")]
Base = Annotated[
    str | None, typer.Option("--base", "-b", help="A folder with a transformers model, or its id on the hub.")
]
Text = Annotated[list[str] | None, typer.Option("--text", help="The column of the text; twice for two texts.")]
Target = Annotated[str | None, typer.Option("--target", help="The column of what is to be told.")]
By = Annotated[list[str] | None, typer.Option("--by", help="LABEL or LABEL=COLUMN to route by; may be given again.")]
Kind = Annotated[
    str | None, typer.Option("--kind", help="classification, regression, tagging, causal, masked, seq2seq.")
]
Module = Annotated[str | None, typer.Option("--module", help="The kind of module: LoRA, or {LoRA: {rank: 16}}.")]
At = Annotated[list[str] | None, typer.Option("--at", "-a", help="Where modules go: a pattern, or role.query.")]
Steps = Annotated[int | None, typer.Option("--steps", help="How many; otherwise --epochs.")]
Epochs = Annotated[float | None, typer.Option("--epochs", help="How often the data is gone through [3].")]
Batch = Annotated[int | None, typer.Option("--batch", help="Examples a step, over all processes [32].")]
Rate = Annotated[float | None, typer.Option("--lr", help="Learning rate of modules [0.001].")]
Layers = Annotated[int | None, typer.Option("--layers", help="Only the first n layers of the base.")]
Validation = Annotated[str | None, typer.Option("--validation", help="A file, or a share of the rows [0.1].")]
Test = Annotated[str | None, typer.Option("--test", help="A file, or a share of the rows [0.2].")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="Any other argument of a run: --set pool=[mean,max].")]
Dry = Annotated[bool, typer.Option("--dry-run", help="Print the plan, and stop.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="The folder that is written.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Value = Annotated[list[str] | None, typer.Option("--value", help="LABEL=VALUE of all rows, where no column names it.")]
OwnText = Annotated[list[str] | None, typer.Option("--text", help="The column of the text [the run's].")]
Unknown = Annotated[str, typer.Option("--unknown", help="Rows of new label values: error, or base, without modules.")]
AnyBase = Annotated[bool, typer.Option("--any-base", help="Though the modules were made on another base.")]


def texts(given: list[str] | None) -> str | list[str] | None:
    """One column, or two."""
    return None if not given else given[0] if len(given) == 1 else given


def share(given: str | None) -> str | float | None:
    """A share of the rows, or a file's name."""
    return float(given) if given is not None and given.replace(".", "", 1).isdigit() else given
