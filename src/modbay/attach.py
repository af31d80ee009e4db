"""attach, and the handle that it returns: a bay of modules in a network."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .abstract import Aggregator, InputComposition, Kind, Router, Routing
from .aggregation import WeightedSum
from .core import BayState, Inventory, Modular, Network, Session, parameters
from .errors import BayError, CompositionError, LabelError, listed
from .routing import ByLabel
from .seams import Place, Seat, places, seam_for, swap, union, unswap
from .types import Labels

Spec = Kind | nn.Module | Mapping[Any, Kind]


def attach(
    model: nn.Module,
    at: Any = None,
    modules: Mapping[str, Spec] | None = None,
    router: Router | Callable[[], Router] | None = None,
    aggregator: Aggregator | Callable[[], Aggregator] | None = None,
    *,
    name: str = "modules",
    freeze: bool = True,
    sometimes: bool = False,
    add_losses: bool = True,
) -> "Bay":
    """Plug modules into a model, in place: at each site, y = A(f, x, {m_i}, r(x, c), c).

        bay = mb.attach(model, at="*.attention.*.value", modules={"en": mb.LoRA(8), "de": mb.LoRA(8)},
                        router=mb.ByLabel("language"), name="language")
        out = model(**batch, language=["en", "de", None])

    at: a name pattern (fnmatch), a module type, a predicate (name, module) → bool, a role (mb.role.ffn), mb.part, mb.span,
        or a list of these, which is their union; "" is the model itself.
    modules: a kind by name, or, for a module whose kind differs by site, a mapping from places to kinds.
    router: an object is one route for all sites; a callable that makes one gives each site its own. Default: by label,
        the keyword being `name`. aggregator: likewise. Default: WeightedSum.
    freeze: the base's parameters stop requiring gradients. sometimes: sites may not run in every pass (experts).
    add_losses: auxiliary losses are added to a transformers output's `.loss` in training.
    Raises MatchError, LabelError, CompositionError or BayError, and leaves the model as it was.
    """
    session = _session(model)
    state = _state(model, session, name, router, aggregator, sometimes, add_losses)
    kinds = {module: _kinds(model, at, module, spec) for module, spec in (modules or {}).items()}
    everywhere = list(
        union(
            *[[p for p, _ in pairs] for pairs in kinds.values()], places(model, at) if at is not None else []
        ).values()
    )
    bay = Bay(model, session, state, _factory(router), _factory(aggregator), at)
    try:
        bay._open(everywhere, kinds)
    except BaseException:
        bay._close(everywhere)
        raise
    if freeze:
        bay._freeze_base()
    return bay


def bays(model: nn.Module) -> "dict[str, Bay]":
    """The bays of a model by name, in the order attached; of a copy, its own."""
    seat = model._modules.get("_bay")
    return dict(seat.session.handles) if isinstance(seat, Seat) else {}


def _session(model: nn.Module) -> Session:
    seat = model._modules.get("_bay")
    if isinstance(seat, Seat):
        return seat.session
    inner = next((n for n, m in model.named_modules() if isinstance(m, Seat) and m.is_root), None)
    if inner is not None:
        raise BayError(
            f"a bay is attached already to {inner.rpartition('._bay')[0] or inner!r}, a part of this model: attach to the "
            f"same root, so that one call has one set of labels."
        )
    return Session()


def _state(model, session, name, router, aggregator, sometimes, add_losses) -> BayState:
    """The new bay's state, every name checked."""
    if not isinstance(name, str) or not name or "." in name:
        raise BayError(f"name={name!r}: a bay's name is part of parameter names: a string without '.', and not empty.")
    if name in session.bays:
        raise BayError(f"name={name!r}: the model has a bay of that name. Choose another, or use that one's add().")
    made = ByLabel(name) if router is None else router
    shared = made if isinstance(made, Router) else None
    sample = shared or made()  # type: ignore[operator]
    if not isinstance(sample, Router):
        raise CompositionError(
            f"router={router!r}: a Router, or a callable that makes one; it made {type(sample).__name__}."
        )
    import inspect

    base = type(model).__dict__.get("_base", type(model))
    own = inspect.signature(base.forward).parameters
    for keyword in sample.keywords:
        if keyword in own:
            raise LabelError(
                f"label {keyword!r}: {base.__name__}.forward has an argument of that name. Choose another name for the label."
            )
    shared_aggregator = (
        WeightedSum() if aggregator is None else aggregator if isinstance(aggregator, Aggregator) else None
    )
    return BayState(
        name, Inventory(), shared, shared_aggregator, tuple(sample.keywords), sometimes=sometimes, add_losses=add_losses
    )


def _factory(part: Any) -> Callable | None:
    return part if part is not None and not isinstance(part, nn.Module) else None


def _kinds(model: nn.Module, at: Any, name: str, spec: Spec) -> list[tuple[Place, Kind]]:
    """The places of one module, each with its kind there."""
    if isinstance(spec, Mapping):
        pairs = [(place, kind) for where, kind in spec.items() for place in places(model, where)]
    else:
        where = at if at is not None else "" if isinstance(spec, InputComposition) and spec.place == "input" else None
        if where is None:
            raise BayError(f"modules[{name!r}] = {spec!r} has no place: pass at=…, or a mapping from places to kinds.")
        pairs = [(place, spec) for place in places(model, where)]
    seen: dict[str, Kind] = {}
    for place, kind in pairs:
        if place.site.name in seen:
            raise CompositionError(
                f"modules[{name!r}] has two kinds at {place.site.name!r}: {seen[place.site.name]!r} and {kind!r}. A module "
                f"has one kind a site; put the second into a bay of its own."
            )
        if not isinstance(kind, (Kind, nn.Module)):
            raise CompositionError(
                f"modules[{name!r}] = {kind!r}: a module is a kind (mb.LoRA(8), …), not {type(kind).__name__}."
            )
        seen[place.site.name] = kind
    return pairs


class Bay:
    """The handle of a bay: modules of one inventory, plugged into a model's sites under one router and one aggregator."""

    def __init__(self, model: nn.Module, session: Session, state: BayState, router, aggregator, at):
        self.model, self.session, self.state = model, session, state
        self.make_router, self.make_aggregator, self.at = router, aggregator, at
        self.frozen_base: dict[str, bool] = {}
        self.modulars: dict[str, Modular] = {}
        self.places: dict[str, Place] = {}

    def __repr__(self) -> str:
        return f"<Bay {self.state.name!r}: {listed(self.names())} at {len(self.modulars)} sites>"

    # Opening and closing

    def _open(self, everywhere: Sequence[Place], kinds: Mapping[str, list[tuple[Place, Kind]]]) -> None:
        session, state = self.session, self.state
        for name in kinds:
            state.inventory.check(name)
        for place in everywhere:
            here = [kind for pairs in kinds.values() for p, kind in pairs if p.site.name == place.site.name]
            self._place(place, here)
        root = self._seat(self.model)
        root.is_root = True
        session.bays[state.name] = state
        session.handles[state.name] = self
        swap(self.model, sorted(session.keywords))
        for name, pairs in kinds.items():
            self._plug(name, pairs)
        self._rebuild()
        shared = nn.Module()
        shared._modules.update(
            {k: v for k, v in (("router", state.router), ("aggregator", state.aggregator)) if v is not None}
        )
        root.shared._modules[state.name] = shared
        self._settle(shared)
        session.unchecked.add(state.name)

    def _place(self, place: Place, here: Sequence[Kind]) -> None:
        """A modular in the target's seat, with the seam that its kinds ask for."""
        name, seat = place.site.name, self._seat(place.target)
        seam = seam_for(self.model, place, here, seat)
        aggregator = self.make_aggregator() if self.make_aggregator else None
        router = self.make_router() if self.make_router else None
        modular = Modular(site=place.site, inventory=self.state.inventory, aggregator=aggregator, router=router)
        for kind in here:
            (aggregator or self.state.aggregator).admit(kind, place.site)  # type: ignore[union-attr]
        seat.put(self.state.name, modular, seam)
        self.modulars[name], self.places[name] = modular, place
        self.state.seats[name] = seat

    def _seat(self, target: nn.Module) -> Seat:
        seat = target._modules.get("_bay")
        if not isinstance(seat, Seat):
            seat = Seat(self.session)
            seat.train(target.training)
            swap(target)
            target._modules["_bay"] = seat
            fast = (nn.TransformerEncoderLayer, nn.MultiheadAttention)
            if any(isinstance(m, fast) for m in self.model.modules()):
                target.register_forward_pre_hook(_no_fast_path)
        return seat

    def _settle(self, module: nn.Module) -> None:
        """Put what is new where the model's weights are."""
        tensor = next((p for n, p in self.model.named_parameters() if "_bay" not in n and p.is_floating_point()), None)
        if tensor is not None:
            module.to(tensor.device)

    def _plug(self, name: str, pairs: Sequence[tuple[Place, Kind]]) -> None:
        """Make a module's parameters, at all its sites together, and plug them in."""
        made: dict[str, Mapping[str, Tensor]] = {}
        by_kind: dict[int, tuple[Kind, list[Place]]] = {}
        for place, kind in pairs:
            by_kind.setdefault(id(kind), (kind, []))[1].append(place)
        for kind, several in by_kind.values():
            if isinstance(kind, Kind) and not isinstance(kind, Network):
                made |= parameters(kind, kind.init([self.modulars[p.site.name].site for p in several]))
        kinds = {place.site.name: kind for place, kind in pairs}
        self.state.inventory.names.append(name)
        for site, modular in self.modulars.items():
            modular.plug(name, kinds.get(site), made.get(site))
            part = modular.order[-1]
            if part is not None:
                part.train(modular.training)

    def _rebuild(self) -> None:
        """Tell routers and aggregators which modules there are."""
        names, first = self.names(), next(iter(self.modulars.values()))
        if self.state.router is not None:
            self.state.router.build(names, self._root_site(first))
        for modular in self.modulars.values():
            if modular.router is not None:
                modular.router.build(names, modular.site)
            if modular.aggregator is not None:
                modular.aggregator.build(modular.site)
        if self.state.aggregator is not None:
            self.state.aggregator.build(first.site)

    def _root_site(self, first: Modular):
        """What a shared router is told of its x: the call's embedded input, as wide as the model's embedding."""
        embed = getattr(self.model, "get_input_embeddings", lambda: None)()
        width = getattr(embed, "embedding_dim", None)
        from .core import describe

        return describe("", self.model, width) if width else first.site

    def _close(self, everywhere: Sequence[Place] = ()) -> None:
        """Take everything out of the model again."""
        session, name = self.session, self.state.name
        targets = {id(p.target): p.target for p in [*everywhere, *self.places.values()]}
        for target in [*targets.values(), self.model]:
            seat = target._modules.get("_bay")
            if isinstance(seat, Seat):
                seat.take(name)
        session.bays.pop(name, None)
        session.handles.pop(name, None)
        session.unchecked.discard(name)
        for target in [*targets.values(), self.model]:
            seat = target._modules.get("_bay")
            if not isinstance(seat, Seat) or seat.bays._modules or (target is self.model and session.bays):
                continue
            unswap(target)
            del target._modules["_bay"]
            for key, hook in list(target._forward_pre_hooks.items()):
                if hook is _no_fast_path:
                    del target._forward_pre_hooks[key]
        if session.bays:
            swap(self.model, sorted(session.keywords))

    def _freeze_base(self) -> None:
        for name, parameter in self.model.named_parameters():
            if "_bay" not in name.split("."):
                self.frozen_base[name] = parameter.requires_grad
                parameter.requires_grad_(False)

    def _part(self, name: str) -> int:
        if name not in self.state.inventory.names:
            raise BayError(f"no module {name!r} in bay {self.state.name!r}; there are {listed(self.names())}.")
        return self.state.inventory.names.index(name)

    def _parts(self, *names: str) -> Iterator[nn.Module]:
        for name in names or self.names():
            self._part(name)
            for modular in self.modulars.values():
                part = modular.parts._modules.get(name)
                if part is not None:
                    yield part

    # Verbs

    def names(self) -> list[str]:
        """The modules, in order: their places are the indices that label tensors hold."""
        return list(self.state.inventory.names)

    def use(self, *which: str | None | Sequence[str | None] | Mapping[str, float]) -> "Bay":
        """Set the modules for all calls until changed: a name, several, {name: weight}, a list with one an example, or None
        for the base alone. Without an argument, the router decides again. A label given to a call goes before."""
        self.state.chosen = self._chosen(which)
        return self

    def _chosen(self, which: tuple) -> Routing | Mapping[str, Labels] | None:
        if not which:
            return None
        if len(which) == 1 and isinstance(which[0], Mapping):
            ids = [self._part(name) for name in which[0]]
            weights = torch.tensor([float(w) for w in which[0].values()])
            return Routing(index=torch.tensor(ids, dtype=torch.long), weights=weights, host=(tuple(ids),))
        if len(which) == 1 and isinstance(which[0], (list, tuple, Tensor)):
            if len(self.state.keywords) != 1:
                raise LabelError(
                    f"use({which[0]!r}): a list needs a router with one label; give a name or weights instead."
                )
            return {self.state.keywords[0]: which[0]}
        ids = [self._part(name) for name in which if name is not None]
        return Routing(index=torch.tensor(ids, dtype=torch.long), host=(tuple(ids),))

    def add(self, name: str, spec: Spec, at: Any = None) -> "Bay":
        """Add a module: new parameters, the others untouched. An optimiser that exists must be given them."""
        self.state.inventory.check(name)
        if name in self.state.inventory.names:
            raise BayError(
                f"add({name!r}): bay {self.state.name!r} has a module of that name; remove or rename it first."
            )
        pairs = self._known(name, spec, at)
        for place, kind in pairs:
            modular = self.modulars[place.site.name]
            (modular.aggregator or self.state.aggregator).admit(kind, place.site)  # type: ignore[union-attr]
        self._plug(name, pairs)
        self._rebuild()
        return self

    def _known(self, name: str, spec: Spec, at: Any) -> list[tuple[Place, Kind]]:
        """The places of a module that is added, which the bay must have already."""
        if not isinstance(spec, Mapping) and at is None and isinstance(spec, (Kind, nn.Module)):
            return [(place, spec) for place in self.places.values()]
        pairs = _kinds(self.model, self.at if at is None else at, name, spec)
        new = [place.site.name for place, _ in pairs if place.site.name not in self.modulars]
        if new:
            raise BayError(
                f"add({name!r}): bay {self.state.name!r} has no sites {listed(new)}; attach another bay for them."
            )
        return pairs

    def remove(self, name: str) -> "Bay":
        """Remove a module and its parameters; the others are untouched."""
        index = self._part(name)
        for modular in self.modulars.values():
            modular.unplug(index, name)
        del self.state.inventory.names[index]
        if isinstance(self.state.chosen, Routing):
            self.state.chosen = self._without(self.state.chosen, index)
        self._rebuild()
        return self

    def _without(self, chosen: Routing, index: int) -> Routing | None:
        """The route that was set, after a module left: None if that module was in it."""
        ids = chosen.host[0]  # type: ignore[index]
        if index in ids:
            return None
        ids = tuple(i - (i > index) for i in ids)
        return Routing(index=torch.tensor(ids, dtype=torch.long), weights=chosen.weights, host=(ids,))

    def rename(self, old: str, new: str) -> "Bay":
        """Give a module another name; everything else stays."""
        index = self._part(old)
        self.state.inventory.check(new)
        if new in self.state.inventory.names:
            raise BayError(f"rename({old!r}, {new!r}): bay {self.state.name!r} has a module {new!r} already.")
        self.state.inventory.names[index] = new
        for modular in self.modulars.values():
            parts = modular.parts._modules
            modular.parts._modules = {new if key == old else key: part for key, part in parts.items()}
        self._rename_in_routers(old, new)
        return self

    def _rename_in_routers(self, old: str, new: str) -> None:
        for router in [self.state.router, *[m.router for m in self.modulars.values()]]:
            if router is not None:
                router.rename(old, new)
        self._rebuild()

    def freeze(self, *names: str) -> "Bay":
        """Freeze modules (all, if none is named): no gradient, and so not one bit moves under any optimiser."""
        for part in self._parts(*names):
            for parameter in part.parameters():
                parameter.requires_grad_(False)
                parameter.grad = None
        return self

    def unfreeze(self, *names: str) -> "Bay":
        """Let modules learn again."""
        for part in self._parts(*names):
            for parameter in part.parameters():
                parameter.requires_grad_(True)
        return self

    def reset(self, *names: str) -> "Bay":
        """Draw modules anew, in place: optimisers keep their references."""
        for name in names or self.names():
            index = self._part(name)
            by_kind: dict[int, tuple[Kind, list[Modular]]] = {}
            for modular in self.modulars.values():
                part = modular.order[index]
                if part is not None:
                    by_kind.setdefault(id(part.kind), (part.kind, []))[1].append(modular)
            for kind, several in by_kind.values():
                made = kind.init([modular.site for modular in several])
                for modular in several:
                    for key, tensor in made.get(modular.site.name, {}).items():
                        with torch.no_grad():
                            modular.order[index].tensors()[key].copy_(tensor)  # type: ignore[union-attr]
        return self

    def parameters(self, *names: str) -> list[nn.Parameter]:
        """The parameters of modules, each once."""
        return list({id(p): p for part in self._parts(*names) for p in part.parameters()}.values())

    def parameter_groups(
        self, lr: float, router_lr: float | None = None, aggregator_lr: float | None = None
    ) -> list[dict]:
        """Groups for an optimiser: modules, routers and aggregators, each with its learning rate; frozen ones left out."""
        routers = [self.state.router, *[m.router for m in self.modulars.values()]]
        aggregators = [self.state.aggregator, *[m.aggregator for m in self.modulars.values()]]
        groups = [
            {"name": f"{self.state.name}.modules", "params": self.parameters(), "lr": lr},
            {"name": f"{self.state.name}.router", "params": _of(routers), "lr": lr if router_lr is None else router_lr},
            {"name": f"{self.state.name}.aggregator", "params": _of(aggregators), "lr": aggregator_lr or lr},
        ]
        for group in groups:
            group["params"] = [p for p in group["params"] if p.requires_grad]
        return [group for group in groups if group["params"]]

    def summary(self) -> str:
        """A table: each module with its kinds, sites, and parameters."""
        rows = [("module", "kind", "sites", "parameters", "learning")]
        for name in self.names():
            parts = [m.parts._modules[name] for m in self.modulars.values() if name in m.parts._modules]
            own = self.parameters(name)
            kinds = dict.fromkeys(repr(part.kind) for part in parts)
            learning = sum(p.numel() for p in own if p.requires_grad)
            rows.append((name, " + ".join(kinds), str(len(parts)), f"{sum(p.numel() for p in own):,}", f"{learning:,}"))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        head = f"bay {self.state.name!r}: router {type(self.state.router).__name__}, {len(self.modulars)} sites"
        return "\n".join([head, *lines])

    @contextmanager
    def disable(self) -> Iterator[None]:
        """The model without this bay, for the length of a with-block."""
        before, self.state.enabled = self.state.enabled, False
        try:
            yield
        finally:
            self.state.enabled = before

    def losses(self) -> dict[str, Tensor]:
        """The auxiliary losses of the last call, by name, summed over sites."""
        context = self.session.last
        total: dict[str, Tensor] = {}
        for name, value in [] if context is None else context.losses:
            total[name] = total[name] + value if name in total else value
        return total

    def routing(self) -> Routing | None:
        """The route of the last call, if it is one for all sites."""
        return None if self.session.last is None else self.session.last.routes.get(self.state.name)

    def in_state_dict(self, shown: bool = True) -> "Bay":
        """Show the modules in the model's state dict (for foreign checkpoints), or hide them, as at first."""
        self.session.shown = shown
        return self

    def detach(self) -> nn.Module:
        """Take the bay out; the base comes back bit for bit. The bay attached last goes first."""
        order = list(self.session.bays)
        if self.state.name not in order:
            raise BayError(f"detach: bay {self.state.name!r} is not attached any more.")
        if order[-1] != self.state.name:
            raise BayError(
                f"detach: bay {self.state.name!r} is not the one attached last; outputs compose in that order. Detach "
                f"{listed(reversed(order[order.index(self.state.name) + 1 :]))} first."
            )
        for target in [place.target for place in self.places.values()]:
            if "_base" not in type(target).__dict__ or "forward" in target.__dict__:
                unswap(target)  # raises, before anything has been taken out
        parameters_now = dict(self.model.named_parameters())
        self._close()
        for name, wanted in self.frozen_base.items():
            if name in parameters_now:
                parameters_now[name].requires_grad_(wanted)
        return self.model


def _of(modules: Sequence[nn.Module | None]) -> list[nn.Parameter]:
    return list({id(p): p for m in modules if m is not None for p in m.parameters()}.values())


def _no_fast_path(module: nn.Module, args: tuple) -> None:
    """A hook that does nothing: torch's fused encoder, which would go past our sites, is not used where hooks are."""
