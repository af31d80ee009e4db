"""attach, and the handle that it returns: a bay of modules in a network."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import library
from .abstract import Aggregator, Kind, Router, Routing
from .aggregation import WeightedSum
from .core import BayState, Inventory, Modular, Session, as_kind, pack, refuse_packed, unpack
from .errors import BayError, CompositionError, LabelError, listed
from .fold import fold, unfold
from .library import save
from .merge import MergeReport, merge
from .recording import Recording, record
from .routing import ByLabel
from .seams import Fitting, Pairs, Place, Seat, Spec, free, pairs_of, places, union, unswap
from .types import Labels


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

    at: a name pattern (fnmatch), a module type, a predicate (name, module) → bool, a role (mb.role.ffn), mb.part,
        mb.span, mb.before, or a list of these, which is their union; "" is the model itself.
    modules: a kind by name, or, for a module whose kind differs by site, a mapping from places to kinds.
    router: an object is one route for all sites; a callable that makes one gives each site its own. Default: by label,
        the keyword being `name`. aggregator: likewise. Default: WeightedSum.
    freeze: the base's parameters stop requiring gradients. sometimes: sites may not run in every pass (experts).
    add_losses: auxiliary losses are added to a transformers output's `.loss` in training.
    Raises MatchError, LabelError, CompositionError or BayError, and leaves the model as it was.
    """
    session = _session(model)
    state = _state(model, session, name, router, aggregator, sometimes, add_losses)
    fitting = Fitting(model, session, state, router, aggregator, at)
    said = [] if at is None else places(model, at)
    kinds = {module: pairs_of(model, at, module, spec, said) for module, spec in (modules or {}).items()}
    everywhere = list(union(said, *[[place for place, _ in pairs] for pairs in kinds.values()]).values())
    if not everywhere:
        raise BayError("attach: neither at=… nor a module says a place.")
    return _open(fitting, everywhere, kinds, freeze)


def _open(fitting: Fitting, everywhere: Sequence[Place], kinds: Mapping[str, Pairs], freeze: bool, known=None) -> "Bay":
    """The bay put into the model; on an error the model is left as it was."""
    bay = Bay(fitting)
    try:
        fitting.open(bay, everywhere, kinds, known)
    except BaseException:
        fitting.close(everywhere)
        raise
    if freeze:
        fitting.freeze_base()
    return bay


def load(
    model: nn.Module, folder: str | Path, *, base: str = "same", allow_nan: bool = False, freeze: bool = True,
    name: str | None = None,
) -> "dict[str, Bay]":  # fmt: skip
    """Attach the bays that a folder holds (`bay.save`), with their routers and aggregators; returns them by name.

    A folder of peft's or adapters' is known, too: its modules come frozen, in one bay that is called `name`, or "peft"
    or "adapters"; one that is alone is at work at once; peft's Poly and multitask prompts come with their router, and
    calls say task_ids=…. base: "any" loads onto another base than the modules were made on. allow_nan: values may be
    NaN or infinite. freeze: as for `attach`. All is checked before the model changes; raises FileError, or BaseMismatch
    with the names of the tensors that differ, and leaves the model as it was.
    """
    session, out = _session(model), {}
    try:
        for plan in library.plans(model, session, folder, base, allow_nan, name):
            with library.making(model, plan.path):
                own = (plan.name, plan.router, plan.aggregator, plan.sometimes, plan.add_losses)
                state = _state(model, session, *own)
                state.guest = plan.guest
                fitting = Fitting(model, session, state, plan.router, plan.aggregator, None)
                out[state.name] = _open(fitting, list(plan.places.values()), plan.pairs, freeze, plan.known)
            plan.finish(fitting)
            if plan.start is not None:
                out[state.name].use(*plan.start)
    except BaseException:
        for bay in reversed(out.values()):
            bay.fitting.close()
        raise
    return out


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
            f"a bay is attached already to {inner.rpartition('._bay')[0] or inner!r}, a part of this model: attach to "
            f"the same root, so that one call has one set of labels."
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
    free(model, sample.keywords)
    shared_aggregator = (
        WeightedSum() if aggregator is None else aggregator if isinstance(aggregator, Aggregator) else None
    )
    return BayState(
        name, Inventory(), shared, shared_aggregator, tuple(sample.keywords), sometimes=sometimes, add_losses=add_losses
    )


class Bay:
    """The handle of a bay: modules of one inventory, in a model's sites, under one router and one aggregator."""

    def __init__(self, fitting: Fitting):
        self.fitting = fitting
        self.model, self.session, self.state = fitting.model, fitting.session, fitting.state

    def __repr__(self) -> str:
        return f"<Bay {self.state.name!r}: {listed(self.names())} at {len(self.modulars)} sites>"

    @property
    def modulars(self) -> dict[str, Modular]:
        """The equation at each site, by the site's name."""
        return self.fitting.modulars

    def _part(self, name: str) -> int:
        try:
            return self.state.inventory.names.index(name)
        except ValueError:
            have = listed(self.names())
            raise BayError(f"no module {name!r} in bay {self.state.name!r}; there are {have}.") from None

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

    def use(self, *which: str | Sequence[str | None] | Mapping[str, float] | None) -> "Bay":
        """Set the modules for all calls until changed: a name, several, {name: weight}, a list with one an example, or
        None for the base alone. Without an argument, the router decides again. A label given to a call goes before."""
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
            (modular.aggregator or self.state.aggregator).admit(as_kind(kind), place.site)  # type: ignore[union-attr]
        self.fitting.plug(name, pairs)
        self.fitting.rebuild()
        return self

    def _known(self, name: str, spec: Spec, at: Any) -> Pairs:
        """The places of a module that is added, which the bay must have already."""
        if not isinstance(spec, Mapping) and at is None and isinstance(spec, (Kind, nn.Module)):
            return [(place, spec) for place in self.fitting.places.values()]  # type: ignore[misc]
        where = self.fitting.at if at is None else at
        pairs = pairs_of(self.model, where, name, spec, [] if where is None else places(self.model, where))
        new = [place.site.name for place, _ in pairs if place.site.name not in self.modulars]
        if new:
            raise BayError(
                f"add({name!r}): bay {self.state.name!r} has no sites {listed(new)}; attach another bay for them."
            )
        return pairs

    def remove(self, name: str) -> "Bay":
        """Remove a module and its parameters; the others are untouched."""
        index = self._part(name)
        self.fitting.unplug(index, name)
        self._forget(name)
        if isinstance(self.state.chosen, Routing):
            self.state.chosen = self._without(self.state.chosen, index)
        self.fitting.rebuild()
        return self

    def _forget(self, name: str, new: str | None = None) -> None:
        """What is known of a module goes with it, or with its new name."""
        several: list[dict[str, Any]] = [self.state.foreign, self.state.about]
        for known in several:
            if name in known:
                said = known.pop(name)
                known.update({} if new is None else {new: said})

    def _without(self, chosen: Routing, index: int) -> Routing | None:
        """The route that was set, after a module left: None if that module was in it."""
        ids = chosen.host[0]  # type: ignore[index]
        if index in ids:
            return None
        ids = tuple(i - (i > index) for i in ids)
        return Routing(index=torch.tensor(ids, dtype=torch.long), weights=chosen.weights, host=(ids,))

    def merge(
        self,
        name: str,
        which: Mapping[str, float] | Sequence[str],
        method: str = "linear",
        of: str | None = None,
        rank: int | None = None,
        **arguments: Any,
    ) -> MergeReport:
        """Add a module made of others, and report, by site, what was done and how exact it is:

            report = bay.merge("both", {"en": 0.7, "de": 0.3})         # Σ w_i Δ_i, exactly
            report = bay.merge("both", ["en", "de"], method="ties", density=0.2, rank=16)

        which: {name: weight}, or names, which weigh 1 each, 1/n each if linear. method: linear, task_arithmetic, ties,
        dare or slerp, as in modbay.merging; what more they take are its `arguments` (density, scale, t, seed …).
        of: "deltas", what modules change of f's parameters, Σ w_i Δ_i; or "parameters", each averaged, Σ w_i φ_i, which
        LoRA's A and B are not the same by, and the only way for bottlenecks and prompts. None: deltas where all parts
        at a site have them. rank: the most that a low-rank result may have, and what would be kept dense is cut to it;
        None: exact. A module without a part at a site changes nothing there; weight 1 on one is that module, bit for
        bit. The others stay, and an optimiser must be given the new one.
        Raises CompositionError for kinds at a site that have no merge in common, and MergeError or BayError for what
        is asked; then nothing has changed.
        """
        return merge(self.fitting, name, which, method, of, rank, **arguments)

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
        self._forget(old, new)
        return self

    def _rename_in_routers(self, old: str, new: str) -> None:
        for router in [self.state.router, *[m.router for m in self.modulars.values()]]:
            if router is not None:
                router.rename(old, new)
        self.fitting.rebuild()

    def freeze(self, *names: str) -> "Bay":
        """Freeze modules (all, if none is named): no gradient, and so not one bit moves under any optimiser."""
        for part in self._parts(*names):
            for parameter in part.parameters():
                parameter.requires_grad_(False)
                parameter.grad = None
        return self

    def unfreeze(self, *names: str) -> "Bay":
        """Let modules learn again."""
        parts = list(self._parts(*names))
        refuse_packed(parts, "unfreeze", self.state.name)
        for part in parts:
            for parameter in part.parameters():
                parameter.requires_grad_(True)
        return self

    def pack(self, *names: str) -> "Bay":
        """Put modules (all, if none is named) into one tensor a site, frozen: quicker to serve, and to compile."""
        for name in names:
            self._part(name)
        pack(list(self.modulars.values()), names or self.names())
        return self

    def unpack(self) -> "Bay":
        """Give packed modules parameters of their own again, learning as they were. An optimiser must be given them."""
        for modular in self.modulars.values():
            unpack(modular)
        return self

    def reset(self, *names: str) -> "Bay":
        """Draw modules anew, in place: optimisers keep their references."""
        for name in names or self.names():
            index = self._part(name)
            self._forget(name)
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
        """Groups for an optimiser: modules, routers, aggregators, each with its learning rate; frozen ones left out."""
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
            parts: list[Any] = [m.parts._modules.get(name) for m in self.modulars.values()]
            parts = [part for part in parts if part is not None]
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

    def record(
        self, *, when: str = "always", tokens: int = 0, values: Mapping[str, Sequence[str]] | None = None
    ) -> AbstractContextManager[Recording]:
        """Record the routers' choices in a with-block, in training and serving, by site, label and time:

            with bay.record() as recording:
                model(**batch, task=["ner", "pos"])
            print(*recording.alarms(), sep="\\n")

        when: "training" or "evaluation" leaves the other's calls out. tokens: how many positions are sampled, to see
        which tokens went where. values: what the indices of labels mean that are tensors, and that no router reads.
        """
        several = self.modulars
        return record(self.state.name, self.names, self.state.router, several, when=when, tokens=tokens, values=values)

    def in_state_dict(self, shown: bool = True) -> "Bay":
        """Show the modules in the model's state dict (for foreign checkpoints), or hide them, as at first."""
        self.session.shown = shown
        return self

    def save(
        self,
        folder: str | Path,
        *names: str,
        about: Mapping[str, Mapping[str, Any]] | None = None,
        library: str | Path | None = None,
    ) -> Path:
        """Write FOLDER/<bay>/: the bay and all its modules, or only those named; the others are not touched.

        about: what to keep of a module beside its tensors, by its name; all of it may be left out:

            bay.save("library", about={"en": {
                "labels": {"language": ["en"]}, "metrics": {"accuracy": 0.93}, "licence": "CC-BY-4.0", "notes": "…",
                "data": [{"name": "mail.csv", "sha256": "…", "rows": 1200}], "parents": [], "embedding": [0.1, …],
            }})

        It is kept when the module is loaded and saved again; of one that learned more since, labels and licence are,
        and what it was made of becomes its parent. library: a folder where the modules go, if they aren't there yet;
        FOLDER/<bay> then refers to them by their content (a composition), and mb.load finds them there.
        """
        return save(folder, self.fitting, *names, about=about, library=library)

    def load(
        self, folder: str | Path, *names: str, add: bool = False, base: str = "same", allow_nan: bool = False
    ) -> "Bay":
        """Load in place what `save` wrote: all of it, or the modules named; optimisers keep their references.

        add: modules that the bay lacks are added, and an optimiser must be given them. base, allow_nan: see `mb.load`.
        """
        library.load(self.fitting, folder, names, add, base, allow_nan)
        return self

    def export(
        self, folder: str | Path, name: str | None = None, format: str = "peft", rank: int | None = None,
        error: float = 0.05,
    ) -> dict[str, float]:  # fmt: skip
        """Write a module, the one there is unless named, into FOLDER as others load it; returns errors by site.

        format: "peft" or "adapters", exactly; peft's without a name is the whole bay where peft has such: Polytropon of
        LoRAs, and prompts by task that share one; adapters' is a setup of what `use` has set, of several modules that a
        Sequence stacks or AdapterFusion fuses. "lora" is plain LoRA for the engines that serve it (vLLM, LoRAX),
        "gguf" the same for llama.cpp, as FOLDER/NAME.gguf or a file that ends so: exact where the module is of low
        rank, else the nearest of a `rank`, or of the lowest whose relative error ‖ΔW − B A‖/‖ΔW‖ is at most `error`.
        Raises CompositionError for what a format can't hold, or a larger error; nothing is written then.
        """
        return library.export(folder, self.fitting, name, format, rank, error)

    def fold(self, *which: str | Mapping[str, float], untie: bool = False, dequantise: bool = False) -> "Bay":
        """Add modules into the base's weights: names, {name: weight}, or what `use` has set; the bay rests meanwhile.

        untie: a weight that is used in two places is copied for this one. dequantise: a quantised linear layer
        becomes a Linear first; how much that acts otherwise is logged. What has no delta raises CompositionError.
        """
        fold(self.fitting, which, untie, dequantise)
        return self

    def unfold(self) -> "Bay":
        """Take the folded modules out of the base's weights again, bit for bit; the bay runs again."""
        unfold(self.fitting)
        return self

    def detach(self, keep: bool = False) -> nn.Module:
        """Take the bay out; the base comes back bit for bit. The bay attached last goes first.

        keep: what is folded stays in the base's weights for good; without it, a folded bay must be unfolded first.
        """
        order = list(self.session.bays)
        if self.state.name not in order:
            raise BayError(f"detach: bay {self.state.name!r} is not attached any more.")
        if order[-1] != self.state.name:
            raise BayError(
                f"detach: bay {self.state.name!r} is not the one attached last; outputs compose in that order. Detach "
                f"{listed(reversed(order[order.index(self.state.name) + 1 :]))} first."
            )
        if keep != (self.state.folded is not None):
            said = "is not folded: there is nothing to keep" if keep else "is folded: unfold it first, or keep=True"
            raise BayError(f"detach(keep={keep}): bay {self.state.name!r} {said}.")
        for target in [place.target for place in self.fitting.places.values()]:
            if "_base" not in type(target).__dict__ or "forward" in target.__dict__:
                unswap(target)  # raises, before anything has been taken out
        self.fitting.close()
        return self.model


def _of(modules: Sequence[nn.Module | None]) -> list[nn.Parameter]:
    return list({id(p): p for m in modules if m is not None for p in m.parameters()}.values())
