"""What looks wrong with routing, in sentences that name the site, the module, the figure, and what to try.

Collapse and its remedies: Pfeiffer et al., 2023 (arXiv 2302.11529), section 4.2.1; balance: Shazeer et al., 2017
(1701.06538), Fedus et al., 2021 (2101.03961).
"""

from collections.abc import Iterator, Sequence
from math import exp, log

from ..errors import listed
from . import _measures as measures
from ._table import Table

ENOUGH = 5  # routes for each module, below which nothing is said of it
FLAT = 0.95  # exp(H_a) / n above which a route is all modules alike
ALIKE = 0.01  # of the most mutual information, below which values of a label are not told apart
ALONE = 0.2  # (exp(H_b) − 1) / (n − 1) below which a router has collapsed

BALANCE = "a balance loss (mb.TopK(balance=1e-2)), noise (mb.TopK(noise=True)), or a lower rate for the router"


def alarms(sites: Sequence[Sequence[Table]]) -> list[str]:
    """The sentences about the tables of each site: first of all examples, then by label.

    What is said of several sites alike is said once. Fewer than five routes for each module are too few to judge by.
    """
    found: dict[tuple[str, str, str], list[tuple[str, str]]] = {}
    for tables in sites:
        for what, figure, advice in _of_site(tables):
            key = (tables[0].bay, what, advice)
            found.setdefault(key, []).append((tables[0].site, figure))
    return [_sentence(*key, several) for key, several in found.items()]


def _sentence(bay: str, what: str, advice: str, several: Sequence[tuple[str, str]]) -> str:
    names = [site or "all sites" for site, _ in several]
    where = names[0] if names == ["all sites"] else f"site {names[0]!r}"
    where = where if len(names) == 1 else f"{len(names)} sites, {listed(names)}"
    figure = several[0][1] if len(several) == 1 else f"{several[0][1]} at the first"
    return f"bay {bay!r}, {where}: {what} ({figure}). {advice}"


def _of_site(tables: Sequence[Table]) -> Iterator[tuple[str, str, str]]:
    """(what is wrong, the figure, what to try)."""
    every, n = tables[0], len(tables[0].modules)
    routes = float(every.rows.sum())
    if n < 2:
        return
    if routes < ENOUGH * n:
        yield f"too few routes to judge {n} modules by", f"{routes:.0f} were recorded", "Record more calls."
        return
    share = every.use
    if not share.any():
        yield "no route takes any module", "all shares are nought", "See which labels the calls have."
        return
    h_a = float((every.entropy * every.examples).sum() / every.examples.sum())
    h_b = measures.entropy(share)
    if (exp(h_b) - 1) / (n - 1) < ALONE:
        yield from _collapsed(tables, h_b)
        return
    if exp(h_a) > FLAT * n:
        figure = f"a route spreads over {exp(h_a):.2f} of {n}, H_a = {h_a:.2f} of {log(n):.2f} nats"
        advice = "Try a lower temperature, fewer modules a route (mb.TopK(k=1)), a higher rate for the router"
        yield "routing does nothing, as all modules get the same of everything", figure, f"{advice}, or more steps."
        return
    for name, x in zip(every.modules, share, strict=True):
        if x < 1 / (measures.LITTLE * n):
            figure = f"{x:.2%} of the use, where an equal share is {1 / n:.1%}"
            yield f"module {name!r} is out of use", figure, f"Try {BALANCE}; or bay.remove({name!r})."
    yield from _blind(tables[1:])


def _collapsed(tables: Sequence[Table], h_b: float) -> Iterator[tuple[str, str, str]]:
    every = tables[0]
    n, i = len(every.modules), int(every.use.argmax())
    figure = f"{every.use[i]:.1%} of the use, H_b = {h_b:.2f} of {log(n):.2f} nats: {exp(h_b):.1f} of {n} modules work"
    blind = [one.label for one in tables[1:] if _told(one) < ALIKE]
    if blind:
        figure += f", and {listed(blind)} makes no difference"
    yield f"the router has collapsed onto module {every.modules[i]!r}", figure, f"Try {BALANCE}, from the first step."


def _blind(tables: Sequence[Table]) -> Iterator[tuple[str, str, str]]:
    for one in tables:
        told = _told(one)
        if told < ALIKE:
            figure = f"the module tells {told:.1%} of what it could of {one.label!r}"
            what = f"{len(one.values)} values of {one.label!r} are routed alike"
            advice = "If modules shall be theirs, give the router the label"
            yield what, figure, f"{advice} (mb.Skills({one.label!r}, …)), or route by example: mb.TopK(by='example')."


def _told(table: Table) -> float:
    """How much of what it could the module tells of a label; 1 where there is nothing to tell."""
    inverse = measures.inverse_mutual_information(table.counts)
    return 1.0 if inverse != inverse else 1 - inverse
