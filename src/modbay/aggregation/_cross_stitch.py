"""Several streams, each of a task's own network, mixed after every layer.

Misra, Shrivastava, Gupta and Hebert, "Cross-stitch Networks for Multi-task Learning", 2016 (arXiv 1604.03539).
Subspaces: Ruder, Bingel, Augenstein and Søgaard, "Latent Multi-task Architecture Learning" (sluice networks), 2019
(arXiv 1705.08142).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..abstract import Aggregator, Context, InputComposition, Kind, Routing, Site
from ..errors import CompositionError
from ..types import System


class CrossStitch(Aggregator):
    """ỹ_s = Σ_t α_st m_t(x_t): each stream goes through its module, and is then a mix of all of them.

        mb.Modular(None, {"pos": layer, "ner": other}, mb.Uniform(), mb.CrossStitch(2))

    streams: how many, T: x and y (T, b, …), the modules in order. subspaces: S equal parts of the features that are
    mixed apart, α (T·S, T·S); sluice networks have 2. channels: α of its own for each feature of a part, (T·S, T·S,
    d/S). start: of α on the diagonal; the rest of one is spread over the others of a row (the paper has 0.9 and 0.1 for
    two streams; the sluice networks' balanced start is 1/(T·S)). axis: of the features.
    All streams run, so that the route must be one for all, mb.Uniform(); its weights are not applied. For mb.Modular.
    Raises CompositionError for another number of modules or streams, or features that do not divide into the subspaces.
    """

    systems = (
        System((34,), "mb.CrossStitch(2)", ("tests/test_networks.py::test_cross_stitch_units_mix_streams",)),
        System(
            (35,),
            "mb.CrossStitch(2, subspaces=2)",
            ("tests/test_networks.py::test_subspaces_of_streams_are_mixed_apart",),
            "sluice units",
        ),
    )

    def __init__(self, streams: int, subspaces: int = 1, channels: bool = False, start: float = 0.9, axis: int = -1):
        super().__init__()
        if streams < 1 or subspaces < 1 or streams * subspaces < 2:
            raise CompositionError(f"CrossStitch(streams={streams}, subspaces={subspaces}): there is nothing to mix.")
        self.streams, self.subspaces, self.channels, self.axis = streams, subspaces, channels, axis
        self.start = start
        self.alpha: Tensor
        self.built = False

    def build(self, site: Site) -> None:
        if self.built:
            return
        n = self.streams * self.subspaces
        alpha = torch.full((n, n), (1 - self.start) / (n - 1)).fill_diagonal_(self.start).to(site.device, site.dtype)
        if self.channels:
            alpha = alpha.unsqueeze(-1).repeat(1, 1, self._part(site.features("outputs")))
        self.alpha, self.built = nn.Parameter(alpha), True

    def _part(self, features: int) -> int:
        if features % self.subspaces:
            raise CompositionError(f"CrossStitch(subspaces={self.subspaces}): {features} features do not divide so.")
        return features // self.subspaces

    def admit(self, kind: Kind, site: Site) -> None:
        if site.name or isinstance(kind, InputComposition):
            raise CompositionError(
                f"CrossStitch at site {site.name!r} with {type(kind).__name__}: streams are a first axis of what goes "
                f"through mb.Modular, and what is mixed is outputs. Use methods.cross_stitch for whole networks."
            )

    def forward(self, f: Callable | None, x: Tensor, modules: Any, routing: Routing, c: Context) -> Tensor:
        if routing.axes or not len(x) == len(modules) == self.streams:
            raise CompositionError(
                f"CrossStitch(streams={self.streams}) got {len(modules)} modules, {len(x)} streams and a route with "
                f"{routing.axes} axes: it wants a module for each stream, and mb.Uniform() as the router."
            )
        outs = torch.stack([modules.output(t, f, x[t], c) for t in range(self.streams)]).movedim(self.axis, -1)
        parts = outs.unflatten(-1, (self.subspaces, self._part(outs.shape[-1]))).movedim(-2, 1).flatten(0, 1)
        mixed = torch.einsum("std,t...d->s...d" if self.channels else "st,t...->s...", self.alpha.to(parts), parts)
        return mixed.unflatten(0, (self.streams, self.subspaces)).movedim(1, -2).flatten(-2).movedim(-1, self.axis)
