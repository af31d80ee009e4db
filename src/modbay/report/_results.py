"""The verdict, and the results by task and label with their intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

from . import _charts as charts
from ._figures import (
    NONE,
    capital,
    chance,
    count,
    duration,
    grouped,
    headed,
    interval,
    listed,
    lower_is_better,
    memory,
    named,
    number,
    numbers,
    p_is,
    plural,
    points,
    rows,
    short,
    show,
    unit,
)
from ._html import Safe, fold, join, section, tag
from ._tables import LEFT, LONG, RIGHT, Head, folded, pair, table

Facts = Mapping[str, Any]
WEAKEST = 8  # rows that stand before a folded table


def task_of(row: Facts) -> str:
    return str(row.get("task") or "")


def label_of(row: Facts) -> str:
    return str(row.get("label") or "")


def value_of(row: Facts) -> str:
    return str(row.get("value") or "")


def main_cell(facts: Facts) -> Facts | None:
    """The one figure of the run: over all tasks, else of the first task, over all its rows."""
    whole = [row for row in rows(facts, "results") if not label_of(row) and number(row.get("estimate")) is not None]
    return next((row for row in whole if not task_of(row)), whole[0] if whole else None)


def figure(row: Facts) -> str:
    """`86.3 %, 95 % interval [84.1, 88.2]`."""
    metric = str(row.get("metric", ""))
    span = interval(row.get("low"), row.get("high"), metric)
    return f"{show(row.get('estimate'), metric)}{unit(metric)}" + (f" (95\u202f% interval {span})" if span else "")


def verdict(facts: Facts) -> Safe | str:
    """One sentence, or two where another run is beside this one."""
    compare = facts.get("compare")
    cell = main_cell(facts)
    if isinstance(compare, Mapping) and compare.get("verdict"):
        return str(compare["verdict"]).strip().split("\n")[0]
    if cell is None:
        return ""
    over = f" over {plural(int(cell['n']), 'test row')}" if number(cell.get("n")) else ""
    task = task_of(cell)
    metric = named(str(cell.get("metric", "")))
    said = f"{capital(metric)} {f'on {task}' if task else 'over all tasks'} is {figure(cell)}{over}"
    return join(said, _others(facts, cell), ".", _beside(facts, cell))


def _others(facts: Facts, cell: Facts) -> str:
    tasks = {task_of(row): row for row in reversed(rows(facts, "results")) if not label_of(row) and task_of(row)}
    tasks.pop(task_of(cell), None)
    if not task_of(cell) or not tasks:
        return ""
    others = [
        f"{task} {show(row.get('estimate'), str(row.get('metric', '')))}" for task, row in reversed(tasks.items())
    ]
    return f"; {listed(others)}"


def _beside(facts: Facts, cell: Facts) -> str:
    for row in rows(facts, "against", "rows"):
        if all(row.get(key) == cell.get(key) for key in ("task", "label", "value", "metric")):
            metric = str(row.get("metric", ""))
            span = interval(row.get("low"), row.get("high"), metric, sign=True)
            told = f"{show(row.get('difference'), metric, sign=True)}{points(metric)} {span}"
            return f" Against {facts['against'].get('name', 'the other run')}: {told}, {p_is(row.get('p'))}."
    return ""


def key_figures(facts: Facts) -> Safe | None:
    """The few numbers that stand large under the title."""
    cells: list[tuple[str, str, str]] = []
    cell = main_cell(facts)
    if cell is not None:
        metric = str(cell.get("metric", ""))
        span = interval(cell.get("low"), cell.get("high"), metric)
        name = ", ".join(part for part in (named(metric), task_of(cell)) if part)
        cells.append(
            (f"{show(cell.get('estimate'), metric)}{unit(metric)}", name, f"95\u202f% interval {span}" if span else "")
        )
    learning = sum(numbers(learned(row) for row in rows(facts, "parameters")))
    base = number(_at(facts, "base", "parameters"))
    if learning:
        of = f"{100 * learning / base:.2g}\u202f% of the base’s {short(base)}" if base else ""
        cells.append((short(learning), "parameters learned", of))
    if number(facts.get("seconds")) is not None:
        cells.append((duration(facts["seconds"]), "time", _cores(facts)))
    peak = _at(facts, "memory", "peak_mib")
    if number(peak) is not None:
        cells.append((memory(peak), "memory at most", ""))
    made = [
        tag("div", tag("dt", name), tag("dd", tag("b", big), tag("span", small) if small else None))
        for big, name, small in cells
    ]
    return tag("dl", made, class_="key") if made else None


def learned(row: Facts) -> Any:
    """How many of a module's parameters learned: facts say a number, or whether they did."""
    learning = row.get("learning")
    return row.get("parameters") if learning is True else 0 if learning is False else learning


def _at(facts: Facts, *keys: str) -> Any:
    at: Any = facts
    for key in keys:
        at = at.get(key) if isinstance(at, Mapping) else None
    return at


def _cores(facts: Facts) -> str:
    threads = number(_at(facts, "machine", "threads"))
    gpu = _at(facts, "machine", "gpu")
    return str(gpu) if gpu else f"on {plural(int(threads), 'thread')}" if threads else ""


def results(facts: Facts) -> Safe | None:
    """The tables of results."""
    cells = rows(facts, "results")
    if not cells:
        return None
    parts: list[Any] = []
    whole = [row for row in cells if not label_of(row)]
    if whole:
        parts.append(_whole(whole))
    by_label = grouped([row for row in cells if label_of(row)], lambda row: (task_of(row), label_of(row)))
    by_label = dict(sorted(by_label.items(), key=lambda item: item[0][1] == "class"))  # classes are many: last
    tables = [_by_label(task, label, group) for (task, label), group in by_label.items()]
    broad = ["broad" if len(metrics_of(group)) > 1 or len(tables) == 1 else None for group in by_label.values()]
    made = [tag("div", one, class_=kind) for one, kind in zip(tables, broad, strict=True)]
    parts.append(tag("div", made, class_="pairs") if made else None)
    lead = (
        "Each dot is an estimate on the test rows, each line its 95\u202f% bootstrap interval: "
        "where two intervals overlap widely, take neither for better without the paired test."
    )
    return section("results", "Results", lead, *parts)


def metrics_of(cells: Sequence[Facts]) -> list[str]:
    return list(dict.fromkeys(str(row.get("metric", "")) for row in cells))


def _whole(cells: Sequence[Facts]) -> Safe:
    """One row by task and metric; shares have a common ruler."""
    shares = [row for row in cells if headed(str(row.get("metric", ""))).endswith("%")]
    scale = charts.spanning([row.get(key) for row in shares for key in ("estimate", "low", "high")], "accuracy")
    ruler = charts.axis(scale, "accuracy") if shares else ""
    heads = [LEFT("task"), Head(ruler), RIGHT("estimate"), RIGHT("rows")]
    lines = []
    for row in cells:
        metric = str(row.get("metric", ""))
        x, low, high = (row.get(key) for key in ("estimate", "low", "high"))
        name = join(task_of(row) or "all tasks", tag("small", headed(metric)))
        drawn = charts.whisker(scale, x, low, high) if row in shares else ""
        lines.append([name, drawn, pair(show(x, metric), interval(low, high, metric)), count(row.get("n"))])
    return table("Over all test rows", "Results over all test rows", heads, lines)


def _by_label(task: str, label: str, cells: Sequence[Facts]) -> Safe:
    """One row by value, the first metric with whiskers; long ones folded, the weakest before the fold."""
    metrics = metrics_of(cells)
    first = metrics[0]
    values = grouped(cells, value_of)
    main = {value: row for value, group in values.items() for row in group if row.get("metric") == first}
    places = [row.get(key) for row in main.values() for key in ("estimate", "low", "high")]
    scale = charts.spanning(places, first)
    mean = number(main[""].get("estimate")) if "" in main else None
    heads = [LEFT(label), Head(charts.axis(scale, first)), RIGHT(headed(first))]
    heads += [RIGHT(headed(metric)) for metric in metrics[1:]]
    counted = label != "class"  # the F1 of a class is of all rows of the task
    heads += [RIGHT("rows")] if counted else []

    def line(value: str) -> list[Any]:
        by = {row.get("metric"): row for row in values[value]}
        one = by.get(first, {})
        drawn = charts.whisker(scale, one.get("estimate"), one.get("low"), one.get("high"), mean)
        figures = [
            pair(show(row.get("estimate"), str(metric)), interval(row.get("low"), row.get("high"), str(metric)))
            for metric in metrics
            for row in [by.get(metric, {})]
        ]
        told = [value or f"mean of {label}s", drawn, *figures]
        return [*told, count(values[value][0].get("n"))] if counted else told

    title = f"{task or 'All tasks'}, by {label}"
    said = f"Results of {title}"
    caption = join(
        tag("strong", title), _extremes(main, first), "; the dashed line is the mean" if mean is not None else ""
    )
    if len(values) <= LONG:
        return table(caption, said, heads, [line(value) for value in values])
    known = [(number(row.get("estimate")), value) for value, row in main.items() if value]
    order = sorted(((x, value) for x, value in known if x is not None), reverse=lower_is_better(first))
    weak = table(join(caption, f". The {WEAKEST} weakest:"), said, heads, [line(value) for _, value in order[:WEAKEST]])
    whole = table("", said, heads, [line(value) for value in values])
    return tag("div", weak, folded(f"All {plural(len(values), 'value')} of {label}", whole, len(values)))


def _extremes(main: Mapping[str, Facts], metric: str) -> str:
    known = [(x, value) for value, row in main.items() if value and (x := number(row.get("estimate"))) is not None]
    if len(known) < 3:
        return ""
    low, high = min(known), max(known)
    if lower_is_better(metric):
        low, high = high, low
    return f": from {show(low[0], metric)} ({low[1]}, the weakest) to {show(high[0], metric)} ({high[1]})"


def against(facts: Facts) -> Safe | None:
    """This run against another, row by row."""
    cells = rows(facts, "against", "rows")
    if not cells:
        return None
    name = str(facts["against"].get("name") or "the other run")
    tables = [
        _against(metric, name, group)
        for metric, group in grouped(cells, lambda row: str(row.get("metric", ""))).items()
    ]
    sure = [row for row in cells if sided(row)]
    lead = (
        f"Both runs answered the same test rows; of {plural(len(cells), 'difference')} {len(sure)} "
        f"{'is' if len(sure) == 1 else 'are'} shown (bold: the interval leaves out nought and p is below 0.05). "
        "From the others nothing follows, least of all that the two runs are equal."
    )
    return section("against", f"Against {name}", lead, *tables)


def sided(row: Facts) -> bool:
    """Whether a difference is shown: its interval leaves out nought, and p, where there is one, is below 0.05."""
    low, high, p = number(row.get("low")), number(row.get("high")), number(row.get("p"))
    return low is not None and high is not None and (low > 0 or high < 0) and (p is None or p < 0.05)


def _against(metric: str, name: str, cells: Sequence[Facts]) -> Safe:
    scale = charts.spanning([row.get(key) for row in cells for key in ("difference", "low", "high")], metric, zero=True)
    heads = [LEFT("rows"), RIGHT("this run"), RIGHT(name), Head(charts.axis(scale, metric)), RIGHT("difference"),
             RIGHT("95\u202f% interval"), RIGHT("p"), RIGHT("rows")]  # fmt: skip
    lines = [
        [
            who(row), show(row.get("a"), metric), show(row.get("b"), metric),
            charts.whisker(scale, row.get("difference"), row.get("low"), row.get("high"), 0.0, best=sided(row)),
            strong(show(row.get("difference"), metric, sign=True), sided(row)),
            interval(row.get("low"), row.get("high"), metric, sign=True), chance(row.get("p")), count(row.get("n")),
        ]
        for row in cells
    ]  # fmt: skip
    lower = " Lower is better." if lower_is_better(metric) else ""
    caption = f"{capital(headed(metric))}: this run less {name}.{lower} p is corrected for the number of comparisons."
    said = f"Differences in {named(metric)}"
    if len(cells) <= LONG:
        return table(caption, said, heads, lines)
    whole = [line for row, line in zip(cells, lines, strict=True) if not label_of(row)]
    summary = f"{capital(headed(metric))}: all {plural(len(cells), 'difference')}"
    return join(table(caption, said, heads, whole) if whole else None, fold(summary, table("", said, heads, lines)))


def strong(value: str, yes: bool) -> Any:
    return tag("b", value) if yes and value != NONE else value


def who(row: Facts) -> str:
    """`intents · language pt`."""
    parts = [task_of(row), f"{label_of(row)} {value_of(row) or 'mean'}" if label_of(row) else ""]
    return " · ".join(part for part in parts if part) or "all tasks"
