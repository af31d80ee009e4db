"""`modbay adapt`: few rows of something new, over the modules that a run has."""

from pathlib import Path
from typing import Any

from .. import report, training
from ..errors import ConfigError
from ._say import console, table
from ._train import show_results
from ._work import print_folder, print_json, work


def run(folder: Path, data: str, out: Path, ways: str | None, given: dict[str, Any], as_json: bool) -> None:
    """Adapt, and print how each way did, which was taken, and why."""
    with work("adapt", out, as_json) as doing:
        given["test"] = share(given["test"])
        data, given["task"] = named(data, given["task"])
        asked = None if ways is None else [way.strip() for way in ways.split(",") if way.strip()]
        done = training.adapt(
            folder, data, out, ways=asked, progress=doing.progress, command=doing.command, page=report.write, **given
        )
    if as_json:
        print_json(done.folder, done.facts)
        return
    show(done)
    print_folder(done.folder, "is the run with it")


def named(data: str, task: str | None) -> tuple[str, str | None]:
    """(file, task) of NAME=FILE, as the other commands take it, or of FILE."""
    name, equals, file = data.partition("=")
    if not equals or Path(data).exists():
        return data, task
    if task not in (None, name):
        raise ConfigError(f"DATA={data}, --task {task}: two names for one task; give one.")
    return file, name


def share(given: str | None) -> str | float | None:
    """A file, or a share of the rows."""
    if given is None or Path(given).exists():
        return given
    try:
        return float(given)
    except ValueError:
        raise ConfigError(f"--test {given}: a share of the rows, from 0 to below 1, or a file that is there.") from None


def show(done: training.Run) -> None:
    """The ways, the verdict, what the module was made of, the proof, and the test rows' figures."""
    out, facts = console(), done.facts
    came, compared = facts["adapt"], facts.get("compare", {})
    if compared:
        rows = [
            (r["method"], f"{r['estimate']:.3f} ± {r['error']:.3f}", f"{r['parameters']:,}", f"{r['seconds']:.1f}")
            for r in compared["rows"]
        ]
        heads = ("way", compared["metric"], "trained", "seconds")
        out.print(table(heads, rows, right=heads[1:]))
        n = compared["rows"][0]["n"]
        out.print(f"± one standard error, over {n} of {came['rows']} rows, each told by what was trained without it.\n")
    out.print(compared.get("verdict") or facts["verdict"], soft_wrap=True)
    if came["from"]:
        weights = sorted(came["from"].items(), key=lambda one: -abs(one[1]))
        more = f" … ({len(weights)} in all)" if len(weights) > 6 else ""
        out.print(f"from: {', '.join(f'{name} {w:.2f}' for name, w in weights[:6])}{more}", soft_wrap=True)
    proof = facts["proof"][-1]
    out.print(f"Proof: {proof['what']}: none of {proof['rows']:,} rows changed.", soft_wrap=True)
    if not came["tested"]:
        out.print("No test rows were given (--test): the figures of cross-validation are all there is.")
        return
    own = [
        r for r in facts["results"]
        if r["task"] == came["task"] and (came["label"] == "task" or r["value"] == came["value"])
    ]  # fmt: skip
    out.print()
    show_results({"results": own})
