"""adapters' setups, adapter_setup.json: which of a folder's modules work together, and how; AdapterFusion's weights."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...abstract import Aggregator
from ...aggregation import AdapterFusion, Again
from ...aggregation import Sequence as InTurn
from ...errors import FileError, listed
from ...modules import Bottleneck, Compacter
from .._files import inside, read_json
from .._foreign import Foreign
from ._places import end
from ._source import CONFIG, Source, stored

LOG = logging.getLogger("modbay")
SETUP, FUSION = "adapter_setup.json", "adapter_fusion_config.json"
FUSED, FUSED_PICKLE = "model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin"
UNLIKE = {
    "query_before_ln": "a query that is read before the norm",
    "residual_before": "a residual inside of the values",
    "temperature": "a temperature that cools with each call",
}


@dataclass(frozen=True)
class Setup:
    """start: what `bay.use` is told. aggregators: by site. fusions: the tensors of an AdapterFusion by site."""

    start: tuple | None = None
    aggregators: Mapping[str, Aggregator] = field(default_factory=dict)
    fusions: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)


def read_setup(folder: Path, files: Sequence[Foreign], model: nn.Module) -> Setup:
    """What adapter_setup.json says; modules alone, with a warning, for what has no equal: the modules are there."""
    if not inside(folder, SETUP).exists():
        return Setup()
    said = read_json(folder / SETUP).get("adapter_setup")
    how, names, more = _flat(folder, said)
    there = {file.name: file for file in files}
    unknown = [name for name in names if name not in there]
    if unknown:
        raise FileError(f"{folder}/{SETUP} names {listed(unknown)}; there are {listed(there)}.")
    chosen = [there[name] for name in names]
    if len(names) == 1:
        return Setup((names[0],))
    if how == "Fuse":
        return _fused(folder, chosen, model)
    if how == "Average":
        weights = more.get("weights")
        if not isinstance(weights, list) or len(weights) != len(names) or not all(map(_number, weights)):
            raise FileError(f"{folder}/{SETUP}: its weights are {weights!r:.80}, not a number for each module.")
        LOG.warning("%s averages by %s; adapters 1.3 itself divides by their number once more.", folder, weights)
        return Setup((dict(zip(names, map(float, weights), strict=True)),))
    if how == "Stack" and (stacked := _stacked(chosen)) is not None:
        return Setup(tuple(names), stacked)
    LOG.warning("%s puts %s together as %s, which one bay does not: they are loaded, and none is at work.", folder,
                listed(names), how)  # fmt: skip
    return Setup()


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _flat(folder: Path, said: Any) -> tuple[str, list[str], Mapping[str, Any]]:
    """(how, the names, what more is said) of a block whose children are modules; how="nested" for any other."""
    wrong = FileError(f"{folder}/{SETUP}: adapter_setup is {said!r:.80}, no block of modules: damaged, or edited.")
    if not isinstance(said, dict) or not isinstance(said.get("children"), list) or not said["children"]:
        raise wrong
    names: list[str] = []
    how = str(said.get("type"))
    for child in said["children"]:
        if not isinstance(child, dict) or not isinstance(child.get("children"), list) or not child["children"]:
            raise wrong
        if child.get("type") == "single" and isinstance(child["children"][0], str):
            names.append(child["children"][0])
        else:
            how = "nested blocks"
    more = said.get("kwargs")
    if len(set(names)) < len(names):
        raise wrong
    return how, names, more if isinstance(more, dict) else {}


def _stacked(files: Sequence[Foreign]) -> dict[str, Aggregator] | None:
    """Each in turn, on what the one before it gave; None where there is no order between them."""
    out: dict[str, Aggregator] = {}
    for file in files:
        for site, kind in file.kinds.items():
            several = [other for other in files if site in other.kinds]
            serial = isinstance(kind, Compacter) or (isinstance(kind, Bottleneck) and kind.placement == "serial")
            if len(several) > 1 and not (serial and all(map(_adds, several))):
                return None
            if file is not files[0] and not serial:  # adapters asks the first alone
                return None
            order = InTurn([other.name for other in files])
            if len(several) > 1:
                out[site] = Again("input", order) if isinstance(file.aggregators.get(site), Again) else order
    return None if any(file.gates for file in files) else out


def _adds(file: Foreign) -> bool:
    """Whether it leaves the residual sum to what follows it; else the next one adds the residual again."""
    config = read_json(inside(file.path, CONFIG)).get("config")
    return not isinstance(config, dict) or config.get("original_ln_after") is not False


def _fused(folder: Path, files: Sequence[Foreign], model: nn.Module) -> Setup:
    """AdapterFusion: Q reads what the modules read, K and V what they add."""
    names = [file.name for file in files]
    inner = inside(folder, ",".join(names))
    said = read_json(inside(inner, FUSION))
    config = said.get("config")
    if not isinstance(config, dict):
        raise FileError(f"{inner}/{FUSION}: config is {config!r:.80}, not an object.")
    for key, what in UNLIKE.items():
        if config.get(key):
            raise FileError(f"{inner}/{FUSION}: {key}={config[key]!r:.40}: {what}, which modbay's fusion has not.")
    if not config.get("query", True) or not config.get("key", True):
        raise FileError(f"{inner}/{FUSION}: a fusion without query or key is no attention, and modbay's is one.")
    file, tensors = stored(inner, FUSED, FUSED_PICKLE)
    source = Source(inner, file, {**said, "name": said.get("name") or ",".join(names)}, tensors, model)
    drop = config.get("dropout_prob") if _number(config.get("dropout_prob")) else 0.0
    make = lambda: AdapterFusion(float(drop or 0), 0.01 if config.get("regularization") else 0.0)
    aggregators: dict[str, Aggregator] = {}
    fusions: dict[str, dict[str, Tensor]] = {}
    for path, own in source.take("adapter_fusion_layer").items():
        place = end(source, path)
        site = next(
            (site for site in (place.norm, place.total, place.dense, place.whole) if site in files[0].kinds), None
        )
        if site is None:
            raise FileError(f"{file}: it fuses at {path!r}, where its modules have no part.")
        if place.scale is not None and site != place.total:
            raise FileError(f"{file}: it fuses what is scaled behind {path!r}, and modbay's would see it before that.")
        parts = {name: source.needs(path, own, name)[0] for name in ("query.weight", "query.bias", "key.weight",
                                                                    "key.bias")}  # fmt: skip
        parts["value.weight"] = own.pop("value.weight", torch.eye(len(parts["query.bias"])))
        source.done(path, own)
        fusions[site] = parts
        aggregators[site] = Again("input", make()) if isinstance(files[0].aggregators.get(site), Again) else make()
    for one in files:
        odd = [site for site, kind in one.kinds.items()
               if site not in fusions or getattr(kind, "placement", "serial") != "serial"]  # fmt: skip
        if odd or one.gates:
            raise FileError(f"{folder}: {one.name!r} has parts at {listed(odd)}, which its fusion does not reach.")
    if source.tensors:
        raise FileError(f"{file}: {listed(source.tensors)} are not known to be parts of a fusion.")
    return Setup(tuple(names), aggregators, fusions)
