"""Compositional attention: any way to search with any thing to retrieve, paired anew at each position.

Mittal, Raparthy, Rish, Bengio and Lajoie, "Compositional Attention: Disentangling Search and Retrieval", 2022 (arXiv
2110.09419); maps as in the authors' code.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..abstract import Aggregator, Context, InputComposition, Kind, Routing, Site
from ..errors import CompositionError, SiteError
from ..types import System

TESTS = "tests/test_outputs.py::"


class CompositionalAttention(Aggregator):
    """y = W [h_1; …; h_S], h_s = Σ_r a_sr A_s m_r(x): each search A_s takes a mix of what it retrieves, of all modules.

        values = {name: nn.Linear(64, 16) for name in "abcd"}
        layer = mb.Modular(None, values, mb.Uniform(), mb.CompositionalAttention(searches=4, width=16), features=64)
        y = layer(x)                                                    # x and y (b, t, 64)

    A_s = softmax(Q_s x · K_s x / √k) over the positions that are not padding, (t, t) an example; a_sr = softmax_r(Q̄_s x
    · K̄ A_s m_r(x) / √k). Modules are the retrievals; their order does not matter. searches: S. size: k, d/S if None.
    width: of what the modules give, d if None. All maps have biases. The route, one for all, says which modules take
    part; its weights are not applied. Differs: dropout, and the code's mask of each position's own key, are left out.
    Raises CompositionError for x that is no sequence, another width, or a route by example or token.
    """

    systems = (
        System(
            (139,), "mb.CompositionalAttention(searches=4)",
            (TESTS + "test_searches_and_retrievals_are_composed",
             TESTS + "test_one_retrieval_is_attention_with_shared_values"),
            "compositional attention",
        ),
    )  # fmt: skip

    def __init__(self, searches: int = 4, size: int | None = None, width: int | None = None):
        super().__init__()
        if searches < 1 or (size is not None and size < 1) or (width is not None and width < 1):
            raise CompositionError(
                f"CompositionalAttention(searches={searches}, size={size}, width={width}): positive numbers."
            )
        self.searches, self.size, self.width = searches, size, width
        self.built = False

    def build(self, site: Site) -> None:
        if self.built:
            return
        d, v = site.features("inputs"), self.width or site.features("outputs")
        k = self.size or max(1, d // self.searches)
        place = {"device": site.device, "dtype": site.dtype}
        self.query, self.key, self.choice = (nn.Linear(d, self.searches * k, **place) for _ in range(3))
        self.told, self.out = nn.Linear(v, k, **place), nn.Linear(self.searches * v, site.features("outputs"), **place)
        self.built = True

    def admit(self, kind: Kind, site: Site) -> None:
        if isinstance(kind, InputComposition) or site.axis != -1 or site.form == "embedding":
            raise CompositionError(
                f"CompositionalAttention at site {site.name!r} with {type(kind).__name__}: it attends over positions, "
                f"x (b, t, features), and modules say what there is to retrieve."
            )

    def forward(self, f: Callable | None, x: Tensor, modules: Any, routing: Routing, c: Context) -> Tensor:
        ids = modules.active(routing)
        if x.ndim != 3 or routing.axes or not ids:
            raise CompositionError(
                f"CompositionalAttention got x {tuple(x.shape)}, {len(ids)} active modules and a route with "
                f"{routing.axes} axes: it wants sequences (b, t, features), and one route for all, as mb.Uniform()."
            )
        values = torch.stack([modules.output(i, f, x, c) for i in ids], 1)  # (b, r, t, v)
        if values.shape[-1] != self.told.in_features:
            raise CompositionError(
                f"CompositionalAttention: modules give {values.shape[-1]} features, and it was built for "
                f"{self.told.in_features}: say width={values.shape[-1]}."
            )
        own = self.told.weight.dtype
        seen, values = x.to(own), values.to(own)
        split = lambda map: map(seen).unflatten(-1, (self.searches, -1)).transpose(1, 2)  # (b, s, t, k)
        query, key, choice = split(self.query), split(self.key), split(self.choice)
        scale = query.shape[-1] ** -0.5
        scores = query @ key.mT * scale
        if c.mask is not None:
            if c.mask.shape[1] != x.shape[1]:
                raise SiteError(
                    f"CompositionalAttention: x has {x.shape[1]} positions, the attention mask {c.mask.shape[1]}."
                )
            scores = scores.masked_fill(c.mask[:, None, None, :] == 0, torch.finfo(scores.dtype).min)
        found = scores.softmax(-1).unsqueeze(2) @ values.unsqueeze(1)  # (b, s, r, t, v)
        match = (self.told(found) * choice.unsqueeze(2)).sum(-1) * scale  # (b, s, r, t)
        heads = (match.softmax(2).unsqueeze(-1) * found).sum(2)  # (b, s, t, v)
        return self.out(heads.transpose(1, 2).flatten(-2)).to(x.dtype)
