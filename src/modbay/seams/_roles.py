"""Roles: `at=mb.role.attention.query` in place of a name pattern, where a model's structure leaves no doubt.

About half of the architectures that nobody looked at come out entirely right from structure alone, so a role refuses
rather than guesses: what is contradictory, incomplete or ambiguous raises, and says which names could be meant.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from ..core import base_type
from ..errors import RoleError
from ._structure import CONTAINERS, Structure, is_norm, linear_shape, parent, shown, under, words

PARTS = ("query", "key", "value", "qkv", "output")
FEED_FORWARD = ("ffn", "ffn_in", "ffn_out")
NAMES = ("attention", *PARTS, *FEED_FORWARD, "block", "embedding", "head", "norm")

# Embeddings that are added to a model's input embedding, or bias its attention.
_ADDED = re.compile(r"pos|type|segment|rel|wpe|bias|lang")


@dataclass(frozen=True)
class Role:
    """What a module is for, whatever it is called; the attention's parts are its attributes too."""

    name: str

    def __repr__(self) -> str:
        return f"mb.role.{self.name}"

    def __getattr__(self, part: str) -> "Role":
        if part in PARTS and self.__dict__.get("name") == "attention":
            return Role(part)
        raise AttributeError(f"{self!r} has no part {part!r}" if "name" in self.__dict__ else part)


class Vocabulary:
    """All roles: `mb.role.attention`, `mb.role.attention.query` (or `mb.role.query`), `mb.role.ffn_in` …"""

    attention = Role("attention")  # the module that computes q·k and mixes the values: BERT's `attention.self`
    query = Role("query")
    key = Role("key")
    value = Role("value")
    qkv = Role("qkv")  # one Linear for the three
    output = Role("output")  # attention's last Linear
    ffn = Role("ffn")  # the feed-forward module; mixtures of experts too
    ffn_in = Role("ffn_in")  # its first Linear; of a gated one gate and up
    ffn_out = Role("ffn_out")  # its last Linear
    block = Role("block")  # a layer: attention and feed-forward
    embedding = Role("embedding")  # of the input: tokens or patches; of an encoder-decoder the encoder's
    head = Role("head")  # the Linears beside the trunk; of a language model the one that gives the logits
    norm = Role("norm")  # every normalisation with weights

    def __getattr__(self, name: str) -> Role:
        raise AttributeError(f"mb.role has no {name!r}; the roles are {', '.join(NAMES)}")


role = Vocabulary()


class Roles(dict[str, list[str]]):
    """Role → dotted names, where they are certain; `doubts` has the sentences and `candidates` the names elsewhere."""

    def __init__(self) -> None:
        super().__init__({name: [] for name in NAMES})
        self.doubts: dict[str, list[str]] = {name: [] for name in NAMES}
        self.candidates: dict[str, list[str]] = {name: [] for name in NAMES}

    def doubt(self, names: Iterable[str], sentence: str) -> None:
        for name in names:
            self.doubts[name].append(sentence)

    def settle(self) -> None:
        """Takes away the names of the roles in doubt."""
        for name, sentences in self.doubts.items():
            if sentences:
                self.candidates[name] = self.candidates[name] or self[name]
                self[name] = []


def find_roles(model: nn.Module) -> Roles:
    """Every role of a model, by structure; nothing raises here: what is not certain is in `doubts`."""
    return _find(Structure(model))


def _find(structure: Structure) -> Roles:
    roles = Roles()
    for read in (_attention, _feed_forward, _blocks, _embedding, _head, _norms):
        read(structure, roles)
    roles.settle()
    return roles


def match_role(model: nn.Module, role: Role) -> list[str]:
    """The dotted names of the modules with a role, in the model's order.

    Raises RoleError if the model has none, if they are no modules of their own (a fused projection), or if its
    structure contradicts itself; the message lists what could be meant.
    """
    if role.name not in NAMES:
        raise RoleError(f"at={role!r}: there is no role {role.name!r}; the roles are {', '.join(NAMES)}.")
    roles = find_roles(model)
    if roles[role.name]:
        return roles[role.name]
    said = roles.doubts[role.name] or [f"nothing in its structure is recognised as {role.name}"]
    patterns = collapsed(roles.candidates[role.name])
    message = f"at={role!r} has no certain answer in {base_type(model).__name__}: {'; '.join(said)}."
    if patterns:
        message += f" It could mean {counted(patterns)}."
    example = next(iter(patterns), "*.NAME")
    raise RoleError(f"{message} Give names or a pattern instead, at={example!r}: `modbay inspect MODEL` lists them.")


def collapsed(names: Iterable[str]) -> dict[str, int]:
    """Names with their layers' numbers as `*`, and how many of each there are."""
    patterns: dict[str, int] = {}
    for name in names:
        pattern = ".".join("*" if part.isdigit() else part for part in name.split("."))
        patterns[pattern] = patterns.get(pattern, 0) + 1
    return patterns


def counted(patterns: Mapping[str, int], most: int = 8) -> str:
    said = [f"{pattern!r} ({n})" for pattern, n in patterns.items()]
    return ", ".join(said[:most]) + (f" … ({len(said)} patterns)" if len(said) > most else "")


def _attention(structure: Structure, roles: Roles) -> None:
    found = structure.attention
    roles["attention"] = list(found)
    for part in PARTS:
        have = [a.parts[part] for a in found.values() if part in a.parts]
        lack = [a for a in found.values() if part not in a.parts]
        rivals = [name for a in found.values() for name in a.rivals.get(part, [])]
        fused = [name for a in lack for p, name in a.parts.items() if part != "output" and p != "output"]
        roles[part] = have
        roles.candidates[part] = have + (rivals or fused)
        if rivals:
            roles.doubt([part], f"{counted(collapsed(rivals))} may be it, or be part of it")
        elif lack:
            reason = _why(part, lack[0].parts) or lack[0].missing
            some = "only some attention modules have one" if have else "it is no module of its own"
            roles.doubt([part], f"{some}: in {counted(collapsed(a.name for a in lack))}, {reason}")
    for name in found:
        pair = _pair(structure, name)
        if pair:
            roles.doubt(["attention", *PARTS], f"{name!r} also holds what may be a feed-forward pair, {pair}")
            break
    if structure.strange:
        said = counted(collapsed(structure.strange))
        roles.doubt(["attention", *PARTS, *FEED_FORWARD], f"{said} are called attention, but not recognised as such")
    outside = [name for name in found if not structure.in_block(name)]
    if structure.blocks and outside:
        said = counted(collapsed(outside))
        roles.doubt(["attention", *PARTS, *FEED_FORWARD], f"there is attention outside the blocks, {said}")


def _why(part: str, parts: Mapping[str, str]) -> str | None:
    """Why an attention that has other parts lacks this one."""
    if part in ("query", "key", "value") and "qkv" in parts:
        return (
            f"query, key and value are fused in {parts['qkv']!r}; take mb.role.attention.qkv, or mb.part with the "
            "features of one, whose order only the model's code tells"
        )
    if part in ("key", "value") and "kv" in parts:
        return f"key and value are fused in {parts['kv']!r}"
    if part == "qkv" and "query" in parts:
        return "query, key and value are modules of their own; take [mb.role.query, mb.role.key, mb.role.value]"
    return None


def _pair(structure: Structure, name: str) -> str | None:
    """Two Linears of an attention module d → o → d with o ≠ d, neither of them one of its projections."""
    known = set(structure.attention[name].parts.values())
    shapes = {l: structure.linears[l] for l in structure.inside(name) if l not in known}
    for first, (d, o) in shapes.items():
        for second, shape in shapes.items():
            if d < o and shape == (o, d):
                return shown(structure, [first, second])
    return None


def _feed_forward(structure: Structure, roles: Roles) -> None:
    parts = structure.blocks
    if not parts:
        roles.doubt(FEED_FORWARD, "no block with attention and a feed-forward part is recognised")
        return
    doubts = [part.doubt for part in parts.values() if part.doubt]
    experts = [part.experts for part in parts.values() if part.experts]
    roles["ffn"] = [part.module for part in parts.values() if part.module]
    roles["ffn_in"] = [name for part in parts.values() for name in part.ins]
    roles["ffn_out"] = [part.out for part in parts.values() if part.out]
    if doubts:
        for name in FEED_FORWARD:
            inside = [l for block in parts for l in structure.inside(block)]
            roles.candidates[name] = [l for l in inside if not structure.in_attention(l)]
        roles.doubt(FEED_FORWARD, doubts[0])
    elif experts:
        tensors = [f"{e}.{n}" for e in experts for n, _ in structure.modules[e].named_parameters(recurse=False)]
        for name in ("ffn_in", "ffn_out"):
            roles.candidates[name] = tensors + roles[name]
        roles.doubt(["ffn_in", "ffn_out"], "it is a mixture of experts whose weights are fused parameters")
    if len(roles["ffn"]) < len(parts) and not doubts:
        roles.candidates["ffn"] = roles["ffn_in"] + roles["ffn_out"]
        some = "some blocks' feed-forward part" if roles["ffn"] else "its feed-forward part"
        roles.doubt(["ffn"], f"{some} is no module: its Linears meet only in the block; take "
                             "mb.role.ffn_in, mb.role.ffn_out or mb.span(mb.role.ffn_in, mb.role.ffn_out)")  # fmt: skip


def _blocks(structure: Structure, roles: Roles) -> None:
    blocks = roles["block"] = list(structure.blocks)
    if not blocks:
        roles.doubt(["block"], "no member of a ModuleList or Sequential holds both attention and a feed-forward part")
    lists = {parent(block) for block in blocks if isinstance(structure.modules[parent(block)], nn.ModuleList)}
    odd = [name for name in structure.modules if parent(name) in lists and name and name not in structure.blocks]
    if odd:
        said = f"{counted(collapsed(odd))} stand among the blocks, and are none by their structure"
        roles.doubt(["block", *FEED_FORWARD], said)
    types = {base_type(structure.modules[block]) for block in blocks}
    known = {*blocks, *odd}
    alike = [name for name, m in structure.modules.items() if base_type(m) in types and name not in known]
    if alike:
        roles.doubt(["block"], f"{counted(collapsed(alike))} are of the blocks' class, and stand elsewhere")


def _given(model: nn.Module, *getters: str) -> nn.Module | None:
    """What a chain of a model's own getters gives; they are absent, raise, or give None where they do not apply."""
    for getter in getters:
        method = getattr(model, getter, None)
        if not isinstance(method, Callable):
            return None
        try:
            model = method()
        except Exception:
            return None
        if not isinstance(model, nn.Module):
            return None
    return model


def _name(structure: Structure, module: nn.Module | None) -> str | None:
    return next((name for name, m in structure.modules.items() if m is module), None)


def _called(structure: Structure, name: str) -> bool:
    """Whether the source of a module's parent calls it; True where that can't be read."""
    around, last = structure.modules[parent(name)], name.rpartition(".")[2]
    source = "" if isinstance(around, CONTAINERS) else structure.source(around)
    # A weight that is only read (`self.decoder.weight.t()`) is no call.
    return not source or re.search(rf"self\.{re.escape(last)}\b(?!\.weight|\.bias)", source) is not None


def _embedding(structure: Structure, roles: Roles) -> None:
    encoder = _given(structure.model, "get_encoder")
    # T5's and BART's own answer is `shared`, which holds the weight and is never called: the encoder has another.
    found = _given(structure.model, "get_encoder", "get_input_embeddings") if encoder is not structure.model else None
    name = _name(structure, found) or _name(structure, _given(structure.model, "get_input_embeddings"))
    outside = {n: m for n, m in structure.modules.items() if not structure.in_block(n)}
    inputs = [n for n, m in outside.items() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding))]
    inputs = [n for n in inputs if not _ADDED.search(n.rpartition(".")[2].lower())]
    if name is None and len(inputs) == 1:
        name = inputs[0]
    weight = getattr(structure.modules.get(name or "-"), "weight", None)
    rivals = [n for n in inputs if name is None or not (under(n, name) or outside[n].weight is weight)]
    roles["embedding"] = [name] if name else []
    roles.candidates["embedding"] = roles["embedding"] + rivals
    if rivals:
        roles.doubt(["embedding"], "more than one module may take the input")
    elif name and not _called(structure, name):
        roles.doubt(["embedding"], f"{name!r} holds the weight, but the code around it does not call it")


def _head(structure: Structure, roles: Roles) -> None:
    model = structure.model
    name = _name(structure, _given(model, "get_output_embeddings"))
    after = _after_blocks(structure)
    if name is not None:
        roles["head"] = [name]
        if not _called(structure, name):
            roles.doubt(["head"], f"{name!r} holds the weight of the logits, but the code around it does not call it")
        return
    prefix = getattr(model, "base_model_prefix", "")
    trunk = getattr(model, prefix, None) if isinstance(prefix, str) and prefix else None
    beside = [l for l in structure.linears if not under(l, prefix)] if isinstance(trunk, nn.Module) else after
    roles["head"] = beside
    if prefix and not isinstance(trunk, nn.Module):
        roles.doubt(["head"], f"it is a trunk itself, or has several: no {prefix!r} that a head could stand beside")
    elif any("pool" in word for l in beside for word in words(l)):
        roles.doubt(["head"], "a pooler stands beside the trunk, which may or may not count as head")
    elif not isinstance(trunk, nn.Module) and len(beside) > 1:
        roles.doubt(["head"], "several Linears stand after the last block")


def _norms(structure: Structure, roles: Roles) -> None:
    roles["norm"] = [name for name, module in structure.modules.items() if is_norm(module)]
    odd = []
    for name, module in structure.modules.items():
        own = list(module.parameters(recurse=False))
        said = any(w == "ln" or w.endswith("norm") for w in words(name.rpartition(".")[2]))
        if said and own and not is_norm(module) and all(p.ndim == 1 for p in own):
            odd.append(name)
    if odd:
        roles.candidates["norm"] = roles["norm"] + odd
        roles.doubt(["norm"], f"{counted(collapsed(odd))} are called norms, and their class is not")


def _after_blocks(structure: Structure) -> list[str]:
    """The Linears that are registered after the last block; none without blocks."""
    order = list(structure.modules)
    last = max((i for i, name in enumerate(order) if structure.in_block(name)), default=len(order))
    return [name for name in order[last:] if name in structure.linears and not structure.in_block(name)]


@dataclass(frozen=True)
class Row:
    """Modules that look alike: what `modbay inspect MODEL` prints on a line."""

    pattern: str
    type: str
    shape: str
    count: int
    roles: str  # `query`; with a question mark if in doubt


def describe_roles(model: nn.Module) -> list[Row]:
    """One row for each group of modules with weights that differ only in the numbers of their layers, in order."""
    structure = Structure(model)
    roles = _find(structure)
    groups: dict[tuple[str, str, str, str], int] = {}
    for name, module in structure.modules.items():
        if not name or (isinstance(module, CONTAINERS) and not roles_of(roles, name)):
            continue
        if not any(True for _ in module.parameters()):
            continue
        key = next(iter(collapsed([name]))), base_type(module).__name__, _shape(module), roles_of(roles, name)
        groups[key] = groups.get(key, 0) + 1
        for own, tensor in module.named_parameters(recurse=False):
            if tensor.ndim == 3 and not isinstance(module, (nn.Conv1d, nn.Embedding)):  # experts: a place of its own
                shape = " × ".join(map(str, tensor.shape))
                key = next(iter(collapsed([f"{name}.{own}"]))), "Parameter", shape, roles_of(roles, f"{name}.{own}")
                groups[key] = groups.get(key, 0) + 1
    return [Row(pattern, kind, shape, n, said) for (pattern, kind, shape, said), n in groups.items()]


def roles_of(roles: Roles, name: str) -> str:
    """`query`, or `head?`: the roles of one name, those in doubt where it has no other."""
    certain = [r for r in NAMES if name in roles[r]]
    return ", ".join(certain or [f"{r}?" for r in NAMES if name in roles.candidates[r]])


def _shape(module: nn.Module) -> str:
    linear, weight = linear_shape(module), dict(module.named_parameters(recurse=False)).get("weight")
    if linear is not None:
        return f"{linear[0]} → {linear[1]}"
    return " × ".join(map(str, weight.shape)) if weight is not None else ""
