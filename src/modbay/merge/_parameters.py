"""Merging of the parameters themselves, of modules of one kind: averaging LoRA's A and B is not averaging B A.

Ponti, Sordoni, Bengio and Reddy, "Combining Modular Skills in Multitask Learning", 2022 (arXiv 2202.13914); of
bottlenecks: Chronopoulou, Peters, Fraser and Dodge, "AdapterSoup", 2023 (arXiv 2302.07027).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..abstract import Generator
from ..core import Network, Part
from ..errors import CompositionError, listed
from ..seams import Place
from ._deltas import Result
from ._methods import Method

Memo = dict[tuple[int, ...], Tensor]


def alike(parts: Mapping[str, Part]) -> bool:
    """Whether modules are of one kind, whose parameters can be merged."""
    first, *others = parts.values()
    if isinstance(first.kind, (Generator, Network)):
        return False
    shapes = lambda part: {name: tensor.shape for name, tensor in part.tensors().items()}
    return all(part.kind == first.kind and shapes(part) == shapes(first) for part in others)


def averaged(place: Place, parts: Mapping[str, Part], method: Method, memo: Memo) -> Result:
    """Each learned tensor merged by itself; what sites share stays shared (`memo`). Constants must be equal."""
    kind = next(iter(parts.values())).kind
    wanted = [name for name in method.weights if name not in parts]
    if wanted:
        raise CompositionError(
            f"merge at site {place.site.name!r}: {listed(wanted)} has no part here, and no parameters that could be "
            f"averaged. Merge modules that have the same sites, or of='deltas' where their kinds have any."
        )
    tensors: dict[str, Tensor] = {}
    learned = {}
    for name in next(iter(parts.values())).tensors():
        several = [part.tensors()[name].detach() for part in parts.values()]
        if several[0].is_floating_point() and name not in kind.constants:
            learned[name] = several
        elif all(torch.equal(several[0], other) for other in several[1:]):
            tensors[name] = several[0] if name in kind.remade else several[0].clone()
        else:
            raise CompositionError(
                f"merge at site {place.site.name!r}: {kind!r}'s {name!r} is not learned and differs between "
                f"{listed(parts)}, so that there is no average of it. of='deltas' merges what they do to the weights, "
                f"where kinds have a delta."
            )
    made = method.merged(place.site.name, list(parts), *learned.values())
    for (name, _), tensor in zip(learned.items(), made, strict=True):
        ids = tuple(id(part.tensors()[name]) for part in parts.values())
        tensors[name] = memo.setdefault(ids, tensor)  # type: ignore[arg-type]
    in_order = {name: tensors[name] for name in next(iter(parts.values())).tensors()}
    return Result(kind, in_order, f"{method.name} of A, B …" if set("AB") <= set(learned) else f"{method.name} of each")


def copied(part: Part, memo: Memo) -> Result:
    """One module's part as it is; what sites share stays shared."""
    kind: Any = part.kind
    if isinstance(kind, Network):
        raise CompositionError(
            "merge: a network of your own is no function of its parameters. Add a copy of it: bay.add(name, network)."
        )
    kept = {
        name: tensor.detach() if name in kind.remade else memo.setdefault((id(tensor),), tensor.detach().clone())
        for name, tensor in part.tensors().items()
    }
    return Result(kind, kept, "as it is")


def moved(place: Place, parts: Mapping[str, Part], method: Method) -> Result:
    """Trainable copies of a site, merged by what each parameter is changed of the site's own."""
    several = [part.tensors() for part in parts.values()]
    names = list(several[0])
    bases = [place.target.get_parameter(name.replace("/", ".")).detach() for name in names]
    made = method.merged(
        place.site.name, list(parts), *[[own[name].detach() for own in several] for name in names], bases=bases
    )
    first, tensors = {}, {}
    for name, tensor in zip(names, made, strict=True):  # tied ones stay tied
        tensors[name] = first.setdefault(id(several[0][name]), tensor)
    return Result(next(iter(parts.values())).kind, tensors, f"{method.name} of what each parameter changed")
