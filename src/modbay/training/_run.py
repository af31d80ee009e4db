"""A run as a folder: what was asked for, what it knows, its modules, and what it said of the test rows.

    run.yaml            reruns it: modbay train FOLDER/run.yaml --out ANOTHER
    run.json            the facts: versions, data, results, routing …; `report.html` shows them
    network.json        classes and routes: what is needed to use the modules
    standard.safetensors  mean and scale of the features, where the base has a head
    modules/            the bays, as `bay.save` writes them
    predictions.jsonl   the test rows, with what was said of them

While it is written it is FOLDER.partial; it takes its name when it is whole.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors.torch
import yaml

from ..attach import bays, load
from ..errors import ConfigError
from ._base import TextModel
from ._build import Network, bare
from ._config import Config, config, read_config
from ._routes import Routes

PARTIAL = ".partial"


@dataclass
class Run:
    """A run that is finished, as its folder has it. known: kind, kinds and classes of its tasks."""

    folder: Path
    config: Config
    known: dict[str, Any]
    routes: Routes
    facts: dict[str, Any]

    def network(self) -> Network:
        """The base with the run's modules, in eval mode."""
        network = bare(self.config, self.known, self.routes.values)
        network.routes = self.routes
        if isinstance(network.model, TextModel):
            read_standard(network.model, self.folder)
        if (self.folder / "modules").is_dir():
            load(network.model, self.folder / "modules")
        network.model.eval()
        return network


def open_run(folder: str | Path) -> Run:
    """A finished run; raises ConfigError for a folder that is none."""
    folder = Path(folder)
    if not (folder / "network.json").is_file():
        partial = unfinished(folder)
        verb = "extend" if (partial / "extend.yaml").is_file() else "train"
        more = f" It is unfinished: `modbay {verb} --resume {folder}` goes on." if partial.is_dir() else ""
        raise ConfigError(f"{folder}: this is no folder of a run (it has no network.json).{more}")
    asked = config(read_config(folder / "run.yaml"), str(folder / "run.yaml"))
    known = read_json(folder / "network.json")
    facts = read_json(folder / "run.json")
    return Run(folder, asked, known["tasks"], Routes.parse(known["routes"]), facts)


def unfinished(folder: Path) -> Path:
    """Where a run is while it is written."""
    return folder.with_name(folder.name + PARTIAL)


def write_network(
    folder: Path, network: Network, known: Mapping[str, Any], about: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """What is needed to use the modules, and the modules. about: what their files say of them, by bay."""
    write_json(folder / "network.json", {"format": 1, "tasks": dict(known), "routes": network.routes.dump()})
    if isinstance(network.model, TextModel):
        write_standard(network.model, folder)
    for bay in bays(network.model).values():
        bay.save(folder / "modules", about=about.get(bay.state.name))


def write_standard(model: TextModel, folder: Path) -> None:
    """Mean and scale of the features."""
    tensors = {"mean": model.mean.cpu().contiguous(), "scale": model.scale.cpu().contiguous()}
    aside = folder / "standard.writing"
    safetensors.torch.save_file(tensors, aside)
    os.replace(aside, folder / "standard.safetensors")


def read_standard(model: TextModel, folder: Path) -> None:
    """What `write_standard` wrote; raises ConfigError if it is of another base."""
    read = safetensors.torch.load_file(folder / "standard.safetensors")
    if read["mean"].shape != model.mean.shape:
        raise ConfigError(f"{folder}: its features are {len(read['mean'])} wide, those of the base {len(model.mean)}.")
    model.mean.copy_(read["mean"])
    model.scale.copy_(read["scale"])


def write_config(folder: Path, asked: Config) -> None:
    """run.yaml."""
    text = yaml.safe_dump(asked.dump(), sort_keys=False, allow_unicode=True)
    write_text(
        folder / "run.yaml", f"# modbay train {folder.name.removesuffix(PARTIAL)}/run.yaml --out ANOTHER\n{text}"
    )


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """All of it, or nothing."""
    aside = path.with_name(path.name + ".writing")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def read_json(path: Path) -> dict[str, Any]:
    """A file of a run; raises ConfigError if it is not whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: it can't be read ({error}); the folder is no whole run.") from None
