"""A checkpoint of adapters' in the making: a module's kinds and tensors, under the names that adapters has for them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from ...abstract import Aggregator, Kind
from ...errors import CompositionError
from ...seams import Roles, find_roles, named
from ...types import Params
from ._names import then
from ._places import End, ends


@dataclass
class Draft:
    """A checkpoint in the making: what a module is at each of its sites, how it is put together with the base there,
    and its gates, as weight and bias."""

    name: str
    model: nn.Module
    kinds: Mapping[str, Kind]
    params: Mapping[str, Params]
    aggregators: Mapping[str, Aggregator]
    gates: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        return named(self.model)

    @cached_property
    def roles(self) -> Roles:
        return find_roles(self.model)

    @cached_property
    def ends(self) -> dict[str, End]:
        """By the path at which adapters keeps a module."""
        return ends(self.model, self.modules, self.roles)

    @property
    def base(self) -> str:
        """Where the model without its head is; "" if it has none."""
        prefix = getattr(self.model, "base_model_prefix", "") or ""
        return prefix if prefix in self.modules else ""

    @property
    def width(self) -> int | None:
        return getattr(getattr(self.model, "config", None), "hidden_size", None)

    @property
    def layers(self) -> int:
        return len(self.roles["block"])

    def put(self, path: str, mark: str, **tensors: Tensor) -> None:
        """Tensors at a path, by what adapters calls them, "__" for "."."""
        path = then(self.model, path)
        front = f"{path}." if path else ""
        for name, tensor in tensors.items():
            self.tensors[f"{front}{mark}.{self.name}.{name.replace('__', '.')}"] = tensor

    def refuse(self, site: str, why: str) -> CompositionError:
        return CompositionError(
            f"export of module {self.name!r} as adapters: at {site!r} {why}. bay.save keeps everything."
        )

    def common(self, what: str, values: Mapping[str, Any]) -> Any:
        """What all sites have alike; raises CompositionError if they do not."""
        first = next(iter(values.values()))
        for site, value in values.items():
            if value != first:
                raise self.refuse(site, f"{what} is {value!r}, and elsewhere {first!r}: adapters has one for all")
        return first

    def left_out(
        self, where: Mapping[str, tuple[int, str]], wanted: Collection[str], there: Collection[tuple[int, str]] = ()
    ) -> list[int]:
        """The layers without any of the places; raises CompositionError for a layer with some of them. there: the
        places that layers have at all, where they differ."""
        out = []
        for layer in range(self.layers):
            own = {place for i, place in where.values() if i == layer}
            if not own:
                out.append(layer)
            elif own != {place for place in wanted if not there or (layer, place) in there}:
                site = next(site for site, (i, _) in where.items() if i == layer)
                raise self.refuse(site, f"layer {layer} has {sorted(own)}, and another {sorted(wanted)}")
        return out

    def gated(self, sites: Collection[str]) -> bool:
        """Whether all these have a gate; raises CompositionError if only some do."""
        have = [site for site in sites if site in self.gates]
        if have and len(have) < len(sites):
            raise self.refuse(have[0], "it has a gate, and at other places not")
        return bool(have)
