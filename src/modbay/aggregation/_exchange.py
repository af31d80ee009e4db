"""Several streams: each module reads one, and each stream takes its share of every module.

Tang, Liu, Zhao and Gong, "Progressive Layered Extraction (PLE)", 2020 (RecSys); Yang, Xu, Wu and Wang, "Multi-Task
Reinforcement Learning with Soft Modularization", 2020 (arXiv 2003.13661).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..abstract import Aggregator, Context, InputComposition, Kind, Routing, Site
from ..errors import CompositionError


class Exchange(Aggregator):
    """y_s = Σ_i α_si m_i(x_{of(i)}): stream s is a mix of what the modules made of the streams that they read.

        mb.Modular(None, experts, router, mb.Exchange([0, 1, 2]), features=64)      # x and y (3, b, …, 64)

    of: the stream that each module reads, in order. The streams are the first axis of x and y, and the rows of a batch
    their second, so that to a router streams are examples and rows are tokens: α is (S, b, n), or (S, n). All modules
    run. For mb.Modular. Raises CompositionError for another number of modules, or a stream that is not there.
    """

    def __init__(self, of: Sequence[int]):
        super().__init__()
        self.of = list(of)

    def admit(self, kind: Kind, site: Site) -> None:
        if site.name or isinstance(kind, InputComposition):
            raise CompositionError(
                f"Exchange at site {site.name!r} with {type(kind).__name__}: streams are a first axis of what goes "
                f"through mb.Modular, and what is mixed is outputs."
            )

    def forward(self, f: Callable | None, x: Tensor, modules: Any, routing: Routing, c: Context) -> Tensor:
        if routing.axes not in (1, 2) or len(self.of) != len(modules) or max(self.of) >= len(x):
            raise CompositionError(
                f"Exchange(of={self.of}) got {len(modules)} modules, {len(x)} streams and a route with {routing.axes} "
                f"axes: each module reads one of the streams, and the route is one a stream, or a row of it."
            )
        outs = torch.stack([modules.output(i, f, x[s], c) for i, s in enumerate(self.of)])  # (n, b, …)
        weights = routing.dense(len(modules)).to(outs.dtype)
        return torch.einsum("sbn,nb...->sb..." if routing.axes == 2 else "sn,nb...->sb...", weights, outs)
