"""`extend`: one more task, or one more value of a label, onto a finished run, whose own answers stay bit for bit."""

import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from ... import data
from ...data import Row
from ...errors import ConfigError, ProofError
from ...metrics import write_records
from ...routing import Skills
from .._about import about
from .._facts import facts
from .._fit import Ready, atomic, finish, fit
from .._new import Page, free
from .._plan import plan
from .._predict import predict
from .._progress import Progress, Silent
from .._run import Run, open_run, read_json, unfinished, write_json, write_network, write_text
from .._tasks import Tasks
from ._arrive import Arrived, arrive
from ._extension import ARRIVED, Extension, arrived
from ._newcomers import Newcomers, newcomers, tested
from ._proof import prints, proof

FEWEST, PASSES = 100, 10  # steps of an extension that says neither steps nor epochs: so many passes, but no fewer steps
ASKED = "extend.yaml"


@dataclass
class Extending:
    """An extension that could start: everything has been found sound, and nothing written."""

    asked: Extension
    came: Newcomers
    who: list[Arrived]
    ready: Ready
    old: list[Row]
    before: list[bytes]
    notes: list[str]
    warnings: list[str]


def ready_to_extend(asked: Extension, progress: Progress | None = None) -> Extending:
    """Read the data, open the run, make a place for the newcomers. Raises before anything is written."""
    progress, run = progress or Silent(), asked.run
    with progress.stage("Read the data"):
        came = newcomers(asked)
        old, notes = tested(run)
    with progress.stage("Open the run"):
        network = run.network()
    before = prints(network, old, progress, "Before: the run's own test rows")
    config = _settled(asked, network, len(came.splits.train))
    torch.manual_seed(config.seed)
    who, said = arrive(network, replace(asked, config=config), came, progress)
    rows = came.splits.train
    with progress.stage("Encode"):
        examples = network.encoder.encode(rows, [network.routes.of(row, network.keywords) for row in rows])
    known = came.known
    tasks = Tasks(known["kind"], known["kinds"], known["classes"], came.values, came.splits, came.files)
    survey = data.survey(came.splits)
    made = Ready(config, tasks, network, plan(config, tasks, network, examples, survey), survey, examples)
    return Extending(asked, came, who, made, old, before, [*notes, *said], [*notes, *came.notes])


def extend(
    asked: Extension, out: str | Path, *, resume: bool = False, progress: Progress | None = None, command: str = "",
    page: Page | None = None,
) -> Run:  # fmt: skip
    """Extend a run as asked, and write the whole of it to the folder `out`, which must not exist; returns it, opened.

    What the run's own rows use is frozen. That their logits are what they were is measured, on what was written:
    ProofError, and nothing is left behind, if one bit differs. Otherwise raises as `train` does, and resumes as it.
    """
    progress, out, began = progress or Silent(), Path(out), time.perf_counter()
    partial = unfinished(free(out, resume=resume))
    with atomic(partial):
        write_text(partial / ASKED, f"# modbay extend {out.name}/{ASKED} --out ANOTHER\n{_yaml(asked.dump())}")
        going = ready_to_extend(asked, progress)
    curve = fit(going.ready, partial, progress)
    trained = time.perf_counter() - began
    network, rows = going.ready.network, [*going.old, *going.came.splits.test]
    records = predict(network, rows, progress=progress, what="Test, old and new together")
    shutil.copyfile(asked.run.folder / "run.yaml", partial / "run.yaml")
    new = about(going.ready.config, network, going.ready.tasks, records[len(going.old) :], "extend")
    write_network(partial, network, going.came.known, new)
    write_records(partial / "predictions.jsonl", records)
    ways = [{"fixed": fixed, "config": one.dump()} for fixed, one in [*arrived(asked.run), (asked.fixed, asked.config)]]
    write_json(partial / ARRIVED, {"format": 1, "arrivals": ways})
    said = proved(going, partial, progress)
    seconds = {"train": trained, "all": time.perf_counter() - began}
    told = _facts(going, records, curve, command, seconds, said)
    write_json(partial / "run.json", told)
    if page is not None:
        page(partial / "report.html", told)
    finish(partial, out)
    return open_run(out)


def proved(going: Extending, partial: Path, progress: Progress) -> dict[str, Any]:
    """The proof, by the network as it was written; raises ProofError, the folder removed, if a bit changed."""
    written = Run(partial, going.asked.run.config, going.came.known, going.ready.network.routes, {})
    written = replace(written, routes=written.routes.parse(read_json(partial / "network.json")["routes"]))
    after = prints(written.network(), going.old, progress, "After: the run's own test rows")
    said = proof(going.before, after, str(going.asked.run.folder))
    if said["changed"]:
        shutil.rmtree(partial)
        raise ProofError(
            f"{said['changed']:,} of {said['rows']:,} test rows of {going.asked.run.folder} are answered with other "
            f"logits than before: the extension touched what others use. Nothing was written. Something in the run is "
            f"not what this command freezes (a module that keeps statistics?), or the machine does not repeat itself."
        )
    return said


def _settled(asked: Extension, network: Any, rows: int) -> Any:
    """The arguments of training, with what depends on the data and the run."""
    config, given = asked.config, asked.more
    gates = any(isinstance(part, Skills) for part in network.model.modules())
    if gates and config.weight_decay:
        raise ConfigError(
            f"weight_decay={config.weight_decay}: the run's gates are one tensor for all labels, and decay would move "
            f"those of the others. Leave it at 0."
        )
    if "steps" not in given and "epochs" not in given:
        config = config.model_copy(update={"steps": max(FEWEST, PASSES * rows // config.batch)})
    return config


def _facts(going: Extending, records: Any, curve: Any, command: str, seconds: dict, said: dict) -> dict[str, Any]:
    """The facts of the extended run: its results are on the rows of all, old and new."""
    asked, ready = going.asked, going.ready
    run = asked.run
    told = run.config.model_copy(update={"seed": ready.config.seed})
    out = facts(replace(ready, config=told), records, curve, command, seconds)
    names = ", ".join(dict.fromkeys(one.value for one in going.who))
    return {
        **out,
        "title": f"{run.facts.get('title', run.folder.name)} + {names}",
        "data": [*run.facts.get("data", []), *going.came.files],
        "warnings": [*going.warnings, *out["warnings"]],
        "config": asked.dump(),
        "extended": {"run": str(run.folder), "newcomers": [asdict(one) for one in going.who], "notes": going.notes,
                     "rows": {part: len(rows) for part, rows in going.came.splits.items()}},
        "proof": [*run.facts.get("proof", []), said],
    }  # fmt: skip


def _yaml(what: dict[str, Any]) -> str:
    return yaml.safe_dump(what, sort_keys=False, allow_unicode=True)
