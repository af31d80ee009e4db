"""What lies in a folder of adapters': its config, read with types, and its tensors, which are taken until none is left.

The adapter's name is inside the keys, "encoder.layer.0.output.adapters.NAME.adapter_up.weight", and what stands before
the first layer ("bert.") depends on whether the model had a head.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...abstract import Aggregator, Kind
from ...errors import FileError, listed
from ...seams import Roles, find_roles, named
from ...types import Params
from .._files import inside, read_json, read_tensors, typed
from .._pickles import pickled_tensors
from ._names import now

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin"


@dataclass
class Source:
    """A checkpoint of adapters' beside the model that it goes onto. What is found is kept by site."""

    path: Path
    file: Path
    said: Mapping[str, Any]
    tensors: dict[str, Tensor]
    model: nn.Module
    kinds: dict[str, Kind] = field(default_factory=dict)
    found: dict[str, Params] = field(default_factory=dict)
    aggregators: dict[str, Aggregator] = field(default_factory=dict)
    gates: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.modules = named(self.model)
        self.name = self.get(self.said, "name", str, "")
        self.shared: dict[str, Tensor] = {}  # what is one for all layers
        self._equal: dict[Kind, Kind] = {}

    @cached_property
    def roles(self) -> Roles:
        return find_roles(self.model)

    # What the config says

    def get(self, table: Mapping[str, Any], key: str, wanted: type | tuple[type, ...], default: Any = None) -> Any:
        """A value of the config of the type that adapters writes there; null is the default."""
        return typed(self.path / CONFIG, table, key, wanted, default)

    def older(self, *version: int) -> bool:
        """Whether it was written by adapters before a version; what has none was written by its forerunner."""
        said = re.match(r"adapters\.(\d+)\.(\d+)", self.get(self.said, "version", str, ""))
        return said is not None and tuple(map(int, said.groups())) < version

    def refuse(self, what: str) -> FileError:
        """The error for an option that makes another function than modbay has."""
        return FileError(
            f"{self.path}/{CONFIG}: {what}, which modbay has not. Load it with adapters itself, or train it without."
        )

    # Its tensors

    def take(self, mark: str) -> dict[str, dict[str, Tensor]]:
        """The tensors under "PATH.mark.NAME.", taken out, by path."""
        out: dict[str, dict[str, Tensor]] = {}
        middle = f".{mark}.{self.name}."
        for key in list(self.tensors):
            path, found, rest = f".{key}".partition(middle)
            if found:
                out.setdefault(path.removeprefix("."), {})[rest] = self.tensors.pop(key)
        return out

    def names(self, path: str) -> tuple[str, ...]:
        """What a path may be called here: the model may have been another with, or without, a head."""
        head = getattr(self.model, "base_model_prefix", "") or ""
        own = (path, f"{head}.{path}" if path else head, path.removeprefix(f"{head}."))
        return tuple(dict.fromkeys([*own, *(now(self.model, name) for name in own)]))

    def own(self, path: str) -> str | None:
        """The name of a module in this model; None if it has none."""
        return next((name for name in self.names(path) if name and name in self.modules), None)

    def site(self, path: str) -> str:
        """The same; raises FileError if there is none."""
        name = self.own(path)
        if name is None:
            raise FileError(
                f"{self.path}: {path!r} is no module of this {type(self.model).__name__}: it was made on another model "
                f"({self.said.get('model_name') or self.said.get('model_type') or 'unnamed'}). Load that one."
            )
        return name

    def needs(self, path: str, own: dict[str, Tensor], *names: str) -> list[Tensor]:
        """Tensors that must be there, taken out."""
        lost = [name for name in names if name not in own]
        if lost:
            raise FileError(f"{self.file}: {path!r} has no {listed(lost)}: not all of it was saved.")
        return [own.pop(name) for name in names]

    def done(self, path: str, own: Mapping[str, Tensor]) -> None:
        """Raise FileError for what is left at a path."""
        if own:
            raise FileError(f"{self.file}: {path!r} has {listed(own)}, which its config does not tell of.")

    def keep(self, site: str, kind: Kind, **tensors: Tensor) -> None:
        """A kind and its tensors at a site. Equal kinds are one, as they are made together."""
        if site in self.kinds:
            raise FileError(f"{self.file}: {site!r} is there twice, as {self.kinds[site]} and {kind}.")
        self.kinds[site] = self._equal.setdefault(kind, kind)
        self.found[site] = {name: tensor.contiguous() for name, tensor in tensors.items()}

    def gate(self, path: str, site: str, own: dict[str, Tensor]) -> None:
        """A gate of UniPELT's, if there is one."""
        if "gate.weight" in own or "gate.bias" in own:
            weight, bias = self.needs(path, own, "gate.weight", "gate.bias")
            self.gates[site] = (weight, bias)


def stored(folder: Path, safe: str, pickle: str) -> tuple[Path, dict[str, Tensor]]:
    """(the file, its tensors): safetensors, or else the .bin, by the restricted loader; finite."""
    path = inside(folder, safe)
    if path.exists() or not inside(folder, pickle).exists():
        tensors = read_tensors(path)
    else:
        path = inside(folder, pickle)
        tensors = pickled_tensors(path)
    bad = [key for key, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if bad:
        raise FileError(
            f"{path} has values that are NaN or infinite, in {listed(bad)}. Its training diverged, or the file is "
            f"damaged: take an earlier one."
        )
    return path, tensors


def open_source(folder: Path, model: nn.Module) -> Source:
    """Read config and tensors; raises FileError for damage, or numbers that are not finite."""
    said = read_json(inside(folder, CONFIG))
    file, tensors = stored(folder, TENSORS, PICKLE)
    return Source(folder, file, said, tensors, model)
