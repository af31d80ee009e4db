"""`modbay adapt`: few rows of something new, over the modules that a run has."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from .. import report, training
from ..errors import ConfigError, ModbayError
from ._progress import Shown
from ._say import console, fail, table
from ._train import show_results


def run(folder: Path, data: str, out: Path, ways: str | None, given: dict[str, Any], as_json: bool) -> None:
    """Adapt, and print how each way did, which was taken, and why."""
    progress = training.Silent() if as_json else Shown()
    command = shlex.join(["modbay", *sys.argv[1:]])
    try:
        given["test"] = share(given["test"])
        asked = None if ways is None else [way.strip() for way in ways.split(",") if way.strip()]
        done = training.adapt(folder, data, out, ways=asked, progress=progress, command=command, **given)
    except KeyboardInterrupt:
        print("modbay: stopped; nothing was written.", file=sys.stderr)
        raise SystemExit(130) from None
    except ModbayError as error:
        fail(str(error))
    page = done.folder / "report.html"
    report.write(page, done.facts)
    if as_json:
        print(json.dumps({"folder": str(done.folder), **done.facts}, indent=1, ensure_ascii=False))
        return
    show(done)
    console().print(f"\n{done.folder}/ is the run with it; open {page}", soft_wrap=True)


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
