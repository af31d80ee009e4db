"""Drawings as inline SVG, coloured by the page's style sheet, so that they follow light, dark and print."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log2, log10
from typing import Any

from ._figures import is_share, number, numbers
from ._html import Safe, join, tag

WIDE = 168  # pixels of a whisker's cell
EDGE = 8
MARKS = 6  # markers and dashes that differ in shape, so that colour is never alone


def round_to(x: float) -> str:
    """A coordinate: a tenth of a pixel is enough."""
    return f"{x:.1f}".removesuffix(".0")


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from low to high, at most `most`."""
    if high <= low:
        return [low]
    rough = (high - low) / max(1, most - 1)
    ten = 10.0 ** floor(log10(rough))
    for times in (1, 2, 2.5, 5, 10, 20):
        step = times * ten
        first, last = ceil(low / step - 1e-9), floor(high / step + 1e-9)
        if last - first + 1 <= most:
            break
    return [i * step for i in range(first, last + 1)]


def labels(at: Sequence[float], metric: str) -> list[str]:
    """Ticks in words, with as many decimals as they need."""
    times = 100.0 if is_share(metric) else 1.0
    for decimals in range(6):
        if all(abs(round(times * x, decimals) - times * x) < 1e-6 * max(1, abs(times * x)) for x in at):
            break
    return [f"{times * x + 0.0:,.{decimals}f}".replace("-", "−") for x in at]


@dataclass(frozen=True)
class Scale:
    """Where numbers are on a line of pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, x: float) -> float:
        low, high = self.low, self.high
        if self.log:
            x, low, high = log2(x), log2(low), log2(high)
        share = 0.5 if high == low else (min(max(x, low), high) - low) / (high - low)
        return self.start + share * (self.end - self.start)


def spanning(
    values: Sequence[Any], metric: str = "", start: float = EDGE, end: float = WIDE - EDGE, zero: bool = False
) -> Scale:
    """A scale over all values, with a little air; of shares, it ends at 0 and 1, of their differences (`zero`) not."""
    known = numbers(values) or [0.0, 1.0]
    low, high = min(known), max(known)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    air = 0.04 * (high - low) or 0.1 * abs(high) or 1.0
    if is_share(metric) and not zero:
        return Scale(max(low - air, min(low, 0.0)), min(high + air, max(high, 1.0)), start, end)
    return Scale(low - air, high + air, start, end)


def axis(scale: Scale, metric: str) -> Safe:
    """The ruler over a column of whiskers."""
    at = ticks(scale.low, scale.high, 4)
    marks = [
        tag("text", label, x=round_to(scale(x)), y=10, text_anchor="middle")
        for x, label in zip(at, labels(at, metric), strict=True)
    ]
    lines = "".join(f"M{round_to(scale(x))} 13v5" for x in at)
    return tag(
        "svg", marks, tag("path", d=lines), class_="axis", width=WIDE, height=18, viewBox=f"0 0 {WIDE} 18",
        aria_hidden="true",
    )  # fmt: skip


def whisker(scale: Scale, estimate: Any, low: Any, high: Any, line: Any = None, best: bool = False) -> Safe:
    """A dot with its interval; `line`: where to draw the reference. The figures stand beside it as text."""
    x, a, b, at = number(estimate), number(low), number(high), number(line)
    parts = []
    if at is not None:
        parts.append(tag("path", class_="ref", d=f"M{round_to(scale(at))} 0v20"))
    if a is not None and b is not None:
        left, right = round_to(scale(a)), round_to(scale(b))
        parts.append(tag("path", class_="span", d=f"M{left} 10H{right}M{left} 6v8M{right} 6v8"))
    if x is not None:
        parts.append(tag("circle", cx=round_to(scale(x)), cy=10, r=4, class_="best" if best else None))
    return tag(
        "svg", parts, class_="whisker", width=WIDE, height=20, viewBox=f"0 0 {WIDE} 20", aria_hidden="true"
    )  # fmt: skip


def bar(share: Any, most: float, line: float | None = None) -> Safe:
    """A bar from nought to `most`."""
    scale = Scale(0, most or 1, 0, WIDE)
    parts = [tag("rect", x=0, y=5, width=round_to(scale(number(share) or 0)), height=10)]
    if line is not None:
        parts.append(tag("path", class_="ref", d=f"M{round_to(scale(line))} 0v20"))
    return tag(
        "svg", parts, class_="bar", width=WIDE, height=20, viewBox=f"0 0 {WIDE} 20", aria_hidden="true"
    )  # fmt: skip


@dataclass(frozen=True)
class Series:
    """One line of a chart: `points` (x, y) in order, with intervals where known."""

    name: str
    points: Sequence[tuple[float, float]]
    low: Sequence[Any] = ()
    high: Sequence[Any] = ()
    mark: int = 0
    dots: bool = True


def shape(mark: int, x: float, y: float) -> Safe:
    """The marker of a series: circle, square, triangle, diamond, inverted triangle, cross."""
    paths = ("", "-4-4h8v8h-8z", "0-5l4.8 8.5h-9.6z", "0-5.5l4.5 5.5l-4.5 5.5l-4.5-5.5z", "0 5l4.8-8.5h-9.6z",
             "-5-2h3v-3h4v3h3v4h-3v3h-4v-3h-3z")  # fmt: skip
    kind, path = f"mark c{mark % MARKS}", paths[mark % MARKS]
    if not path:
        return tag("circle", cx=round_to(x), cy=round_to(y), r=4.3, class_=kind)
    return tag("path", d=f"M{round_to(x)} {round_to(y)}m{path}", class_=kind)


def chart(series: Sequence[Series], said: str, metric: str = "", *, across: str, at: Sequence[float] = ()) -> Safe:
    """Lines over one axis; `at`: the places on a logarithmic one, where 0 stands at a half; `said`: the alt text."""
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points] + [v for one in series for v in numbers([*one.low, *one.high])]
    if at:
        width = Scale(max(min(at), 0.5), max(*at, 0.5), 58, 360, log=True)
        marks, written = [max(x, 0.5) for x in at], [f"{x:g}" for x in at]
    else:
        width = Scale(min(xs), max(xs), 50, 368)
        marks = ticks(min(xs), max(xs), 6)
        written = labels(marks, "")
    height = spanning(ys, metric, 200, 10)
    up = ticks(height.low, height.high, 6)
    grid = "".join(f"M46 {round_to(height(y))}H374" for y in up)
    parts = [tag("path", d=grid, class_="grid")]
    for y, label in zip(up, labels(up, metric), strict=True):
        parts.append(tag("text", label, x=40, y=round_to(height(y) + 4), text_anchor="end"))
    for x, label in zip(marks, written, strict=True):
        parts.append(tag("text", label, x=round_to(width(x)), y=218, text_anchor="middle"))
    parts.append(tag("text", across, x=210, y=236, text_anchor="middle", class_="across"))
    parts += [_line(one, width, height, i - (len(series) - 1) / 2) for i, one in enumerate(series)]
    return tag("svg", parts, class_="chart", viewBox="0 0 380 240", role="img", aria_label=said)


def _line(one: Series, width: Scale, height: Scale, offset: float) -> Safe:
    """A series; markers stand a little beside each other, so that whiskers don't cover one another."""
    aside = 3 * offset if one.low else 0
    places = [(width(x) + aside, height(y)) for x, y in one.points]
    parts, kind = [], one.mark % MARKS
    path = "M" + "L".join(f"{round_to(x)} {round_to(y)}" for x, y in places)
    for (x, _), low, high in zip(places, one.low, one.high, strict=False):
        if number(low) is not None and number(high) is not None:
            parts.append(f"M{round_to(x)} {round_to(height(low))}V{round_to(height(high))}")
    spans = tag("path", d="".join(parts), class_=f"spans c{kind}") if parts else None
    dots = [shape(kind, x, y) for x, y in places] if one.dots else None
    return join(spans, tag("path", d=path, class_=f"line c{kind}"), dots)


def legend(names: Sequence[str]) -> Safe:
    """What the lines are, in the order of their markers."""
    return tag(
        "ul",
        [
            tag(
                "li",
                tag(
                    "svg",
                    tag("path", d="M0 8h26", class_=f"line c{i % MARKS}"),
                    shape(i, 13, 8),
                    width=26,
                    height=16,
                    viewBox="0 0 26 16",
                    class_="swatch",
                    aria_hidden="true",
                ),
                tag("span", name),
            )
            for i, name in enumerate(names)
        ],
        class_="legend",
    )
