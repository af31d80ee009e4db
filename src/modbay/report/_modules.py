"""What the modules are like: proofs, routing, similarity, use, parameters."""

import re
from collections.abc import Mapping, Sequence
from math import exp, log
from typing import Any

from . import _charts as charts
from ._figures import NONE, count, grouped, listed, number, numbers, plural, rows, short, show, strings, two
from ._html import Safe, fold, join, section, tag
from ._results import Facts, learned
from ._tables import LEFT, LONG, RIGHT, Head, folded, heat, table

WRITTEN = 20  # modules up to which similarities are written out; above, cells are tinted only
DRAWN = 60  # modules up to which they are drawn at all
FEW = 4  # maps of single sites that are shown whole
MAPPED = 40  # values up to which a routing map is not folded

Matrix = Sequence[Sequence[Any]]


def proof(facts: Facts) -> Safe | None:
    """What stayed as it was, to the bit."""
    proofs = rows(facts, "proof")
    if not proofs:
        return None
    broken = [row for row in proofs if number(row.get("changed")) != 0]
    lines = [
        [
            str(row.get("what", NONE)),
            count(row.get("rows")),
            count(row.get("changed")),
            tag("span", "✓ bit-equal", class_="good")
            if row not in broken
            else tag("strong", "✗ changed", class_="bad"),
        ]
        for row in proofs
    ]
    lead = "The same rows were answered before and after, and compared bit by bit: " + (
        "nothing changed." if not broken else f"{plural(len(broken), 'comparison')} failed, so don’t rely on it."
    )
    heads = [LEFT("what was compared"), RIGHT("rows"), RIGHT("changed"), LEFT("")]
    return section("proof", "Proofs that nothing else changed", lead, table("", "Proofs of bit-equality", heads, lines))


def routing(facts: Facts) -> Safe | None:
    """Which modules each value of a label uses, by bay and site."""
    maps = [row for row in rows(facts, "routing") if row.get("weights") and row.get("modules") and row.get("values")]
    if not maps:
        return None
    groups = grouped(maps, lambda row: (str(row.get("bay", "")), str(row.get("label", ""))))
    lead = (
        "Each row is a value of a label, each column a module, the tint the weight that the router gave it: "
        "like rows share modules. Sharing says how knowledge is stored, not that it helps."
    )
    return section("routing", "Routing", lead, *[_routed(bay, label, group) for (bay, label), group in groups.items()])


def _routed(bay: str, label: str, maps: Sequence[Facts]) -> Safe:
    """The maps of one bay by one label: the mean over sites first, then by kind of site, then site by site."""
    first = maps[0]
    alike = [row for row in maps if _size(row) == _size(first)]
    parts = [tag("h3", f"Bay {bay}, routed by {label}" if label else f"Bay {bay}")]
    where = "at all sites" if len(alike) == 1 else f"mean of {plural(len(alike), 'site')}"
    site = str(first.get("site") or "")
    parts.append(
        _map(first, _mean([row["weights"] for row in alike]), site if len(alike) == 1 and site else where, label)
    )
    if 1 < len(maps) <= FEW:
        parts.append(fold(f"The {len(maps)} sites", [_map(row, row["weights"], _site(row), label) for row in maps]))
    elif len(maps) > FEW:
        kinds = grouped(alike, lambda row: re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", _site(row)))
        if 1 < len(kinds) <= FEW:
            means = [_map(rows_[0], _mean([r["weights"] for r in rows_]), kind, label) for kind, rows_ in kinds.items()]
            parts.append(fold(f"By kind of site ({len(kinds)})", tag("div", means, class_="pairs")))
        parts.append(fold(f"Site by site ({len(maps)})", _sites(maps)))
    return tag("div", parts)


def _site(row: Facts) -> str:
    return str(row.get("site") or "all sites")


def _size(row: Facts) -> tuple[int, int]:
    return len(row["values"]), len(row["modules"])


def _mean(matrices: Sequence[Matrix]) -> list[list[float | None]]:
    """Cell by cell, over those that are known."""
    out = []
    for lines in zip(*matrices, strict=False):
        known = [numbers(cells) for cells in zip(*lines, strict=False)]
        out.append([sum(xs) / len(xs) if xs else None for xs in known])
    return out


def _map(row: Facts, weights: Matrix, where: str, label: str) -> Safe:
    values, modules = [str(x) for x in row["values"]], [str(x) for x in row["modules"]]
    known = [abs(x) for line in weights for x in numbers(line)] or [0.0]
    signed = any(x < 0 for line in weights for x in numbers(line))
    cells = [[_weight(x) for x in line] for line in weights]
    caption = join(where, ": ", _says(values, modules, weights))
    made = heat(
        caption, f"Routing of {row.get('bay', '')} by {label}", values, modules, weights, cells,
        between=(0.0, max(*known, min(1.0, 3 / len(modules)))), both=signed,
    )  # fmt: skip
    return folded(f"{where}: {plural(len(values), 'value')} of {label}", made, len(values), MAPPED)


def _weight(value: Any) -> str:
    x = number(value)
    return NONE if x is None else "" if x == 0 else "1" if x == 1 else two(x)


def _says(values: Sequence[str], modules: Sequence[str], weights: Matrix) -> str:
    """One sentence about a map."""
    ones = [[x for x in line if number(x)] for line in weights]
    if ones and all(len(line) == 1 for line in ones):
        return f"every one of {plural(len(values), 'value')} uses one module alone."
    active = [_effective(line) for line in weights]
    known = [x for x in active if x is not None]
    if not known:
        return "weights by module."
    mean = f"{sum(known) / len(known):.1f} of {plural(len(modules), 'module')}"
    return f"a value uses {mean} on average (the exponential of its entropy)."


def _effective(line: Sequence[Any]) -> float | None:
    """How many modules a row of weights amounts to."""
    xs = [abs(x) for x in numbers(line)]
    total = sum(xs)
    return exp(-sum(x / total * log(x / total) for x in xs if x)) if total else None


def _sites(maps: Sequence[Facts]) -> list[Safe]:
    """Sites by modules, the mean over values: a table for each set of modules."""
    out = []
    for modules, group in grouped(maps, lambda row: tuple(map(str, row["modules"]))).items():
        means = [_mean([[line] for line in row["weights"]])[0] for row in group]
        apart = [_apart(row["weights"]) for row in group]
        known = [x for line in means for x in numbers(line)] or [0.0]
        out.append(heat(
            "Mean weight over all values; apart: how far the values differ, 0 (all alike) to 1 (nothing shared).",
            "Routing site by site", [_site(row) for row in group], [*modules, "apart"],
            [[*line, x] for line, x in zip(means, apart, strict=True)],
            [[*[_weight(x) for x in line], _weight(x)] for line, x in zip(means, apart, strict=True)],
            between=(min(0.0, *known), max(1.0, *known)),
        ))  # fmt: skip
    return out


def _apart(weights: Matrix) -> float | None:
    """Mean total variation between the values' shares and the mean share."""
    shares = []
    for line in weights:
        xs = [abs(number(x) or 0.0) for x in line]
        if total := sum(xs):
            shares.append([x / total for x in xs])
    if len(shares) < 2:
        return None
    mean = [sum(xs) / len(xs) for xs in zip(*shares, strict=False)]
    far = sum(sum(abs(x - m) for x, m in zip(share, mean, strict=False)) / 2 for share in shares) / len(shares)
    return far / (1 - 1 / len(shares))


def similarity(facts: Facts) -> Safe | None:
    """Cosines between modules."""
    maps = [row for row in rows(facts, "similarity") if row.get("cosine") and row.get("modules")]
    if not maps:
        return None
    lead = (
        "Cosines between what the modules add to the base’s weights: near 1 they do the same, near 0 they have nothing "
        "in common. A high one suggests that two could be merged; it does not prove that they may be."
    )
    return section(
        "similarity", "Similarity of modules", lead, tag("div", [_similar(row) for row in maps], class_="flow")
    )


def _similar(row: Facts) -> Safe:
    names, cosine = [str(x) for x in row["modules"]], row["cosine"]
    pairs = [
        (x, names[i], names[j])
        for i, line in enumerate(cosine[: len(names)])
        for j, x in enumerate(line[:i])
        if number(x) is not None
    ]
    pairs.sort(reverse=True)
    of = {"deltas": "of what they add", "parameters": "of their parameters"}.get(
        str(row.get("of")), str(row.get("of") or "")
    )
    caption = join(tag("strong", row.get("bay") or ""), f", cosine {of}")
    if pairs:
        x, a, b = pairs[0]
        caption = join(
            caption, f": nearest are {b} and {a} ({two(x)}); the median is {two(pairs[len(pairs) // 2][0])}."
        )
    if len(names) > DRAWN:
        lines = [[f"{b} and {a}", two(x)] for x, a, b in pairs[:LONG]]
        return table(
            join(caption, f" The {len(lines)} nearest pairs:"),
            "Nearest modules",
            [LEFT("pair"), RIGHT("cosine")],
            lines,
        )
    shown = len(names) <= WRITTEN
    cells = [["" if not shown or i == j else two(x) for j, x in enumerate(line)] for i, line in enumerate(cosine)]
    off = [[None if i == j else x for j, x in enumerate(line)] for i, line in enumerate(cosine)]
    return heat(caption, "Similarity of modules", names, names, off, cells, between=(-1.0, 1.0), both=True)


def use(facts: Facts) -> Safe | None:
    """How much each module is used, and warnings of collapse."""
    shares = rows(facts, "use")
    collapse = strings(facts.get("collapse"))
    if not shares and not collapse:
        return None
    lead = "How much of the routing weight each module gets over the data; the dashed line is an equal share. " + (
        f"{plural(len(collapse), 'sign')} of collapse: look here before trusting the modules."
        if collapse
        else "No sign of collapse was found."
    )
    warned = tag("ul", [tag("li", x) for x in collapse], class_="warned") if collapse else None
    groups = grouped(shares, lambda row: str(row.get("bay", "")))
    tables = tag("div", [_used(bay, group) for bay, group in groups.items()], class_="pairs") if groups else None
    return section("use", "Use and collapse", lead, warned, tables)


def _used(bay: str, shares: Sequence[Facts]) -> Safe:
    most = max([*numbers(row.get("share") for row in shares), 1 / len(shares)])
    lines = [
        [str(row.get("module", NONE)), charts.bar(row.get("share"), most, 1 / len(shares)), _percent(row.get("share"))]
        for row in shares
    ]
    heads = [LEFT("module"), Head("share"), RIGHT("%")]
    made = table(tag("strong", bay), f"Use of the modules of {bay}", heads, lines)
    return folded(f"{bay}: all {plural(len(shares), 'module')}", made, len(shares))


def _percent(share: Any) -> str:
    return show(share, "accuracy")


def parameters(facts: Facts) -> Safe | None:
    """Modules and their sizes."""
    modules = rows(facts, "parameters")
    if not modules:
        return None
    learning = sum(numbers(learned(row) for row in modules))
    base = facts.get("base")
    size = number(base.get("parameters")) if isinstance(base, Mapping) else None
    whole = short(sum(numbers(row.get("parameters") for row in modules)))
    named = sum(not str(row.get("module", "")).startswith("(") for row in modules)  # (routing) is no module
    lead = f"{plural(named, 'module')} with {whole} parameters, "
    lead += f"of which {short(learning)} learned" + (f", beside the base’s {short(size)}." if size else ".")
    lead += " The norm is of what a module changes, else of its parameters: near nought, it has learned little."
    return section("parameters", "Parameters by module", lead, _parameters(modules))


def _parameters(modules: Sequence[Facts]) -> Safe:
    heads = [
        LEFT("bay"),
        LEFT("module"),
        LEFT("kind"),
        RIGHT("sites"),
        RIGHT("parameters"),
        RIGHT("learned"),
        RIGHT("norm"),
    ]
    lines = [
        [
            str(row.get("bay", NONE)),
            str(row.get("module", NONE)),
            tag("span", str(row.get("kind", NONE)), class_="long"),
            _sites_of(row.get("sites")),
            count(row.get("parameters")),
            count(learned(row)),
            show(row.get("norm")),
        ]
        for row in modules
    ]
    bays = grouped(modules, lambda row: str(row.get("bay", "")))
    made = table("", "Parameters by module", heads, lines)
    if len(modules) <= LONG:
        return made
    totals = [
        [
            bay,
            count(len(group)),
            tag("span", listed(list(dict.fromkeys(str(row.get("kind", NONE)) for row in group))), class_="long"),
            count(sum(numbers(row.get("parameters") for row in group))),
            count(sum(numbers(learned(row) for row in group))),
        ]
        for bay, group in bays.items()
    ]
    heads = [LEFT("bay"), RIGHT("modules"), LEFT("kinds"), RIGHT("parameters"), RIGHT("learned")]
    return join(
        table("By bay", "Parameters by bay", heads, totals), fold(f"All {plural(len(modules), 'module')}", made)
    )


def _sites_of(sites: Any) -> str:
    return str(len(sites)) if isinstance(sites, list | tuple) else count(sites)
