"""Two languages arrive, with a few utterances an intent: what can be done, and what it costs those that were there.

`modbay extend` adds modules; what it is measured against is here: tuning in place, from scratch, and TF-IDF.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any

from .. import data, training
from ..data import Columns, Row, Splits, survey
from ..metrics import Record, paired, records, table
from ._data import ARRIVALS
from ._write import SHOTS, TASK, Scale, write_csv

KINDS = {TASK: "classification"}
BATCH = 16
RATE = {"lr": 1e-3, "head_lr": 3e-3}  # as METHODS' were chosen, at 4 shots


@dataclass
class Way:
    """A way to take newcomers in: its accuracy by (newcomer, shots), and what it did to the twelve."""

    title: str
    cells: dict[tuple[str, int], Any] = field(default_factory=dict)
    changed: int | None = None  # test rows of the others whose logits changed in any bit; None where none is involved
    rows: int = 0
    points: list[float] = field(default_factory=list)  # that the others lost or won, each time
    learning: int = 0
    seconds: float = 0.0

    def told(self, said: Sequence[Record], k: int) -> None:
        """Test records of newcomers after k shots."""
        for value in dict.fromkeys(record.labels["language"] for record in said):
            own = [record for record in said if record.labels["language"] == value]
            cells = table(own, dict.fromkeys((r.task for r in own), "classification"), [])
            self.cells[value, k] = next(cell for cell in cells if cell.metric == "accuracy" and not cell.label)


class Arrivals:
    """All ways, over the runs of a comparison."""

    def __init__(self, files: Path, joint: Path, out: Path, scale: Scale, seed: int):
        self.data, self.joint, self.out, self.scale, self.seed = files, joint, out, scale, seed
        self.proofs: list[dict[str, Any]] = []
        self.against: dict[str, Any] = {}

    def extended(self, title: str, method: str, more: dict[str, Any]) -> Way:
        """`modbay extend`, by both newcomers at once."""
        way = Way(title, changed=0)
        for k in self.scale.shots:
            asked = {"run": str(self.joint / f"{method}-{self.seed}"), "data": str(self.data / SHOTS.format(k=k)),
                     "validation": 0.0, "test": str(self.data / "new-test.csv"), "batch": BATCH,
                     "steps": len(ARRIVALS) * self.scale.few_steps, "seed": self.seed, **RATE, **more}  # fmt: skip
            run = training.extend(training.extension(asked), self.out / f"{method}-{more.get('ways', 'both')}-{k}")
            new = [r for r in records(run.folder / "predictions.jsonl") if r.labels["language"] in ARRIVALS]
            way.told(new, k)
            way.seconds += run.facts["time"]["train"]
            way.learning = sum(row["learning"] for row in run.facts["parameters"]) // len(ARRIVALS)
            said = run.facts["proof"][-1]
            way.changed, way.rows = (way.changed or 0) + said["changed"], way.rows + said["rows"]
            self.proofs.append({**said, "what": f"{title}, {k} shots: {said['what']}"})
        return way

    def in_place(self, title: str) -> Way:
        """The shared module and head, tuned on a newcomer's rows: on a copy for each, as it changes what others use."""
        way, run = Way(title, changed=0), training.open_run(self.joint / f"shared-{self.seed}")
        old = training.read_tasks(run.config).splits.test
        network = run.network()
        before = training.all_logits(network, old)
        was, now, name = answers(network, old, before), [], ""
        for k in self.scale.shots:
            for value in ARRIVALS:
                rows, test = (
                    [row for row in read(self.data / name) if row.labels["language"] == value]
                    for name in (SHOTS.format(k=k), "new-test.csv")
                )
                began = perf_counter()
                network = tuned(run, rows, self.scale.few_steps, self.seed, self.out / f"in-place-{value}-{k}")
                way.seconds += perf_counter() - began
                way.told(training.predict(network, test), k)
                after = training.all_logits(network, old)
                way.changed = (way.changed or 0) + training.changed(before, after)
                way.rows += len(old)
                now, name = answers(network, old, after), f"the same before {value} was tuned into it, {k} shots"
                way.points.append(100 * (accuracy(now) - accuracy(was)))
                way.learning = sum(p.numel() for p in network.model.parameters() if p.requires_grad)
        differ = paired(now, was, KINDS, ["language"], metrics=["accuracy"])
        self.against = {"name": name, "rows": [asdict(one) for one in differ]}
        return way

    def scratch(self, title: str) -> Way:
        """`modbay train` on the newcomers alone, as two tasks that share nothing."""
        way, joint = Way(title), training.open_run(self.joint / f"shared-{self.seed}").config
        for k in self.scale.shots:
            rows, test = (parted(self.data / name, self.out) for name in (SHOTS.format(k=k), "new-test.csv"))
            given = joint.dump() | {
                "data": {value: {"path": rows[value], "test": test[value]} for value in ARRIVALS},
                "by": {}, "validation": 0.0, "method": "private", "probe": 0, "batch": BATCH, "lr": 3e-3,
                "head_lr": 3e-3, "steps": len(ARRIVALS) * self.scale.few_steps, "seed": self.seed,
            }  # fmt: skip
            given.pop("test")
            run = training.train(training.config(given), self.out / f"scratch-{k}")
            said = records(run.folder / "predictions.jsonl")
            way.told([replace(one, labels={"language": one.task}) for one in said], k)
            way.seconds += run.facts["time"]["train"]
            way.learning = sum(row["learning"] for row in run.facts["parameters"]) // len(ARRIVALS)
        return way

    def tfidf(self, alone: str, again: str) -> list[Way]:
        """TF-IDF by a newcomer's rows alone, and by all rows once more, with what validation chose for the twelve."""
        one, every = Way(alone), Way(again)
        old = training.read_tasks(training.open_run(self.joint / f"shared-{self.seed}").config).splits
        was = records(self.joint / f"tfidf-{self.seed}/predictions.jsonl")
        test = read(self.data / "new-test.csv")
        for k in self.scale.shots:
            few = read(self.data / SHOTS.format(k=k))
            for way, name, each, train in (
                (one, "tfidf-each", "language", few),
                (every, "tfidf", None, [*old.train, *few]),
            ):
                chosen = json.loads((self.joint / f"{name}-{self.seed}/run.json").read_text(encoding="utf-8"))["config"]
                asked = test if each else [*old.test, *test]
                began = perf_counter()
                said, way.learning = training.linear(train, asked, KINDS, each, chosen["features"], chosen["penalty"])
                way.seconds += perf_counter() - began
                way.told(said[len(asked) - len(test) :], k)
                if not each:
                    way.points.append(100 * (accuracy(said[: len(old.test)]) - accuracy(was)))
        one.learning //= len(ARRIVALS)
        return [one, every]


def accuracy(said: Sequence[Record]) -> float:
    """The mean over languages."""
    right: dict[str, list[bool]] = {}
    for one in said:
        right.setdefault(one.labels["language"], []).append(one.prediction == one.target)
    return fmean(fmean(several) for several in right.values())


def read(path: Path) -> list[Row]:
    """The rows of one of the demo's files."""
    return data.read(path, Columns("text", "intent", {"language": "language"}), "classification", TASK)


def parted(path: Path, out: Path) -> dict[str, str]:
    """A file for each newcomer."""
    found = {}
    for value in ARRIVALS:
        rows = [(row.text, row.target, value) for row in read(path) if row.labels["language"] == value]
        found[value] = str(write_csv(out / "scratch" / f"{value}-{path.name}", rows))
    return found


def tuned(run: training.Run, rows: Sequence[Row], steps: int, seed: int, folder: Path) -> Any:
    """A run's network with all of its modules and heads trained on, by rows that it can route."""
    network = run.network()
    config = run.config.model_copy(
        update={"steps": steps, "batch": BATCH, "seed": seed, "evaluate_every": steps, **RATE}
    )
    tasks = training.Tasks(run.known["kind"], run.known["kinds"], run.known["classes"], {}, Splits(list(rows)), [])
    examples = network.encoder.encode(rows, [network.routes.of(row, network.keywords) for row in rows])
    training.fit(training.Ready(config, tasks, network, {}, survey(tasks.splits), examples), folder, training.Silent())
    shutil.rmtree(folder)
    return network


def answers(network: Any, rows: Sequence[Row], logits: Sequence[Any]) -> list[Record]:
    """What logits say of rows."""
    names = network.encoder.classes[TASK]
    return [
        Record(row.where, row.task, dict(row.labels), str(row.target), names[int(one.argmax())])
        for row, one in zip(rows, logits, strict=True)
    ]
