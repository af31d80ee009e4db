"""`modbay methods`: the catalogue, as a table, in full, as JSON or as a page."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from difflib import get_close_matches

from ..methods import AXES, Entry, catalogue
from ._say import console, fail, table

HEADS = ("name", "systems", "§", "what it computes", "how to build it", "folds")
TITLES = {"composition": "Compositions, and methods of a run"}


def run(names: list[str], axis: str | None, as_json: bool, as_page: bool) -> None:
    """Print all rows, those of an axis, or those named, in full."""
    rows = catalogue()
    if axis is not None:
        chosen = [one for one in AXES if axis.lower() in one]
        if not chosen:
            fail(f"--axis {axis}: there is no such axis. They are {', '.join(AXES)}.")
        rows = [row for row in rows if row.axis in chosen]
    if names:
        rows = [row for name in names for row in named(name, rows)]
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2, ensure_ascii=False))
    elif as_page:
        print(page(rows))
    elif names:
        for row in rows:
            console().print(full(row), soft_wrap=True)
    else:
        show(rows)


def named(name: str, rows: Sequence[Entry]) -> list[Entry]:
    """The rows of a part or a system, by name or number, case aside."""
    found = [r for r in rows if name.lower() in (r.name.lower(), r.part.lower()) or name in map(str, r.systems)]
    if not found:
        known = {one.lower(): one for row in rows for one in (row.name, row.part)}
        near = ", ".join(known[one] for one in get_close_matches(name.lower(), known, 3))
        fail(f"NAME={name!r}: there is no such method. Near: {near or '`modbay methods` lists all of them'}.")
    exact = [row for row in found if row.name.lower() == name.lower()]
    return exact or found


def show(rows: Sequence[Entry]) -> None:
    """A table an axis."""
    out = console()
    for axis in dict.fromkeys(row.axis for row in rows):
        mine = [row for row in rows if row.axis == axis]
        title = TITLES.get(axis, axis.capitalize())
        out.print(table((title, *HEADS[1:]), [cells(row) for row in mine]))
        out.print()
    out.print("`modbay methods NAME` prints one in full: its equation, arguments, source and tests.")


def cells(row: Entry) -> tuple[str, ...]:
    """A row for people."""
    folds = {True: "yes", False: "no", None: ""}[row.folds]
    return row.name, ", ".join(map(str, row.systems)), row.section, row.equation, row.build, folds


def full(row: Entry) -> str:
    """All that is known of a row."""
    numbers = f", systems {', '.join(map(str, row.systems))}" if row.systems else ""
    parts = [f"{row.build}\n{row.name}: {row.axis}, survey section {row.section}{numbers}", row.doc, row.source]
    return "\n\n".join(part for part in [*parts, "\n".join(row.tests)] if part) + "\n"


def page(rows: Sequence[Entry]) -> str:
    """The catalogue in Markdown, docs/methods.md."""
    said = "Written by `modbay methods --page`, from the code; systems are numbered as the survey's list has them."
    lines = ["# Methods", "", said]
    heads = (*HEADS, "source")
    for axis in dict.fromkeys(row.axis for row in rows):
        lines += ["", f"## {TITLES.get(axis, axis.capitalize())}", "", in_bars(heads), in_bars(["---"] * len(heads))]
        lines += [in_bars(linked(row)) for row in rows if row.axis == axis]
    return "\n".join(lines)


def linked(row: Entry) -> list[str]:
    """A row for the page, with links to its papers."""
    *said, build, folds = (one.replace("|", "\\|") for one in cells(row))
    return [*said, f"`{build}`", folds, ", ".join(f"[{one}](https://arxiv.org/abs/{one})" for one in row.arxiv)]


def in_bars(said: Sequence[str]) -> str:
    return f"| {' | '.join(said)} |"
