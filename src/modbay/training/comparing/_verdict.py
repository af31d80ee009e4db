"""What a comparison shows, in sentences: what to take, and what is not shown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

from ...metrics import Gap, Standing, differ

LOWER = ("rmse", "perplexity")
SHARES = ("accuracy", "span_f1")  # shown in per cent
MOST = 5  # names in a sentence


@dataclass(frozen=True)
class Cost:
    """What a method costs who takes it. network: whether it needs the base at all."""

    title: str
    network: bool
    parameters: int


def verdict(
    found: Mapping[str, Standing], gaps: Mapping[tuple[str, str], Gap], costs: Mapping[str, Cost], reference: str,
    seeds: int, level: float = 0.95,
) -> str:  # fmt: skip
    """Take the cheapest of those that are not shown to differ from the best estimate; then what the reference shows.

    Cheaper: without the base before with it, then the fewer parameters that learn.
    """
    known = [name for name in found if isfinite(found[name].estimate)]
    if len(known) < 2:
        return "Nothing is compared: fewer than two methods have a figure."
    metric = found[known[0]].metric
    best = (min if metric in LOWER else max)(known, key=lambda name: found[name].estimate)
    tie = [name for name in known if name == best or not differ(gaps.get((name, best)), level)]
    take = min(tie, key=lambda name: (costs[name].network, costs[name].parameters))
    said = [_taken(found, gaps, costs, metric, best, take, tie)]
    if not costs[take].network and any(costs[name].network for name in known):
        said.append("No method that needs the base is shown to beat it.")
    if reference in known and reference not in (best, take):
        said.append(_beside(found, gaps, costs, metric, reference, known, level))
    if seeds == 1:
        said.append("One seed: what another training would change is not in the intervals.")
    return " ".join(said)


def _taken(found, gaps, costs, metric: str, best: str, take: str, tie: Sequence[str]) -> str:
    title = lambda name: costs[name].title
    figure = _figure(found[take], metric)
    if len(tie) == 1:
        others = [name for name in found if name != best and (best, name) in gaps]
        near = min(others, key=lambda name: abs(gaps[best, name].difference))
        return (
            f"Take “{title(take)}” ({figure}): it is shown to beat every other, the nearest, “{title(near)}”, by "
            f"{_gap(gaps[best, near], metric)}."
        )
    if take == best:
        rest = _names([title(name) for name in tie if name != best])
        return (
            f"Take “{title(take)}” ({figure}): the best estimate, and the cheapest of those not shown to differ from "
            f"it; not shown to differ: {rest}."
        )
    more = [title(name) for name in tie if name not in (best, take)]
    also = f" {_names(more)} {'are' if len(more) > 1 else 'is'} not shown to differ from that, either." if more else ""
    return (
        f"Take “{title(take)}” ({figure}): the cheapest of those not shown to differ from the best estimate, “"
        f"{title(best)}” ({_figure(found[best], metric)}); the difference is {_gap(gaps[best, take], metric)}.{also}"
    )


def _beside(found, gaps, costs, metric: str, reference: str, known: Sequence[str], level: float) -> str:
    """What is shown to differ from the reference, and how many are not."""
    sides: dict[str, list[str]] = {"better": [], "worse": []}
    others = [name for name in known if name != reference]
    for name in others:
        gap = gaps.get((name, reference))
        if differ(gap, level):
            sides["better" if (gap.difference > 0) != (metric in LOWER) else "worse"].append(costs[name].title)
    rest = len(others) - sum(map(len, sides.values()))
    parts = [f"{_names(names)} {'are' if len(names) > 1 else 'is'} {side}" for side, names in sides.items() if names]
    none = f"none of the other {rest} is shown to differ" if parts else f"none of the {rest} is shown to differ"
    return f"Against “{costs[reference].title}”: {'; '.join([*parts, *([none] if rest else [])])}."


def _names(titles: Sequence[str]) -> str:
    titles = [f"“{title}”" for title in titles]
    if len(titles) > MOST:
        return f"{', '.join(titles[: MOST - 1])} and {len(titles) - MOST + 1} more"
    return " and ".join([", ".join(titles[:-1]), titles[-1]]) if len(titles) > 1 else titles[0]


def _figure(one: Standing, metric: str) -> str:
    unit = " %" if metric in SHARES else ""
    span = f"95 % interval {number(one.low, metric)} to {number(one.high, metric)}"
    return f"{metric.replace('_', ' ')} {number(one.estimate, metric)}{unit}, {span}"


def _gap(gap: Gap, metric: str) -> str:
    """The size of a difference, its interval and p; the first is at least nought for a best one."""
    low, high = (gap.low, gap.high) if gap.difference >= 0 else (-gap.high, -gap.low)
    points = " points" if metric in SHARES else ""
    p = "p < 0.001" if gap.p < 0.001 else f"p = {gap.p:.3f}" if gap.p < 0.1 else f"p = {gap.p:.2f}"
    return f"{number(abs(gap.difference), metric)}{points} ({number(low, metric)} to {number(high, metric)}, {p})"


def number(x: float, metric: str) -> str:
    """`66.8` of an accuracy of 0.668; three or four figures of anything else; a true minus."""
    shown = f"{100 * abs(x):.1f}" if metric in SHARES else f"{abs(x):.3f}" if abs(x) < 10 else f"{abs(x):.4g}"
    return ("−" if x < 0 and any(c in "123456789" for c in shown) else "") + shown
