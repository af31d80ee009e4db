"""The tables, and what they show: every figure and every sentence about one is of this run."""

import os
import platform
import shutil
import sys
from importlib.metadata import version
from math import sqrt
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ._arrivals import ARRIVALS, HEAD, IN_PLACE, MODULE, SCRATCH
from ._run import Arrived, Cost, Joint, Results
from ._ways import BOTH, SHARED, WAYS, WIDER

WIDE = 120  # columns of the file, and where nobody looks
LEAST = 90  # columns that the tables need


def terminal() -> Console:
    """Standard output, wide enough for the tables."""
    wide = max(LEAST, shutil.get_terminal_size().columns) if sys.stdout.isatty() else WIDE
    return Console(width=wide, highlight=False)


def show(results: Results, out: Path, screen: Console) -> None:
    """Print the report, and write it to `out`/report.txt."""
    with (out / "report.txt").open("w", encoding="utf-8") as file:
        for console in (screen, Console(file=file, width=WIDE, highlight=False)):
            _all(results, out, console)


def _all(results: Results, out: Path, console: Console) -> None:
    console.print()
    console.print(_joint(results))
    for sentence in _of_joint(results):
        console.print(sentence, markup=False)
    console.print()
    console.print(_arrived(results))
    for sentence in _of_arrivals(results):
        console.print(sentence, markup=False)
    console.print()
    for sentence in _of_files(results, out):
        console.print(sentence, markup=False, soft_wrap=True)
    console.print()
    console.print(_machine(results), markup=False)


def _table(title: str, *heads: str) -> Table:
    made = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), title=title, title_justify="left", title_style="bold")
    for i, head in enumerate(heads):
        made.add_column(head, justify="right" if i else "left", no_wrap=bool(i))
    return made


def _joint(results: Results) -> Table:
    sizes = results.scale.sizes
    made = _table(
        f"{len(sizes)} languages learn together ({sum(sizes.values()):,} utterances); test, %",
        "", "accuracy", "macro-F1", " ".join(results.smallest), "trained", "seconds",
    )  # fmt: skip
    for row in results.joint:
        s = row.scores
        figures = (s.mean(), s.mean_f1(), s.over(results.smallest))
        trained = "" if row.trained is None else f"{row.trained:,}"
        made.add_row(row.title, *[f"{100 * x:.1f}" for x in figures], trained, f"{row.seconds:.1f}")
    return made


def _of_joint(results: Results) -> list[str]:
    """What the first table shows, and what it does not."""
    rows = {row.title: row for row in results.joint}
    ways = [rows[way.title] for way in WAYS]
    best, tfidf = (
        max(ways, key=_accuracy),
        max((row for row in results.joint if row.title.startswith("TF")), key=_accuracy),
    )
    shared, wider, both = (rows[way.title] for way in (SHARED, WIDER, BOTH))
    return [
        f"Means over languages. One seed; {_noise(results, best, tfidf)}",
        f"Best with modules: {best.title} ({_percent(best)}). Best without: {tfidf.title} ({_percent(tfidf)}), "
        f"{_points(best, tfidf)} for modules.",
        f"A module a language beside the shared one: {_points(both, shared)} against the shared one alone, "
        f"{_points(both, wider)} against a shared one of twice the rank, so that a row meets as many parameters.",
        "No way with modules beats TF-IDF here: this table is no reason for them, what comes below may be one."
        if _accuracy(tfidf) >= _accuracy(best)
        else "One run of one seed does not show that they would win again.",
    ]


def _noise(results: Results, one: Joint, other: Joint) -> str:
    """The standard error that a mean over languages has from the test utterances alone."""
    n, p = results.scale.held_out, (_accuracy(one) + _accuracy(other)) / 2
    each = 100 * sqrt(p * (1 - p) / n)
    return (
        f"{n} test utterances a language leave a standard error of {each:.1f} points on one language, "
        f"{each / sqrt(len(results.scale.sizes)):.1f} on the mean, and another seed's training adds to it."
    )


def _arrived(results: Results) -> Table:
    languages = list(dict.fromkeys(language for language, _ in results.arrived[0].accuracy))
    keys = [(language, k) for language in languages for k in results.scale.shots]
    made = _table(
        "A language arrives later, with a few utterances an intent; its test accuracy, %",
        "", *[f"{language} {k}" for language, k in keys], "trained", "seconds", "the others",
    )  # fmt: skip
    for row in results.arrived:
        cells = [f"{100 * row.accuracy[key]:.1f}" for key in keys]
        trained, seconds = "" if row.trained is None else f"{row.trained:,}", f"{row.seconds / len(keys):.1f}"
        made.add_row(row.title, *cells, trained, seconds, _others(row.costs))
    return made


def _others(costs: list[Cost]) -> str:
    """What an arrival did to the languages that were there."""
    if not costs:
        return "not involved"
    if all(cost.changed == 0 for cost in costs):
        return "same bits"
    return f"{_signed(sum(cost.points for cost in costs) / len(costs))}"


def _of_arrivals(results: Results) -> list[str]:
    """What the second table shows: measured, not assumed."""
    rows = {row.title: row for row in results.arrived}
    module, n = rows[MODULE.title], results.scale.held_out
    touched = [rows[way.title] for way in ARRIVALS if rows[way.title].costs]
    counts = [f"{row.title}: {_changed(row)}" for row in touched]
    lost = [f"{cost.newcomers[0]} {cost.shots} {_signed(cost.points)}" for cost in rows[IN_PLACE.title].costs]
    return [
        "The number beside a language is the utterances an intent. A new module stands on the shared one; its head is "
        "a copy of the others'. Seconds are of training, one arrival. The others are the languages before, scored "
        "anew on their test: points gained or lost, means over arrivals.",
        f"Their rows whose logits changed in any bit: {'; '.join(counts)}. That is in the same batches; where "
        "newcomers' rows share one, so that sums may be taken in another order, logits were "
        f"{results.beside:.0e} apart at most.",
        f"Points that the others lost or won by each tuning in place: {', '.join(lost)}.",
        *[
            f"Points of '{module.title}' over '{other.title}': {_gaps(module, rows[other.title])}."
            for other in (IN_PLACE, HEAD, SCRATCH)
        ],
        f"One draw of the few utterances, and {n} to test: a cell's standard error is some {50 / sqrt(n):.0f} points.",
    ]


def _changed(row: Arrived) -> str:
    return f"{sum(cost.changed or 0 for cost in row.costs):,} of {sum(cost.rows for cost in row.costs):,}"


def _gaps(one: Arrived, other: Arrived) -> str:
    """Differences in points, cell by cell."""
    return ", ".join(f"{l} {k} {_signed(100 * (a - other.accuracy[l, k]))}" for (l, k), a in one.accuracy.items())


def _of_files(results: Results, out: Path) -> list[str]:
    worst = max(results.loaded.values())
    same = "equal to the bit" if worst == 0 else f"up to {worst:.1e} apart"
    return [
        f"All modules are in {out}/ ({', '.join(results.loaded)}). Loaded into fresh models, one mixed batch of "
        f"{len(results.mixed)} languages ({' '.join(results.mixed)}): logits {same}.",
        "To use them:",
        "    import modbay as mb; from modbay import demo",
        f"    model = demo.assistant({str(out)!r}); mb.load(model, {str(out / MODULE.start)!r})",
        f"    print(demo.ask(model, {[u.text for u in results.examples]}, {[u.language for u in results.examples]}))",
    ]


def _machine(results: Results) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("modbay", "torch", "transformers"))
    threads, cores = torch.get_num_threads(), os.cpu_count()
    return (
        f"{results.seconds:.0f} seconds on {platform.machine()}, {threads} threads of {cores} cores; Python "
        f"{platform.python_version()}, {packages}"
    )


def _accuracy(row: Joint) -> float:
    return row.scores.mean()


def _percent(row: Joint) -> str:
    return f"{100 * _accuracy(row):.1f}"


def _points(one: Joint, other: Joint) -> str:
    return f"{_signed(100 * (_accuracy(one) - _accuracy(other)))} points"


def _signed(points: float) -> str:
    return f"{points:+.1f}".replace("-0.0", "0.0").replace("+0.0", "0.0")
