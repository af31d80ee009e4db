"""AdapterDrop: the lowest layers go without modules, at random in training.

Rücklé, Geigle, Glockner, Beck, Pfeiffer, Reimers and Gurevych, "AdapterDrop: On the Efficiency of Adapters in
Transformers", 2021 (arXiv 2010.11918).
"""

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..abstract import Context, Router, Routing, Site
from ..errors import CompositionError
from ..types import System
from ._by_label import ByLabel


class Drop(Router):
    """α_l = A_label at layer l ≥ n, and no module below, for a route of the whole path; n ~ U{0 … L − 1} in training.

        bay = mb.attach(model, at=mb.role.ffn, modules={"ner": mb.Bottleneck()}, router=mb.Drop("task"), name="task")
        bay.state.router.drop = 5                           # the lowest five layers run without modules from now on

    label, table: as of ByLabel. drop: n in evaluation. robust: whether n is drawn anew in each call of training, so
    that modules are good for every n; without, it is `drop` there, too. A layer is what its sites' names have up to
    their first number (encoder.layer.3); sites without a number are in no layer, and keep their modules.
    One object for all sites: raises CompositionError where each site would have its own, or for n that is no number of
    layers. To leave modules out for good, attach to the upper layers alone.
    """

    reads_x: ClassVar[bool] = False
    systems = (
        System(
            (42,),
            'mb.Drop("task", drop=5)',
            (
                "tests/test_networks.py::test_adapter_drop_leaves_the_lowest_layers_out",
                "tests/test_networks.py::test_adapter_drop_draws_how_many_layers_in_training",
            ),
            "AdapterDrop",
        ),
    )

    def __init__(
        self,
        label: str,
        table: Mapping[str, Sequence[str] | Mapping[str, float] | str] | None = None,
        drop: int = 0,
        robust: bool = True,
    ):
        super().__init__()
        if isinstance(drop, bool) or not isinstance(drop, int) or drop < 0:
            raise CompositionError(f"Drop(drop={drop!r}): a number of layers, from 0.")
        self.inner = ByLabel(label, table)
        self.label, self.keywords = label, (label,)
        self.drop, self.robust = drop, robust
        self.layer: Tensor

    @property
    def table(self) -> Mapping[str, list[str] | dict[str, float]] | None:
        return self.inner.table

    def build(self, names: Sequence[str], site: Site) -> None:
        if not self.sites and site.name:
            raise CompositionError(
                f"Drop at site {site.name!r}: the lowest layers are told by all sites together. Give one object, "
                f"router=mb.Drop({self.label!r}), for all of them."
            )
        found = [re.match(r"(.*?(?:^|\.)\d+)(?:\.|$)", name) for name in self.sites]
        numbers = {layer: i for i, layer in enumerate(dict.fromkeys(m[1] for m in found if m))}
        self.layers = len(numbers)
        if self.drop > self.layers:
            raise CompositionError(f"Drop(drop={self.drop}): the sites are in {self.layers} layers.")
        of = [numbers[m[1]] if m else self.layers for m in found]
        self.register_buffer("layer", torch.tensor(of, dtype=torch.long, device=site.device), persistent=False)
        self.inner.build(names, site)
        self.names = tuple(names)

    def rename(self, old: str, new: str) -> None:
        self.inner.rename(old, new)
        self.names = self.inner.names

    def forward(self, x: Tensor | None, c: Context) -> Routing:
        route = self.inner(x, c)
        if not self.sites:
            return route
        n: Tensor | int = self.drop
        if self.training and self.robust and self.layers:
            n = torch.randint(self.layers, (), device=self.layer.device)
        index = route.index.expand(len(self.sites), *route.index.shape)  # type: ignore[union-attr]
        kept = (self.layer >= n).to(index.device).view(-1, *[1] * (index.ndim - 1))
        weights = None if route.weights is None else route.weights.expand(index.shape)
        return Routing(index=torch.where(kept, index, -1), weights=weights, sites=self.sites)
