"""What a bay of modules that others wrote is like: its router and aggregator, their tensors, and what is at work."""

import copy
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..abstract import Aggregator
from ..aggregation import AdapterFusion, PerSite
from ..errors import FileError
from ..routing import Gate
from ..seams import Fitting
from . import adapters
from ._foreign import Foreign
from ._format import describe
from ._read import fits

OPEN = 100.0  # the bias of a gate that is open: σ(100) is one in float32


@dataclass(frozen=True, eq=False)
class Setting:
    """router, aggregator: as `attach` takes them. start: what `bay.use` is told at once; None, nothing.
    fusions: the tensors of an AdapterFusion by site. gates: by site and module."""

    router: Callable | None = None
    aggregator: Callable | None = None
    start: tuple | None = None
    fusions: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    gates: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def fill(self, fitting: Fitting, path: Path) -> None:
        """Put the values of router and aggregator into the bay that was just attached; frozen, as modules are."""
        for site, tensors in self.fusions.items():
            aggregator = fitting.modulars[site].aggregator
            (own,) = (part for part in aggregator.modules() if isinstance(part, AdapterFusion) and part.width)  # type: ignore
            _fill(path, dict(own.named_parameters()), tensors)
        if not self.gates:
            return
        names = fitting.state.inventory.names
        for site, modular in fitting.modulars.items():
            gates, router = self.gates.get(site, {}), modular.router
            weight = torch.zeros_like(router.weight)  # type: ignore[union-attr, arg-type]
            bias = torch.full_like(router.bias, OPEN)  # type: ignore[union-attr, arg-type]
            for name, (w, b) in gates.items():
                weight[names.index(name)], bias[names.index(name)] = w.flatten(), b.flatten()
            _fill(path, {"weight": router.weight, "bias": router.bias}, {"weight": weight, "bias": bias})  # type: ignore


def _fill(path: Path, targets: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    fits(path, tensors, targets)
    with torch.no_grad():
        for key, target in targets.items():
            target.copy_(tensors[key])
            target.requires_grad_(False)


def setting(folder: Path, name: str, files: Sequence[Foreign], model: nn.Module) -> Setting:
    """The bay of modules that lie in one folder; raises FileError if they are put together in ways that differ."""
    table: dict[str, Aggregator] = {}
    said: dict[str, Any] = {}
    for file in files:
        for site in file.kinds:
            own = file.aggregators.get(site)
            what = None if own is None else describe(own, site)
            if said.setdefault(site, what) != what:
                raise FileError(
                    f"{folder}: {file.name!r} and another module there are put together with the base in ways that "
                    f"differ at {site!r}, which one bay can't have. Load them one by one, mb.load(model, FOLDER, "
                    f"name=…), each from its folder."
                )
            if own is not None:
                table[site] = own
    setup = adapters.read_setup(folder, files, model)
    table |= setup.aggregators
    gates: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for file in files:
        for site, gate in file.gates.items():
            gates.setdefault(site, {})[file.name] = gate
    one = len(files) == 1
    return Setting(
        router=(lambda: Gate(None if one else name, norm=True)) if gates else None,
        aggregator=_per_site(table, said),
        start=setup.start or ((files[0].name,) if one and not gates else None),
        fusions=setup.fusions,
        gates=gates,
    )


def _per_site(table: Mapping[str, Aggregator], sites: Collection[str]) -> Callable | None:
    """What makes the aggregator of a site, by few patterns: layers' numbers are stars where that hits no other."""
    if not table:
        return None
    said = {site: describe(own, site) for site, own in table.items()}
    parts: dict[str, tuple[type, dict[str, Any]]] = {}
    for site, own in table.items():
        wide = re.sub(r"(?<=\.)\d+(?=\.)", "*", escape(site))
        same = all(said.get(other) == said[site] for other in sites if fnmatchcase(other, wide))
        parts[wide if same else escape(site)] = (type(own), own.arguments())
    return lambda: PerSite({pattern: cls(**copy.deepcopy(arguments)) for pattern, (cls, arguments) in parts.items()})


def joined(
    fitting: Fitting, name: str, sites: Collection[str]
) -> tuple[dict[str, Aggregator], dict[str, tuple[Tensor, Tensor]]]:
    """(the aggregator at each site, the gate of one module at those where it has one): what `setting` was told."""
    aggregators: dict[str, Aggregator] = {}
    gates: dict[str, tuple[Tensor, Tensor]] = {}
    i = fitting.state.inventory.names.index(name)
    for site in sites:
        modular = fitting.modulars[site]
        own = modular.aggregator or fitting.state.aggregator
        assert own is not None
        aggregators[site] = own.at(site) if isinstance(own, PerSite) else own
        router = modular.router or fitting.state.router
        if isinstance(router, Gate):
            weight, bias = router.weight.detach()[i : i + 1], router.bias.detach()[i : i + 1]
            if bool(weight.any()) or float(bias) < OPEN:
                gates[site] = (weight, bias)
    return aggregators, gates
