"""Several modules that work together as a setup of adapters', adapter_setup.json: stacked, or fused."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ...abstract import Aggregator, Kind
from ...aggregation import AdapterFusion, Again
from ...aggregation import Sequence as InTurn
from ...errors import CompositionError, listed
from ...modules import Bottleneck, Compacter
from .._files import write_json, write_tensors
from ._draft import Draft
from ._setup import FUSED, FUSION, SETUP
from ._write import VERSION, prepared, top
from ._write_bottlenecks import found

FUSE: dict[str, Any] = {
    "dropout_prob": None, "key": True, "query": True, "query_before_ln": False, "regularization": True,
    "residual_before": False, "temperature": False, "value": True, "value_before_softmax": True,
    "value_initialized": True,
}  # fmt: skip


def write_setup(folder: Path, drafts: Sequence[Draft], weighted: bool) -> Path:
    """Write modules that are at work together, in their order, each into its folder, and how they are; raises
    CompositionError for a way that adapters has not, before anything is written."""
    names = [draft.name for draft in drafts]
    if weighted:
        raise _refuse(names, "they have weights, and adapters 1.3's Average divides by their number once more")
    shared = {site: draft for draft in drafts for site in draft.kinds if sum(site in d.kinds for d in drafts) > 1}
    inner = {site: _inner(draft.aggregators[site]) for site, draft in shared.items()}
    swapped = {end.dense for draft in drafts for end in draft.ends.values() if end.swapped and end.dense in shared}
    if swapped:
        raise _refuse(names, f"several are at {listed(swapped)}, and adapters has them beside that part, one by one")
    if inner and all(type(one) is AdapterFusion for one in inner.values()):
        how, fusion = "Fuse", _fused(drafts, inner)
    elif all(type(one) is InTurn for one in inner.values()):
        how, fusion = "Stack", None
        drafts = _stacked(drafts, inner)
    else:
        strange = listed({type(one).__name__ for one in inner.values()})
        raise _refuse(names, f"the bay puts them together by {strange}; Sequence is its Stack, AdapterFusion its Fuse")
    ready = [prepared(draft) for draft in drafts]
    names = [draft.name for draft in drafts]
    for name, make in zip(names, ready, strict=True):
        make(folder / name)
    if fusion is not None:
        config, tensors = fusion
        joint = ",".join(names)
        (folder / joint).mkdir(exist_ok=True)
        write_tensors(folder / joint / FUSED, tensors)
        said = {**top(drafts[0]), "adapter_names": names, "config": config, "name": joint}
        write_json(folder / joint / FUSION, said)
    children = [{"type": "single", "children": [name]} for name in names]
    setup = {"adapter_setup": {"type": how, "children": children}, "head_setup": None, "version": VERSION}
    write_json(folder / SETUP, setup)
    return folder


def _refuse(names: Sequence[str], why: str) -> CompositionError:
    return CompositionError(
        f"export of {listed(names)} as a setup of adapters': {why}. Export them one by one, export(FOLDER, NAME); "
        f"bay.save keeps everything."
    )


def _inner(aggregator: Aggregator) -> Aggregator | None:
    return aggregator.inner if isinstance(aggregator, Again) else aggregator


def _serial(kind: Kind) -> bool:
    return isinstance(kind, Compacter) or (isinstance(kind, Bottleneck) and kind.placement == "serial")


def _stacked(drafts: Sequence[Draft], inner: Mapping[str, Any]) -> Sequence[Draft]:
    """In the order in which they work."""
    names = [draft.name for draft in drafts]
    orders = {tuple(one.order) if isinstance(one.order, list) else one.order for one in inner.values()}
    if len(orders) > 1 or "routed" in orders:
        raise _refuse(names, f"their order is not one for all sites ({listed(map(str, orders))})")
    order = next(iter(orders), None)
    if isinstance(order, tuple):
        lost = [name for name in names if name not in order]
        if lost:
            raise _refuse(names, f"Sequence(order={list(order)!r}) says no place for {listed(lost)}")
        drafts = sorted(drafts, key=lambda draft: order.index(draft.name))
    for draft in drafts:
        odd = [site for site, kind in draft.kinds.items() if not _serial(kind)]
        if draft.gates or any(site in inner or draft is not drafts[0] for site in odd):
            site = next(iter(odd or draft.gates))
            raise _refuse(names, f"{draft.name!r} has more than serial bottlenecks, at {site!r}, which no stack orders")
    return drafts


def _fused(drafts: Sequence[Draft], inner: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(the config, the tensors) of the fusion's layers."""
    names = [draft.name for draft in drafts]
    for draft in drafts:
        odd = [site for site, kind in draft.kinds.items() if site not in inner or not _serial(kind)]
        odd += [site for site in inner if site not in draft.kinds]
        if odd or draft.gates:
            raise _refuse(names, f"{draft.name!r} has other parts than the fusion reaches, at {listed(odd)}")
    said: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for site, one in inner.items():
        if one.over != "changes" or one.temperature != 1 or one.guide:
            raise _refuse(names, "their AdapterFusion attends over outputs, at a temperature or with a guide")
        said.append({**FUSE, "dropout_prob": one.dropout or None, "regularization": bool(one.regularise)})
        path, _, _ = found(drafts[0], site)
        for key, tensor in one.named_parameters():
            tensors[f"{path}.adapter_fusion_layer.{','.join(names)}.{key}"] = tensor.detach().clone()
    if any(one != said[0] for one in said):
        raise _refuse(names, "dropout or regularisation of their fusion differ by site")
    return said[0], tensors
