"""Modular: the equation y = A(f, x, {m_i}, r(x, c), c) as one module."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..abstract import Aggregator, Context, Kind, Replacement, Router, Routing, Site
from ..errors import BayError, CompositionError
from ..types import Labels, Params
from ._engine import Part
from ._function import Function
from ._modules import Modules
from ._plan import Arrangement
from ._site import describe


@dataclass(frozen=True, eq=False)
class Network(Replacement):
    """A network of the user's own as a module: it stands instead of f. Its parameters are its own."""

    network: nn.Module

    def __eq__(self, other: object) -> bool:
        return self is other  # as its network is: equal kinds with as many rows would be run as one

    def __hash__(self) -> int:
        return id(self)

    def init(self, sites):
        return {}

    def forward(self, params: Params, x: Tensor, f: Callable | None, c: Context) -> Tensor:
        if isinstance(self.network, Modular):
            return self.network.run(Function(self.network.f, (x,), {}) if self.network.f else None, x, c)
        return self.network(x)


def as_kind(module: Any) -> Any:
    """A module as a kind: a network of the user's own is one that stands instead of f."""
    return Network(module) if isinstance(module, nn.Module) else module


class NetworkPart(Part):
    """The part of a `Network`: it holds the network, so that its parameters are found."""

    def __init__(self, kind: Network):
        super().__init__(kind, {})
        self.network = kind.network


@dataclass(eq=False)
class Inventory:
    """What the sites of a bay share: the names of its modules in order, and a number for each kind."""

    names: list[str] = field(default_factory=list)
    numbers: dict[Any, int] = field(default_factory=dict)
    empty: Arrangement = field(default_factory=Arrangement)

    def number(self, kind: Any) -> int:
        """The same small number for equal kinds."""
        try:
            return self.numbers.setdefault(kind, len(self.numbers))
        except TypeError:  # a kind with a field that can't be hashed is equal to itself alone
            return self.numbers.setdefault(id(kind), len(self.numbers))

    def check(self, name: str) -> None:
        """Raise BayError if a module can't have this name."""
        if not isinstance(name, str) or not name or "." in name or "/" in name:
            raise BayError(
                f"module name {name!r}: a name is part of parameter names and of folders, so it must be a string "
                f"without '.' and '/', and not empty."
            )


class Modular(nn.Module):
    """y = A(f, x, {m_1 … m_n}, r(x, c), c): modules plugged into f, or into nothing.

        experts = {"a": mb.FeedForward(64), "b": mb.FeedForward(64)}
        moe = mb.Modular(None, experts, mb.TopK(1), mb.Mixture(), features=32)
        y = moe(x)
        loras = {"en": mb.LoRA(4), "de": mb.LoRA(4)}
        layer = mb.Modular(nn.Linear(8, 8), loras, mb.ByLabel("language"), mb.WeightedSum())
        y = layer(x, language=["en", "de", None])

    f: a module or function of x, or None. modules: kinds, or networks of your own, by name. x: (b, …, d). Labels are
    keywords, named as the router names them. `features`: the width of x where it can't be read from f.
    Raises CompositionError for parts that do not fit.
    """

    def __init__(
        self,
        f: Callable | None = None,
        modules: Mapping[str, Kind | nn.Module] | None = None,
        router: Router | None = None,
        aggregator: Aggregator | None = None,
        *,
        features: int | None = None,
        site: Site | None = None,
        inventory: Inventory | None = None,
        bay: str = "",
    ):
        super().__init__()
        self.f = f
        self.prefix = f"{bay}." if bay else ""  # of the names of losses
        self.site = site or describe("", f if isinstance(f, nn.Module) else None, features)
        self.inventory = inventory or Inventory()
        self.parts = nn.Module()
        self.pools = nn.ModuleList()  # of modules that are packed
        self.order: list[Part | None] = []
        self.numbers = self.inventory.empty
        self.shapes: dict[int, Any] = {}
        self.router, self.aggregator = router, aggregator
        for name, kind in (modules or {}).items():
            self.inventory.check(name)
            self.inventory.names.append(name)
            self.plug(name, kind)
        if aggregator is not None:
            aggregator.build(self.site)
        if router is not None and self.inventory.names:  # a bay plugs its modules in later, and builds then
            router.build(self.inventory.names, self.site)

    def plug(self, name: str, kind: Kind | nn.Module | None, params: Mapping[str, Tensor] | None = None) -> None:
        """Add a module's part at this site, new if no parameters are given; None if the module has no part here."""
        if kind is None:
            self.order.append(None)
            self.numbers = self.numbers.plus(-1)
            return
        kind = as_kind(kind)
        if not isinstance(kind, Kind):
            raise CompositionError(
                f"modules[{name!r}] = {kind!r}: a module is a kind (mb.LoRA(8), …) or an nn.Module, not "
                f"{type(kind).__name__}."
            )
        if self.aggregator is not None:
            self.aggregator.admit(kind, self.site)
        if isinstance(kind, Network):
            part: Part = NetworkPart(kind)
        else:
            part = Part(kind, parameters(kind, kind.init([self.site]))[self.site.name] if params is None else params)
        self._moved()
        self.parts._modules[name] = part  # not add_module: a name such as "type" or "half" is a name, too
        self.order.append(part)
        self.numbers = self.numbers.plus(self._number(kind, part))

    def _number(self, kind: Kind, part: Part) -> int:
        """The number of a kind here: another one where shapes differ (masks of several sizes)."""
        number, shapes = self.inventory.number(kind), tuple(tensor.shape for tensor in part.tensors().values())
        return number if self.shapes.setdefault(number, shapes) == shapes else self.inventory.number((number, shapes))

    def unplug(self, index: int, name: str) -> None:
        """Take a module's part away."""
        self._moved()
        del self.order[index]
        self.numbers = self.numbers.without(index)
        self.parts._modules.pop(name, None)

    def _moved(self) -> None:
        """The order of the modules changes: no pool holds them all in order any more."""
        for pool in self.pools:
            pool.whole = False  # type: ignore[assignment]

    def modules_at(self, router: Any = None) -> Modules:
        names = self.inventory.names
        return Modules(self.order, self.numbers, self.site, names, router or self.router, self.prefix)

    def forward(
        self, x: Tensor, *, routing: Routing | None = None, context: Context | None = None, **labels: Labels
    ) -> Tensor:
        """The output for x, by the router's routing or by one that is given, in a context that can be given, too."""
        if self.aggregator is None or (self.router is None and routing is None):
            lack = "an aggregator" if self.aggregator is None else "a router"
            raise CompositionError(
                f"Modular without {lack}: a layer of its own needs both, mb.ByLabel(…) and mb.WeightedSum(), say."
            )
        f = (
            Function(self.f, (x,), {}, self.f if isinstance(self.f, nn.Module) else None)
            if self.f is not None
            else None
        )
        c = Context() if context is None else context
        c.labels = {**c.labels, **labels}
        return self.run(f, x, c, routing)

    def run(self, f: Function | None, x: Tensor, c: Context, route: Routing | None = None, aggregator=None) -> Tensor:
        """The equation in a context that is given; with a routing that was made elsewhere, or the router's own."""
        modules = self.modules_at()
        routing = modules.route(x, c) if route is None else route.on(x.device)
        if routing.axes:
            x = modules.spread(routing, x)
            modules.check(routing, x)
        aggregator = aggregator or self.aggregator
        assert aggregator is not None
        if routing.heads is not None and not aggregator.heads:
            raise CompositionError(
                f"site {self.site.name!r}: {type(aggregator).__name__} has no use for weights by parts of the "
                f"parameters (heads): average parameters, mb.ParameterAverage(), or route without heads."
            )
        y = aggregator(f, x, modules, routing, c)
        if self.training and torch.is_grad_enabled():
            penalise(modules, routing, c, self.prefix)
        return y


def penalise(modules: Modules, routing: Routing, c: Context, prefix: str = "") -> None:
    """Keep the losses that the active modules add of themselves."""
    for i in modules.active(routing):
        part = modules.parts[i]
        if type(part.kind).penalty is not Kind.penalty:
            value = part.kind.penalty(part.tensors())
            if value is not None:
                c.add_loss(f"{prefix}{modules.names[i]}.{type(part.kind).__name__}", value)


def parameters(kind: Kind, made: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """What `init` made, its learned tensors as parameters; what is shared stays shared."""
    seen: dict[int, Tensor] = {}

    def own(name: str, tensor: Tensor) -> Tensor:
        if id(tensor) not in seen:
            learned = tensor.is_floating_point() and name not in kind.constants
            seen[id(tensor)] = nn.Parameter(tensor.detach()) if learned else tensor.detach()
        return seen[id(tensor)]

    return {site: {name: own(name, tensor) for name, tensor in tensors.items()} for site, tensors in made.items()}
