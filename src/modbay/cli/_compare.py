"""`modbay compare`: several methods on the same data, and what to take."""

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .. import report, training
from ..errors import ConfigError, Interrupted, ModbayError
from ..metrics import Gap, differ
from ._progress import Shown
from ._say import console, fail, table
from ._train import RUNS, said

SHARES = ("accuracy", "span_f1")  # shown in per cent


def run(
    data: list[str], flags: dict[str, Any], sets: list[str], methods: list[str], seeds: list[str],
    reference: str | None, out: Path | None, resume: Path | None, dry: bool, as_json: bool,
) -> None:  # fmt: skip
    """Compare, or print what would be compared."""
    progress = training.Silent() if as_json else Shown()
    command = shlex.join(["modbay", *sys.argv[1:]])
    folder = resume or out
    try:
        asked = training.begun(resume) if resume else asked_for(data, flags, sets, methods, seeds, reference)
        if dry:
            show_plan(training.planned(asked, progress), as_json)
            return
        folder = folder or free_name(asked)
        done = training.compare(asked, folder, resume=resume is not None, progress=progress, command=command)
    except Interrupted as stopped:
        print(f"modbay: {stopped}. To go on: modbay compare --resume {folder}", file=sys.stderr)
        raise SystemExit(130) from None
    except KeyboardInterrupt:
        kept = folder is not None and folder.with_name(folder.name + ".partial").exists()
        more = f"finished runs are kept. To go on: modbay compare --resume {folder}" if kept else "nothing is written"
        print(f"modbay: stopped; {more}", file=sys.stderr)
        raise SystemExit(130) from None
    except ModbayError as error:
        fail(str(error))
    for facts in [done.folder / "compare.json", *sorted(done.folder.glob("*/run.json"))]:
        report.write(facts.parent / "report.html", json.loads(facts.read_text(encoding="utf-8")))
    if as_json:
        print(json.dumps({"folder": str(done.folder), **done.facts}, indent=1, ensure_ascii=False))
        return
    show(done.facts)
    console().print(
        f"\n{done.folder}/ holds a run of each method and seed; open {done.folder}/report.html", soft_wrap=True
    )


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


def free_name(asked: training.Comparison) -> Path:
    """runs/TASK-compare, numbered if there is one already."""
    name = f"{'-'.join(asked.config.sources)[:60]}-compare"
    taken = lambda path: path.exists() or path.with_name(path.name + ".partial").exists()
    return next(p for i in range(1, 10_000) if not taken(p := RUNS / (name if i == 1 else f"{name}-{i}")))


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
