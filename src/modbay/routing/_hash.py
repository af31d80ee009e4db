"""Hash layers: which module a token goes to follows from what token it is.

Roller, Sukhbaatar, Szlam and Weston, "Hash Layers For Large Sparse Models", 2021 (arXiv 2106.04426). By the highest of
several hashes: Thaler and Ravishankar, "Using Name-Based Mappings to Increase Hit Rates", 1998.
"""

import zlib
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..abstract import Context, Router, Routing, Site
from ..errors import CallError, CompositionError
from ..types import System
from ._columns import renamed

OF = ("token", "previous", "bigram")
TESTS = ("tests/test_tasks.py::test_a_hash_of_a_token_is_fixed_and_even",)


class Hash(Router):
    """α_t = e_i with i = hash(token t): each token of the vocabulary has one module, for good. Nothing is learned.

        mb.attach(model, at=mb.role.ffn, modules={f"e{i}": mb.FeedForward(512) for i in range(16)}, router=mb.Hash(),
                  aggregator=mb.Mixture())

    table: the module of each token id, (vocabulary,), −1 for none: see `methods.balanced_hash` and
    `methods.clustered_hash`. Without it i = argmax_i h(token, name_i), a random one drawn by the seed, so that a module
    that comes takes its share from all others, and one that leaves gives its tokens to them; under a table these go
    without. of: what is hashed: the "token", the "previous" one, or the "bigram" of both, without a table.
    argument: of the model's call, that holds the ids (b, t). Index: (b, t, 1). The paper's MultiHash is left out.
    Raises CallError for a call without ids, or for a step of a cached generation, which has no previous token.
    """

    reads_x: ClassVar[bool] = False
    systems = (
        System((72,), "mb.Hash()", TESTS, "random hash layer", "α_t = e_i, i = argmax_i h(x_t, i)"),
        System(
            (72,),
            "router=mb.Hash(methods.balanced_hash(counts, 16))",
            ("tests/test_tasks.py::test_a_balanced_hash_fills_the_emptiest",),
            "balanced hash layer",
            "α_t = e_i, i = table[x_t], filled by falling frequency",
        ),
        System(
            (72,),
            "router=mb.Hash(methods.clustered_hash(embeddings, 16))",
            ("tests/test_tasks.py::test_a_clustered_hash_keeps_neighbours_together",),
            "clustered and dispersed hash layers",
            "α_t = e_i, i = table[x_t], a k-means cluster, or spread over it",
        ),
        System((72,), 'mb.Hash(of="bigram")', TESTS, "bigram hash layer", "α_t = e_i, i = argmax_i h(x_{t−1}, x_t, i)"),
    )

    def __init__(
        self, table: Tensor | Sequence[int] | None = None, of: str = "token", seed: int = 0, argument: str = "input_ids"
    ):
        super().__init__()
        if of not in OF or (of == "bigram" and table is not None):
            raise CompositionError(f"Hash(of={of!r}): 'token', 'previous', or, without a table, 'bigram'.")
        self.of, self.seed, self.argument = of, seed, argument
        given = None if table is None else torch.as_tensor(table, dtype=torch.long)
        self.register_buffer("table", given, persistent=False)
        self.table: Tensor | None
        self.salts: Tensor
        if given is not None and given.ndim != 1:
            raise CompositionError(f"Hash(table={tuple(given.shape)}): one module's number a token of the vocabulary.")

    def build(self, names: Sequence[str], site: Site) -> None:
        if self.table is not None:
            self._follow(names, site)
        known = {} if not self.names else dict(zip(self.names, self.salts.tolist(), strict=True))
        salts = [known.get(name, zlib.crc32(f"{self.seed}/{name}".encode()) & 0x7FFFFFFF) for name in names]
        self.register_buffer("salts", torch.tensor(salts, dtype=torch.long, device=site.device))
        self.names = tuple(names)

    def _follow(self, names: Sequence[str], site: Site) -> None:
        """The table for other modules than before."""
        table: Any = self.table
        table = table.to(site.device)
        if not self.names:
            high = int(table.max())
            if high >= len(names) or int(table.min()) < -1:
                raise CompositionError(f"Hash(table=…) names module {high}; there are {len(names)}, from 0.")
        elif tuple(names) != self.names:
            now = [names.index(name) if name in names else -1 for name in self.names] + [-1]
            table = torch.tensor(now, device=table.device)[table]
        self.register_buffer("table", table, persistent=False)

    def rename(self, old: str, new: str) -> None:
        self.names = renamed(self.names, old, new)

    def forward(self, x: Tensor | None, c: Context) -> Routing:
        ids = c.arguments.get(self.argument)
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.ndim != 2:
            raise CallError(
                f"Hash reads token ids (b, t) in the call's {self.argument!r}, and there are none. Call the model with "
                f"{self.argument}=…, or name another argument of it: mb.Hash(argument=…)."
            )
        ids = ids if c.rows is None else ids[c.rows]
        if self.of != "token" and c.mask is not None and c.mask.shape[1] > ids.shape[1]:
            raise CallError(
                f"Hash(of={self.of!r}): a step of a cached generation lacks the token before: use_cache=False."
            )
        key = ids if self.of == "token" else torch.cat([torch.zeros_like(ids[:, :1]), ids[:, :-1]], 1)
        if self.table is not None:
            return Routing(index=self.table[key].unsqueeze(-1))
        if self.of == "bigram":
            key = mixed(key) ^ ids
        return Routing(index=mixed(mixed(key).unsqueeze(-1) ^ self.salts).argmax(-1, keepdim=True))


def mixed(key: Tensor) -> Tensor:
    """Whole numbers below 2³¹, each a fixed scramble of another: products stay below 2⁶³."""
    key = key & 0x7FFFFFFF
    for _ in range(2):
        key = ((key ^ (key >> 16)) * 0x45D9F3B) & 0x7FFFFFFF
    return key ^ (key >> 16)
