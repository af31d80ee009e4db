"""Bottlenecks, Compacter and invertible adapters under adapters' names: the inverse of `_bottlenecks`."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...abstract import Kind
from ...aggregation import AdapterFusion, Again, Sequence, WeightedSum
from ...modules import Bottleneck, Compacter, Invertible
from ._bottlenecks import ACTIVATIONS, affine, scaled, words
from ._draft import Draft
from ._places import ATTENTION, CROSS, OUTPUT, End, inverted

THEIRS = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())} | {"silu": "swish"}
DEFAULTS: dict[str, Any] = {
    "adapter_residual_before_ln": False, "cross_adapter": False, "dropout": 0.0, "factorized_phm_W": True,
    "factorized_phm_rule": False, "hypercomplex_nonlinearity": "glorot-uniform", "init_weights": "bert",
    "init_weights_seed": None, "inv_adapter": None, "inv_adapter_reduction_factor": None, "is_parallel": False,
    "learn_phm": True, "leave_out": [], "ln_after": False, "ln_before": False, "mh_adapter": False,
    "non_linearity": "relu", "original_ln_after": True, "original_ln_before": False, "output_adapter": False,
    "phm_bias": True, "phm_c_init": "normal", "phm_dim": 4, "phm_init_range": 0.0001, "phm_layer": False,
    "phm_rank": 1, "reduction_factor": 16, "residual_before_ln": True, "scaling": 1.0, "shared_W_phm": False,
    "shared_phm_rule": True, "stochastic_depth": 0.0, "use_gating": False,
}  # fmt: skip


def bottlenecks(draft: Draft, sites: Mapping[str, Kind]) -> dict[str, Any]:
    """One config for all: what it reads and where it adds must be one way."""
    config = dict(DEFAULTS)
    rest = {site: kind for site, kind in sites.items() if not isinstance(kind, Invertible)}
    before = {site: kind for site, kind in sites.items() if isinstance(kind, Invertible)}
    functions = draft.common("the non-linear function", {site: k.activation for site, k in sites.items()})  # type: ignore
    if functions not in THEIRS:
        raise draft.refuse(next(iter(sites)), f"activation={functions!r} is none of adapters'")
    config["non_linearity"] = THEIRS[functions]
    if before:
        config |= _invertible(draft, before)
    if not rest:
        return config
    where = {site: found(draft, site) for site in rest}
    ways = {site: _how(draft, site, end, at) for site, (_, end, at) in where.items()}
    sizes = {site: (end.layer, len(draft.params[site]["down_bias"])) for site, (_, end, _) in where.items()}
    parts = {end.part for _, end, _ in where.values()}
    names = {site: (end.layer, end.part) for site, (_, end, _) in where.items()}
    there = {(end.layer, end.part) for end in draft.ends.values()}
    config |= {
        **draft.common("its place in the block", ways), "mh_adapter": ATTENTION in parts,
        "cross_adapter": CROSS in parts, "output_adapter": OUTPUT in parts, "use_gating": draft.gated(rest),
        "leave_out": draft.left_out(names, parts, there),
        "reduction_factor": _reduction(draft, sizes),
    }  # fmt: skip
    config |= draft.common("its kind", {
        site: _said(draft, site, kind, ways[site].get("is_parallel", False)) for site, kind in rest.items()
    })  # fmt: skip
    for site, (path, end, at) in where.items():
        kind = rest[site]
        tensors = _phm(draft, site, kind) if isinstance(kind, Compacter) else _plain(draft, site, kind, end, at)
        draft.put(path, "adapters", **tensors, **_gate(draft, site, end, at))
    return config


def found(draft: Draft, site: str) -> tuple[str, End, str]:
    """(adapters' path, the end of a part, which site of it this is)."""
    for path, end in draft.ends.items():
        for where in ("dense", "norm", "whole", "total"):
            if getattr(end, where) == site:
                return path, end, where
    raise draft.refuse(site, "there is no end of attention or feed-forward part, as adapters has its bottlenecks at")


def _how(draft: Draft, site: str, end: End, where: str) -> dict[str, Any]:
    """What the config says of the block, from the site and how the module is put together with f there."""
    aggregator, kind = draft.aggregators[site], draft.kinds[site]
    placement = getattr(kind, "placement", "serial")
    parallel = placement == "parallel"
    again = isinstance(aggregator, Again)
    known = isinstance(aggregator, (WeightedSum, Again, AdapterFusion, Sequence))
    if not known or (again and aggregator.start != "input"):
        raise draft.refuse(site, f"the bay's {type(aggregator).__name__} is none of adapters' ways")
    fused = isinstance(aggregator.inner if isinstance(aggregator, Again) else aggregator, AdapterFusion)
    # What no scaling of weights makes up for:
    beyond = placement == "sum" or isinstance(kind, Compacter) or fused or site in draft.gates
    if end.scale is not None and where != "total" and (beyond or not bool(end.scale.all())):
        raise draft.refuse(site, "it is in front of the layer's scale, which adapters' is behind")
    if placement == "sum" and where == "whole" and not end.norm and not again:
        return {"original_ln_before": True}
    if placement == "sum" or parallel != (where == "whole") or (again and where != "norm"):
        raise draft.refuse(site, f"a bottleneck with placement={placement!r} is nowhere so in adapters")
    if where == "total":
        return {"original_ln_before": True}
    if where == "norm":
        return {"original_ln_before": True, "original_ln_after": again, "residual_before_ln": again}
    if end.swapped and isinstance(kind, Compacter):
        raise draft.refuse(site, "Compacter reads what goes out of the part, and adapters' what goes in")
    return {"is_parallel": parallel != end.swapped}


def _said(draft: Draft, site: str, kind: Kind, parallel: bool) -> dict[str, Any]:
    if isinstance(kind, Compacter):
        own = draft.params[site]
        return {"phm_layer": True, "phm_dim": kind.n, "phm_rank": kind.rank or 1, "factorized_phm_W": "down" not in own}
    assert isinstance(kind, Bottleneck)
    if kind.norm == "after" and kind.scale != 1:
        raise draft.refuse(site, "a scale is before the norm there, and adapters' is behind")
    scale = kind.scale if isinstance(kind.scale, str) else float(kind.scale)
    more = {"init_weights": "mam_adapter"} if parallel else {}
    return {"scaling": scale, "ln_before": kind.norm is True, "ln_after": kind.norm == "after", **more}


def _reduction(draft: Draft, sizes: Mapping[str, tuple[int, int]]) -> Any:
    """The number, or one for each layer, by which adapters divides the width and cuts off."""
    width, by_layer = draft.width or 0, {}
    for site, (layer, size) in sizes.items():
        tried = (width // size, width / size, math.nextafter(width / size, 0))
        wanted = next((r for r in tried if r and int(width // r) == size), 0)
        if not wanted or by_layer.setdefault(layer, wanted) != wanted:
            raise draft.refuse(site, f"{size} features are no width {width} divided by one number for the layer")
    values = set(by_layer.values())
    return values.pop() if len(values) == 1 else {str(layer): r for layer, r in by_layer.items()}


def _plain(draft: Draft, site: str, kind: Any, end: End, where: str) -> dict[str, Tensor]:
    own = draft.params[site]
    if own["down"].ndim != 2:
        raise draft.refuse(site, "it is a convolution's")
    if end.scale is not None and where != "total":
        if kind.norm:
            raise draft.refuse(site, "it has a norm in front of the layer's scale, which adapters' is behind")
        own = scaled(own, 1 / end.scale.detach(), where)
    at = "adapter_down__1" if kind.norm is True else "adapter_down__0"
    out = {f"{at}__weight": own["down"], f"{at}__bias": own["down_bias"], "adapter_up__weight": own["up"],
           "adapter_up__bias": own["up_bias"]}  # fmt: skip
    if kind.norm:
        for norm in ("adapter_norm_before", "adapter_down__0") if kind.norm is True else ("adapter_norm_after",):
            out |= {f"{norm}__weight": own["norm"], f"{norm}__bias": own["norm_bias"]}
    if kind.scale == "learned":
        out["scaling"] = own["scale"]
    return out


def _phm(draft: Draft, site: str, kind: Compacter) -> dict[str, Tensor]:
    own = draft.params[site]
    rule = own["A"].mT
    key = f"{draft.base}.shared_parameters" if draft.base else "shared_parameters"
    there = draft.tensors.setdefault(f"{key}.{draft.name}.phm_rule", rule)
    if not torch.equal(there, rule):
        raise draft.refuse(site, "Compacter's A is another than elsewhere, and adapters has one for all")
    out = {}
    for ours, theirs in (("down", "adapter_down__0"), ("up", "adapter_up")):
        if kind.rank is None:
            out[f"{theirs}__W"] = own[ours].mT
        else:
            out |= {f"{theirs}__W_left": own[f"{ours}_t"].mT, f"{theirs}__W_right": own[f"{ours}_s"].mT}
        out[f"{theirs}__b"] = own[f"{ours}_bias"]
    return out


def _invertible(draft: Draft, sites: Mapping[str, Any]) -> dict[str, Any]:
    """Behind the embeddings; its inverse, which is before the layer that gives words, is the same tensors."""
    site, *rest = sites
    kind, own, last = sites[site], draft.params[site], words(draft.model, draft.modules)
    if site != inverted(draft.model, draft.modules, draft.roles):
        raise draft.refuse(site, "the invertible adapter is not behind the embeddings")
    for other in rest:
        there = draft.params[other]
        shared = there.keys() == {f"{kind.inverse}{name}" for name in own}
        if other != f"{last}[before]" or not shared:
            where = f"mb.before({last!r}) is the place" if last else "this model has none"
            raise draft.refuse(other, f"the inverse is not before the layer that gives words: {where}")
    ends = {"down": "0__weight", "down_bias": "0__bias", "up": "2__weight", "up_bias": "2__bias"}
    names = {f"{net}__{theirs}": own[f"{net}_{ours}"] for net in "FG" for ours, theirs in ends.items()}
    inner = "encoder" if site.split(".")[-2:-1] == ["encoder"] else ""  # of T5 and BART, whose encoder keeps it
    draft.put(".".join(part for part in (draft.base, inner) if part), "invertible_adapters", **names)
    return {"inv_adapter": "nice", "inv_adapter_reduction_factor": kind.reduction}


def _gate(draft: Draft, site: str, end: End, where: str) -> dict[str, Tensor]:
    """A gate of what the bottleneck reads, from one of the site's input: see `_bottlenecks._gate`."""
    if site not in draft.gates:
        return {}
    weight, bias = draft.gates[site]
    reads = getattr(draft.aggregators[site], "reads", "input")
    if (reads == "output") != (where == "total") or getattr(draft.kinds[site], "placement", "") == "sum":
        raise draft.refuse(site, f"there is a gate of the site's {reads}, and adapters' is another")
    if where not in ("whole", "total"):
        last, shift = affine(draft.modules[site], weight)
        turned = weight / last if where == "norm" else torch.linalg.lstsq(last.mT, weight.mT).solution.mT
        back = turned * last if where == "norm" else turned @ last
        if not torch.allclose(back, weight, rtol=1e-4, atol=1e-5):
            raise draft.refuse(site, "its gate reads what the projection's output does not tell")
        weight, bias = turned, bias - turned @ shift
    return {"gate__weight": weight, "gate__bias": bias}
