"""`modbay train`: from labelled data to a folder of modules."""

import json
from pathlib import Path
from typing import Any

import yaml

from .. import report, training
from ..errors import ConfigError
from ._say import console, table
from ._work import free_name, print_folder, print_json, work

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
    with work("train", resume or out, as_json) as doing:
        asked = resumed(resume) if resume is not None else asked_for(data, flags, sets)
        if dry:
            show_plan(training.ready(asked, doing.progress), as_json)
            return
        doing.folder = doing.folder or free_name(RUNS / name_of(asked))
        done = training.train(
            asked, doing.folder, resume=resume is not None, progress=doing.progress, command=doing.command,
            page=report.write,
        )  # fmt: skip
    if as_json:
        print_json(done.folder, done.facts)
        return
    show_results(done.facts)
    print_folder(done.folder, "holds the modules, predictions and facts")


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
    partial = training.unfinished(folder)
    if folder.exists():
        raise ConfigError(f"--resume {folder}: that run is finished.")
    if not (partial / "run.yaml").is_file():
        raise ConfigError(f"--resume {folder}: there is no {partial}/run.yaml, so no run of that name was begun.")
    return training.config(training.read_config(partial / "run.yaml"), str(partial / "run.yaml"))


def name_of(asked: training.Config) -> str:
    """TASK-METHOD."""
    return f"{'-'.join(asked.sources)[:60]}-{asked.method or ('bays' if asked.bays else 'shared')}"


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
