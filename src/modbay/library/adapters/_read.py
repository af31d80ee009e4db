"""Reading a checkpoint of adapters': its architecture says how."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ...errors import FileError, listed
from .._foreign import Foreign, together
from . import _bottlenecks, _prompts, _weights
from ._heads import heads
from ._names import STRIPPED, kind
from ._source import CONFIG, Source, open_source


def bottleneck(source: Source, method: Mapping[str, Any]) -> None:
    _bottlenecks.invertible(source, method)
    _bottlenecks.bottlenecks(source, method)


READERS: dict[str, Callable[[Source, Mapping[str, Any]], None]] = {
    "bottleneck": bottleneck,
    "lora": _weights.lora,
    "prompt_tuning": _prompts.prompt,
    "prefix_tuning": _prompts.prefix,
}


def read(folder: Path, name: str, model: nn.Module) -> Foreign:
    """The module that a folder of adapters' holds, for this model."""
    source = open_source(folder, model)
    if kind(model) in STRIPPED:
        raise FileError(
            f"{folder}: adapters takes the own adapters of a {type(model).__name__} out, so that what it trains there "
            f"is for another base than this one. Load it with adapters itself."
        )
    with together(folder, "adapters 1.3's"):
        source.shared |= {key: t for own in source.take("shared_parameters").values() for key, t in own.items()}
        for method in _methods(source):
            READERS[method.get("architecture") or "bottleneck"](source, method)
        if not source.kinds:
            raise FileError(f"{folder}: it holds no tensors of {source.name!r}.")
        heads(source)
    if source.tensors:
        raise FileError(
            f"{source.file}: {listed(source.tensors)} are not known to be parts of {source.name!r}: newer than modbay, "
            f"or changed by hand."
        )
    base = source.get(source.said, "model_name", str) or None
    return Foreign(name, folder, "adapters", source.kinds, source.found, base, source.aggregators, source.gates,
                   source.widths)  # fmt: skip


def _methods(source: Source) -> list[Mapping[str, Any]]:
    """The methods that one adapter is: several in a union. Without a name of its own a method is a bottleneck."""
    config = source.get(source.said, "config", dict, {})
    several = source.get(config, "configs", list, []) if config.get("architecture") == "union" else [config]
    for one in several:
        if not isinstance(one, dict) or (one.get("architecture") or "bottleneck") not in READERS:
            said = one.get("architecture") if isinstance(one, dict) else one
            raise FileError(
                f"{source.path}/{CONFIG}: architecture {said!r:.60} is not one that modbay reads: "
                f"{listed(sorted(READERS))}, and unions of them."
            )
    return several
