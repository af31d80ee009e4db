"""Methods beside each other, what transfers, and what a few examples do."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from . import _charts as charts
from ._figures import (
    NONE,
    capital,
    chance,
    duration,
    headed,
    interval,
    listed,
    lower_is_better,
    named,
    number,
    numbers,
    plural,
    points,
    rows,
    short,
    show,
)
from ._html import Safe, fold, join, section, tag
from ._results import Facts, sided, strong
from ._tables import LEFT, RIGHT, Head, folded, heat, pair, table


def _title(row: Facts) -> str:
    return str(row.get("title") or row.get("method") or NONE)


def compare(facts: Facts) -> Safe | None:
    """The table of methods, and their figures by value."""
    methods = rows(facts, "compare", "rows")
    if not methods:
        return None
    made: Mapping[str, Any] = facts["compare"]
    metric = str(made.get("metric") or "")
    titles = {str(row.get("method", "")): _title(row) for row in methods}
    reference = str(made.get("reference") or _reference(methods))
    parts = [_methods(methods, metric, reference, titles.get(reference, reference)), _pairs(methods, metric, titles)]
    parts.append(_by_value(methods, metric))
    lead = _lead(methods, titles.get(reference, reference)) + (
        f" Budget: {made['budget']}" if made.get("budget") else ""
    )
    said = [line for line in str(made.get("verdict") or "").strip().split("\n")[1:] if line.strip()]
    more = tag("ul", [tag("li", line) for line in said]) if said else None  # the first line stands under the title
    return section("compare", "Methods compared", lead, parts[0], more, *parts[1:])


def _reference(methods: Sequence[Facts]) -> str:
    """The method that most others have a difference to."""
    seen = Counter(str(name) for row in methods for name in _beside(row))
    return seen.most_common(1)[0][0] if seen else ""


def _beside(row: Facts) -> Mapping[str, Facts]:
    beside = row.get("beside")
    return {k: v for k, v in beside.items() if isinstance(v, Mapping)} if isinstance(beside, Mapping) else {}


def _lead(methods: Sequence[Facts], reference: str) -> str:
    shown = f"{plural(len(methods), 'method')} on the same data, splits and budget"
    if not reference:
        return f"{shown}, each with its 95\u202f% interval; overlapping intervals decide nothing."
    return (
        f"{shown}. The paired difference to {reference} decides, not whether two intervals overlap: "
        "it is bold where its interval leaves out nought and p is below 0.05; from the others nothing follows."
    )


def _methods(methods: Sequence[Facts], metric: str, reference: str, title: str) -> Safe:
    places = [row.get(key) for row in methods for key in ("estimate", "low", "high")]
    scale = charts.spanning(places, metric)
    known = numbers(row.get("estimate") for row in methods)
    top = (min if lower_is_better(metric) else max)(known) if known else None
    line = next((row.get("estimate") for row in methods if str(row.get("method")) == reference), None)
    heads = [LEFT("method"), Head(charts.axis(scale, metric)), RIGHT(headed(metric))]
    if reference:
        heads += [RIGHT(f"less {title}"), RIGHT("p")]
    heads += [RIGHT("parameters"), RIGHT("time")]
    lines = []
    for row in methods:
        x = row.get("estimate")
        span = interval(row.get("low"), row.get("high"), metric)
        cells = [_title(row), charts.whisker(scale, x, row.get("low"), row.get("high"), line, best=x == top)]
        cells.append(pair(strong(show(x, metric), x == top), span))
        if reference:
            cells += _difference(_beside(row).get(reference), metric)
        lines.append([*cells, short(row.get("parameters")), duration(row.get("seconds"))])
    dashed = f" The dashed line is {title}." if line is not None else ""
    lower = " Lower is better." if lower_is_better(metric) else ""
    caption = f"{capital(headed(metric))} with 95\u202f% intervals; the filled dot is the best estimate.{lower}{dashed}"
    return table(caption, "Methods compared", heads, lines)


def _difference(beside: Facts | None, metric: str) -> list[Any]:
    if beside is None:
        return [NONE, NONE]
    shown = strong(show(beside.get("difference"), metric, sign=True), sided(beside))
    return [pair(shown, interval(beside.get("low"), beside.get("high"), metric, sign=True)), chance(beside.get("p"))]


def _pairs(methods: Sequence[Facts], metric: str, titles: Mapping[str, str]) -> Safe | None:
    """Every method less every other, if more than one is a reference."""
    names = list(dict.fromkeys(str(name) for row in methods for name in _beside(row)))
    if len(names) < 2:
        return None
    values = [[_beside(row).get(name, {}).get("difference") for name in names] for row in methods]
    cells = [
        [
            strong(show(v, metric, sign=True), sided(_beside(row).get(name, {})))
            for name, v in zip(names, line, strict=True)
        ]
        for row, line in zip(methods, values, strict=True)
    ]
    most = max((abs(x) for line in values for x in numbers(line)), default=1.0)
    made = heat(
        f"Row less column, in{points(metric) or ' ' + named(metric)}. Bold: shown, as above.",
        "Differences between all methods", [_title(row) for row in methods], [titles.get(n, n) for n in names], values,
        cells, between=(-most, most), both=True,
    )  # fmt: skip
    return fold("Every method against every other", made)


def _by_value(methods: Sequence[Facts], metric: str) -> Safe | None:
    by = [row["by"] if isinstance(row.get("by"), Mapping) else {} for row in methods]
    names = list(dict.fromkeys(name for one in by for name in one))
    if not names:
        return None
    values = [[one.get(name) for one in by] for name in names]
    known = [x for line in values for x in numbers(line)] or [0.0]
    pick = min if lower_is_better(metric) else max
    best = [pick(numbers(line), default=None) for line in values]
    cells = [
        [strong(show(x, metric), x == top) for x in line] for line, top in zip(values, best, strict=True)
    ]  # fmt: skip
    made = heat(
        f"{capital(headed(metric))} by value; bold is the best of its row, be it by chance.",
        f"{named(metric)} by value and method",
        [str(name) for name in names],
        [_title(row) for row in methods],
        values,
        cells,
        between=(min(known), max(known)),
    )
    return folded(f"{capital(headed(metric))} of all {plural(len(names), 'value')}", made, len(names))


def transfer(facts: Facts) -> Safe | None:
    """The matrix of gains."""
    made = facts.get("transfer")
    if not isinstance(made, Mapping) or not made.get("rows") or not made.get("values"):
        return None
    names, columns = [str(x) for x in made["rows"]], [str(x) for x in made.get("columns") or []]
    values = made["values"]
    metric = str(made.get("metric") or _main_metric(facts))
    known = [x for line in values for x in numbers(line)]
    most = max(map(abs, known), default=1.0)
    gains = sum(x > 0 for x in known)
    cells = [[show(x, metric, sign=True) for x in line] for line in values]
    what = str(made.get("of") or "Gain").rstrip(".") + (", in points" if points(metric) else "")
    caption = f"{what}: blue is a gain, orange a loss."
    lead = (
        f"Each cell is what its row gains over its column’s way of learning: {gains} of {len(known)} are gains. "
        "Single cells rest on few test rows; read rows and columns as wholes."
    )
    made = heat(caption, "Transfer", names, columns, values, cells, between=(-most, most), both=True)
    return section("transfer", "What transfers", lead, made)


def _main_metric(facts: Facts) -> str:
    """What a gain is measured in, where the facts don't say."""
    compare = facts.get("compare")
    if isinstance(compare, Mapping) and compare.get("metric"):
        return str(compare["metric"])
    return next((str(row.get("metric", "")) for row in rows(facts, "results")), "")


def shots(facts: Facts) -> Safe | None:
    """A chart by newcomer, and the figures under it."""
    curves = [row for row in rows(facts, "shots", "rows") if numbers(row.get("estimates") or [])]
    at = numbers(facts["shots"].get("shots") or []) if curves else []
    if not curves or not at:
        return None
    metric = str(facts["shots"].get("metric") or "")
    ways = list(dict.fromkeys(str(row.get("way", "")) for row in curves))
    values = list(dict.fromkeys(str(row.get("value", "")) for row in curves))
    figures = []
    for value in values:
        series = [_curve(row, at, ways) for row in curves if str(row.get("value", "")) == value]
        said = f"{headed(metric)} by training examples for {value or 'the newcomer'}: " + "; ".join(
            f"{one.name} {', '.join(show(y, metric) for _, y in one.points)}" for one in series
        )
        drawn = charts.chart(series, said, metric, across="training examples", at=at)
        caption = tag("figcaption", tag("strong", value or "Newcomer"), f": {headed(metric)}")
        figures.append(tag("figure", caption, drawn))
    lead = (
        f"How far a few examples carry: {named(metric)} after {listed([f'{x:g}' for x in at], 8)} "
        "examples with 95\u202f% intervals; where whiskers overlap, the cheaper way will do."
    )
    shown = [charts.legend(ways), tag("div", figures, class_="figures")]
    return section("shots", "From a few examples", lead, *shown, fold("The figures", _shots(curves, at, metric)))


def _curve(row: Facts, at: Sequence[float], ways: Sequence[str]) -> charts.Series:
    low, high = row.get("low") or [None] * len(at), row.get("high") or [None] * len(at)
    known = [
        (max(x, 0.5), y, a, b)
        for x, y, a, b in zip(at, row["estimates"], low, high, strict=False)
        if number(y) is not None
    ]
    way = str(row.get("way", ""))
    return charts.Series(
        way, [(x, y) for x, y, _, _ in known], [a for *_, a, _ in known], [b for *_, b in known], ways.index(way)
    )  # fmt: skip


def _shots(curves: Sequence[Facts], at: Sequence[float], metric: str) -> Safe:
    heads = [LEFT("newcomer"), LEFT("way"), *[RIGHT(f"{x:g} {'example' if x == 1 else 'examples'}") for x in at]]
    lines = []
    for row in curves:
        low, high = row.get("low") or [], row.get("high") or []
        spans = [interval(a, b, metric) for a, b in zip(low, high, strict=False)] or [""] * len(at)
        figures = [pair(show(x, metric), span) for x, span in zip(row["estimates"], spans, strict=False)]
        figures += [join(NONE)] * (len(at) - len(figures))
        lines.append([str(row.get("value") or NONE), str(row.get("way", "")), *figures[: len(at)]])
    return table(f"{capital(headed(metric))} with 95\u202f% intervals", "Figures of the few-shot curves", heads, lines)
