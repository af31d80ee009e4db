"""Where adapters has its modules: behind the last projection of attention or feed-forward part, and what lies about it.

    h = dense(…),    y = LayerNorm(h + r)      BERT and its kin, BART
    h = dense(…),    y = h + r                 GPT-2, T5, ViT, Llama, whose norm is in front of the part
    h = λ dense(…),  y = h + r                 BEiT

r is the input of the part, which is what a parallel module reads; in front of a norm there, if the part begins so. At
the attention of ALBERT adapters takes the one for the other, h for r.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from ...core import describe
from ...errors import FileError
from ...seams import Roles, crosses
from ._names import kind, then
from ._source import Source

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
    "llama": (
        ("self_attn.o_proj", "input_layernorm", "attention_adapters", None, ATTENTION),
        ("mlp.down_proj", "post_attention_layernorm", "output_adapters", "", OUTPUT),
    ),
    "beit": (
        ("attention.o_proj", "layernorm_before", "attention_adapters", None, ATTENTION),
        ("attention.output.dense", "layernorm_before", "attention_adapters", None, ATTENTION),
        ("mlp.fc2", "layernorm_after", "output_adapters", "", OUTPUT),
        ("output.dense", "layernorm_after", "output_adapters", "", OUTPUT),
    ),
    "vit": (
        ("attention.o_proj", "layernorm_before", "attention_adapters", None, ATTENTION),
        ("attention.output.dense", "layernorm_before", "attention_adapters", None, ATTENTION),
        ("mlp.fc2", "layernorm_after", VIT, "", OUTPUT),
        ("output.dense", "layernorm_after", VIT, "", OUTPUT),
    ),
}  # of layers with the norm in front: (projection, norm, adapters' place, what gives h + r: "" is the layer, the part)
FRONT["mbart"] = (
    ("self_attn.out_proj", "self_attn_layer_norm", "attention_adapters", None, ATTENTION),
    ("encoder_attn.out_proj", "encoder_attn_layer_norm", "cross_attention_adapters", None, CROSS),
    ("fc2", "final_layer_norm", "output_adapters", "", OUTPUT),
)
FRONT |= {"mt5": FRONT["t5"], "mistral": FRONT["llama"]}
BEHIND: dict[str, tuple[tuple[str, str, str, str, str], ...]] = {
    "distilbert": (
        ("attention", "attention.out_lin", "sa_layer_norm", "attention_adapters", ATTENTION),
        ("ffn.lin1", "ffn.lin2", "output_layer_norm", "output_adapters", OUTPUT),
    ),
    "bart": (
        ("self_attn", "self_attn.out_proj", "self_attn_layer_norm", "attention_adapters", ATTENTION),
        ("encoder_attn", "encoder_attn.out_proj", "encoder_attn_layer_norm", "cross_attention_adapters", CROSS),
        ("fc1", "fc2", "final_layer_norm", "output_adapters", OUTPUT),
    ),
    "albert": (
        ("attention", "attention.dense", "attention.LayerNorm", "attention.attention_adapters", ATTENTION),
        ("ffn", "ffn_output", "full_layer_layer_norm", "output_adapters", OUTPUT),
    ),
}  # of layers with a norm behind, but for BERT's kin: (what begins the part, projection, norm, adapters' place, part)
BEHIND["plbart"] = BEHIND["bart"]
SCALES = {"beit": {ATTENTION: "lambda_1", OUTPUT: "lambda_2"}}  # parameters of a layer by which h is multiplied
SWAPPED = {"albert": (ATTENTION,)}  # parts at which adapters takes h for r, and r for h
PREFIXES: dict[str, dict[str, str]] = {
    "distilbert": {"attention": "self"},
    "albert": {"attention": "self_prefix"},
    "gpt2": {"attn": "self_prefix"},
    "llama": {"self_attn": "self_prefix"},
    "bart": {"self_attn": "self_prefix", "encoder_attn": "cross_prefix"},
    "t5": {"layer.0.SelfAttention": "self_prefix", "layer.1.EncDecAttention": "cross_prefix"},
    "vit": {"attention.attention": "self_prefix", "attention": "self_prefix"},  # as it was called once, and now
}  # what adapters calls the prefixes of an attention, but for those of BERT's kin
PREFIXES |= {"mt5": PREFIXES["t5"], "mistral": PREFIXES["llama"], "beit": PREFIXES["vit"]}
PREFIXES |= {"mbart": PREFIXES["bart"], "plbart": PREFIXES["bart"], "deberta": {}, "deberta-v2": {}}  # none there
TWO = ("t5", "mt5", "bart", "mbart", "plbart")  # an encoder, whose prefixes have a name of their own, and a decoder
BEGINS = {"gpt2": ".drop", "llama": ".embed_tokens", "t5": "encoder.embed_tokens"}  # what gives the first layer its
BEGINS |= {"mistral": BEGINS["llama"], "mt5": BEGINS["t5"]}  # input, where it is no norm
FUSED = "attn.c_attn"  # GPT-2's query, key and value, in this order


@dataclass(frozen=True)
class End:
    """The end of a part of a layer, by the names of its modules: where it began, its last projection, and its norm, ""
    if that is in front; then `total` gives h + r, if any module does. layer: its number; part: ATTENTION, …; scale: λ,
    if h is multiplied by one; swapped: whether adapters takes h for r."""

    first: str
    dense: str
    norm: str
    layer: int
    part: str
    total: str = ""
    scale: Tensor | None = field(default=None, compare=False)
    swapped: bool = False

    @property
    def whole(self) -> str:
        """The part as a site."""
        return f"{self.first}:{self.dense}"


def ends(model: nn.Module, modules: Mapping[str, nn.Module], roles: Roles) -> dict[str, End]:
    """The ends of all parts that are so, by the path at which adapters keeps a module of them."""
    out: dict[str, End] = {}
    family = kind(model)
    for i, layer in enumerate(roles["block"]) if family in FRONT else ():
        for dense, norm, place, total, part in FRONT[family]:
            if f"{layer}.{dense}" in modules and f"{layer}.{norm}" in modules:
                whole = "" if total is None else f"{layer}.{total}".rstrip(".")
                first, last = f"{layer}.{norm}", f"{layer}.{dense}"
                scale = modules[layer]._parameters.get(SCALES.get(family, {}).get(part, ""))
                out[f"{then(model, layer)}.{place}"] = End(first, last, "", i, part, whole, scale)
    for i, layer in enumerate(roles["block"]) if family in BEHIND else ():
        for first, dense, norm, place, part in BEHIND[family]:
            first, dense, norm = (f"{layer}.{name}" for name in (first, dense, norm))
            if {first, dense, norm} <= modules.keys():
                out[f"{layer}.{place}"] = End(first, dense, norm, i, part, swapped=part in SWAPPED.get(family, ()))
    return out if family in FRONT or family in BEHIND else _kin(modules, roles)


def _kin(modules: Mapping[str, nn.Module], roles: Roles) -> dict[str, End]:
    """Those of BERT and its kin, by structure: a projection and its norm are a module of their own, which adapters is
    part of."""
    out: dict[str, End] = {}
    for first, last in (("attention", "output"), ("ffn_in", "ffn_out")):
        if len(roles[first]) != len(roles[last]):
            continue
        for i, (begun, dense) in enumerate(zip(roles[first], roles[last], strict=True)):
            path = dense.rpartition(".")[0]
            inner = modules[path].named_children() if path in modules else ()
            norms = [f"{path}.{name}" for name, m in inner if isinstance(m, nn.LayerNorm)]
            if len(norms) == 1:
                out[path] = End(begun, dense, norms[0], i, ATTENTION if first == "attention" else OUTPUT)
    return out


def behind(table: Mapping[str, End]) -> bool:
    """Whether parts end in their norms, as BERT's do."""
    return any(end.norm for end in table.values())


def end(source: Source, path: str) -> End:
    """The end of a part, from the path at which adapters keeps a module of it; raises FileError for other layers."""
    table = ends(source.model, source.modules, source.roles)
    name = next((name for name in source.names(path) if name in table), None)
    if name is None:
        raise FileError(
            f"{source.path}: it has a module behind {path!r}, and layers of this {type(source.model).__name__} are not "
            f"known to end there in a projection and a sum, as BERT's, GPT-2's, T5's, ViT's, Llama's and BART's do."
        )
    return table[name]


def attentions(model: nn.Module, modules: Mapping[str, nn.Module], roles: Roles) -> dict[str, tuple[int, str]]:
    """(layer, what adapters calls its prefix) of each attention, in order; {} of a model for which this is not known.
    Layers are counted on from the encoder's to the decoder's."""
    known = PREFIXES.get(kind(model))
    if known is None:
        kin = behind(ends(model, modules, roles))
        return {site: (i, "self_prefix") for i, site in enumerate(roles["attention"])} if kin else {}
    out: dict[str, tuple[int, str]] = {}
    for i, layer in enumerate(roles["block"]):
        for inner, place in known.items():
            site = f"{layer}.{inner}"
            if site in roles["attention"]:
                encodes = kind(model) in TWO and ".encoder." in f".{site}"
                out[site] = (i, "encoder_prefix" if encodes else place)
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
    last = BEGINS.get(kind(model))
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
        if kind(model) in ("llama", "mistral") and short in ("intermediate", "output"):
            if site.endswith(".gate_proj"):
                continue
            short = "intermediate" if site.endswith(".down_proj") else "output"  # which adapters calls so
        out[site] = (layer, f"cross {short}" if crosses(site) else short)
    for layer, block in enumerate(roles["block"]) if kind(model) == "deberta-v2" else ():
        out |= {f"{block}.attention.self.{name}": (layer, name[0]) for name in ("query_proj", "key_proj", "value_proj")}
    for layer, block in enumerate(roles["block"]) if kind(model) == "gpt2" else ():
        width = describe("", modules[f"{block}.{FUSED}"]).features("outputs") // 3
        out |= {f"{block}.{FUSED}[{i * width}:{(i + 1) * width}]": (layer, short) for i, short in enumerate("qkv")}
    return out
