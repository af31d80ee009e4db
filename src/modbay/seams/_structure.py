"""What a model's modules are, read from their shapes, names and sources: attention, blocks, feed-forward pairs.

No table of model families: the same few facts are asked of every model. What they do not settle is written down as a
doubt, and `_roles` turns doubts into errors.
"""

import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from ..core import base_type

# Names of a projection, once the words that say nothing (`proj`, `lin`, `w` …) are taken off.
_LETTERS = {
    "q": "q", "wq": "q", "query": "q", "queries": "q",
    "k": "k", "wk": "k", "key": "k", "keys": "k",
    "v": "v", "wv": "v", "value": "v", "values": "v",
    "kv": "kv", "wkv": "kv", "qkv": "qkv", "wqkv": "qkv",
}  # fmt: skip
_PARTS = {"q": "query", "k": "key", "v": "value", "kv": "kv", "qkv": "qkv"}
_OUTPUT = {"o", "wo", "out", "output", "post"}  # or nothing at all: `dense`, `c_proj`
_EMPTY = {"proj", "projection", "lin", "linear", "layer", "head", "dense", "fc", "w", "c", "to", "self"}
_ATTENTION = {"attention", "attn"}
_CALLS_ATTENTION = re.compile(r"attention_interface\(|ALL_ATTENTION_FUNCTIONS|scaled_dot_product_attention\(")
_PRODUCT = re.compile(r"matmul\(|bmm\(|einsum\(| @ ")
_MULTIHEAD = "nn.MultiheadAttention computes it in no module that is called; the whole is mb.role.attention"
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


@dataclass(frozen=True)
class Attention:
    """One attention module: its projections by part, and why a part has no module of its own."""

    name: str
    parts: dict[str, str] = field(default_factory=dict)  # query, key, value, kv, qkv, output → dotted name
    rivals: dict[str, list[str]] = field(default_factory=dict)  # part → others whose names say nearly the same
    missing: str = "none of its Linears is named or shaped like it"


@dataclass(frozen=True)
class FeedForward:
    """The feed-forward part of one block: d → o by `ins` (gate and up are two), o → d by `out`."""

    ins: tuple[str, ...] = ()
    out: str | None = None
    module: str | None = None  # the smallest module that holds it all, if it holds no attention
    experts: str | None = None  # the module that holds the fused parameters of a mixture of experts
    doubt: str | None = None


def under(name: str, root: str) -> bool:
    """Whether `name` is the module `root` or lies in it."""
    return root == "" or name == root or name.startswith(root + ".")


def parent(name: str) -> str:
    return name.rpartition(".")[0]


def above(name: str) -> list[str]:
    """A module and all that it lies in, the root last."""
    return [name, *(above(parent(name)) if name else [])]


def words(name: str) -> list[str]:
    """`queryProj_2.Wo` → query, proj, 2, wo."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear map: Linear, what resembles it when quantised, and GPT-2's transposed Conv1D."""
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(inputs, int) and isinstance(outputs, int):
        return inputs, outputs
    if base_type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return tuple(module.weight.shape)  # type: ignore[union-attr, return-value]
    return None


class Structure:
    """One model, read once."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.modules = {name: m for name, m in model.named_modules() if "_bay" not in name.split(".")}
        self._sources: dict[type, str] = {}
        # Torch's attention reads the weights of its out_proj and never calls it: it is no Linear to anyone.
        inside = [name for name, m in self.modules.items() if isinstance(m, nn.MultiheadAttention)]
        shapes = {name: linear_shape(m) for name, m in self.modules.items() if name and parent(name) not in inside}
        self.linears = {name: shape for name, shape in shapes.items() if shape is not None}
        self.below: dict[str, list[str]] = {name: [] for name in self.modules}  # what lies in a module, itself included
        for name in self.modules:
            for root in above(name):
                self.below.get(root, []).append(name)
        self.attention: dict[str, Attention] = {}
        self.holds: set[str] = set()  # what an attention lies in
        for name in sorted(self.modules, key=lambda name: -name.count(".") if name else 1):  # the innermost first
            if self._is_attention(name):
                self.attention[name] = self._projections(name)
                self.holds |= set(above(name))
        self.attention = {name: self.attention[name] for name in self.modules if name in self.attention}
        self.blocks = {name: _feed_forward(self, name) for name in _blocks(self)}
        outputs = {out for a in self.attention.values() for out in above(a.parts.get("output", ""))}
        self.strange = [name for name in self.modules if name not in outputs and self._is_strange(name)]

    def inside(self, root: str) -> list[str]:
        """The Linears in a module."""
        return [name for name in self.below[root] if name in self.linears]

    def in_attention(self, name: str) -> bool:
        return any(root in self.attention for root in above(name))

    def in_block(self, name: str) -> bool:
        return any(root in self.blocks for root in above(name))

    def source(self, module: nn.Module) -> str:
        """The text of a module's forward and of its own methods that it calls; "" where Python does not have it."""
        cls = base_type(module)
        if cls not in self._sources:
            seen: dict[str, str] = {}
            todo = ["forward"]
            while todo:
                method = todo.pop()
                function = getattr(cls, method, None)
                if method in seen or not callable(function) or (hasattr(nn.Module, method) and method != "forward"):
                    continue
                try:
                    seen[method] = inspect.getsource(inspect.unwrap(function))
                except (OSError, TypeError):  # compiled, frozen, or typed at a prompt
                    seen[method] = ""
                todo += re.findall(r"self\.(\w+)\(", seen[method])
            self._sources[cls] = "\n".join(seen.values())
        return self._sources[cls]

    def _is_attention(self, name: str) -> bool:
        """By the names of its projections, or by what its source computes; the innermost such module."""
        module = self.modules[name]
        if isinstance(module, nn.MultiheadAttention):
            return True
        if name in self.holds or isinstance(module, CONTAINERS) or name in self.linears or name == "":
            return False
        parts = set(self._sort(name, by_shape=False)[0])
        if {"query", "key", "value"} <= parts or {"query", "kv"} <= parts or "qkv" in parts:
            return True
        source = self.source(module)
        cubes = [p for p in module.parameters(recurse=False) if p.ndim == 3]
        weights = [p for p in module.parameters() if p.ndim > 1]
        if _CALLS_ATTENTION.search(source):
            return len(weights) > 1
        mixes = "softmax" in source.lower() and _PRODUCT.search(source) is not None
        return (mixes if source else _says_attention(module)) and (len(cubes) > 2 or "qkv" in self._sort(name)[0])

    def _is_strange(self, name: str) -> bool:
        """A module that calls itself attention, has weights, and is none by the rules above."""
        module = self.modules[name]
        said = _says_attention(module) or (_ATTENTION & set(words(name)[-1:]) and not self.in_block(name))
        weights = any(p.ndim > 1 for p in module.parameters())
        return bool(said) and weights and name not in self.holds and not self.in_attention(name)

    def _sort(self, name: str, by_shape: bool = True) -> tuple[dict[str, str], dict[str, list[str]], list[str]]:
        """The Linears of an attention module: by part, those that only resemble a part, and the rest."""
        parts: dict[str, str] = {}
        rivals: dict[str, list[str]] = {}
        rest: list[str] = []
        for linear in self.inside(name):
            said = _said(linear[len(name) :])
            letters = [_LETTERS[w] for w in said if w in _LETTERS]
            part = _PARTS.get("".join(sorted(set("".join(letters)), key="qkv".index)))
            if part is None:
                rest.append(linear)
            elif len(letters) < len(said) or part in parts:  # query_global, pos_key_proj
                rivals.setdefault(part, []).append(linear)
            else:
                parts[part] = linear
        wide = [l for l in rest if self.linears[l][1] == 3 * self.linears[l][0]]
        double = [l for l in rest if self.linears[l][1] == 2 * self.linears[l][0]]
        if by_shape and not parts and not rivals and len(wide) == 1:
            parts["qkv"] = wide[0]
        elif by_shape and set(parts) == {"query"} and not rivals and len(double) == 1:
            parts["kv"] = double[0]
        return parts, rivals, [l for l in rest if l not in parts.values()]

    def _projections(self, name: str) -> Attention:
        module = self.modules[name]
        if isinstance(module, nn.MultiheadAttention):
            return Attention(name, missing=_MULTIHEAD)
        parts, rivals, rest = self._sort(name)
        named = [l for l in rest if set(_said(l[len(name) :])) <= _OUTPUT]
        # BERT's output projection lies beside the attention: the only Linear there.
        beside = [l for l in self.inside(parent(name)) if not under(l, name)] if parent(name) else []
        outputs = named if len(named) == 1 else beside if not rest else rest + beside
        if len(outputs) == 1 and _fits(self, parts, outputs[0]):
            parts["output"] = outputs[0]
        elif rest or len(outputs) == 1:
            rivals["output"] = outputs
        raw = [n for n, p in module.named_parameters(recurse=False) if p.ndim > 1]
        own = f"its projections are its own parameters ({', '.join(raw)})"
        return Attention(name, parts, rivals, own if raw and not parts else Attention.missing)


def _blocks(structure: Structure) -> list[str]:
    """The members of containers that hold an attention and two more Linears, or experts; the innermost of them."""
    found = []
    for name, module in structure.modules.items():
        if not name or isinstance(module, CONTAINERS) or not isinstance(structure.modules[parent(name)], CONTAINERS):
            continue
        holds = name in structure.holds and name not in structure.attention
        if holds and (len(_others(structure, name)) > 1 or _experts(structure, name)):
            found.append(name)
    outer = {root for name in found for root in above(parent(name))}
    return [name for name in found if name not in outer]


def _others(structure: Structure, block: str) -> list[str]:
    """The Linears of a block that belong to no attention."""
    outputs = {a.parts.get("output") for a in structure.attention.values()}
    return [l for l in structure.inside(block) if l not in outputs and not structure.in_attention(l)]


def _experts(structure: Structure, block: str) -> list[str]:
    """Modules with two or more parameters (experts, …, …)."""
    found = []
    for name in structure.below[block]:
        cubes = [p.shape[0] for p in structure.modules[name].parameters(recurse=False) if p.ndim == 3]
        if len(cubes) > 1 and len(set(cubes)) == 1 and not structure.in_attention(name):
            found.append(name)
    return found


def _widths(structure: Structure, block: str) -> set[int]:
    """How wide the stream through a block is: what its attention takes and gives, else what its norms act on."""
    widths: set[int] = set()
    for name in structure.below[block]:
        if name in structure.attention:
            parts, module = structure.attention[name].parts, structure.modules[name]
            widths |= {structure.linears[parts[part]][0] for part in ("query", "qkv") if part in parts}
            widths |= {structure.linears[parts["output"]][1]} if "output" in parts else set()
            widths |= {module.embed_dim} if isinstance(module, nn.MultiheadAttention) else set()
    norms = [m for name in structure.below[block] if is_norm(m := structure.modules[name])]
    return widths or {p.shape[0] for norm in norms for p in norm.parameters(recurse=False) if p.ndim == 1}


def _feed_forward(structure: Structure, block: str) -> FeedForward:
    """The pair, or the experts, of a block; with a doubt if its Linears outside attention are anything else."""
    experts, others, widths = _experts(structure, block), _others(structure, block), _widths(structure, block)
    if len(experts) == 1:
        around = parent(experts[0])
        return FeedForward(module=experts[0] if around == block else around, experts=experts[0])
    if experts or len(widths) != 1:
        return FeedForward(doubt=f"{block!r} has {len(experts)} sets of experts and widths {sorted(widths)}")
    (d,) = widths
    ins = [l for l in others if structure.linears[l][0] == d != structure.linears[l][1]]
    outs = [l for l in others if structure.linears[l][1] == d != structure.linears[l][0]]
    hidden = {structure.linears[l][1] for l in ins}
    if len(outs) != 1 or len(ins) not in (1, 2) or len(others) != len(ins) + 1 or len(hidden) != 1:
        return FeedForward(
            doubt=f"the Linears of {block!r} outside attention are not one pair {d} → o → {d} (o ≠ {d}, with or "
            f"without a gate): {shown(structure, others)}"
        )
    (o,) = hidden
    back = structure.linears[outs[0]][0]
    if o != back and not (len(ins) == 1 and o == 2 * back):  # gate and up in one
        return FeedForward(doubt=f"in {block!r}, {d} → {o} is not followed by {o} → {d}: {shown(structure, others)}")
    around = outs[0]
    while not all(under(l, around) for l in ins):
        around = parent(around)
    return FeedForward(tuple(ins), outs[0], None if around in structure.holds else around)


def shown(structure: Structure, names: Iterable[str]) -> str:
    return ", ".join(f"{name!r} ({' → '.join(map(str, structure.linears[name]))})" for name in names)


def _fits(structure: Structure, parts: dict[str, str], output: str) -> bool:
    """Whether a Linear takes what the heads give: as wide as the queries."""
    width = structure.linears[output][0]
    if "qkv" in parts:
        return width < structure.linears[parts["qkv"]][1]
    wanted = {structure.linears[parts[part]][1] for part in ("query", "value") if part in parts}
    return not wanted or width in wanted


def _says_attention(module: nn.Module) -> bool:
    return bool(_ATTENTION & set(words(base_type(module).__name__)))


def is_norm(module: nn.Module) -> bool:
    """A normalisation with weights, by its class's name: LayerNorm, LlamaRMSNorm, BatchNorm2d, NoNorm."""
    named = re.search(r"norm(\d+d)?$", base_type(module).__name__.lower())
    return named is not None and any(True for _ in module.parameters(recurse=False))


def _said(name: str) -> list[str]:
    """The words of a name that say something."""
    return [word for word in words(name) if word not in _EMPTY | _ATTENTION and not word.isdigit()]
