"""`at`: from what a user says to the places of a model. A name that matches nothing raises; nothing is skipped."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..abstract import Site
from ..core import base_type, describe
from ..errors import MatchError, listed
from ._roles import Role, match_role


@dataclass(frozen=True, eq=False)
class Place:
    """A site, and how its target is tapped: whole, a slice of its output, the end of a span, a parameter of it, or what
    goes into it."""

    site: Site
    target: nn.Module
    features: slice | None = None
    entry: str | None = None  # the target at which a span begins
    before: bool = False  # whether the site is what goes into the target

    @property
    def whole(self) -> bool:
        """Whether the site is the whole call of its target, or of a parameter of it."""
        return self.features is None and self.entry is None and not self.before

    def view(self) -> Site:
        """The site with the weight and bias as a delta sees them: its own slice, and no narrower than float32."""
        own = self.target._parameters
        weight, bias = own.get(self.site.parameter), None if self.site.bare else own.get("bias")
        if weight is None or self.before:
            return self.site
        dtype = torch.promote_types(weight.dtype, torch.float32)
        cut = self.features or slice(None)
        weight = (weight[..., cut] if self.site.form == "transposed" else weight[cut]).to(dtype)
        module: Any = SimpleNamespace(weight=weight, bias=None if bias is None else bias[cut].to(dtype))
        return replace(self.site, module=module, parameter="weight", dtype=dtype)


@dataclass(frozen=True)
class At:
    """A pattern with more said: see `at`, `part`, `span` and `before`."""

    what: Any
    features: int | None = None
    output: tuple[int, int] | None = None
    until: Any = None
    before: bool = False


def at(what: Any, *, features: int | None = None) -> At:
    """The same as `what`, with the width of the site said where it can't be read from the module."""
    return At(what, features=features)


def part(what: Any, start: int, stop: int) -> At:
    """The features start … stop of the output of `what`: GPT-2's value is `mb.part("*.attn.c_attn", 1536, 2304)`."""
    return At(what, output=(start, stop))


def span(first: Any, last: Any) -> At:
    """From the input of `first` to the output of `last`, pair by pair: BERT's feed-forward part, which is no module."""
    return At(first, until=last)


def before(what: Any, *, features: int | None = None) -> At:
    """What goes into `what`, with the identity as f: a module there changes the input of a layer, whatever gives it.

        mb.attach(model, at=mb.before(mb.role.head), modules={"a": mb.Bottleneck(8)})

    The site is called NAME[before]. features: the width of that input, where it can't be read from the module. For
    function compositions and networks; what changes f's parameters has none to change there, and is refused.
    """
    return At(what, features=features, before=True)


def named(model: nn.Module) -> dict[str, nn.Module]:
    """The model's own modules by dotted name, without what modbay put there."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def walk(name: str, module: nn.Module) -> None:  # not named_modules: it would walk through thousands of parts
        if id(module) not in seen:
            seen.add(id(module))
            found[name] = module
            for child, inner in module._modules.items():
                if inner is not None and child != "_bay":
                    walk(f"{name}.{child}" if name else child, inner)

    walk("", model)
    return found


def places(model: nn.Module, what: Any) -> list[Place]:
    """The places that `what` says, in the model's order; raises MatchError if a part of it matches nothing."""
    found: dict[str, Place] = {}
    for one in what if isinstance(what, (list, tuple)) else [what]:
        for place in _places(model, one):
            found.setdefault(place.site.name, place)
    order = {name: i for i, name in enumerate(named(model))}
    return sorted(found.values(), key=lambda p: (order.get(p.site.name.split("[")[0], len(order)), p.site.name))


def _places(model: nn.Module, what: Any) -> list[Place]:
    if not isinstance(what, At):
        return [_place(model, name) for name in names(model, what)]
    if what.until is not None:
        return _spans(model, what)
    out = []
    for name in names(model, what.what):
        place = _place(model, name, what.features)
        if what.before:
            place = _entering(place)
        if what.output is not None:
            start, stop = what.output
            if place.site.bare:
                raise MatchError(f"mb.part({what.what!r}, …): {name!r} is a parameter, without an output.")
            width = place.site.outputs
            if width is not None and not 0 <= start < stop <= width:
                raise MatchError(f"mb.part({what.what!r}, {start}, {stop}): {name!r} has outputs 0 … {width}.")
            site = replace(place.site, name=f"{name}[{start}:{stop}]", outputs=stop - start)
            place = replace(place, site=site, features=slice(start, stop))
        out.append(place)
    return out


def _place(model: nn.Module, name: str, features: int | None = None) -> Place:
    path, _, last = name.rpartition(".")
    owner = model.get_submodule(path)
    if name == "" or last in owner._modules:
        target = model.get_submodule(name)
        return Place(describe(name, target, features), target)
    tensor = getattr(owner, last)
    form = "experts" if tensor.ndim == 3 else "linear"
    site = Site(name, form, tensor.shape[-1], tensor.shape[-2], -1, tensor.device, tensor.dtype, owner, last, bare=True)
    return Place(site, owner)


def _entering(place: Place) -> Place:
    """The place before a module; raises MatchError where what goes in has no features."""
    site = place.site
    if site.form == "embedding" or site.bare:
        what = "token ids" if site.form == "embedding" else "no call of its own"
        raise MatchError(f"mb.before({site.name!r}): {type(place.target).__name__} there takes {what}, no features.")
    name = f"{site.name}[before]"
    there = Site(name, "other", site.inputs, site.inputs, site.axis, site.device, site.dtype)
    return Place(there, place.target, before=True)


def _spans(model: nn.Module, what: At) -> list[Place]:
    first, last = names(model, what.what), names(model, what.until)
    if len(first) != len(last):
        raise MatchError(
            f"mb.span({what.what!r}, {what.until!r}): {len(first)} beginnings and {len(last)} ends do not pair up."
        )
    out = []
    for begin, end in zip(first, last, strict=True):
        a, b = _place(model, begin), _place(model, end)
        site = Site(f"{begin}:{end}", "other", a.site.inputs, b.site.outputs, -1, b.site.device, b.site.dtype, b.target)
        out.append(Place(site, b.target, entry=begin))
    return out


def names(model: nn.Module, what: Any) -> list[str]:
    """The dotted names that a pattern, type, predicate or role matches; raises MatchError if there are none."""
    modules = named(model)
    if isinstance(what, Role):
        return match_role(model, what)
    if isinstance(what, str):
        found = [name for name in modules if fnmatchcase(name, what)] or [
            name
            for name, tensor in model.named_parameters()
            if fnmatchcase(name, what) and _bare(modules, name, tensor)
        ]
    elif isinstance(what, type):
        found = [name for name, module in modules.items() if isinstance(module, what)]
    elif isinstance(what, Callable):
        found = [name for name, module in modules.items() if what(name, module)]
    else:
        raise MatchError(
            f"at={what!r}: a place is a name pattern, a module type, a predicate (name, module) → bool, a role "
            f"(mb.role.ffn …), or a list of these; not {type(what).__name__}."
        )
    if not found:
        raise MatchError(_nothing(what, modules))
    return found


def _bare(modules: Mapping[str, nn.Module], name: str, tensor: Tensor) -> bool:
    """Whether a parameter is a site by itself: fused experts (E, o, i), or a matrix of what is no layer of torch's, as
    the gates of mixtures of experts are."""
    owner = modules.get(name.rpartition(".")[0])
    if owner is None or tensor.ndim not in (2, 3):
        return False
    form = describe(name, owner).form
    layer = form == "transposed" or (form != "other" and base_type(owner).__module__.startswith("torch.nn."))
    return tensor.ndim == 3 or not layer


def _nothing(what: Any, modules: Iterable[str]) -> str:
    """The error of a match that is empty, with what is near."""
    said = what.__name__ if isinstance(what, (type, Callable)) and hasattr(what, "__name__") else repr(what)
    message = f"at={said} matches no module of the model."
    if isinstance(what, str):
        tail = what.rpartition(".")[2].strip("*")
        last = list(dict.fromkeys(name.rpartition(".")[2] for name in modules if name))
        near = get_close_matches(tail, last, 3, 0.5) or [n for n in last if tail and (tail in n or n in tail)]
        message += f" Modules are named like {listed(near or last)}." if last else ""
        if "*" not in what and any(name.endswith("." + what) for name in modules):
            message += f" Names are dotted paths from the root: did you mean '*.{what}'?"
    return message + " `modbay inspect MODEL` lists all names, types and roles."


def union(*several: Sequence[Place]) -> dict[str, Place]:
    """Places by name, those of the first list first."""
    found: dict[str, Place] = {}
    for group in several:
        for place in group:
            found.setdefault(place.site.name, place)
    return found
