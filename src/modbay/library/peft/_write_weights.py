"""Changes of weights under peft's names: the inverse of `_weights`."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...abstract import Kind
from ...modules import DoRA, LoKr, LoRA
from ...seams import Place
from ._draft import Draft
from ._moved import kept


def lora(draft: Draft, sites: Mapping[str, Kind]) -> None:
    dora = any(isinstance(kind, DoRA) for kind in sites.values())
    biased = any(getattr(kind, "bias", False) for kind in sites.values())
    if dora and not all(isinstance(kind, DoRA) for kind in sites.values()):
        raise draft.refuse(next(iter(sites)), "it has LoRA or DoRA, and elsewhere the other; peft's have one")
    lacks = [site for site in sites if not draft.places[site].site.bare and draft.places[site].site.bias is None]
    some = biased and any(not getattr(sites[site], "bias", False) for site in lacks)  # then not as LoRA's own
    stable = all(getattr(kind, "stable", False) for kind in sites.values())
    ranks: dict[str, float] = {}
    alphas: dict[str, float] = {}
    bare: dict[str, list[str]] = {}
    for site, kind in sites.items():
        own = dict(draft.params[site])
        a, b = own["A"], own["B"]
        if getattr(draft.places[site].target, "groups", 1) > 1:
            raise draft.refuse(site, "the convolution has groups, which peft's A mixes")
        factor = kind.factor if isinstance(kind, LoRA) else _factor(kind)
        if "A0" in own:  # what was taken from the weight is subtracted: both in one, of twice the rank
            a, b = torch.cat([a, own["A0"].to(a)]), torch.cat([b, -own["B0"].to(b)], 1)
        rank = b.shape[-1]
        ranks[site], alphas[site] = rank, factor * (math.sqrt(rank) if stable else rank)
        if draft.places[site].site.bare:
            if dora or biased:
                raise draft.refuse(site, "a parameter by itself is changed, to which peft gives no bias and no DoRA")
            bare.setdefault(site.rpartition(".")[0], []).append(site)
            continue
        if draft.form(site) == "embedding":
            draft.put(site, lora_embedding_A=a, lora_embedding_B=b)
        else:
            draft.put(site, lora_A__weight=a, lora_B__weight=b.view(*b.shape, *[1] * (a.ndim - 2)))
        if biased and site in lacks and "bias" in own:
            raise draft.refuse(site, "LoRA has a bias where the layer has none, which peft refuses")
        if biased and site not in lacks:
            draft.put(site, lora_B__bias=own.get("bias", b.new_zeros(b.shape[0])))
        if dora:
            draft.put(site, lora_magnitude_vector=_lengths(draft.places[site]).to(b) + own["magnitude"])
    for owner, several in bare.items():
        _parameters(draft, owner, several)
    plain = {site: kind for site, kind in sites.items() if not draft.places[site].site.bare}
    kept(draft, plain)
    draft.whole(plain)
    (rank, rank_pattern), (alpha, alpha_pattern) = draft.pattern(ranks), draft.pattern(alphas)
    draft.config |= {
        "r": rank, "lora_alpha": alpha, "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern, "bias": "none",
        "use_rslora": stable, "use_dora": dora, "lora_bias": biased and not some,
        "lora_dropout": 0.0, **draft.common(plain), "init_lora_weights": True,
    }  # fmt: skip
    if bare:
        draft.config["target_parameters"] = sorted(site for several in bare.values() for site in several)


def _factor(kind: Any) -> float:
    return 1.0 if kind.alpha is None else kind.alpha / kind.rank


def _lengths(place: Place) -> Tensor:
    """The length of each row of a weight."""
    weight = place.site.weight.detach().float()
    return (weight.mT if place.site.form in ("transposed", "embedding") else weight).flatten(1).norm(dim=1)


def _parameters(draft: Draft, owner: str, sites: list[str]) -> None:
    """A and B of a matrix; A (E r, i) and B (o, r E) of E experts. Several of one module are nested, the last of them
    outermost."""
    module = draft.model.get_submodule(owner)
    order = [f"{owner}.{name}" for name in module._parameters if f"{owner}.{name}" in sites]
    for depth, site in enumerate(reversed(order)):
        a, b = draft.params[site]["A"], draft.params[site]["B"]
        if a.ndim == 3:
            if getattr(module, "is_transposed", False):
                a, b = b.mT, a.mT
            a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
        draft.put(owner + ".base_layer" * depth, lora_A__weight=a, lora_B__weight=b)


def adalora(draft: Draft, sites: Mapping[str, Kind]) -> None:
    """peft scales by α / (r + 1e-5), r being the rank at first, which is one for all sites."""
    draft.whole(sites)
    begun = max(len(draft.params[site]["values"]) for site in sites)
    alphas = {site: _factor(kind) * (begun + 1e-5) for site, kind in sites.items()}
    rank_pattern = {}
    for site in sites:
        own = draft.params[site]
        draft.put(site, lora_A=own["Q"].flatten(1), lora_B=own["P"], lora_E=own["values"].unsqueeze(-1))
        if len(own["values"]) != begun:
            rank_pattern[f"{site}.lora_E"] = [True] * len(own["values"])
    if rank_pattern or len(set(alphas.values())) > 1:
        raise draft.refuse(next(iter(sites)), "sites differ in rank or factor, which peft's AdaLoRA can't")
    draft.config |= {"init_r": begun, "r": begun, "target_r": begun, "total_step": 1,
                     "lora_alpha": next(iter(alphas.values())), **draft.common(sites),
                     "bias": "none"}  # fmt: skip


def loha(draft: Draft, sites: Mapping[str, Kind]) -> None:
    draft.whole(sites)
    for site in sites:
        own = draft.params[site]
        draft.put(site, hada_w1_a=own["B1"], hada_w1_b=own["A1"].flatten(1),
                  hada_w2_a=own["B2"], hada_w2_b=own["A2"].flatten(1))  # fmt: skip
    _ranks(draft, sites)


def lokr(draft: Draft, sites: Mapping[str, Kind]) -> None:
    draft.whole(sites)
    for site in sites:
        own = draft.params[site]
        for ours, theirs in (("C", "lokr_w1"), ("D", "lokr_w2")):
            if ours in own:
                draft.put(site, **{theirs: own[ours]})
            else:
                draft.put(site, **{f"{theirs}_a": own[f"{ours}_left"], f"{theirs}_b": own[f"{ours}_right"].flatten(1)})
    first = next(iter(sites.values()))
    assert isinstance(first, LoKr)
    if any((k.split, k.both) != (first.split, first.both) for k in sites.values()):  # type: ignore[attr-defined]
        raise draft.refuse(next(iter(sites)), "sites are split otherwise than others, which peft can't")
    _ranks(draft, sites)
    draft.config |= {"decompose_both": first.both, "decompose_factor": -1 if first.split is None else first.split}


def _ranks(draft: Draft, sites: Mapping[str, Any]) -> None:
    """r and alpha of LoHa and LoKr. peft divides by r, which is large where modbay's factors are whole."""
    whole = {site: kind.rank or max(draft.places[site].site.shape) for site, kind in sites.items()}
    factors = {site: (1.0 if kind.alpha is None else kind.alpha / (kind.rank or 1)) for site, kind in sites.items()}
    (rank, ranks), (alpha, alphas) = draft.pattern(whole), draft.pattern({s: factors[s] * whole[s] for s in sites})
    draft.config |= {"r": rank, "alpha": alpha, "rank_pattern": ranks, "alpha_pattern": alphas,
                     "target_modules": draft.target(sites), "use_effective_conv2d": False}  # fmt: skip


def vera(draft: Draft, sites: Mapping[str, Kind]) -> None:
    draft.whole(sites)
    wide, tall = ([draft.params[site][name] for site in sites] for name in ("A", "B"))
    a, b = max(wide, key=lambda t: t.shape[1]), max(tall, key=lambda t: t.shape[0])
    ranks = {t.shape[0] for t in wide}
    if (
        len(ranks) > 1
        or not all(torch.equal(t, a[:, : t.shape[1]]) for t in wide)
        or not all(torch.equal(t, b[: t.shape[0]]) for t in tall)
    ):
        raise draft.refuse(next(iter(sites)), "sites have matrices of their own, and peft one pair for all")
    draft.tensors |= {"vera_A": a, "vera_B": b}
    for site in sites:
        own = draft.params[site]
        draft.put(site, vera_lambda_d=own["d"], vera_lambda_b=own["b"])
    seed = next(iter(sites.values())).seed  # type: ignore[attr-defined]
    draft.config |= {
        "r": ranks.pop(), **draft.common(sites), "save_projection": True, "bias": "none", "projection_prng_key": seed,
    }  # fmt: skip


def ia3(draft: Draft, sites: Mapping[str, Kind]) -> None:
    draft.whole(sites)
    entering = {site: kind for site, kind in sites.items() if kind.enters}
    for site, kind in sites.items():
        scale = draft.params[site]["l"]
        if draft.form(site) == "convolution":  # (1, n, 1 …), of inputs and outputs alike
            scale = scale.view(1, -1, *[1] * (draft.places[site].site.weight.ndim - 2))
        else:
            scale = scale.unsqueeze(0 if kind.enters else 1)
        draft.put(site, ia3_l=scale)
    targets = draft.target(sites)
    into = draft.target(entering) if entering else []
    if not set(into) <= set(targets):
        targets, into = sorted(sites), sorted(entering)
    draft.config |= {**draft.common(sites), "target_modules": targets, "feedforward_modules": into}


def norms(draft: Draft, sites: Mapping[str, Kind]) -> None:
    draft.whole(sites)
    for site in sites:
        own, target = draft.params[site], draft.places[site].target._parameters
        gain, shift = target.get("weight"), target.get("bias")
        if gain is None or ("bias" in own and shift is None):
            raise draft.refuse(site, "the norm has no such parameter, which peft would copy")
        draft.put(site, ln_tuning_layers__weight=gain.detach() * (1 + own["gain"]))
        if shift is not None:
            draft.put(site, ln_tuning_layers__bias=shift.detach() + own.get("bias", 0))
    draft.config |= {"target_modules": draft.target(sites)}
