"""What each module adds to y = f(x), one by one, for aggregators that compare them: in factors where kinds have them.

`m` is a site's Modules. Modules of one kind that see the same rows are asked at once.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..abstract import Context, Delta, Factors, FunctionComposition, ParameterComposition, Routing
from . import _sums
from ._engine import factored

Differences = list[tuple[list[int], Factors | Tensor]]


def differences(m: Any, f: Any, x: Tensor, routing: Routing, c: Context) -> tuple[Tensor, Differences]:
    """(y = f(x), what is added to it): places among the modules, or slots, beside the Factors of a group of as many, or
    one place beside Δ, shaped like y. Places are those of `Modules.outputs`."""
    y = f(x) if f is not None else torch.zeros_like(x)
    if routing.axes == 0 or routing.index is None:
        return y, _modules(m, f, x, y, m.active(routing), c)
    _, enters, replaces = m.facts(routing)
    found: Differences = []
    for k in range(routing.index.shape[-1]):
        slot = Routing(index=routing.index[..., k : k + 1])
        change = m.add(f, x, slot, c) - y if enters or replaces else m.changes(f, x, y, slot, c)
        found.append(([k], change if isinstance(change, Tensor) else torch.zeros_like(y)))
    return y, found


def _modules(m: Any, f: Any, x: Tensor, y: Tensor, ids: Sequence[int], c: Context) -> Differences:
    """All of these modules on all rows."""
    found: Differences = []
    for number in dict.fromkeys(m.kinds[i] for i in ids):
        places = [k for k, i in enumerate(ids) if m.kinds[i] == number]
        batched = m.parts[ids[places[0]]].kind.batched
        for group in [places] if batched else [[k] for k in places]:
            own = [ids[k] for k in group]
            factors = _factors(m, own, x, y, c)
            found += (
                [([k], _one(m, i, f, x, y, c)) for k, i in zip(group, own, strict=True)]
                if factors is None
                else [(group, factors)]
            )
    return found


def _factors(m: Any, ids: Sequence[int], x: Tensor, y: Tensor, c: Context) -> Factors | None:
    """The changes of modules of one kind in factors, (g, …) each; None if that kind has none."""
    kind, own, one = m.parts[ids[0]].kind, m.parts[ids[0]].tensors(), len(ids) == 1
    if kind.enters:
        return None
    if isinstance(kind, ParameterComposition):
        has = type(kind.delta(own, m.site)).factors is not Delta.factors
    else:
        has = isinstance(kind, FunctionComposition) and type(kind).factors is not FunctionComposition.factors
    if not has:  # and nothing needs to be stacked
        return None
    found = factored(kind, own if one else m.stacked(ids), x, y, c, m.site)
    if found is None or not one:
        return found
    offset = found.offset
    return Factors(found.code.unsqueeze(0), found.out.unsqueeze(0), None if offset is None else offset.unsqueeze(0))


def _one(m: Any, i: int, f: Any, x: Tensor, y: Tensor, c: Context) -> Tensor:
    kind = m.parts[i].kind
    if kind.replaces:
        return _sums.less(m, m.one(i, f, x, None, c), y, i)
    return m.output(i, f, x, c, y) - y if kind.enters else m.one(i, f, x, y, c)
