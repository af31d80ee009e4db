"""`modbay compare`: several methods on the same data, and what to take."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .. import report, training
from ..errors import ConfigError
from ..metrics import Gap, differ
from ._say import console, table
from ._train import RUNS, said
from ._work import free_name, print_folder, print_json, work

SHARES = ("accuracy", "span_f1")  # shown in per cent


def run(
    data: list[str], flags: dict[str, Any], sets: list[str], methods: list[str], seeds: list[str],
    reference: str | None, out: Path | None, resume: Path | None, dry: bool, as_json: bool,
) -> None:  # fmt: skip
    """Compare, or print what would be compared."""
    with work("compare", resume or out, as_json) as doing:
        asked = training.begun(resume) if resume else asked_for(data, flags, sets, methods, seeds, reference)
        if dry:
            show_plan(training.planned(asked, doing.progress), as_json)
            return
        doing.folder = doing.folder or free_name(RUNS / f"{'-'.join(asked.config.sources)[:60]}-compare")
        done = training.compare(
            asked, doing.folder, resume=resume is not None, progress=doing.progress, command=doing.command,
            page=report.write,
        )  # fmt: skip
    if as_json:
        print_json(done.folder, done.facts)
        return
    show(done.facts)
    print_folder(done.folder, "holds a run of each method and seed")


def asked_for(
    data: list[str], flags: dict[str, Any], sets: list[str], methods: list[str], seeds: list[str], reference: str | None
) -> training.Comparison:
    """What files and flags ask for; --methods picks among those of a YAML file, and may name others."""
    given, where = said(data, flags, sets)
    names = [name.strip() for one in methods for name in one.split(",") if name.strip()]
    if names:
        own = given.get("methods")
        given["methods"] = {name: own.get(name) for name in names} if isinstance(own, Mapping) else names
        if len(set(names)) < len(names):
            raise ConfigError(f"--methods {','.join(names)}: a method comes twice.")
    if seeds:
        given["seeds"] = [yaml.safe_load(seed) for one in seeds for seed in one.replace(",", " ").split()]
    if reference:
        given["reference"] = reference
    return training.comparison(given, where)


def show_plan(plan: Any, as_json: bool) -> None:
    """Data, methods and what learns in each."""
    if as_json:
        made = {"data": plan.survey.as_dict(), "learning": plan.learning, "left_out": plan.left_out}
        print(json.dumps({"asked": plan.asked.dump(), **made}, indent=1, ensure_ascii=False))
        return
    out = console()
    for line in plan.survey.lines():
        out.print(line, soft_wrap=True)
    rows = [
        (name, e.title, f"{plan.learning[name]:,}" if name in plan.learning else "") for name, e in plan.entries.items()
    ]
    out.print()
    out.print(table(("method", "", "learning"), rows, right=("learning",)))
    for name, why in plan.left_out.items():
        out.print(f"{name} is left out: {why}.", soft_wrap=True)
    seeds = ", ".join(map(str, plan.asked.seeds))
    out.print(f"\nSeeds {seeds}; differences are to {plan.asked.reference!r}.")


def show(facts: Mapping[str, Any]) -> None:
    """The table, and what it says."""
    out, made = console(), facts["compare"]
    metric, reference = made["metric"], made["reference"]
    percent = metric in SHARES
    head = metric.replace("_", " ") + (", %" if percent else "")
    heads = ("method", head, "95 %", f"less {reference}", "95 % of it", "p", "learning", "seconds")
    rows = []
    for row in made["rows"]:
        beside = row["beside"].get(reference)
        less = ("", "", "")
        if beside:
            star = "*" if differ(Gap(**beside)) else ""
            span = f"{figure(beside['low'], percent, '+')} – {figure(beside['high'], percent, '+')}"
            less = (figure(beside["difference"], percent, "+") + star, span, f"{beside['p']:.3f}")
        own = (figure(row["estimate"], percent), f"{figure(row['low'], percent)} – {figure(row['high'], percent)}")
        rows.append((row["title"], *own, *less, f"{row['parameters']:,}", f"{row['seconds']:.1f}"))
    out.print(table(heads, rows, right=heads[1:]))
    over = f"; means over {' and '.join(made['mean_over'])}" if made["mean_over"] else ""
    out.print(f"{made['budget']}{over}; * is shown, p being corrected for all pairs of methods.", soft_wrap=True)
    values = list(made["rows"][0]["by"])
    if values and len(values) <= 16:
        each = [(row["title"], *[figure(row["by"][value], percent) for value in values]) for row in made["rows"]]
        out.print()
        out.print(table((head, *values), each, right=values))
    for line in facts.get("left_out", {}).items():
        out.print("{} is left out: {}.".format(*line), soft_wrap=True)
    out.print(f"\n{made['verdict']}", soft_wrap=True)


def figure(x: float | None, percent: bool, sign: str = "") -> str:
    """A number for the table, with a true minus."""
    if x is None:
        return "–"
    shown = f"{100 * x:{sign}.1f}" if percent else f"{x:{sign}.3f}"
    return shown.replace("-", "−") if any(digit in shown for digit in "123456789") else shown.lstrip("+-")
