"""Where adapters has its modules: behind the last projection of attention or feed-forward part, and what lies about it.

    h = dense(…),  y = LayerNorm(h + r)

r is the input of the part, which is what a parallel module reads.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ...errors import FileError
from ...seams import Roles
from ._source import Source

APART = {  # of models whose layers have no module for the end of a part: (projection, the norm behind it)
    "attention_adapters": ("attention.out_lin", "sa_layer_norm"),
    "output_adapters": ("ffn.lin2", "output_layer_norm"),
}


@dataclass(frozen=True)
class End:
    """The end of a part of a layer, by the names of its modules: where it began, its last projection, and its norm.
    layer: its number; attends: whether the part is attention."""

    first: str
    dense: str
    norm: str
    layer: int
    attends: bool

    @property
    def whole(self) -> str:
        """The part as a site."""
        return f"{self.first}:{self.dense}"


def ends(modules: Mapping[str, nn.Module], roles: Roles) -> dict[str, End]:
    """The ends of all parts that are so, by the path at which adapters keeps a module of them."""
    out: dict[str, End] = {}
    for first, last in (("attention", "output"), ("ffn_in", "ffn_out")):
        if len(roles[first]) != len(roles[last]):
            continue
        for i, (begun, dense) in enumerate(zip(roles[first], roles[last], strict=True)):
            path, norm = _behind(modules, dense)
            if norm:
                out[path] = End(begun, dense, norm, i, first == "attention")
    return out


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
    table = ends(source.modules, source.roles)
    name = next((name for name in source.names(path) if name in table), None)
    if name is None:
        raise FileError(
            f"{source.path}: it has a module behind {path!r}, and layers of this {type(source.model).__name__} are not "
            f"known to end there in a projection, a sum and a norm, as BERT's do."
        )
    return table[name]


def embedded(modules: Mapping[str, nn.Module], roles: Roles) -> str | None:
    """The norm that the embeddings end in, if they do."""
    tables = [name.rpartition(".")[0] for name in roles["embedding"]]
    for name, module in modules.items():
        if isinstance(module, nn.LayerNorm) and name.rpartition(".")[0] in tables:
            return name
    return None


def behind_embeddings(source: Source, what: str) -> str:
    """The same; raises FileError if they do not."""
    name = embedded(source.modules, source.roles)
    if name is None:
        raise FileError(
            f"{source.path}: it has {what} behind the embeddings, and those of this {type(source.model).__name__} are "
            f"not known to end in a norm, as BERT's do."
        )
    return name


def projections(roles: Roles) -> dict[str, tuple[int, str]]:
    """(layer, what adapters calls it) of each projection that a LoRA of adapters' may be at."""
    names = {"query": "q", "key": "k", "value": "v", "ffn_in": "intermediate", "ffn_out": "output"}
    return {site: (i, short) for role, short in names.items() for i, site in enumerate(roles[role])}
