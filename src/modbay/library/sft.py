"""Modules of composable-sft: differences of parameters at few entries, pytorch_diff.bin; in, not out.

Ansell, Ponti, Korhonen and Vulić, "Composable Sparse Fine-Tuning for Cross-Lingual Transfer", 2022 (arXiv 2110.07560).
The file has {"diffs": {parameter: {size, index_steps, values}}, "abs": {parameter: tensor}}: flat indices, the first
dimension counting fastest, each as the step from the one before; and what was fine-tuned whole, a head as a rule.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..abstract import Kind
from ..core import describe
from ..errors import FileError
from ..modules import BitFit, Full, Norm, SparseDelta
from ..seams import named
from ..types import Params
from ._files import inside
from ._foreign import Foreign, together
from ._pickles import unpickled

LOG = logging.getLogger("modbay")
DIFF = "pytorch_diff.bin"
SPARSE = {False: SparseDelta(density=None), True: SparseDelta(density=None, bias=True)}


def read(folder: Path, name: str, model: nn.Module) -> Foreign:
    """The module that a folder of composable-sft's holds, for this model."""
    path = inside(folder, DIFF)
    held = unpickled(path, numbers=True)
    with together(path, "composable-sft's"):
        changes = _changes(path, held.get("diffs") or {}, model)
        kinds: dict[str, Kind] = {}
        found: dict[str, Params] = {}
        for site, own in changes.items():
            kinds[site], found[site] = _kind(path, site, model.get_submodule(site), own)
        for site, own in _whole(path, held.get("abs") or {}, model).items():
            if site in kinds:
                raise FileError(f"{path}: {site!r} has differences, and values beside them.")
            kinds[site], found[site] = Full(), own
    if not kinds:
        raise FileError(f"{path} changes nothing of this {type(model).__name__}.")
    return Foreign(name, folder, "sft", kinds, found)


def _changes(path: Path, diffs: Mapping[str, Any], model: nn.Module) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """(flat indices, values) by site and parameter; one that two modules share is changed at both."""
    owners: dict[int, list[tuple[str, str]]] = {}
    for site, module in named(model).items():
        for key, p in module._parameters.items():
            if p is not None:
                owners.setdefault(id(p), []).append((site, key))
    parameters = {n: p for n, p in model.named_parameters(remove_duplicate=False) if "_bay" not in n.split(".")}
    out: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for name, said in diffs.items():
        if name not in parameters:
            raise FileError(f"{path}: this {type(model).__name__} has no parameter {name!r:.80}: it is another's.")
        p = parameters[name]
        own = _decoded(path, name, said, p)
        for site, key in owners[id(p)]:
            out.setdefault(site, {})[key] = own
    return out


def _decoded(path: Path, name: str, said: Mapping[str, Any], p: Tensor) -> tuple[Tensor, Tensor]:
    size, values = tuple(said["size"]), said["values"]
    steps = torch.tensor([int(step) for step in said["index_steps"]], dtype=torch.int64)
    flat = steps.cumsum(0)
    sound = size == tuple(p.shape) and values.shape == flat.shape and values.is_floating_point()
    if not sound or bool((steps[1:] <= 0).any()) or bool(((flat < 0) | (flat >= p.numel())).any()):
        raise FileError(
            f"{path}: the difference of {name!r} is of {size}, {len(flat)} places and {tuple(values.shape)} values, "
            f"and does not fit the parameter's {tuple(p.shape)}."
        )
    if not bool(torch.isfinite(values).all()):
        raise FileError(f"{path} has values that are NaN or infinite, in {name!r}. Take an earlier one.")
    places = torch.zeros_like(flat)
    for width in size:  # the last dimension is to count fastest
        places, flat = places * width + flat % width, flat // width
    order = places.argsort()
    return places[order], values.detach()[order]


def _kind(path: Path, site: str, module: nn.Module, own: dict[str, tuple[Tensor, Tensor]]) -> tuple[Kind, Params]:
    """What a module with a changed weight, bias or both has."""
    base = module._parameters
    dense = lambda key: torch.zeros(base[key].numel(), dtype=own[key][1].dtype).scatter_(0, *own[key])  # type: ignore
    if own.keys() == {"bias"}:
        return BitFit(), {"bias": dense("bias")}
    shift = {"bias": dense("bias")} if "bias" in own else {}
    if describe(site, module).form in ("linear", "transposed", "convolution", "embedding") and "weight" in own:
        return SPARSE[bool(shift)], {"indices": own["weight"][0], "values": own["weight"][1], **shift}
    gain = base.get("weight")
    if own.keys() <= {"weight", "bias"} and gain is not None and gain.ndim == 1:
        change, gain = dense("weight"), gain.detach()
        if bool((change[gain.cpu() == 0] == 0).all()):
            relative = torch.where(change == 0, 0, change / gain.to(change))
            return Norm(bool(shift)), {"gain": relative, **shift}
    raise FileError(f"{path}: it changes {sorted(own)} of {site!r} ({type(module).__name__}), which no kind does.")


def _whole(path: Path, values: Mapping[str, Tensor], model: nn.Module) -> dict[str, Params]:
    """Copies of the layers with values of their own; those that the model has not are a head that it has not."""
    modules, out = named(model), {}
    for name, value in values.items():
        site, _, key = name.rpartition(".")
        base = modules[site]._parameters.get(key) if site in modules else None
        if base is None or any(modules[site].children()):
            LOG.warning("%s: %r is no layer's of this %s, and is left out.", path, name, type(model).__name__)
            continue
        if not bool(torch.isfinite(value).all()):
            raise FileError(f"{path} has values that are NaN or infinite, in {name!r}. Take an earlier one.")
        own = out.setdefault(
            site, {k: p.detach().clone() for k, p in modules[site]._parameters.items() if p is not None}
        )
        own[key] = value.detach()
    return out
