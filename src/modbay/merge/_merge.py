"""The verb: a module made of several of a bay, in the bay.

    report = bay.merge("both", {"en": 0.7, "de": 0.3})

All is computed before the bay changes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ..abstract import Kind, ParameterComposition
from ..core import Part, parameters
from ..errors import BayError, CompositionError, MergeError, listed
from ..modules import Full
from ..seams import Fitting, Place
from ._deltas import Result, merged, named
from ._methods import Method, method_of
from ._parameters import Memo, alike, averaged, copied, moved
from ._report import MergeReport, SiteReport, short

OF = (None, "deltas", "parameters")


def merge(
    fitting: Fitting,
    name: str,
    which: Mapping[str, float] | Sequence[str],
    method: str = "linear",
    of: str | None = None,
    rank: int | None = None,
    **arguments: Any,
) -> MergeReport:
    """Add a module made of others; see `Bay.merge`."""
    asked = method_of(method, which, arguments)
    _free(fitting, name, asked)
    if of not in OF:
        raise MergeError(f"merge(of={of!r}): it is 'deltas', 'parameters', or None for what each site has.")
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise MergeError(f"merge(rank={rank!r}): a rank is a positive integer, or None for an exact result.")
    results, rows, memo = {}, [], {}
    with torch.no_grad():
        for site, modular in fitting.modulars.items():
            parts = {one: modular.parts._modules[one] for one in asked.weights if one in modular.parts._modules}
            here = asked.at(parts)
            parts = {one: part for one, part in parts.items() if one in here.weights}
            if any(here.weights.values()):
                made, by = _one(fitting.places[site], parts, here, asked, of, rank, memo)  # type: ignore[arg-type]
                results[site] = made = _rounded(fitting.places[site], made, parts, by)  # type: ignore[arg-type]
                rows.append(SiteReport(site, tuple(parts), by, made.how, short(made.kind), made.error))
    _plug(fitting, name, results)
    return MergeReport(name, method, asked.weights, tuple(rows))


def _free(fitting: Fitting, name: str, asked: Method) -> None:
    """Raise BayError for a name that is taken or can't be one, for modules that are not there, and while folded."""
    state, own = fitting.state, fitting.state.inventory.names
    state.inventory.check(name)
    if name in own:
        raise BayError(f"merge({name!r}, …): bay {state.name!r} has a module of that name; remove or rename it first.")
    unknown = [one for one in asked.weights if one not in own]
    if unknown:
        raise BayError(f"merge({name!r}, …): bay {state.name!r} has no {listed(unknown)}; there are {listed(own)}.")
    folded = [other.name for other in fitting.session.bays.values() if other.folded is not None]
    if folded:
        raise BayError(f"merge({name!r}, …): bay {listed(folded)} is folded into the base's weights: unfold it first.")


def _one(
    place: Place, parts: Mapping[str, Part], here: Method, asked: Method, of: str | None, rank: int | None, memo: Memo
) -> tuple[Result, str]:
    """(the merged part of one site, of what it was made)."""
    only = here.alone()
    if only is not None:
        return copied(parts[only], memo), "module"
    full = all(isinstance(part.kind, Full) for part in parts.values())
    changes = all(isinstance(part.kind, (ParameterComposition, Full)) for part in parts.values())
    if of == "parameters" or (of is None and not changes):
        if not alike(parts):
            raise CompositionError(_apart(place, parts, "their parameters can't be merged one by one"))
        return averaged(place, parts, _everywhere(asked, here), memo), "parameters"
    if not changes:
        raise CompositionError(_apart(place, parts, "not all of them have a delta"))
    return (moved(place, parts, here) if full else merged(place, parts, here, rank)), "deltas"


def _everywhere(asked: Method, here: Method) -> Method:
    """The method with the weights of modules that the site lacks, of which there is then no average."""
    return Method(here.name, {one: w for one, w in asked.weights.items() if w or one in here.weights}, here.options)


def _apart(place: Place, parts: Mapping[str, Part], why: str) -> str:
    return (
        f"merge at site {place.site.name!r}: {named(parts)}: {why}. Use them together instead: "
        f"bay.use({{name: weight}}) with mb.WeightedSum(), or mb.Ensemble(), which need not merge."
    )


def _rounded(place: Place, made: Result, parts: Mapping[str, Part], by: str) -> Result:
    """The result in its parameters' dtype; raises MergeError if it is not finite."""
    if by == "module":
        return made
    dtypes = [t.dtype for part in parts.values() for t in part.tensors().values() if t.is_floating_point()]
    dtype = reduce(torch.promote_types, dtypes) if dtypes else place.site.dtype
    out: dict[str, Tensor] = {}
    for key, tensor in made.tensors.items():
        floats = tensor.is_floating_point()
        out[key] = tensor.to(dtype).contiguous() if floats and by == "deltas" else tensor
        if floats and not bool(out[key].isfinite().all()):
            raise MergeError(
                f"merge at site {place.site.name!r}: {key!r} would not be finite in {str(out[key].dtype)[6:]}. A "
                f"module is not, or the weights are too large for this dtype."
            )
    return replace(made, tensors=out)


def _plug(fitting: Fitting, name: str, results: Mapping[str, Result]) -> None:
    """Put the module in; on an error the bay is as it was."""
    kinds: dict[Any, tuple[Kind, dict[str, Mapping[str, Tensor]]]] = {}
    pairs = []
    for site, made in results.items():
        place, modular = fitting.places[site], fitting.modulars[site]
        (modular.aggregator or fitting.state.aggregator).admit(made.kind, place.site)  # type: ignore[union-attr]
        kind, own = kinds.setdefault(_key(made.kind), (made.kind, {}))
        own[site] = made.tensors
        pairs.append((place, kind))
    tensors: dict[str, Any] = {}
    for kind, own in kinds.values():
        tensors |= parameters(kind, own)
    names = fitting.state.inventory.names
    try:
        fitting.plug(name, pairs, made=tensors)
        fitting.rebuild()
    except BaseException:
        if names and names[-1] == name:
            fitting.unplug(len(names) - 1, name)
            fitting.rebuild()
        raise


def _key(kind: Kind) -> Any:
    """Equal for equal kinds, one of which stands for all in files; a kind that can't be hashed is equal to itself."""
    try:
        hash(kind)
    except TypeError:
        return id(kind)
    return kind
