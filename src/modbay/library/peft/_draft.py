"""A checkpoint of peft's in the making: a module's kinds and tensors, under the names that peft has for them."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ...abstract import Kind
from ...errors import CompositionError
from ...seams import Place
from ...types import Params


@dataclass
class Draft:
    """A checkpoint in the making: what a module is at each of its places, and what peft calls that."""

    name: str
    model: nn.Module
    places: Mapping[str, Place]
    kinds: dict[str, Kind]
    params: Mapping[str, Params]
    served: bool = False  # whether it is for engines that serve it, not for peft
    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def put(self, path: str, **tensors: Tensor) -> None:
        """Tensors of a module, by what peft calls them, "__" for "."."""
        for name, tensor in tensors.items():
            self.tensors[f"{path}.{name.replace('__', '.')}"] = tensor

    def refuse(self, site: str, why: str) -> CompositionError:
        return CompositionError(
            f"export of module {self.name!r} as peft: at {site!r} {why}. format='lora' writes what changes weights as "
            f"plain LoRA; bay.save keeps everything."
        )

    def target(self, sites: Mapping[str, Any]) -> list[str]:
        """target_modules: last names, where these are at all such modules; else whole paths."""
        short = sorted({site.rpartition(".")[2] for site in sites})
        named = [name for name, _ in self.model.named_modules() if "_bay" not in name.split(".")]
        hit = {name for name in named if name.rpartition(".")[2] in short}
        return short if hit == set(sites) else sorted(sites)

    def pattern(self, values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
        """(the value that most sites have, those of the others by an expression that peft matches)."""
        common = Counter(values.values()).most_common(1)[0][0]
        return common, {f"^{site}": value for site, value in values.items() if value != common}

    def form(self, site: str) -> str:
        return self.places[site].site.form

    def whole(self, sites: Mapping[str, Any]) -> None:
        """Raise CompositionError for a place that is no whole module."""
        for site in sites:
            place = self.places[site]
            if not place.whole or place.site.bare:
                raise self.refuse(site, "it is at a part of a layer, and peft's are at whole ones")

    def common(self, sites: Mapping[str, Any]) -> dict[str, Any]:
        """What every change of weights says."""
        return {
            "target_modules": self.target(sites) if sites else [],
            "fan_in_fan_out": any(self.form(site) == "transposed" for site in sites),  # the weights are (in, out)
        }
