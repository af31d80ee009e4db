"""The table of a comparison: each method's figure, its difference to every other, what its labels gain, its cost."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from ...metrics import Gap, Record, Standing, gaps, standings
from .._tasks import Tasks
from ._comparison import Entry
from ._verdict import LOWER, Cost, verdict

SINGLE = ("private", "shared")  # what the others' gains are over


def told(
    entries: Mapping[str, Entry],
    runs: Mapping[str, Sequence[Sequence[Record]]],
    facts: Mapping[str, Sequence[Mapping[str, Any]]],
    tasks: Tasks,
    by: Sequence[str],
    reference: str,
    shared: float,
) -> dict[str, Any]:
    """{"compare", "transfer"} of the facts. facts: of each method's runs; shared: seconds that all on the base need."""
    label = next((one for one in by if len(tasks.values.get(one, {})) > 1), None)
    found = standings(runs, tasks.kinds, label)
    between = gaps(found)
    costs = {name: Cost(entry.title, not entry.baseline, parameters(facts[name][0])) for name, entry in entries.items()}
    compared = {
        "metric": next(iter(found.values())).metric,
        "mean_over": [*(["task"] if len(tasks.kinds) > 1 else []), *([label] if label else [])],
        "reference": reference,
        "rows": [
            _row(name, entries[name], found[name], between, costs[name].parameters,
                 _seconds(facts[name], 0.0 if entries[name].baseline else shared))
            for name in entries
        ],
        "verdict": verdict(found, between, costs, reference, len(next(iter(runs.values())))),
    }  # fmt: skip
    matrix = transfer(found, {name: entry.title for name, entry in entries.items() if not entry.baseline})
    return {"compare": compared, **({"transfer": matrix} if matrix else {})}


def parameters(facts: Mapping[str, Any]) -> int:
    """How many learned."""
    return sum(row["learning"] for row in facts["parameters"])


def _seconds(several: Sequence[Mapping[str, Any]], shared: float) -> float:
    return round(sum(one["time"]["train"] for one in several) / len(several) + shared, 1)


def _row(
    name: str, entry: Entry, one: Standing, between: Mapping[tuple[str, str], Gap], learning: int, seconds: float
) -> dict[str, Any]:
    beside = {
        b: {"difference": gap.difference, "low": gap.low, "high": gap.high, "p": gap.p}
        for (a, b), gap in between.items()
        if a == name
    }
    return {
        "method": name,
        "title": entry.title,
        "estimate": finite(one.estimate),
        "low": finite(one.low),
        "high": finite(one.high),
        "parameters": learning,
        "seconds": seconds,
        "by": {cell(*key, one): finite(sample.estimate) for key, sample in one.by.items()} if len(one.by) > 1 else {},
        "beside": beside,
    }


def cell(task: str, value: str, one: Standing) -> str:
    """A task's name, a value's, or both where there are several of each."""
    several = len({task for task, _ in one.by}) > 1
    return f"{task}, {value}" if several and value else task if several else value


def finite(x: float) -> float | None:
    """JSON has no NaN."""
    return x if isfinite(x) else None


def transfer(found: Mapping[str, Standing], titles: Mapping[str, str]) -> dict[str, Any] | None:
    """What each task and value gains by each method over a module of its own, and over one that all share."""
    columns = [(name, other) for name in titles for other in SINGLE if other in titles and name not in (other, *SINGLE)]
    columns += [("shared", "private")] if set(SINGLE) <= set(titles) else []
    keys = list(next(iter(found.values())).by)
    if not columns or len(keys) < 2:
        return None
    one = next(iter(found.values()))
    sign = -1 if one.metric in LOWER else 1
    gain = lambda name, other, key: finite(sign * (found[name].by[key].estimate - found[other].by[key].estimate))
    return {
        "rows": [cell(*key, one) for key in keys],
        "columns": [f"{titles[name]} over {other}" for name, other in columns],
        "values": [[gain(name, other, key) for name, other in columns] for key in keys],
        "metric": one.metric,
        "of": "What a task or value gains by a method over a module of its own (private) or one for all (shared)",
    }
