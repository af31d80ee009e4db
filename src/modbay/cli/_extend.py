"""`modbay extend`: one more task, language or customer onto a finished run, and the proof that nothing else changed."""

from pathlib import Path
from typing import Any

from .. import report, training
from ..errors import ConfigError
from ._say import console, table
from ._train import said, show_plan, show_results
from ._work import free_name, print_folder, print_json, work

ASKED = "extend.yaml"


def run(folder: Path | None, data: list[str], flags: dict[str, Any], sets: list[str], out: Path | None,
        resume: Path | None, dry: bool, as_json: bool) -> None:  # fmt: skip
    """Extend, or print the plan."""
    with work("extend", resume or out, as_json) as doing:
        asked = resumed(resume) if resume is not None else asked_for(folder, data, flags, sets)
        if dry:
            going = training.ready_to_extend(asked, doing.progress)
            show_plan(going.ready, as_json)
            if not as_json:
                show_notes(going.notes)
            return
        doing.folder = doing.folder or free_name(asked.run.folder.with_name(f"{asked.run.folder.name}-extended"))
        done = training.extend(
            asked, doing.folder, resume=resume is not None, progress=doing.progress, command=doing.command,
            page=report.write,
        )  # fmt: skip
    if as_json:
        print_json(done.folder, done.facts)
        return
    show(done)
    print_folder(done.folder, "is the run with them")


def asked_for(folder: Path | None, data: list[str], flags: dict[str, Any], sets: list[str]) -> training.Extension:
    """What the command line, or one YAML file, asks for."""
    if folder is None:
        raise ConfigError("RUN is missing: modbay extend RUN DATA --out NEW, or modbay extend NEW/extend.yaml.")
    files = [str(folder)] if folder.suffix in (".yaml", ".yml") else data
    if folder.suffix in (".yaml", ".yml") and data:
        raise ConfigError(f"DATA={data}: {folder} says all of an extension, its data too.")
    flags["fixed"] = fixed(flags["fixed"])
    given, where = said(files, flags, sets)
    if folder.suffix not in (".yaml", ".yml"):
        given["run"] = str(folder)
    return training.extension(given, where)


def fixed(given: list[str] | None) -> dict[str, str] | None:
    """LABEL=VALUE as {label: value}."""
    for one in given or ():
        if not all(one.partition("=")):
            raise ConfigError(f"--value {one}: LABEL=VALUE is wanted, language=pt")
    return dict(one.split("=", 1) for one in given) if given else None


def resumed(folder: Path) -> training.Extension:
    """What the unfinished extension of a folder was asked for."""
    file = training.unfinished(folder) / ASKED
    if folder.exists():
        raise ConfigError(f"--resume {folder}: that run is finished.")
    if not file.is_file():
        raise ConfigError(f"--resume {folder}: there is no {file}, so no extension of that name was begun.")
    return training.extension(training.read_config(file), str(file))


def show(done: training.Run) -> None:
    """Who came and what they got, the figures of all, the proof."""
    out, facts = console(), done.facts
    came = facts["extended"]
    rows = [(one["task"], one["label"], one["value"], one["head"] or "the task's", one["module"] or "none", under(one))
            for one in came["newcomers"]]  # fmt: skip
    out.print(table(("task", "label", "value", "head", "module", "on"), rows))
    show_notes(came["notes"])
    out.print()
    show_results(facts)
    out.print()
    proof = facts["proof"][-1]
    out.print(
        f"Proved: the logits of all {proof['rows']:,} test rows of {came['run']} are, bit for bit, what they were.",
        soft_wrap=True,
    )


def under(one: dict[str, Any]) -> str:
    """What stands under a newcomer's own module."""
    named = [f"{bay}: {', '.join(names)}" for bay, names in one["on"].items() if names]
    gates = [f"{bay}: gates of its own" for bay in one["gates"]]
    return "; ".join([*named, *gates]) or ("the base alone" if one["on"] else "what all rows use")


def show_notes(notes: list[str]) -> None:
    """A line each."""
    for note in notes:
        console().print(f"{note[0].upper()}{note[1:]}.", soft_wrap=True)
