"""How the run went and what it was: curves, data, command, machine, config."""

import re
from collections.abc import Mapping, Sequence
from math import floor, log10
from typing import Any

from . import _charts as charts
from ._figures import NONE, capital, count, duration, memory, number, numbers, plural, rows, short, show, strings
from ._html import Safe, fold, join, section, tag
from ._results import Facts
from ._tables import LEFT, RIGHT, table
from ._yaml import dump

RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
POINTS = 300  # of a curve: more cannot be seen


def warnings(facts: Facts) -> Safe | None:
    said = strings(facts.get("warnings"))
    if not said:
        return None
    lead = f"{plural(len(said), 'thing')} about this run that may bend its figures: weigh each before believing them."
    shown, more = said[:8], said[8:]
    rest = fold(f"{len(more)} more", tag("ul", [tag("li", x) for x in more])) if more else None
    return section("warnings", "Warnings", lead, tag("ul", [tag("li", x) for x in shown], class_="warned"), rest)


def curve(facts: Facts) -> Safe | None:
    """Loss, validation and learning rate over the steps."""
    steps = [row for row in rows(facts, "curve") if number(row.get("step")) is not None]
    figures = []
    for key, name in (("loss", "training loss"), ("validation", "validation"), ("lr", "learning rate")):
        points = _thin([(row["step"], row[key]) for row in steps if number(row.get(key)) is not None])
        if len(points) < 2:
            continue
        points, power = _scaled(points)
        first, last = points[0][1], points[-1][1]
        said = f"{name} over {plural(len(points), 'point')}, from {show(first)} to {show(last)}"
        one = charts.Series(name, points, mark=0, dots=len(points) <= 20)
        caption = tag("figcaption", tag("strong", capital(name)), f"{power}: from {show(first)} to {show(last)}")
        figures.append(tag("figure", caption, charts.chart([one], said, across="step")))
    if not figures:
        return None
    lead = "How learning went, step by step: " + _trend(steps)
    return section("curve", "Learning curves", lead, tag("div", figures, class_="figures"))


def _scaled(points: Sequence[tuple[float, float]]) -> tuple[list[tuple[float, float]], str]:
    """Very small and very large figures in a power of ten that the caption names, so that the ruler stays short."""
    most = max(abs(y) for _, y in points)
    if most == 0 or 0.01 <= most < 10_000:
        return list(points), ""
    power = floor(log10(most))
    return [(x, y / 10.0**power) for x, y in points], f", in 10{str(power).translate(RAISED)}"


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most POINTS of them, each the mean of its neighbours."""
    size = -(-len(points) // POINTS)
    if size <= 1:
        return list(points)
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(part[len(part) // 2][0], sum(y for _, y in part) / len(part)) for part in parts]


def _trend(steps: Sequence[Facts]) -> str:
    """Whether the loss still fell in the last tenth."""
    loss = numbers(row.get("loss") for row in steps)
    tenth = len(loss) // 10
    if tenth < 2:
        return "a curve that still moves at its end may gain from more steps."
    before, after = loss[-2 * tenth : -tenth], loss[-tenth:]
    fell = 1 - sum(after) / sum(before) if sum(before) else 0.0
    if fell > 0.02:
        return f"the loss still fell by {100 * fell:.0f}\u202f% over the last tenth, so more steps might help."
    return "the loss was flat over the last tenth, so more steps alone are unlikely to help."


def data(facts: Facts) -> Safe | None:
    """Files, rows, hashes."""
    files = rows(facts, "data")
    if not files:
        return None
    heads = [LEFT("task"), LEFT("split"), RIGHT("rows"), LEFT("file"), LEFT("SHA-256")]
    lines = [
        [str(row.get("task") or NONE), str(row.get("split") or NONE), count(row.get("rows")),
         tag("code", str(row.get("path") or NONE)), tag("code", str(row.get("sha256") or NONE)[:12], class_="hash")]
        for row in files
    ]  # fmt: skip
    hashed = [f"{row['sha256']}  {row.get('path', '')}\n" for row in files if row.get("sha256")]
    whole = fold("Whole hashes, as sha256sum -c reads them", tag("pre", hashed, tabindex=0)) if hashed else None
    total = sum(numbers(row.get("rows") for row in files))
    lead = f"{count(total)} rows in {plural(len(files), 'part')}: the same hashes mean the same data."
    made = table("", "Data", heads, lines)
    return section("data", "Data", lead, made if len(files) <= 40 else fold(f"All {len(files)} parts", made), whole)


def run(facts: Facts) -> Safe | None:
    """The command, versions, machine, time and memory."""
    parts: list[Any] = []
    if facts.get("command"):
        parts.append(tag("pre", tag("code", _words(facts["command"])), class_="command", tabindex=0))
    lists = [
        ("Run", _about(facts)),
        ("Versions", _items(facts.get("versions"), str)),
        ("Machine", _items(facts.get("machine"), _plain)),
        ("Time", _items(facts.get("time"), duration)),
        ("Memory", _memory(facts.get("memory"))),
    ]
    made = [tag("div", tag("h3", name), tag("dl", items, class_="facts")) for name, items in lists if items]
    if made:
        parts.append(tag("div", made, class_="columns"))
    if not parts:
        return None
    lead = "This command with these versions and data gives this run again, on another machine but for the last digits."
    return section("run", "Command and machine", lead, *parts)


def _words(command: Any) -> list[Any]:
    """The command's words, none of which is parted at a hyphen; copied, they are the command as it was."""
    return [part if part.isspace() else tag("span", part) for part in re.split(r"(\s+)", str(command)) if part]


def _about(facts: Facts) -> list[Safe]:
    base = facts.get("base")
    base = base if isinstance(base, Mapping) else {}
    said = [
        str(base["name"]) if base.get("name") else "",
        f"revision {base['revision']}" if base.get("revision") else "",
        f"{short(base['parameters'])} parameters" if number(base.get("parameters")) else "",
    ]
    about = {
        "method": facts.get("method"),
        "base": ", ".join(x for x in said if x),
        "layers": base.get("layers"),
        "seed": facts.get("seed"),
        "finished": facts.get("when"),
        "took": duration(facts.get("seconds")) if number(facts.get("seconds")) is not None else None,
    }
    return _items({key: value for key, value in about.items() if value not in (None, "")}, _plain)


def _items(facts: Any, show_as) -> list[Safe]:
    if not isinstance(facts, Mapping):
        return []
    known = {key: value for key, value in facts.items() if value is not None}
    return [join(tag("dt", str(key).replace("_", " ")), tag("dd", show_as(value))) for key, value in known.items()]


def _memory(facts: Any) -> list[Safe]:
    if not isinstance(facts, Mapping):
        return []
    plain = {str(key).removesuffix("_mib"): memory(value) for key, value in facts.items() if number(value) is not None}
    return _items(plain, str)


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or NONE
    return str(value)


def config(facts: Facts) -> Safe | None:
    """The run's settings as YAML."""
    made = facts.get("config")
    if not isinstance(made, Mapping) or not made:
        return None
    text = dump(made)
    shown = tag("pre", tag("code", text), tabindex=0)
    lead = "All settings, defaults included, as YAML; the run’s folder keeps the same in run.yaml, which runs it again."
    return section("config", "Configuration", lead, shown if text.count("\n") <= 60 else fold("All settings", shown))
