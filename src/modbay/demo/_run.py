"""The demo's course: twelve languages learn together, each way (`modbay compare`); two arrive (`modbay extend`)."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from .. import report, training
from ..errors import ConfigError
from ._arrivals import Arrivals, Way
from ._data import ARRIVALS
from ._write import FULL, SMOKE, Scale, write

MODULE, HEAD, IN_PLACE, SCRATCH = "New module, own head", "Own head alone", "Shared tuned in place", "From scratch"
GATES, ALONE, AGAIN = "Polytropon: new gates, own head", "TF-IDF on it alone", "TF-IDF retrained on all"


@dataclass
class Results:
    """What a run found. facts: of the comparison, with the arrivals' in them."""

    scale: Scale
    facts: dict[str, Any]
    ways: list[Way]
    seconds: float


def run(out: Path, smoke: bool = False, seed: int = 0, progress: training.Progress | None = None) -> Results:
    """The whole run, in the folder `out`; an earlier demo's is removed, anything else raises ConfigError."""
    began, scale, progress = perf_counter(), SMOKE if smoke else FULL, progress or training.Silent()
    files, joint, later = out / "data", out / "joint", out / "arrivals"
    cleared(out)
    with progress.stage("Data: sample grammars, write CSV files"):
        write(files, scale, seed)
    command = f"modbay compare {files}/compare.yaml --out {joint}"
    progress.say(f"$ {command}")
    asked = training.comparison(training.read_config(files / "compare.yaml"), str(files / "compare.yaml"))
    facts = training.compare(asked, joint, progress=progress, command=command).facts
    arrivals = Arrivals(files, joint, later, scale, seed)
    extend = f"modbay extend {joint}/shared-{seed} {files}/K-shot.csv --test {files}/new-test.csv …"
    progress.say(f"$ {extend}   # {', '.join(ARRIVALS)}, K = {', '.join(map(str, scale.shots))}")
    steps: list[tuple[str, Callable[[str], Way | list[Way]]]] = [
        (MODULE, lambda title: arrivals.extended(title, "shared", {})),
        (HEAD, lambda title: arrivals.extended(title, "shared", {"ways": "head"})),
        (GATES, lambda title: arrivals.extended(title, "polytropon", {"ways": "head", "router_lr": 3e-2})),
        (IN_PLACE, arrivals.in_place),
        (SCRATCH, arrivals.scratch),
        (f"{ALONE}; {AGAIN}", lambda _: arrivals.tfidf(ALONE, AGAIN)),
    ]
    ways: list[Way] = []
    for title, way in steps:
        with progress.stage(f"Arrivals: {title}"):
            made = way(title)
        ways += made if isinstance(made, list) else [made]
    whole = perf_counter() - began
    facts |= {"shots": shots(ways, scale), "proof": arrivals.proofs, "against": arrivals.against}
    facts |= {"title": "A voice assistant in twelve languages; two arrive later", "seconds": round(whole, 1)}
    (out / "demo.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    report.write(out / "report.html", facts)
    return Results(scale, facts, ways, whole)


def cleared(out: Path) -> None:
    """A new folder with a file that says whose it is."""
    mark = out / ".modbay-demo"
    if out.exists() and not mark.is_file() and any(out.iterdir()):
        raise ConfigError(f"out={str(out)!r}: it holds something that is no demo's. Choose a new folder.")
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    mark.touch()


def shots(ways: list[Way], scale: Scale) -> dict[str, Any]:
    """The few-shot curves, as the report draws them."""
    rows = []
    for way in ways:
        for value in ARRIVALS:
            cells = [way.cells[value, k] for k in scale.shots]
            spans = {"low": [cell.low for cell in cells], "high": [cell.high for cell in cells]}
            rows.append({"way": way.title, "value": value, "estimates": [cell.estimate for cell in cells], **spans})
    return {"metric": "accuracy", "shots": list(scale.shots), "rows": rows}
