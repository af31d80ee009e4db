"""What lies in a folder of peft's: its config, read with types, and its tensors, which are taken until none is left."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...abstract import Kind
from ...errors import FileError, listed
from ...seams import named
from ...types import Params
from .._files import inside, read_json, read_tensors, typed

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING")
SHARED = ("vera_A", "vera_B")
BARE = ("prompt_embeddings", "prefix_task_cols", "prefix_task_rows")


def full(method: str, key: str) -> str:
    """What peft calls a tensor of a module that stands at "module.tensor"."""
    if key in BARE:
        return key
    return f"base_model.{key}" if method in PROMPTS or key in SHARED else f"base_model.model.{key}"


def short(method: str, key: str) -> str:
    """The same without what peft puts in front."""
    front = "base_model." if method in PROMPTS or key.removeprefix("base_model.") in SHARED else "base_model.model."
    return key.removeprefix(front)


@dataclass
class Source:
    """A checkpoint of peft's beside the model that it goes onto. What is found is kept by site."""

    path: Path
    config: Mapping[str, Any]
    tensors: dict[str, Tensor]
    model: nn.Module
    kinds: dict[str, Kind] = field(default_factory=dict)
    found: dict[str, Params] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.modules = named(self.model)
        self._equal: dict[Kind, Kind] = {}

    # What the config says

    def get(self, key: str, wanted: type | tuple[type, ...], default: Any = None) -> Any:
        """A value of the config of the type that peft writes there; null is the default."""
        return typed(self.path / CONFIG, self.config, key, wanted, default)

    def number(self, key: str, default: float, site: str = "", pattern: str = "") -> float:
        """A number of the config; with `pattern`, what that table of expressions says of a site goes before."""
        table = self.get(pattern, dict, {}) if pattern else {}
        for expression, value in table.items():
            try:
                hit = re.match(rf"(.*\.)?({expression})$", site)
            except re.error as error:
                raise FileError(
                    f"{self.path}/{CONFIG}: {pattern} has {expression!r}, no expression: {error}."
                ) from error
            if hit and isinstance(value, (int, float)) and not isinstance(value, bool):
                return value
        return self.get(key, (int, float), default)

    def refuse(self, options: Mapping[str, str]) -> None:
        """Raise FileError for options that make another function than modbay has."""
        for key, what in options.items():
            if self.config.get(key):
                raise FileError(
                    f"{self.path}/{CONFIG}: {key}={self.config[key]!r:.60}: {what}, which modbay has not. Load it with "
                    f"peft itself, or train it without that option."
                )

    # Its tensors

    def by_path(self, suffixes: Iterable[str]) -> dict[str, Params]:
        """The tensors whose names end so, taken out, by the dotted name of the module that they are at."""
        out: dict[str, dict[str, Tensor]] = {}
        for suffix in sorted(suffixes, key=len, reverse=True):
            for key in [key for key in self.tensors if key.endswith("." + suffix)]:
                path = key.removesuffix("." + suffix)
                out.setdefault(path, {})[suffix] = self.tensors.pop(key)
        return out  # type: ignore[return-value]

    def site(self, path: str) -> str:
        """The name of a module, or fused parameter, in this model; it may have been wrapped with or without a head."""
        head = getattr(self.model, "base_model_prefix", "") or ""
        for name in (path, f"{head}.{path}" if head else path, path.removeprefix(f"{head}.")):
            owner, _, last = name.rpartition(".")
            if name in self.modules or (owner in self.modules and last in self.modules[owner]._parameters):
                return name
        raise FileError(
            f"{self.path}: {path!r} is no module of this {type(self.model).__name__}: it was made on another model "
            f"({self.config.get('base_model_name_or_path') or 'unnamed'}). Load that one."
        )

    def needs(self, path: str, own: Params, *names: str) -> list[Tensor]:
        """Tensors that must be there."""
        lost = [name for name in names if name not in own]
        if lost:
            raise FileError(f"{self.path}/{TENSORS}: {path!r} has no {listed(lost)}: not all of it was saved.")
        return [own[name] for name in names]

    def keep(self, path: str, kind: Kind, **tensors: Tensor) -> None:
        """A kind and its tensors at a module. Equal kinds are one, as they are made together."""
        site = self.site(path)
        if site in self.kinds:
            raise FileError(f"{self.path}/{TENSORS}: {site!r} is there twice, as {self.kinds[site]} and {kind}.")
        self.kinds[site] = self._equal.setdefault(kind, kind)
        self.found[site] = {name: tensor.contiguous() for name, tensor in tensors.items()}

    def own(self, site: str, name: str) -> Tensor | None:
        """A parameter of the base."""
        tensor = self.modules[site]._parameters.get(name)
        return None if tensor is None else tensor.detach()


def open_source(folder: Path, model: nn.Module) -> Source:
    """Read config and tensors; raises FileError for a pickle, damage, or numbers that are not finite."""
    config = read_json(inside(folder, CONFIG))
    tensors = read_tensors(inside(folder, TENSORS))
    bad = [key for key, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if bad:
        raise FileError(
            f"{folder}/{TENSORS} has values that are NaN or infinite, in {listed(bad)}. Its training diverged, or the "
            f"file is damaged: take an earlier one."
        )
    method = str(config.get("peft_type"))
    return Source(folder, config, {short(method, key): t for key, t in tensors.items()}, model)
