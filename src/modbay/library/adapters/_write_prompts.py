"""Prompts and prefixes as adapters keeps them: the inverse of `_prompts`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...abstract import Kind
from ...modules import Prefix, Prompt
from ._draft import Draft
from ._names import kind as family
from ._names import then
from ._places import attentions, biased, embedded
from ._prompts import BOTTLENECK, MASKED

WITHOUT = ("bart", "gpt2", "gptj", "llama", "mbart", "mistral", "mt5", "plbart", "t5", "whisper")  # prompts in adapters


def prompt(draft: Draft, sites: Mapping[str, Kind]) -> dict[str, Any]:
    (site, kind), *more = sites.items()
    assert isinstance(kind, Prompt)
    if family(draft.model) in (*MASKED, *WITHOUT):
        raise draft.refuse(site, f"adapters has no prompts at {type(draft.model).__name__}, or others than modbay")
    if more or site != embedded(draft.modules, draft.roles) or kind.after > 1:
        raise draft.refuse(site, "the prompt is not in front of what the embeddings' norm gives, as adapters' are")
    table = draft.params[site]["prompt"]
    draft.put(draft.base, "prompt_tuning.prompt_tunings", prompt_embedding__weight=table)
    return {
        "architecture": "prompt_tuning", "combine": "prefix_after_bos" if kind.after else "prefix",
        "init_weights_seed": None, "prompt_init": "random_uniform", "prompt_init_text": None,
        "prompt_length": len(table),
    }  # fmt: skip


def prefix(draft: Draft, sites: Mapping[str, Kind]) -> dict[str, Any]:
    """For each kind of attention in one tensor for all layers, under the name of each attention, and once more."""
    table = attentions(draft.model, draft.modules, draft.roles)
    if not table:
        raise draft.refuse(next(iter(sites)), "adapters' names of prefixes in such layers are not known")
    config = draft.model.config
    if any(getattr(config, f"use_{which}relative_position_bias", False) for which in ("", "shared_")):  # of BEiT's
        raise draft.refuse(next(iter(sites)), "adapters runs no prefix beside this model's bias of relative positions")
    strange = next((site for site in sites if site not in table), None)
    if strange is not None:
        raise draft.refuse(strange, "there is no attention at which adapters has a prefix")
    for site, one in sites.items():
        assert isinstance(one, Prefix)
        theirs = "keys" if biased(draft.model, table[site][1]) else None
        if one.relative != theirs:
            raise draft.refuse(site, f"it has relative={one.relative!r}, and adapters' are as {theirs!r} there")
    plain = {site: replace(one, relative=None, group="") for site, one in sites.items()}  # type: ignore[type-var]
    kind = draft.common("the prefix", plain)
    order = [site for site in table if site in sites]
    out = _left_out(draft, {site: table[site] for site in order}, table)
    named: dict[str, Tensor] = {}
    for place in dict.fromkeys(table[site][1] for site in order):
        tensors = _network(draft, kind, [site for site in order if table[site][1] == place])
        named |= {f"{place}__{name}": tensor for name, tensor in tensors.items()}
    for site in table:  # all that adapters keeps the network at, also where it gives no prefix
        draft.put(f"{then(draft.model, site)}.prefix_tuning.pool", "prefix_tunings", **named)
    draft.put(f"{draft.base}.prefix_tuning" if draft.base else "prefix_tuning", "prefix_tunings", **named)
    gated = draft.gated(order)
    for site in order if gated else ():
        weight, bias = draft.gates[site]
        draft.put(f"{then(draft.model, site)}.prefix_tuning", "prefix_gates", weight=weight, bias=bias)
    has = lambda place: place in {table[s][1] for s in order} or all(other != place for _, other in table.values())
    return {
        "architecture": "prefix_tuning", "bottleneck_size": kind.bottleneck or 512, "cross_prefix": has("cross_prefix"),
        "dropout": 0.0, "encoder_prefix": has("encoder_prefix"), "flat": kind.bottleneck is None,
        "init_weights_seed": None, "leave_out": out, "non_linearity": "tanh", "prefix_length": kind.length,
        "shared_gating": True, "use_gating": gated,
    }  # fmt: skip


def _left_out(draft: Draft, where: Mapping[str, tuple[int, str]], table: Mapping[str, tuple[int, str]]) -> list[int]:
    """The layers that have such attentions, and none with a prefix."""
    wanted = {place for _, place in where.values()}
    first = next(iter(where))
    if "cross_prefix" in wanted and "self_prefix" not in wanted:
        raise draft.refuse(first, "a layer of the decoder has a prefix at the one attention, and none at the other")
    out = draft.left_out(where, wanted, set(table.values()))
    for place in wanted:
        if biased(draft.model, place) and any((i, place) in table.values() for i in out):
            raise draft.refuse(first, "other layers have none, behind which adapters' T5 has no bias of positions")
    made = wanted | {"self_prefix", "self"}  # which no option of adapters' takes away
    return [i for i in out if any((i, place) in table.values() for place in made)]


def _network(draft: Draft, kind: Prefix, order: Sequence[str]) -> dict[str, Tensor]:
    own = [draft.params[site] for site in order]
    if kind.bottleneck is None:
        table = torch.stack([params["prefix"] for params in own])  # (L, 2, heads, n, d)
        return {"control_trans": table.permute(3, 0, 1, 2, 4).flatten()}
    shared = {name: own[0][name] for name in ("tokens", "down", "down_bias")}
    if any(not torch.equal(params[name], tensor) for params in own for name, tensor in shared.items()):
        raise draft.refuse(order[0], "prefixes have tokens of their own at some sites, and adapters' share them")
    up, bias = (torch.stack([params[name] for params in own]) for name in ("up", "up_bias"))
    parts = {**shared, "up": up.flatten(0, 3), "up_bias": bias.flatten()}
    return {theirs.replace(".", "__"): parts[ours] for ours, theirs in BOTTLENECK.items()}
