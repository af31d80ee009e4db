"""adapters' prompts, which stand behind the embeddings, and prefixes, which are in one tensor for all layers."""

from collections.abc import Mapping
from typing import Any

import torch

from ...core import describe
from ...errors import FileError
from ...modules import Prefix, Prompt
from ._places import behind, behind_embeddings, ends
from ._source import CONFIG, Source

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
        source.keep(site, Prompt(len(table), after=1 if combine == "prefix_after_bos" else 0), prompt=table)


def prefix(source: Source, method: Mapping[str, Any]) -> None:
    """One network for all layers, the parts of its last map side by side: (L 2 heads d, m). Or what it gives, flat:
    (n L 2 heads d). It is in the file once for each layer, and once more."""
    sites = attentions(source, method)
    copies = list(source.take("prefix_tunings").values())
    if not copies:
        raise FileError(f"{source.file} has no prefix_tunings.{source.name}: not all of it was saved.")
    first = copies[0]
    if any(other.keys() != first.keys() or not all(torch.equal(other[k], t) for k, t in first.items())
           for other in copies[1:]):  # fmt: skip
        raise FileError(f"{source.file}: the copies of its prefix, which is one for all layers, differ.")
    places = {key.partition(".")[0] for key in first}
    if len(places) != 1 or not places <= {"self_prefix", "self"}:
        raise source.refuse(f"prefixes at {sorted(places)}, not at the attention over the input itself alone")
    own = {key.partition(".")[2]: t for key, t in first.items()}
    n = int(source.get(method, "prefix_length", (int, float), 30))
    _, heads, _, width = Prefix(n).init([describe(sites[0], source.modules[sites[0]])])[sites[0]]["prefix"].shape
    layers = len(sites)
    if source.get(method, "flat", bool, False):
        (whole,) = source.needs("prefix", own, "control_trans")
        table = whole.view(n, layers, 2, heads, width).permute(1, 2, 3, 0, 4)  # (L, 2, heads, n, d)
        for site, part in zip(sites, table, strict=True):
            source.keep(site, Prefix(n), prefix=part)
    else:
        if source.get(method, "non_linearity", str, "tanh").lower() != "tanh":
            raise source.refuse(f"non_linearity={method['non_linearity']!r:.40} in a prefix")
        parts = dict(zip(BOTTLENECK, source.needs("prefix", own, *BOTTLENECK.values()), strict=True))
        up, bias = (parts.pop(name).unflatten(0, (layers, 2, heads, width)) for name in ("up", "up_bias"))
        kind = Prefix(n, bottleneck=len(parts["down"]))
        for i, site in enumerate(sites):
            source.keep(site, kind, **parts, up=up[i], up_bias=bias[i])
    source.done("prefix", own)
    _gates(source)


def attentions(source: Source, method: Mapping[str, Any]) -> list[str]:
    """The attentions, in order of the layers, but those of layers that are left out."""
    out = source.get(method, "leave_out", list, [])
    sites = [site for i, site in enumerate(source.roles["attention"]) if i not in out]
    if sites and not behind(ends(source.model, source.modules, source.roles)):
        raise FileError(
            f"{source.path}: it has prefixes, and whether adapters' are modbay's in layers as those of this "
            f"{type(source.model).__name__} was not tried: they are read onto models of BERT's kind."
        )
    if not sites:
        raise FileError(f"{source.path}: it has prefixes, and this {type(source.model).__name__} no attentions for it.")
    return sites


def _gates(source: Source) -> None:
    for path, own in source.take("prefix_gates").items():
        weight, bias = source.needs(path, own, "weight", "bias")
        source.done(path, own)
        if len(weight) != 1:
            raise FileError(f"{source.path}/{CONFIG}: shared_gating=False: modbay gates keys and values alike.")
        source.gates[source.site(path.removesuffix(".prefix_tuning"))] = (weight, bias)
