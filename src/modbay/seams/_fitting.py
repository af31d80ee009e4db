"""Fitting a bay into a model, and taking it out again: seats, seams, parts, and what routers are told of them."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from keyword import iskeyword
from typing import Any

from torch import Tensor, nn

from ..abstract import Generator, Kind, ParameterComposition, Site
from ..core import BayState, Modular, Network, Session, as_kind, parameters
from ..errors import BayError, CompositionError, LabelError
from ..types import Params
from ._match import Place, places
from ._roles import role
from ._seams import seam_for
from ._seat import Seam, Seat, embeddings
from ._sides import crosses, two_sided
from ._swap import swap, unswap

Spec = Kind | nn.Module | Mapping[Any, Kind]
Pairs = list[tuple[Place, Kind]]

KEYS = re.compile("[kv]", re.IGNORECASE)  # how the last name of a key's or value's projection begins

FAST = (nn.TransformerEncoderLayer, nn.MultiheadAttention)  # torch's modules that may go past their children


class Fitting:
    """One bay's modulars and places in a model, by site name."""

    def __init__(self, model: nn.Module, session: Session, state: BayState, router: Any, aggregator: Any, at: Any):
        self.model, self.session, self.state, self.at = model, session, state, at
        self.make_router: Callable | None = _maker(router)
        self.make_aggregator: Callable | None = _maker(aggregator)
        self.modulars: dict[str, Modular] = {}
        self.places: dict[str, Place] = {}
        self.base_flags: dict[str, bool] = {}  # requires_grad of the base's parameters, before they were frozen
        self.guarded = any(isinstance(module, FAST) for module in model.modules())

    def open(
        self,
        handle: Any,
        everywhere: Sequence[Place],
        kinds: Mapping[str, Pairs],
        known: Mapping[str, Mapping[str, Params]] | None = None,
    ) -> None:
        """Seat the bay at every place and plug its modules in; raises before the model is changed where it can."""
        session, state = self.session, self.state
        here: dict[str, list[Kind]] = {place.site.name: [] for place in everywhere}
        for name, pairs in kinds.items():
            state.inventory.check(name)
            for place, kind in pairs:
                here[place.site.name].append(kind)
        for place in everywhere:
            self._place(place, here[place.site.name])
        root = self._seat(self.model)
        root.is_root = True
        session.bays[state.name], session.handles[state.name] = state, handle
        swap(self.model, sorted(session.keywords))
        for name, pairs in kinds.items():
            self.plug(name, pairs, None if known is None else known[name])
        self.rebuild()
        shared = nn.Module()
        parts = {"router": state.router, "aggregator": state.aggregator}
        shared._modules.update({key: part for key, part in parts.items() if part is not None})
        root.shared._modules[state.name] = shared.train(self.model.training)
        weight = next((p for n, p in self.model.named_parameters() if _own(n) and p.is_floating_point()), None)
        if weight is not None:
            shared.to(weight.device)
        session.unchecked.add(state.name)

    def _place(self, place: Place, kinds: Sequence[Kind]) -> None:
        """A modular in the target's seat, with the seam that its kinds ask for."""
        name, seat = place.site.name, self._seat(place.target)
        aggregator = self.make_aggregator() if self.make_aggregator else None
        router = self.make_router() if self.make_router else None
        for kind in kinds:
            (aggregator or self.state.aggregator).admit(as_kind(kind), place.site)  # type: ignore[union-attr]
        modular = Modular(
            site=place.site, inventory=self.state.inventory, aggregator=aggregator, router=router, bay=self.state.name
        )
        seam = seam_for(self.model, place, kinds, seat)  # the last that can raise: a seam may change the model
        seat.put(self.state.name, modular, seam)
        seat.decodes = _decodes(self.model, place)
        self.modulars[name], self.places[name], self.state.seats[name] = modular, place, seat

    def _seat(self, target: nn.Module) -> Seat:
        seat = target._modules.get("_bay")
        if not isinstance(seat, Seat):
            seat = Seat(self.session)
            seat.train(target.training)
            swap(target)
            target._modules["_bay"] = seat
            if self.guarded:
                target.register_forward_pre_hook(_no_fast_path)
        return seat

    def plug(
        self,
        name: str,
        pairs: Pairs,
        known: Mapping[str, Params] | None = None,
        made: Mapping[str, Params] | None = None,
    ) -> None:
        """Make a module's parameters, at all its sites together, and plug them in. `known`: what will be filled in;
        `made`: the parameters themselves, by site."""
        for place, kind in pairs:
            self._fits(place, kind)
        self._read([kind for _, kind in pairs])
        made = self._made(pairs, known) if made is None else made
        kinds = {place.site.name: kind for place, kind in pairs}
        self.state.inventory.names.append(name)
        for site, modular in self.modulars.items():
            modular.plug(name, kinds.get(site), made.get(site))
            part = modular.order[-1]
            if part is not None:
                part.train(modular.training)

    def _made(self, pairs: Pairs, known: Mapping[str, Params] | None) -> dict[str, dict[str, Tensor]]:
        """A new module's parameters by site: each kind makes those of all its sites together; equal ones are one."""
        by_kind: dict[int, tuple[Kind, list[Site]]] = {}
        for place, kind in pairs:
            if isinstance(kind, Kind) and not isinstance(kind, Network):
                number = self.state.inventory.number(kind)
                by_kind.setdefault(number, (kind, []))[1].append(self.modulars[place.site.name].site)
        made: dict[str, dict[str, Tensor]] = {}
        for kind, sites in by_kind.values():
            made |= parameters(kind, kind.init(sites) if known is None else kind.restore(sites, known))
        return made

    def _fits(self, place: Place, kind: Any) -> None:
        """Raise CompositionError if the seam that is there already was made for other kinds."""
        if place.before and isinstance(kind.kind if isinstance(kind, Generator) else kind, ParameterComposition):
            raise CompositionError(
                f"site {place.site.name!r}: {type(kind).__name__} changes parameters of f, and what goes into a layer "
                f"has none. Attach it at the layer itself, or take a kind that acts on features (mb.Bottleneck …)."
            )
        seat, modular = self.state.seats[place.site.name], self.modulars[place.site.name]
        keys = [key for key, other in seat.bays._modules.items() if other is modular]  # type: ignore[union-attr]
        seam: Seam = seat.seams[keys[0]]  # type: ignore[index, assignment]
        if (kind.place if isinstance(kind, Kind) else "") != seam.place:
            raise CompositionError(
                f"site {place.site.name!r} of bay {self.state.name!r} was opened for "
                f"{'prompts or prefixes' if seam.place else 'modules that change its output'}: {type(kind).__name__} "
                f"does not fit there. Attach a second bay for it (mb.attach(…, name=…))."
            )

    def _read(self, kinds: Sequence[Kind]) -> None:
        """Let the labels that these kinds read through the door; raises LabelError for one that the call owns."""
        wanted = {keyword: None for kind in kinds if isinstance(kind, Kind) for keyword in kind.keywords}
        new = [keyword for keyword in wanted if keyword not in (*self.state.keywords, *self.state.read)]
        if new:
            free(self.model, new)
            self.state.read += tuple(new)
            swap(self.model, sorted(self.session.keywords))

    def unplug(self, index: int, name: str) -> None:
        """Take a module out at all sites."""
        for modular in self.modulars.values():
            modular.unplug(index, name)
        del self.state.inventory.names[index]

    def rebuild(self) -> None:
        """Tell routers and aggregators which modules there are."""
        names, first = self.state.inventory.names, next(iter(self.modulars.values())).site
        if self.state.router is not None:
            self.state.router.sites = tuple(self.modulars)
            self.state.router.build(names, self.seen())
        if self.state.aggregator is not None:
            self.state.aggregator.build(first)
        for modular in self.modulars.values() if self.make_router or self.make_aggregator else ():
            if modular.router is not None:
                modular.router.build(names, modular.site)
            if modular.aggregator is not None:
                modular.aggregator.build(modular.site)

    def seen(self) -> Site:
        """The site that a shared router reads: the call's embedded input, or the first site where there is none."""
        width = getattr(embeddings(self.model), "embedding_dim", None)
        first = next(iter(self.modulars.values())).site
        return Site("", "other", width, width, -1, first.device, first.dtype, self.model) if width else first

    def freeze_base(self) -> None:
        """Stop the base's gradients; what they were is remembered for `close`."""
        for name, parameter in self.model.named_parameters():
            if _own(name):
                self.base_flags[name] = parameter.requires_grad
                parameter.requires_grad_(False)

    def close(self, everywhere: Sequence[Place] = ()) -> None:
        """Take everything out of the model again."""
        session, name = self.session, self.state.name
        targets = list({id(p.target): p.target for p in [*everywhere, *self.places.values()]}.values())
        for target in [*targets, self.model]:
            seat = target._modules.get("_bay")
            if isinstance(seat, Seat):
                seat.take(name)
        for table in (session.bays, session.handles):
            table.pop(name, None)
        session.unchecked.discard(name)
        for target in [*targets, self.model]:
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
        flags = dict(self.model.named_parameters())
        for parameter, wanted in self.base_flags.items():
            if parameter in flags:
                flags[parameter].requires_grad_(wanted)


def pairs_of(model: nn.Module, at: Any, name: str, spec: Spec, said: Sequence[Place]) -> Pairs:
    """The places of one module, each with its kind there; `said` are those of `at`."""
    if isinstance(spec, Mapping):
        pairs = [(place, kind) for where, kind in spec.items() for place in places(model, where)]
    else:
        if at is None and not (isinstance(spec, Kind) and spec.place):
            raise BayError(f"modules[{name!r}] = {spec!r} has no place: pass at=…, or a mapping from places to kinds.")
        if at is None:  # a prompt is put in front of the model's input, a prefix into every attention
            said = places(model, "" if spec.place == "input" else role.attention)  # type: ignore[union-attr]
        pairs = [(place, spec) for place in said]
    seen: dict[str, Kind] = {}
    for place, kind in pairs:
        if place.site.name in seen:
            raise CompositionError(
                f"modules[{name!r}] has two kinds at {place.site.name!r}: {seen[place.site.name]!r} and {kind!r}. "
                f"A module has one kind a site; put the second into a bay of its own."
            )
        if not isinstance(kind, (Kind, nn.Module)):
            raise CompositionError(
                f"modules[{name!r}] = {kind!r}: a module is a kind (mb.LoRA(8), …), not {type(kind).__name__}."
            )
        seen[place.site.name] = kind  # type: ignore[assignment]
    return pairs  # type: ignore[return-value]


def free(model: nn.Module, keywords: Sequence[str]) -> None:
    """Raise LabelError for a label that can be no argument of the model's call, or is one already."""
    base = type(model).__dict__.get("_base", type(model))
    own = inspect.signature(base.forward).parameters
    for keyword in keywords:
        if not keyword.isidentifier() or iskeyword(keyword):
            raise LabelError(
                f"label {keyword!r}: labels are arguments of the call, {base.__name__}(x, {keyword}=…), so that "
                f"it must be a Python name. Choose another: mb.attach(…, name='my_bay'), or the router's label."
            )
        if keyword in own:
            raise LabelError(
                f"label {keyword!r}: {base.__name__}.forward has an argument of that name. Choose another name for the "
                f"label."
            )


def _maker(part: Any) -> Callable | None:
    """A callable that makes a part for each site; None for a part that is shared."""
    return part if part is not None and not isinstance(part, nn.Module) else None


def _own(name: str) -> bool:
    return "_bay" not in name.split(".")


def _decodes(model: nn.Module, place: Place) -> bool:
    """Whether x at a place is of the decoder's positions: it is neither in the encoder nor around it, nor a key or
    value of the attention to the encoder."""
    if not two_sided(model) or not hasattr(model, "get_encoder"):
        return False
    encoder: Any = model.get_encoder()  # type: ignore[operator]
    within, around = place.target in set(encoder.modules()), encoder in set(place.target.modules())
    attention, _, last = place.site.name.rpartition(".")
    return not within and not around and not (crosses(attention) and KEYS.match(last))


def _no_fast_path(module: nn.Module, args: tuple) -> None:
    """A hook that does nothing: torch's fused encoder, which would go past our sites, is not used where hooks are."""
