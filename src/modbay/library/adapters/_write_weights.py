"""LoRA and (IA)³ under adapters' names: the inverse of `_weights`."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...abstract import Kind
from ...modules import LoRA
from ._draft import Draft
from ._places import projections

DEFAULTS: dict[str, Any] = {
    "architecture": "lora", "dropout": 0.0, "dtype": None, "init_weights": "lora", "init_weights_seed": None,
    "use_dora": False, "vera_b": None, "vera_d": None,
}  # fmt: skip


def _places(draft: Draft, sites: Mapping[str, Kind]) -> dict[str, Any]:
    """Which projections of which layers."""
    table = projections(draft.model, draft.modules, draft.roles)
    for site, kind in sites.items():
        if site not in table:
            raise draft.refuse(site, f"{type(kind).__name__} is at no query, key, value or feed-forward projection")
    where = {site: table[site] for site in sites}
    wanted = {place.removeprefix("cross ") for _, place in where.values()}
    if not wanted <= set("qkv") and not draft.ends:
        raise draft.refuse(next(iter(sites)), "adapters names the feed-forward projections of such a model otherwise")
    there = set(table.values())
    places = {place for _, place in there if place.removeprefix("cross ") in wanted}
    return {
        "attn_matrices": [m for m in "qkv" if m in wanted] or ["q", "v"], "selfattn_lora": bool(wanted & set("qkv")),
        "intermediate_lora": "intermediate" in wanted, "output_lora": "output" in wanted,
        "leave_out": draft.left_out(where, places, there), "use_gating": draft.gated(sites),
    }  # fmt: skip


def _put(draft: Draft, own: Mapping[str, dict[str, Tensor]]) -> None:
    """Tensors by site; those at parts of one output are one, one behind the other."""
    several: dict[str, list[dict[str, Tensor]]] = {}
    start = lambda site: int(site.partition("[")[2].partition(":")[0] or 0)
    for site in sorted(own, key=start):
        several.setdefault(site.partition("[")[0], []).append(own[site])
    for path, parts in several.items():
        draft.put(path, "loras", **{name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def lora(draft: Draft, sites: Mapping[str, Kind]) -> dict[str, Any]:
    """One rank and one α for all: where factors differ, they go into B."""
    factors: dict[str, float] = {}
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for site, kind in sites.items():
        assert isinstance(kind, LoRA)
        own, factors[site] = draft.params[site], kind.factor
        if kind.bias:
            raise draft.refuse(site, "LoRA has a bias, which adapters' have not")
        a, b = own["A"], own["B"]
        if "A0" in own:  # what was taken from the weight is subtracted: both in one, of twice the rank
            a, b = torch.cat([a, own["A0"].to(a)]), torch.cat([b, -own["B0"].to(b)], 1)
        found[site] = (a, b)
    rank = draft.common("the rank", {site: len(a) for site, (a, _) in found.items()})
    config = {**DEFAULTS, **_places(draft, sites), "composition_mode": "add", "r": rank}
    common = next(iter(factors.values()))
    put: dict[str, dict[str, Tensor]] = {}
    for site, (a, b) in found.items():
        more = _gate(draft, site)
        change = factors[site] if more else factors[site] / common  # a gate stands in the place of α/r
        put[site] = {"lora_A": a, "lora_B": b if change == 1 else b * change, **more}
    _put(draft, put)
    return {**config, "alpha": common * rank}


def ia3(draft: Draft, sites: Mapping[str, Kind]) -> dict[str, Any]:
    for site, kind in sites.items():
        if kind.enters:
            raise draft.refuse(site, "(IA)³ scales the input, and adapters' the output")
        if site in draft.gates:
            raise draft.refuse(site, "there is a gate of what (IA)³ changes, and adapters' scales the output itself")
    _put(draft, {site: {"lora_B": draft.params[site]["l"].unsqueeze(-1)} for site in sites})
    return {**DEFAULTS, **_places(draft, sites), "composition_mode": "scale", "r": 1, "alpha": 1, "init_weights": "ia3"}


def _gate(draft: Draft, site: str) -> dict[str, Tensor]:
    if site not in draft.gates:
        return {}
    weight, bias = draft.gates[site]
    return {"gate__weight": weight, "gate__bias": bias}
