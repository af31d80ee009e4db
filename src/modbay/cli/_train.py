"""`modbay train`: from labelled data to a folder of modules."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml

from .. import report, training
from ..errors import ConfigError, Interrupted, ModbayError
from ._progress import Shown
from ._say import console, fail, table

RUNS = Path("runs")


def run(
    data: list[str],
    flags: dict[str, Any],
    sets: list[str],
    out: Path | None,
    resume: Path | None,
    dry: bool,
    as_json: bool,
) -> None:
    """Train, or print the plan."""
    progress, folder = training.Silent() if as_json else Shown(), out
    command = shlex.join(["modbay", *sys.argv[1:]])
    try:
        if resume is not None:
            asked, out = resumed(resume), resume
        else:
            asked = asked_for(data, flags, sets)
        if dry:
            show_plan(training.ready(asked, progress), as_json)
            return
        folder = out or free_name(asked)
        done = training.train(
            asked, folder, resume=resume is not None, progress=progress, command=command, page=report.write
        )
    except Interrupted as stopped:
        print(f"modbay: {stopped}. To go on: modbay train --resume {folder}", file=sys.stderr)
        raise SystemExit(130) from None
    except ModbayError as error:
        fail(str(error))
    except OSError as error:
        begun = folder is not None and training.unfinished(folder).exists()
        more = f" What it reached is kept; go on with modbay train --resume {folder}" if begun else ""
        fail(f"{error.filename or folder}: {error.strerror or error}.{more}")
    if as_json:
        print(json.dumps({"folder": str(done.folder), **done.facts}, indent=1, ensure_ascii=False))
        return
    show_results(done.facts)
    console().print(
        f"\n{done.folder}/ holds the modules, predictions and facts; open {done.folder}/report.html", soft_wrap=True
    )


def asked_for(data: list[str], flags: dict[str, Any], sets: list[str]) -> training.Config:
    """The Config of files, flags and --set, each going before the last."""
    return training.config(*said(data, flags, sets))


def said(data: list[str], flags: dict[str, Any], sets: list[str]) -> tuple[dict[str, Any], str]:
    """(the arguments of a run, where they were given), not checked yet."""
    given: dict[str, Any] = {}
    where = "the command line"
    files = [one for one in data if one.endswith((".yaml", ".yml"))]
    if len(files) > 1 or (files and len(data) > 1):
        raise ConfigError(f"DATA={data}: one YAML file with all of a run, or data files; not both.")
    if files:
        given, where = training.read_config(files[0]), files[0]
    elif data:
        given["data"] = tasks(data)
    given |= {name: value for name, value in flags.items() if value is not None}
    if isinstance(given.get("by"), list):
        given["by"] = dict(one.partition("=")[::2] if "=" in one else (one, one) for one in given["by"])
    for one in sets:
        name, equals, value = one.partition("=")
        if not equals:
            raise ConfigError(f"--set {one}: NAME=VALUE is wanted, the value in YAML; --set pool=[mean,max]")
        given[name] = yaml.safe_load(value)
    for name in ("module", "at"):
        given |= (
            {name: yaml.safe_load(given[name])} if isinstance(given.get(name), str) and given[name][:1] in "{[" else {}
        )
    return given, where


def tasks(data: list[str]) -> Any:
    """DATA as Config takes it: one task, or several by name."""
    named = [one for one in data if "=" in one and not Path(one).exists()]
    if not named:
        return data[0] if len(data) == 1 else data
    if len(named) < len(data):
        bare = next(one for one in data if one not in named)
        raise ConfigError(f"DATA={bare!r}: give all tasks a name (NAME=FILE), or none, if all files are one task.")
    return dict(one.split("=", 1) for one in data)


def resumed(folder: Path) -> training.Config:
    """What the unfinished run of a folder was asked for."""
    partial = folder.with_name(folder.name + ".partial")
    if folder.exists():
        raise ConfigError(f"--resume {folder}: that run is finished.")
    if not (partial / "run.yaml").is_file():
        raise ConfigError(f"--resume {folder}: there is no {partial}/run.yaml, so no run of that name was begun.")
    return training.config(training.read_config(partial / "run.yaml"), str(partial / "run.yaml"))


def free_name(asked: training.Config) -> Path:
    """runs/TASK-METHOD, numbered if there is one already."""
    name = f"{'-'.join(asked.sources)[:60]}-{asked.method or ('bays' if asked.bays else 'shared')}"
    taken = lambda path: path.exists() or path.with_name(path.name + ".partial").exists()
    return next(p for i in range(1, 10_000) if not taken(p := RUNS / (name if i == 1 else f"{name}-{i}")))


def show_plan(ready: Any, as_json: bool) -> None:
    """Everything that will happen, before it does."""
    plan = ready.plan
    if as_json:
        print(json.dumps(plan, indent=1, ensure_ascii=False))
        return
    out, cut = console(), plan["truncated"]
    for line in ready.survey.lines():
        out.print(line, soft_wrap=True)
    out.print(
        f"\nPieces a text: median {plan['length']}; {cut['rows']:,} of {cut['of']:,} are cut at {cut['max_length']}.\n"
    )
    shares = [(one["task"], one["value"], f"{100 * one['share']:.1f} %") for one in plan["sampling"]]
    out.print(table(("task", "value", "share of the draws"), shares, right=("share of the draws",)))
    out.print()
    heads = ("bay", "module", "kind", "sites", "parameters", "learning")
    rows = [
        tuple(f"{p[head]:,}" if isinstance(p[head], int) else p[head] for head in heads) for p in plan["parameters"]
    ]
    out.print(table(heads, shortened(rows), right=("sites", "parameters", "learning")))
    for name, sites in plan["sites"].items():
        more = f" … ({len(sites)} in all)" if len(sites) > 4 else ""
        out.print(f"sites of {name!r}: {', '.join(sites[:4])}{more}", soft_wrap=True)
    rates = ", ".join(f"{rate['name']} {rate['lr']:g}" for rate in plan["rates"])
    out.print(
        f"\n{plan['steps']:,} steps of {plan['batch']}; rates: {rates or 'none'}; "
        f"{plan['memory_mib']:,} MiB, and the activations."
    )


def shortened(rows: list[tuple], most: int = 24) -> list[tuple]:
    """The first rows, and how many more there are."""
    if len(rows) <= most:
        return rows
    return [*rows[:most], (f"… {len(rows) - most} more", *[""] * (len(rows[0]) - 1))]


def show_results(facts: dict[str, Any]) -> None:
    """The table of tasks and labels, each figure with its interval; classes are left to the report."""
    rows = []
    for r in facts.get("results", []):
        if r["label"] != "class":
            figures = (f"{r['estimate']:.3f}", f"{r['low']:.3f} – {r['high']:.3f}", f"{r['n']:,}")
            rows.append((r["task"], r["label"], r["value"], r["metric"], *figures))
    heads = ("task", "label", "value", "metric", "estimate", "95 % interval", "n")
    console().print(table(heads, rows, right=("estimate", "95 % interval", "n")))
