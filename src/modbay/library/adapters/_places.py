"""Where adapters has its modules: behind the last projection of attention or feed-forward part, and what lies about it.

    h = dense(…),  y = LayerNorm(h + r)        BERT and its kin
    h = dense(…),  y = h + r                   GPT-2, T5, ViT, whose norm is in front of the part

r is the input of the part, which is what a parallel module reads; in front of a norm there, if the part begins so.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ...core import describe
from ...errors import FileError
from ...seams import Roles
from ._names import kind, then
from ._source import Source

APART = {  # of models whose layers have no module for the end of a part: (projection, the norm behind it)
    "attention_adapters": ("attention.out_lin", "sa_layer_norm"),
    "output_adapters": ("ffn.lin2", "output_layer_norm"),
}
ATTENTION, CROSS, OUTPUT = "attention", "cross", "output"  # mh_adapter, cross_adapter, output_adapter
VIT = "output.output_adapters"
FRONT: dict[str, tuple[tuple[str, str, str, str | None, str], ...]] = {
    "gpt2": (
        ("attn.c_proj", "ln_1", "attention_adapters", None, ATTENTION),
        ("mlp.c_proj", "ln_2", "output_adapters", "", OUTPUT),
    ),
    "t5": (
        ("layer.0.SelfAttention.o", "layer.0.layer_norm", "layer.0", "layer.0", ATTENTION),
        ("layer.1.EncDecAttention.o", "layer.1.layer_norm", "layer.1", "layer.1", CROSS),
        ("layer.1.DenseReluDense.wo", "layer.1.layer_norm", "layer.1", "layer.1", OUTPUT),
        ("layer.2.DenseReluDense.wo", "layer.2.layer_norm", "layer.2", "layer.2", OUTPUT),
    ),
    "vit": (
        ("attention.o_proj", "layernorm_before", "attention_adapters", None, ATTENTION),
        ("attention.output.dense", "layernorm_before", "attention_adapters", None, ATTENTION),
        ("mlp.fc2", "layernorm_after", VIT, "", OUTPUT),
        ("output.dense", "layernorm_after", VIT, "", OUTPUT),
    ),
}  # of layers with the norm in front: (projection, norm, adapters' place, what gives h + r: "" is the layer, the part)
FRONT["mt5"] = FRONT["t5"]
PREFIXES: dict[str, dict[str, str]] = {
    "gpt2": {"attn": "self_prefix"},
    "t5": {"layer.0.SelfAttention": "self_prefix", "layer.1.EncDecAttention": "cross_prefix"},
    "vit": {"attention.attention": "self_prefix", "attention": "self_prefix"},  # as it was called once, and now
}  # of layers with the norm in front: what adapters calls the prefixes of an attention
PREFIXES["mt5"] = PREFIXES["t5"]
TO_ENCODER = re.compile(r"\.(EncDecAttention|encoder_attn|crossattention)\.")
FUSED = "attn.c_attn"  # GPT-2's query, key and value, in this order


@dataclass(frozen=True)
class End:
    """The end of a part of a layer, by the names of its modules: where it began, its last projection, and its norm, ""
    if that is in front; then `total` gives h + r, if any module does. layer: its number; part: ATTENTION, …"""

    first: str
    dense: str
    norm: str
    layer: int
    part: str
    total: str = ""

    @property
    def whole(self) -> str:
        """The part as a site."""
        return f"{self.first}:{self.dense}"


def ends(model: nn.Module, modules: Mapping[str, nn.Module], roles: Roles) -> dict[str, End]:
    """The ends of all parts that are so, by the path at which adapters keeps a module of them."""
    out: dict[str, End] = {}
    for i, layer in enumerate(roles["block"]) if kind(model) in FRONT else ():
        for dense, norm, place, total, part in FRONT[kind(model)]:
            if f"{layer}.{dense}" in modules and f"{layer}.{norm}" in modules:
                whole = "" if total is None else f"{layer}.{total}".rstrip(".")
                names = (f"{layer}.{norm}", f"{layer}.{dense}", "")
                out[f"{then(model, layer)}.{place}"] = End(*names, i, part, whole)
    if out:
        return out
    for first, last in (("attention", "output"), ("ffn_in", "ffn_out")):
        if len(roles[first]) != len(roles[last]):
            continue
        for i, (begun, dense) in enumerate(zip(roles[first], roles[last], strict=True)):
            path, norm = _behind(modules, dense)
            if norm:
                out[path] = End(begun, dense, norm, i, ATTENTION if first == "attention" else OUTPUT)
    return out


def behind(table: Mapping[str, End]) -> bool:
    """Whether parts end in their norms, as BERT's do."""
    return any(end.norm for end in table.values())


def _behind(modules: Mapping[str, nn.Module], dense: str) -> tuple[str, str]:
    """(where adapters keeps what is behind a projection, the norm that is next to it)."""
    for last, (projection, norm) in APART.items():
        layer = dense.removesuffix(f".{projection}")
        if layer != dense and f"{layer}.{norm}" in modules:
            return f"{layer}.{last}", f"{layer}.{norm}"
    block = dense.rpartition(".")[0]
    inner = modules[block].named_children() if block in modules else ()
    return block, next((f"{block}.{name}" for name, m in inner if isinstance(m, nn.LayerNorm)), "")


def end(source: Source, path: str) -> End:
    """The end of a part, from the path at which adapters keeps a module of it; raises FileError for other layers."""
    table = ends(source.model, source.modules, source.roles)
    name = next((name for name in source.names(path) if name in table), None)
    if name is None:
        raise FileError(
            f"{source.path}: it has a module behind {path!r}, and layers of this {type(source.model).__name__} are not "
            f"known to end there in a projection and a sum, as BERT's, GPT-2's, T5's and ViT's do."
        )
    return table[name]


def attentions(model: nn.Module, modules: Mapping[str, nn.Module], roles: Roles) -> dict[str, tuple[int, str]]:
    """(layer, what adapters calls its prefix) of each attention, in order; {} of a model for which this is not known.
    Layers are counted on from the encoder's to the decoder's."""
    known = PREFIXES.get(kind(model))
    if known is None:
        table = ends(model, modules, roles)
        place = "self" if any(path.rpartition(".")[2] in APART for path in table) else "self_prefix"
        return {site: (i, place) for i, site in enumerate(roles["attention"])} if behind(table) else {}
    out: dict[str, tuple[int, str]] = {}
    for i, layer in enumerate(roles["block"]):
        for inner, place in known.items():
            site = f"{layer}.{inner}"
            if site in roles["attention"]:
                out[site] = (i, "encoder_prefix" if ".encoder.block." in f".{site}" else place)
    return out


def biased(model: nn.Module, place: str) -> bool:
    """Whether there is a bias of relative positions at the attentions with these prefixes."""
    return kind(model) in ("t5", "mt5") and place != "cross_prefix"


def embedded(modules: Mapping[str, nn.Module], roles: Roles) -> str | None:
    """The norm that the embeddings end in, if they do."""
    tables = [name.rpartition(".")[0] for name in roles["embedding"]]
    for name, module in modules.items():
        if isinstance(module, nn.LayerNorm) and name.rpartition(".")[0] in tables:
            return name
    return None


def inverted(model: nn.Module, modules: Mapping[str, nn.Module], roles: Roles) -> str | None:
    """What gives the first layer its input, behind which adapters has an invertible adapter."""
    last = {"gpt2": ".drop", "t5": "encoder.embed_tokens", "mt5": "encoder.embed_tokens"}.get(kind(model))
    if last is None:
        return embedded(modules, roles)
    return next((name for name in modules if f".{name}".endswith(last)), None)


def behind_embeddings(source: Source, what: str) -> str:
    """The same; raises FileError if they do not."""
    name = embedded(source.modules, source.roles)
    if name is None:
        raise FileError(
            f"{source.path}: it has {what} behind the embeddings, and those of this {type(source.model).__name__} are "
            f"not known to end in a norm, as BERT's do."
        )
    return name


def projections(model: nn.Module, modules: Mapping[str, nn.Module], roles: Roles) -> dict[str, tuple[int, str]]:
    """(layer, what adapters calls it) of each projection that a LoRA of adapters' may be at: "q", "k", "v",
    "intermediate", "output"; behind "cross " those of the attention to an encoder, which go with the others."""
    names = {"query": "q", "key": "k", "value": "v", "ffn_in": "intermediate", "ffn_out": "output"}
    found = {site: (i, short) for role, short in names.items() for i, site in enumerate(roles[role])}
    out: dict[str, tuple[int, str]] = {}
    for site, (i, short) in found.items():
        layer = next((n for n, block in enumerate(roles["block"]) if site.startswith(f"{block}.")), i)
        if kind(model) in ("t5", "mt5") and site.endswith(".wi_0"):
            continue  # of a gated pair adapters has LoRA at the other one
        out[site] = (layer, f"cross {short}" if TO_ENCODER.search(site) else short)
    for layer, block in enumerate(roles["block"]) if kind(model) == "gpt2" else ():
        width = describe("", modules[f"{block}.{FUSED}"]).features("outputs") // 3
        out |= {f"{block}.{FUSED}[{i * width}:{(i + 1) * width}]": (layer, short) for i, short in enumerate("qkv")}
    return out
