"""Prompts and prefixes as adapters keeps them: the inverse of `_prompts`."""

from collections.abc import Mapping
from typing import Any

import torch

from ...abstract import Kind
from ...modules import Prefix, Prompt
from ._draft import Draft
from ._places import APART, behind, embedded
from ._prompts import BOTTLENECK


def prompt(draft: Draft, sites: Mapping[str, Kind]) -> dict[str, Any]:
    (site, kind), *more = sites.items()
    assert isinstance(kind, Prompt)
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
    """In one tensor for all layers, under the name of each layer, and once more."""
    order = [site for site in draft.roles["attention"] if site in sites]
    if not behind(draft.ends):
        raise draft.refuse(next(iter(sites)), "the layers are not as BERT's, for whose prefixes alone names are known")
    if len(order) < len(sites):
        raise draft.refuse(next(site for site in sites if site not in order), "there is no attention over the input")
    kind = draft.common("the prefix", sites)
    assert isinstance(kind, Prefix)
    own = [draft.params[site] for site in order]
    if kind.bottleneck is None:
        table = torch.stack([params["prefix"] for params in own])  # (L, 2, heads, n, d)
        tensors = {"control_trans": table.permute(3, 0, 1, 2, 4).flatten()}
    else:
        shared = {name: own[0][name] for name in ("tokens", "down", "down_bias")}
        if any(not torch.equal(params[name], tensor) for params in own for name, tensor in shared.items()):
            raise draft.refuse(order[0], "prefixes have tokens of their own at some sites, and adapters' share them")
        up, bias = (torch.stack([params[name] for params in own]) for name in ("up", "up_bias"))
        parts = {**shared, "up": up.flatten(0, 3), "up_bias": bias.flatten()}
        tensors = {theirs.replace(".", "__"): parts[ours] for ours, theirs in BOTTLENECK.items()}
    place = "self" if any(path.rpartition(".")[2] in APART for path in draft.ends) else "self_prefix"
    named = {f"{place}__{name}": tensor for name, tensor in tensors.items()}
    for site in order:
        draft.put(f"{site}.prefix_tuning.pool", "prefix_tunings", **named)
    draft.put(f"{draft.base}.prefix_tuning" if draft.base else "prefix_tuning", "prefix_tunings", **named)
    gated = draft.gated(order)
    for site in order if gated else ():
        weight, bias = draft.gates[site]
        draft.put(f"{site}.prefix_tuning", "prefix_gates", weight=weight, bias=bias)
    return {
        "architecture": "prefix_tuning", "bottleneck_size": kind.bottleneck or 512, "cross_prefix": True,
        "dropout": 0.0, "encoder_prefix": True, "flat": kind.bottleneck is None, "init_weights_seed": None,
        "leave_out": [i for i, site in enumerate(draft.roles["attention"]) if site not in sites],
        "non_linearity": "tanh", "prefix_length": kind.length, "shared_gating": True, "use_gating": gated,
    }  # fmt: skip
