"""Where adapters has its modules: behind the last projection of attention or feed-forward part, and what lies about it.

    h = dense(…),  y = LayerNorm(h + r)

r is the input of the part, which is what a parallel module reads.
"""

from dataclasses import dataclass

from torch import nn

from ...errors import FileError
from ._source import Source

APART = {  # of models whose layers have no module for the end of a part: (projection, the norm behind it)
    "attention_adapters": ("attention.out_lin", "sa_layer_norm"),
    "output_adapters": ("ffn.lin2", "output_layer_norm"),
}


@dataclass(frozen=True)
class End:
    """The end of a part of a layer, by the names of its modules: where it began, its last projection, and its norm."""

    first: str
    dense: str
    norm: str

    @property
    def whole(self) -> str:
        """The part as a site."""
        return f"{self.first}:{self.dense}"


def end(source: Source, path: str) -> End:
    """The end of a part, from the path at which adapters keeps a module of it; raises FileError for other layers."""
    parent, _, last = path.rpartition(".")
    if last in APART and (layer := source.own(parent)):
        dense, norm = (f"{layer}.{name}" for name in APART[last])
    else:
        block = source.site(path)
        inner = {n: m for n, m in source.modules[block].named_children() if n != "_bay"}
        dense, norm = (
            next((f"{block}.{n}" for n, m in inner.items() if isinstance(m, kind)), "")
            for kind in (nn.Linear, nn.LayerNorm)
        )
    first = beginning(source, dense)
    if first is None or norm not in source.modules:
        raise FileError(
            f"{source.path}: it has a module behind {path!r}, and layers of {type(source.model).__name__} are not "
            f"known to end there in a projection, a sum and a norm, as BERT's do."
        )
    return End(first, dense, norm)


def beginning(source: Source, dense: str) -> str | None:
    """The module that gets what a part gets, from the part's last projection."""
    roles = source.roles
    for first, last in (("ffn_in", "ffn_out"), ("attention", "output")):
        if dense in roles[last] and len(roles[first]) == len(roles[last]):
            return roles[first][roles[last].index(dense)]
    return None


def embedded(source: Source, what: str) -> str:
    """The norm that the embeddings end in."""
    tables = [name.rpartition(".")[0] for name in source.roles["embedding"]]
    for name, module in source.modules.items():
        if isinstance(module, nn.LayerNorm) and name.rpartition(".")[0] in tables:
            return name
    raise FileError(
        f"{source.path}: it has {what} behind the embeddings, and those of this {type(source.model).__name__} are not "
        f"known to end in a norm, as BERT's do."
    )
