"""Folding: what the active modules do to f's parameters is added into the base's weights, and taken out again.

    W ← W + Σ_i α_i ΔW_i,   b ← b + Σ_i α_i Δb_i

While a bay is folded it does not run, so that the model costs what the base costs.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from .abstract import Delta, FunctionComposition, Kind, ParameterComposition, Routing, Site
from .aggregation import Mixture, ParameterAverage, Sequence, WeightedSum
from .core import Part, base_type, quantised
from .deltas import Affine, After, Beside, Bias, Dense, InputScale, Kronecker, LowRank, Scale, Sparse, Sum
from .dequantise import Unpacked, acts_in, linear, report, unpack
from .errors import BayError, CompositionError, listed
from .modules import Full
from .seams import Fitting, Place

# Exact types: a subclass of Linear need not be affine. GPT-2's Conv1D is known by its site's form.
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
AFFINE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, *NORMS)
MIXING = (LowRank, After, Beside)  # whose ΔW is no weight of a convolution of groups
OUTPUT = (LowRank, Kronecker, Sparse, Dense, Bias, Scale, After, Beside)  # that read x and f(x) alone
ALONE = (WeightedSum, ParameterAverage, Mixture, Sequence)  # one module at weight one is that module, exactly


@dataclass(eq=False)
class Folded:
    """What `unfold` needs: the bay's modules and whether it ran, and each parameter as it was, on the host."""

    weights: dict[str, float]
    enabled: bool
    order: int
    originals: list[tuple[nn.Module, str, Tensor]] = field(default_factory=list)
    tied: list[tuple[nn.Module, str, nn.Parameter]] = field(default_factory=list)
    unpacked: dict[str, Unpacked] = field(default_factory=dict)  # layers that were quantised, by site

    @property
    def dequantised(self) -> dict[str, float]:
        """The relative error of each layer that was quantised: what it does as a Linear, against what it did."""
        return {site: one.error for site, one in self.unpacked.items()}

    def owns(self, module: nn.Module, name: str) -> bool:
        return any(m is module and n == name for m, n, _ in self.originals)


def fold(fitting: Fitting, which: tuple, untie: bool = False, dequantise: bool = False) -> None:
    """Add modules into the base's weights: names, {name: weight}, or what `use` has set.

    untie: a weight that is used in two places is copied first. dequantise: a quantised linear layer becomes a Linear
    with a weight of floats first, and it is logged by how much that acts otherwise. Raises CompositionError for what
    has no delta or no weight to take it, and BayError where it would change other bays; then nothing has changed.
    """
    state = fitting.state
    if state.folded is not None:
        raise BayError(f"fold: bay {state.name!r} is folded already ({listed(state.folded.weights)}): unfold it first.")
    weights = _weights(fitting, which)
    work = list(_work(fitting, weights))
    others = [bay.folded.order for bay in fitting.session.bays.values() if bay.folded is not None]
    done = Folded(weights, state.enabled, 1 + max(others, default=0))
    try:
        for place, parts in work:
            _foldable(place, parts)
            _alone_here(fitting, place)
            if quantised(place.target, place.site.parameter):
                _unpack(fitting, done, place, dequantise)
            _check(place, parts)
        if not untie:
            _untied(fitting, work)
        with torch.no_grad():
            for place, parts in sorted(work, key=lambda item: not _full(item[1])):  # a copy of a block before its parts
                _apply(fitting.model, done, place, parts)
    except BaseException:
        _restore(done)
        raise
    report("fold", done.unpacked)
    state.folded, state.enabled = done, False


def unfold(fitting: Fitting) -> None:
    """Put the base's weights back, bit for bit, and let the bay run again."""
    state, done = fitting.state, fitting.state.folded
    if done is None:
        raise BayError(f"unfold: bay {state.name!r} is not folded.")
    for other in fitting.session.bays.values():
        theirs: Folded | None = other.folded
        later = theirs is not None and theirs.order > done.order
        if later and any(theirs.owns(module, name) for module, name, _ in done.originals):  # type: ignore[union-attr]
            raise BayError(
                f"unfold: bay {other.name!r} was folded after {state.name!r}, at the same sites: unfold it first."
            )
    _restore(done)
    state.folded, state.enabled = None, done.enabled


def _weights(fitting: Fitting, which: tuple) -> dict[str, float]:
    """The modules to be folded, each with its weight."""
    names, chosen = fitting.state.inventory.names, fitting.state.chosen
    if len(which) == 1 and isinstance(which[0], Mapping):
        pairs: Iterable[tuple[str, float]] = which[0].items()
    elif which:
        pairs = [(name, 1.0) for name in which]
    elif isinstance(chosen, Routing) and chosen.host is not None and chosen.axes == 0:
        values = [1.0] * len(chosen.host[0]) if chosen.weights is None else chosen.weights.tolist()
        pairs = [(names[i], w) for i, w in zip(chosen.host[0], values, strict=True)]
    else:
        raise BayError(
            f"fold(): bay {fitting.state.name!r} has a route that depends on the input, and weights can't. Say which: "
            f"fold({names[0] if names else 'NAME'!r}), fold({{name: weight}}), or bay.use(…) before."
        )
    out: dict[str, float] = {}
    for name, w in pairs:
        if name not in names:
            raise BayError(f"fold({name!r}): bay {fitting.state.name!r} has no such module; there are {listed(names)}.")
        out[name] = out.get(name, 0.0) + float(w)
    return {name: w for name, w in out.items() if w}


def _work(fitting: Fitting, weights: Mapping[str, float]) -> Iterator[tuple[Place, list[tuple[Part, float]]]]:
    """Each place with the parts to be folded there; raises CompositionError if the aggregator does more than add."""
    for site, modular in fitting.modulars.items():
        found = [(modular.parts._modules.get(name), w) for name, w in weights.items()]
        parts = [(part, w) for part, w in found if part is not None]
        aggregator = modular.aggregator or fitting.state.aggregator
        single = len(parts) == 1 and parts[0][1] == 1
        adds = isinstance(aggregator, WeightedSum) or getattr(aggregator, "of", "") == "deltas"
        if parts and not adds and not (single and isinstance(aggregator, ALONE)):
            raise CompositionError(
                f"fold at site {site!r}: {type(aggregator).__name__} does more than add what the modules change "
                f"({', '.join(f'{name}: {w}' for name, w in weights.items())}), so that no weight is equal to it."
            )
        if parts:
            yield fitting.places[site], parts  # type: ignore[misc]


def _full(parts: list[tuple[Part, float]]) -> bool:
    """Whether the site becomes a copy of itself, by a copy of its parameters."""
    return len(parts) == 1 and isinstance(parts[0][0].kind, Full) and parts[0][1] == 1


def _foldable(place: Place, parts: list[tuple[Part, float]]) -> None:
    """Raise CompositionError for kinds that change no parameters of f."""
    for kind in (part.kind for part, _ in parts):
        if not isinstance(kind, (ParameterComposition, Full)):
            raise CompositionError(
                f"fold at site {place.site.name!r}: {type(kind).__name__} is no change of f's parameters, so that no "
                f"weight can hold it. Serve the model with the bay attached."
            )


def _check(place: Place, parts: list[tuple[Part, float]]) -> None:
    """Raise CompositionError if these parts can't be folded at this place."""
    site = place.site
    kinds = [part.kind for part, _ in parts]
    if _full(parts) and place.whole and not site.bare:
        return
    plain("fold", place)
    entering = [kind.enters for kind in kinds]
    if any(entering) and not all(entering):
        raise CompositionError(
            f"fold at site {site.name!r}: {listed(type(kind).__name__ for kind in kinds)} act in part on the input and "
            f"in part on the output of f; together they are no sum. Fold them from two bays."
        )
    for kind, delta in ((kind, part_delta(part, 1.0, site)) for part, _ in parts if (kind := part.kind)):
        _fits(kind, list(leaves(delta)), place)


def _unpack(fitting: Fitting, done: Folded, place: Place, dequantise: bool) -> None:
    """Make a quantised layer a Linear; raises CompositionError unless it may, and can."""
    site, own = place.site, base_type(place.target)
    if not dequantise:
        way = f"fold(…, dequantise=True) gives {'it' if linear(place.target) else 'linear layers'} a weight of floats"
        raise CompositionError(
            f"fold at site {site.name!r}: the weight of this {own.__name__} is quantised, and would round away what is "
            f"added. {way}; or serve the model with the bay attached, which acts on it as it is."
        )
    done.unpacked[site.name] = unpack(site.name, place.target, acts_in(fitting.model))


def plain(verb: str, place: Place) -> None:
    """Raise CompositionError unless f, at this place, is known to be a plain product with its weight, and a bias."""
    site, target = place.site, place.target
    scaled = issubclass(base_type(target), nn.Embedding) and hasattr(target, "embed_scale")  # Gemma's words
    exact = site.form == "transposed" or site.bare or scaled or base_type(target) in AFFINE
    whole = exact and target._parameters.get(site.parameter) is not None
    if not whole or place.entry is not None or place.before:
        raise CompositionError(
            f"{verb} at site {site.name!r} ({base_type(target).__name__}): only exactly Linear, Conv1D, Conv1d … "
            f"Conv3d, Embedding, norms of torch and bare parameters are known to be affine. Attach at such a layer "
            f"inside it."
        )
    if getattr(target, "padding_mode", "zeros") != "zeros" or getattr(target, "max_norm", None) is not None:
        raise CompositionError(
            f"{verb} at site {site.name!r}: with padding_mode={getattr(target, 'padding_mode', None)!r} or "
            f"max_norm={getattr(target, 'max_norm', None)!r} the layer is no plain product with its weight."
        )


def _fits(kind: Kind, parts: list[Delta], place: Place) -> None:
    site, target = place.site, place.target
    name = f"fold at site {site.name!r}: {type(kind).__name__}"
    mixing = MIXING if place.features is None else (*MIXING, InputScale)  # a slice of rows is in no place of the groups
    if getattr(target, "groups", 1) > 1 and any(isinstance(leaf, mixing) for leaf in parts):
        raise CompositionError(
            f"{name} at a convolution with {target.groups} groups has no weight that is equal to it."
        )
    if base_type(target) in NORMS and not all(isinstance(leaf, (Affine, Bias, Scale, Copy)) for leaf in parts):
        raise CompositionError(f"{name} does not fit the vectors of a {base_type(target).__name__}.")
    moves = any(isinstance(leaf, Bias) or getattr(leaf, "shift", None) is not None for leaf in parts)
    if moves and site.bias is None and site.form != "embedding":
        raise CompositionError(
            f"{name} moves the bias, and the base's {base_type(target).__name__} has none: one more parameter would "
            f"make it another architecture, which the base's code can't load. Serve it with the bay attached."
        )


def _alone_here(fitting: Fitting, place: Place) -> None:
    """Raise BayError if another bay at work here would compute something else after the fold."""
    bays, own = list(fitting.session.bays.values()), fitting.state.name
    inner = True
    for state in bays:
        if state.name == own:
            inner = False
            continue
        if not state.enabled:
            continue
        other = fitting.session.handles[state.name].fitting
        for site, there in other.places.items():
            kinds = [part for part in other.modulars[site].order if part is not None]
            around = _contains(there.target, place.target) and any(isinstance(part.kind, Full) for part in kinds)
            at = there.target is place.target and not there.before
            same = at and (inner or any(_reads_weight(part, there.site) for part in kinds))
            if around or same:
                raise BayError(
                    f"fold: bay {state.name!r} is at work at {site!r} too, and would give other outputs when "
                    f"{place.site.name!r} has another weight. Fold the bays in the order attached, or disable that one."
                )


def _reads_weight(part: Part, site: Site) -> bool:
    """Whether what a part computes depends on the base's weight, beside f's output."""
    if isinstance(part.kind, FunctionComposition):
        return False
    if part.kind.reads_weight or not isinstance(part.kind, ParameterComposition):
        return True
    return not all(isinstance(leaf, OUTPUT) for leaf in leaves(part_delta(part, 1.0, site)))


def _contains(outer: nn.Module, inner: nn.Module) -> bool:
    return any(module is inner for module in outer.modules())


def _untied(fitting: Fitting, work: list[tuple[Place, list]]) -> None:
    """Raise CompositionError if a weight to be changed is used in another place as well."""
    users = _users(fitting.model)
    for place, parts in work:
        for module, name in _targets(place, parts):
            places = users.get(id(module._parameters[name]), [])
            if len(places) > 1:
                raise CompositionError(
                    f"fold at site {place.site.name!r}: its {name} is tied, {listed(places)} are one tensor, and all "
                    f"would change. fold(…, untie=True) gives this site a copy of its own."
                )


def _users(model: nn.Module) -> dict[int, list[str]]:
    users: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        if "_bay" not in path.split("."):
            for name, p in module._parameters.items():
                if p is not None:
                    users.setdefault(id(p), []).append(f"{path}.{name}")
    return users


def _targets(place: Place, parts: list[tuple[Part, float]]) -> list[tuple[nn.Module, str]]:
    """(module, parameter name) of all that a fold at this place changes."""
    if _full(parts):
        names = [name.replace("/", ".").rpartition(".") for name in parts[0][0].tensors()]
        return [(place.target.get_submodule(path), name) for path, _, name in names]
    own = place.target._parameters
    return [(place.target, n) for n in (place.site.parameter, "bias") if own.get(n) is not None]


def _apply(model: nn.Module, done: Folded, place: Place, parts: list[tuple[Part, float]]) -> None:
    """Keep what was there, then change it."""
    for module, name in _targets(place, parts):
        _keep(model, done, module, name)
    if _full(parts):
        tensors = parts[0][0].tensors()
        for (module, name), tensor in zip(_targets(place, parts), tensors.values(), strict=True):
            module._parameters[name].copy_(tensor)  # type: ignore[union-attr]
        return
    view = place.view()
    total_w, total_b = torch.zeros_like(view.weight), None
    for part, w in parts:
        dw, db = part_delta(part, w, view).dense(view)
        total_w = total_w + dw
        if db is not None:
            total_b = db if total_b is None else total_b + db
    if total_b is not None and view.form == "embedding":  # each row is looked up alone, so that each takes the bias
        total_w, total_b = total_w + total_b, None
    _add(place, total_w, total_b)


def _keep(model: nn.Module, done: Folded, module: nn.Module, name: str) -> None:
    parameter = module._parameters[name]
    assert parameter is not None
    if len(_users(model)[id(parameter)]) > 1:
        done.tied.append((module, name, parameter))
        module._parameters[name] = parameter = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
    if not done.owns(module, name):  # a slice of it may have been folded before
        done.originals.append((module, name, parameter.detach().to("cpu", copy=True)))


def _add(place: Place, dw: Tensor, db: Tensor | None) -> None:
    own, cut = place.target._parameters, place.features or slice(None)
    weight, bias = own[place.site.parameter], own.get("bias")
    assert weight is not None
    part = weight[..., cut] if place.site.form == "transposed" else weight[cut]
    part.copy_(part.to(dw.dtype) + dw)
    if db is not None:
        bias[cut] = bias[cut].to(db.dtype) + db  # type: ignore[index]


def part_delta(part: Part, weight: float, site: Site) -> Delta:
    """What a part adds to the parameters of its site, times a weight, no narrower than float32."""
    dtype = torch.promote_types(site.dtype, torch.float32)
    params = {k: t.detach().to(dtype) if t.is_floating_point() else t for k, t in part.tensors().items()}
    if isinstance(part.kind, Full):
        return Copy(params["weight"], params.get("bias"), weight)
    delta = part.kind.delta(params, site)  # type: ignore[attr-defined]
    return delta if weight == 1 else delta.scale(weight)


@dataclass(frozen=True, eq=False)
class Copy(Delta):
    """ΔW = s (W′ − W), Δb = s (b′ − b): a trainable copy of an affine site, as a change of it."""

    weight: Tensor
    bias: Tensor | None
    s: float = 1.0

    def apply(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        raise NotImplementedError("Full runs as a replacement of f; as a delta it is only folded.")

    def scale(self, factor: Tensor | float) -> "Copy":
        return replace(self, s=self.s * float(factor))

    def dense(self, site: Site) -> tuple[Tensor, Tensor | None]:
        bias = None if self.bias is None or site.bias is None else self.s * (self.bias - site.bias)
        return self.s * (self.weight - site.weight), bias


def leaves(delta: Delta) -> Iterator[Delta]:
    for part in delta.parts if isinstance(delta, Sum) else ():
        yield from leaves(part)
    if not isinstance(delta, Sum):
        yield delta


def _restore(done: Folded) -> None:
    with torch.no_grad():
        for module, name, original in reversed(done.originals):
            module._parameters[name].copy_(original)  # type: ignore[union-attr]
        for module, name, parameter in reversed(done.tied):
            module._parameters[name] = parameter
    for one in done.unpacked.values():
        one.repack()
