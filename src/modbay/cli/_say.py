"""How every command prints a table, and fails."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

WIDE = 160  # columns where nobody looks: a pipe, a file, a test


def console() -> Console:
    """Of this moment's standard output; nothing printed is read as markup."""
    wide = None if sys.stdout.isatty() else WIDE
    return Console(width=wide, markup=False, highlight=False, emoji=False)


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]], right: Sequence[str] = ()) -> Table:
    """A table without lines; `right`: the heads of the columns that hold numbers."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for head in heads:
        made.add_column(head, justify="right" if head in right else "left", overflow="fold", no_wrap=head in right)
    for row in rows:
        made.add_row(*[str(cell) for cell in row])
    return made


def fail(message: str) -> NoReturn:
    """Print why, and leave with status 1."""
    typer.secho(f"modbay: {message}", err=True, fg="red")
    raise typer.Exit(1)
