"""What a recording of routing shows beside its maps: time, tokens, and figures."""

from collections.abc import Mapping, Sequence
from math import exp, log
from typing import Any

from . import _charts as charts
from ._figures import NONE, count, number, numbers, plural, rows, two
from ._html import Safe, fold, join, section, tag
from ._results import Facts
from ._tables import LEFT, RIGHT, heat, table

FEW = 12  # rows of figures that are shown whole

COLUMNS = (
    ("collapse_average", "collapse"), ("collapse_worst", "worst"), ("mutual_information", "mutual information"),
    ("alignment", "alignment"), ("adaptation", "adaptation"), ("H_a", "H_a"), ("H_b", "H_b"),
    ("effective_modules", "effective modules"), ("gini", "Gini"), ("utilisation", "in use"),
)  # fmt: skip


def over_time(facts: Facts) -> Safe | None:
    """How much each module was used, from the first call to the last."""
    maps = [row for row in rows(facts, "over_time") if row.get("shares") and row.get("modules") and row.get("calls")]
    if not maps:
        return None
    lead = (
        "Each column is a stretch of calls, each row a module, the tint its share of the routing then: modules that "
        "fade have lost their examples to others, and learn no more."
    )
    lines = [one for row in maps if (one := _effective(row)) is not None]
    drawn = None
    if lines:
        lines = [charts.Series(name, points, mark=i) for i, (name, points) in enumerate(lines[: charts.MARKS])]
        said = "Effective number of modules over calls: " + "; ".join(
            f"{one.name} from {two(one.points[0][1])} to {two(one.points[-1][1])}" for one in lines
        )
        figure = tag("figure", tag("figcaption", "effective modules, exp H"), charts.chart(lines, said, across="call"))
        drawn = tag("div", charts.legend([one.name for one in lines]) if len(lines) > 1 else None, figure)
    return section("over_time", "Routing over time", lead, [_stretch(row) for row in maps], drawn)


def _where(row: Facts) -> str:
    site = row.get("site")
    return f"{row.get('bay', '')}, {'all sites' if site in (None, '') else site}"


def _stretch(row: Facts) -> Safe:
    modules = [str(name) for name in row["modules"]]
    shares = [line if isinstance(line, list | tuple) else [] for line in row["shares"]]
    spans = [_span(calls) for calls in row["calls"]]
    values = [[line[i] if i < len(line) else None for line in shares] for i in range(len(modules))]
    most = max([*(x for line in values for x in numbers(line)), 1 / len(modules)])
    cells = [[two(x) for x in line] for line in values]
    named = tag("strong", _where(row))
    return heat(
        join(named, ", share by calls"), "Routing over time", modules, spans, values, cells, between=(0.0, most)
    )


def _span(calls: Any) -> str:
    first, last = (calls[0], calls[-1]) if isinstance(calls, list | tuple) and calls else (None, None)
    return count(first) if first == last else f"{count(first)}–{count(last)}"


def _effective(row: Facts) -> tuple[str, list[tuple[float, float]]] | None:
    """The effective number of modules at the end of each stretch; None where there are fewer than two."""
    points = []
    for calls, line in zip(row["calls"], row["shares"], strict=False):
        at = number(calls[-1]) if isinstance(calls, list | tuple) and calls else None
        known = [x for x in numbers(line) if x > 0] if isinstance(line, list | tuple) else []
        if at is not None and known:
            points.append((at, exp(-sum(x / sum(known) * log(x / sum(known)) for x in known))))
    return (_where(row), points) if len(points) > 1 else None


def tokens(facts: Facts) -> Safe | None:
    """Which tokens went where."""
    several = [row for row in rows(facts, "tokens") if rows(row, "modules")]
    if not several:
        return None
    lead = (
        "Of a sample of positions, the tokens that each module got more of than its share, how many, and how many "
        "there were of them in all. A module with words of one kind has found something of its own."
    )
    first, more = [_listed(row) for row in several[:1]], [_listed(row) for row in several[1:]]
    rest = fold(f"The {len(more)} sites", more) if more else None
    return section("tokens", "Which tokens went where", lead, first, rest)


def _listed(row: Facts) -> Safe:
    heads = [LEFT("module"), RIGHT("%"), LEFT("tokens")]
    lines = [
        [str(one.get("module", NONE)), two(100 * (number(one.get("share")) or 0.0)), _words(one.get("tokens"))]
        for one in rows(row, "modules")
    ]
    caption = join(tag("strong", _where(row)), f", of {plural(int(number(row.get('positions')) or 0), 'position')}")
    return table(caption, "Tokens by module", heads, lines)


def _words(given: Any) -> Safe:
    known = [one for one in given if isinstance(one, list | tuple) and len(one) == 3] if isinstance(given, list) else []
    said = [join(tag("code", text), tag("small", f" {count(mine)} of {count(every)}  ")) for text, mine, every in known]
    return tag("span", said or NONE, class_="long")


def figures(facts: Facts) -> Safe | None:
    """Every figure of every site and label."""
    told = rows(facts, "figures")
    if not told:
        return None
    lead = (
        "Collapse, worst and alignment are 0 at best and 1 at worst; mutual information says how much a module tells "
        "of a label, in nats; H_a is the entropy of one route (low: it is sure), H_b that of all (high: all are used)."
    )
    heads = [LEFT("bay, site"), LEFT("label"), RIGHT("examples"), *(RIGHT(name) for _, name in COLUMNS)]
    lines = [_figures(row) for row in told]
    made = lambda some: table("", "Routing in figures", heads, some)
    rest = fold(f"All {len(lines)} rows", made(lines)) if len(lines) > FEW else None
    return section("figures", "Routing in figures", lead, made(lines[:FEW]), rest)


def _figures(row: Mapping[str, Any]) -> Sequence[Any]:
    label = str(row.get("label") or "all examples")
    single = number(row.get("values")) == 1  # nothing is told of one value
    of_values = ("mutual_information", "alignment", "adaptation")
    shown = [NONE if single and key in of_values else two(row.get(key)) for key, _ in COLUMNS]
    return [_where(row), label, count(row.get("examples")), *shown]
