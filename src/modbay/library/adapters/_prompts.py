"""adapters' prompts, which stand behind the embeddings, and prefixes, which are in one tensor for all layers."""

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core import describe
from ...errors import FileError
from ...modules import Prefix, Prompt
from ._names import kind
from ._places import attentions, behind_embeddings, biased
from ._source import CONFIG, Source

LOG = logging.getLogger("modbay")
CAUSAL = ("gpt2", "llama", "mistral", "bart", "mbart", "plbart")  # whose mask, where torch makes it, adapters leaves
MASKED = ("deberta", "deberta-v2")  # whose embeddings are multiplied by the text's mask
BOTTLENECK = {"tokens": "wte.weight", "down": "control_trans.0.weight", "down_bias": "control_trans.0.bias",
              "up": "control_trans.2.weight", "up_bias": "control_trans.2.bias"}  # fmt: skip


def prompt(source: Source, method: Mapping[str, Any]) -> None:
    """The prompts get no position and no norm of the embeddings: they go in front of the layers."""
    combine = source.get(method, "combine", str, "prefix")
    if combine not in ("prefix", "prefix_after_bos"):
        raise source.refuse(f"combine={combine!r:.40}")
    for path, own in source.take("prompt_tunings").items():
        (table,) = source.needs(path, own, "prompt_embedding.weight")
        source.done(path, own)
        site = behind_embeddings(source, "a prompt")
        if kind(source.model) in MASKED:
            raise source.refuse("a prompt where the embeddings are multiplied by the mask of the text")
        source.keep(site, Prompt(len(table), after=1 if combine == "prefix_after_bos" else 0), prompt=table)


def prefix(source: Source, method: Mapping[str, Any]) -> None:
    """For each kind of attention one network for all layers, the parts of its last map side by side, (L 2 heads d, m).
    Or what it gives, flat: (n L 2 heads d). It is in the file once for each layer, and once more."""
    table = attentions(source.model, source.modules, source.roles)
    if not table:
        raise FileError(
            f"{source.path}: it has prefixes, and where adapters has them in layers as those of this "
            f"{type(source.model).__name__} is not known: they are read onto models of BERT's kind, GPT-2, T5, ViT, "
            f"Llama and BART."
        )
    if kind(source.model) in CAUSAL:
        LOG.warning(
            "%s: at a %s under attn_implementation='sdpa' adapters 1.3 computes another function: a prefix hides as "
            "many of a token's nearest ones, or, in a padded batch or a window, does nothing. Here it is as under "
            "'eager'.", source.path, type(source.model).__name__,
        )  # fmt: skip
    copies = list(source.take("prefix_tunings").values())
    if not copies:
        raise FileError(f"{source.file} has no prefix_tunings.{source.name}: not all of it was saved.")
    first = copies[0]
    if any(other.keys() != first.keys() or not all(torch.equal(other[k], t) for k, t in first.items())
           for other in copies[1:]):  # fmt: skip
        raise FileError(f"{source.file}: the copies of its prefix, which is one for all layers, differ.")
    by_place: dict[str, dict[str, Tensor]] = {}
    for key, tensor in first.items():
        by_place.setdefault(key.partition(".")[0], {})[key.partition(".")[2]] = tensor
    out = source.get(method, "leave_out", list, [])
    wanted = _wanted(source, method, table, out)
    if by_place.keys() - wanted:
        raise source.refuse(f"prefixes at {sorted(by_place)}, where this model has {sorted(wanted) or 'none'}")
    for place, sites in wanted.items():
        if place not in by_place:
            raise FileError(f"{source.file} has no prefixes at {place!r}: not all of it was saved.")
        _prefixes(source, method, place, sites, by_place[place])
    _gates(source)


def _wanted(
    source: Source, method: Mapping[str, Any], table: Mapping[str, tuple[int, str]], out: Collection[int]
) -> dict[str, list[str]]:
    """The attentions that have a prefix, in order of the layers, by adapters' name for it."""
    wanted: dict[str, list[str]] = {}
    for site, (layer, place) in table.items():
        flagged = place not in ("encoder_prefix", "cross_prefix") or source.get(method, place, bool, True)
        if flagged and layer not in out:
            wanted.setdefault(place, []).append(site)
    for place, sites in wanted.items():
        if biased(source.model, place) and len(sites) < sum(other == place for _, other in table.values()):
            raise source.refuse(f"leave_out={sorted(out)}: behind a layer without a prefix adapters' T5 has no bias")
    return wanted


def _prefixes(
    source: Source, method: Mapping[str, Any], place: str, sites: Sequence[str], own: dict[str, Tensor]
) -> None:
    n, layers = int(source.get(method, "prefix_length", (int, float), 30)), len(sites)
    _, heads, _, width = Prefix(n).init([describe(sites[0], source.modules[sites[0]])])[sites[0]]["prefix"].shape
    relative = "keys" if biased(source.model, place) else None
    if source.get(method, "flat", bool, False):
        (whole,) = source.needs("prefix", own, "control_trans")
        table = whole.view(n, layers, 2, heads, width).permute(1, 2, 3, 0, 4)  # (L, 2, heads, n, d)
        for site, part in zip(sites, table, strict=True):
            source.keep(site, Prefix(n, relative=relative), prefix=part)
    else:
        if source.get(method, "non_linearity", str, "tanh").lower() != "tanh":
            raise source.refuse(f"non_linearity={method['non_linearity']!r:.40} in a prefix")
        parts = dict(zip(BOTTLENECK, source.needs("prefix", own, *BOTTLENECK.values()), strict=True))
        up, bias = (parts.pop(name).unflatten(0, (layers, 2, heads, width)) for name in ("up", "up_bias"))
        group = {"encoder_prefix": "encoder", "cross_prefix": "cross"}.get(place, "")
        network = Prefix(n, bottleneck=len(parts["down"]), relative=relative, group=group)
        for i, site in enumerate(sites):
            source.keep(site, network, **parts, up=up[i], up_bias=bias[i])
    source.done("prefix", own)


def _gates(source: Source) -> None:
    for path, own in source.take("prefix_gates").items():
        weight, bias = source.needs(path, own, "weight", "bias")
        source.done(path, own)
        if len(weight) != 1:
            raise FileError(f"{source.path}/{CONFIG}: shared_gating=False: modbay gates keys and values alike.")
        source.gates[source.site(path.removesuffix(".prefix_tuning"))] = (weight, bias)
