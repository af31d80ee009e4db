"""Tables: of figures, of whiskers, and heat maps, which are tables whose cells are tinted."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ._figures import number
from ._html import Safe, fold, join, tag

LONG = 24  # rows above which a table is folded
FEW, NARROW = 6, 9  # columns above which long heads of a heat map stand upright, and all heads
SHADES = 10


@dataclass(frozen=True)
class Head:
    """A column: its head, and whether its cells are figures."""

    name: Any
    right: bool = False


LEFT, RIGHT = (lambda name: Head(name)), (lambda name: Head(name, right=True))


def boxed(table: Safe, caption: Any, said: str) -> Safe:
    """A table that scrolls inside its own box, where the keyboard reaches it; the caption stays in sight above it."""
    box = tag("div", table, class_="box", tabindex=0, role="region", aria_label=said)
    return tag("figure", tag("figcaption", caption) if caption else None, box, class_="tab")


def table(caption: Any, said: str, heads: Sequence[Head], rows: Iterable[Sequence[Any]], kind: str = "") -> Safe:
    """Rows of cells, the first of each its heading; `said`: a short name, for those who hear the page."""
    top = tag("tr", [tag("th", head.name, scope="col", class_="r" if head.right else None) for head in heads])
    body = [_row(row, heads) for row in rows]
    made = tag("table", tag("thead", top), tag("tbody", body), class_=kind or None, aria_label=said)
    return boxed(made, caption, said)


def _row(row: Sequence[Any], heads: Sequence[Head]) -> Safe:
    first = tag("th", row[0], scope="row")
    rest = zip(row[1:], heads[1:], strict=True)
    return tag("tr", first, [tag("td", cell, class_="r" if head.right else None) for cell, head in rest])


def folded(summary: str, made: Safe, rows: int, most: int = LONG) -> Safe:
    """The table, under a summary if it is long."""
    return made if rows <= most else fold(summary, made)


def shade(value: Any, low: float, high: float, both: bool = False) -> str | None:
    """The class that tints a cell: s0 … s10 from low to high; with `both`, n10 … p10 around nought."""
    x = number(value)
    if x is None:
        return None
    if both:
        step = round(SHADES * min(1.0, abs(x) / (max(abs(low), abs(high)) or 1.0)))
        return f"{'p' if x > 0 else 'n'}{step}" if step else None
    return f"s{round(SHADES * min(1.0, max(0.0, (x - low) / ((high - low) or 1.0))))}"


def heat(
    caption: Any,
    said: str,
    names: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[Any]],
    cells: Sequence[Sequence[Any]],
    *,
    between: tuple[float, float],
    both: bool = False,
    corner: str = "",
) -> Safe:
    """A matrix: `values` tint, `cells` are written."""
    upright = len(columns) > NARROW or (len(columns) > FEW and any(len(str(name)) > 12 for name in columns))
    top = [tag("th", tag("span", name), scope="col") for name in columns]
    body = [
        tag("tr", tag("th", name, scope="row"), [
            tag("td", cell, class_=shade(value, *between, both)) for value, cell in zip(line, shown, strict=False)
        ])
        for name, line, shown in zip(names, values, cells, strict=False)
    ]  # fmt: skip
    kind = " ".join(["heat", *(["upright"] if upright else []), *(["many"] if len(columns) > 14 else [])])
    head = tag("thead", tag("tr", tag("td", corner, class_="corner"), top))
    return boxed(tag("table", head, tag("tbody", body), class_=kind, aria_label=said), caption, said)


def pair(figure: Any, small: Any) -> Safe:
    """A figure with its interval, small beside it."""
    return join(figure, tag("small", " ", small) if small else None)
