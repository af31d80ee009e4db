"""`modbay evaluate`: a finished run's figures, on its own test rows or on others, alone or against another run."""

import json
import shlex
import sys
from pathlib import Path

from .. import report, training
from ..errors import DataError, ModbayError
from ._given import columns, values
from ._progress import Shown
from ._say import console, fail
from ._train import show_results


def run(
    folder: Path,
    files: list[str],
    against: Path | None,
    by: list[str],
    value: list[str],
    text: str | list[str] | None,
    target: str | None,
    task: str | None,
    unknown: str,
    out: Path | None,
    as_json: bool,
) -> None:
    """Print the table, and with `out` write it to a folder."""
    progress = training.Silent() if as_json else Shown()
    command = shlex.join(["modbay", *sys.argv[1:]])
    try:
        if out is not None:
            training.free(out)
        opened = training.open_run(folder)
        other = None if against is None else training.open_run(against)
        labels = columns(by)
        done = training.evaluate(
            opened, files, against=other, text=text, target=target, by=labels or None, fixed=values(value),
            task=task, unknown=unknown, progress=progress, command=command,
        )  # fmt: skip
        if not files and out is not None:
            try:
                seen = training.own_routing(opened, list(labels or opened.config.by), progress)
            except DataError as error:
                done.facts["warnings"] = [*done.facts.get("warnings", []), f"Routing is not shown: {error}"]
            else:
                done.facts.update({key: [*done.facts.get(key, []), *several] for key, several in seen.items()})
        if out is not None:
            with training.new_folder(out) as partial:
                training.write_evaluation(done, partial)
                report.write(partial / "report.html", done.facts)
    except KeyboardInterrupt:
        print("modbay: stopped; nothing was written", file=sys.stderr)
        raise SystemExit(130) from None
    except ModbayError as error:
        fail(str(error))
    if as_json:
        made = {} if out is None else {"folder": str(out)}
        print(json.dumps({**made, **done.facts}, indent=1, ensure_ascii=False))
        return
    show_results(done.facts)
    said = console()
    for line in [*done.verdict.splitlines(), *done.facts.get("warnings", []), *done.facts.get("collapse", [])]:
        said.print(f"\n{line}", soft_wrap=True)
    if out is not None:
        said.print(f"\n{out}/ holds the report, the facts and what was said of each row", soft_wrap=True)
