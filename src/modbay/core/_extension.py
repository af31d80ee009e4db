"""Input composition: what the active modules of a site put in front of each row's input (survey section 5.3).

Prompts (n, d) and prefixes (2, heads, n, d) are treated alike: n is the axis before the last.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..abstract import Context, Generator, Routing
from ..errors import CompositionError, SiteError
from ._modular import Modular, penalise
from ._modules import Modules

Extension = tuple[Tensor, Tensor | None]
"""E (b, …, n, d), and which of its n places a row has, (b, n); None where every row has all."""


def extended(modular: Modular, x: Tensor, c: Context, routing: Routing | None, aggregator: Any) -> Extension | None:
    """What goes in front of each row of x at a site; None if no module is active."""
    modules = modular.modules_at()
    route = modules.route(x, c) if routing is None else routing.on(x.device)
    out = (aggregator or modular.aggregator).extend(modules, route, x, c)  # type: ignore[union-attr]
    if modular.training and torch.is_grad_enabled():
        penalise(modules, route, c, modular.prefix)
    return out


def extension(modules: Modules, routing: Routing, x: Tensor, c: Context, mode: str = "sum") -> Extension | None:
    """E of each row of x, as the routing says; a row without a module has nothing but masked places.

    mode: "sum" Σ_i α_i P_i; "concatenate" [α_1 P_1, α_2 P_2, …]; "average" the extension of Σ_i α_i φ_i. Rows with
    fewer places than others are filled up in front. Raises CompositionError where lengths differ that are to be summed.
    """
    if routing.axes > 1:
        raise CompositionError(
            f"site {modules.site.name!r}: the tokens of one example were routed apart, but a prompt or prefix is put "
            f"in front of the whole example. Route it by example."
        )
    if routing.heads is not None and mode != "average":
        raise CompositionError(
            f"site {modules.site.name!r}: weights by parts of the parameters (heads) are for mb.ParameterAverage()."
        )
    rows = len(x)
    if routing.axes == 1 and len(_table(routing)) != rows:
        raise SiteError(
            f"site {modules.site.name!r} has {rows} rows, but the routing is for {len(_table(routing))}: the rows of "
            f"this site are not the examples of the batch. Attach to another site, or set the module by bay.use(name)."
        )
    ids = _active(modules, routing)
    if not ids:
        return None
    if mode == "average":
        return _average(modules, routing, ids, x, c)
    each = [_extend(modules, i, routing, x, c) for i in ids]
    own = any(isinstance(modules.parts[i].kind, Generator) for i in ids)  # each is (b, …, n, d) then
    if own:
        each = [e if isinstance(modules.parts[i].kind, Generator) else e.expand(rows, *e.shape)
                for i, e in zip(ids, each, strict=True)]  # fmt: skip
    if routing.axes == 0 and (routing.index is None or routing.host is not None):
        out = _alike(modules, routing, ids, each, mode)
        return out if own else out.expand(rows, *out.shape), None
    if routing.index is None:
        return _weighted(modules, routing, ids, each, own, mode)
    return _chosen(modules, routing, ids, each, rows, own, mode)


def _table(routing: Routing) -> Tensor:
    return routing.weights if routing.index is None else routing.index  # type: ignore[return-value]


def _active(modules: Modules, routing: Routing) -> list[int]:
    """The modules that some row uses. An index on the device is read back, as by a plan; under compile, all count."""
    ids = modules.active(routing)
    if routing.host is None and routing.index is not None and not torch.compiler.is_compiling():
        used = set(routing.index.unique().tolist())
        ids = [i for i in ids if i in used]
    return ids


def _extend(modules: Modules, i: int, routing: Routing, x: Tensor, c: Context) -> Tensor:
    """P_i (…, n, d); of a generator one a row, (b, …, n, d), zero where a row is known not to use it."""
    part = modules.parts[i]
    if not part.kind.place:
        raise CompositionError(
            f"module {modules.names[i]!r} at site {modules.site.name!r} is {type(part.kind).__name__}, but input is "
            f"composed here: only prompts or prefixes fit. Put it into a bay of its own."
        )
    if not isinstance(part.kind, Generator):
        return part.kind.extend(part.tensors(), c)
    rows = None
    if routing.axes == 1 and routing.index is not None and not torch.compiler.is_compiling():
        rows = (routing.index == i).any(-1).nonzero()[:, 0]
        rows = None if len(rows) == len(x) else rows
    c = replace(c.at(rows), training=bool(getattr(modules.site.module, "training", False)))
    made = _generated(part, x if rows is None else x[rows], c)
    return made if rows is None else made.new_zeros(len(x), *made.shape[1:]).index_copy(0, rows, made)


def _generated(part: Any, x: Tensor, c: Context) -> Tensor:
    """What a generator's kind puts in front of each row of x, (b, …, n, d)."""
    kind, each = part.kind.kind, part.kind.generate(part.tensors(), x, c)
    run = lambda params: kind.extend(params, c)
    made = run(each) if kind.batched else torch.func.vmap(run)(each)
    return made.expand(len(x), *made.shape[1:])


def _same_length(modules: Modules, ids: Sequence[int], each: Sequence[Tensor]) -> None:
    if len({e.shape[-2] for e in each}) > 1:
        said = ", ".join(f"{modules.names[i]!r}: {e.shape[-2]}" for i, e in zip(ids, each, strict=True))
        raise CompositionError(
            f"prompts of different lengths can't be summed ({said}) at site {modules.site.name!r}: give them one "
            f"length, or put one after another with aggregator=mb.Concatenate()."
        )


def _alike(modules: Modules, routing: Routing, ids: Sequence[int], each: Sequence[Tensor], mode: str) -> Tensor:
    """One extension for all rows."""
    if routing.weights is not None:
        weights = routing.dense(len(modules))
        each = [weights[i].to(e) * e for i, e in zip(ids, each, strict=True)]
    if mode == "concatenate":
        return torch.cat(list(each), -2)
    _same_length(modules, ids, each)
    return sum(each[1:], start=each[0])


def _weighted(
    modules: Modules, routing: Routing, ids: Sequence[int], each: Sequence[Tensor], own: bool, mode: str
) -> Extension:
    """Dense weights (b, n): every module counts in every row."""
    weights = routing.dense(len(modules))[:, list(ids)].to(each[0])
    if mode == "concatenate":
        several = [w.view(-1, *[1] * (e.ndim - own)) * e for w, e in zip(weights.unbind(1), each, strict=True)]
        return torch.cat(several, -2), None
    _same_length(modules, ids, each)
    return torch.einsum("bm,mb...->b..." if own else "bm,m...->b...", weights, torch.stack(list(each))), None


def _chosen(
    modules: Modules, routing: Routing, ids: Sequence[int], each: Sequence[Tensor], rows: int, own: bool, mode: str
) -> Extension:
    """An index of modules by row: each row takes its own from the stack of those that are active."""
    lengths = [e.shape[-2] for e in each]
    n = max(lengths)
    nothing = each[0].new_zeros(*each[0].shape[:-2], n, each[0].shape[-1])
    stack = torch.stack([*[F.pad(e, (0, 0, n - e.shape[-2], 0)) for e in each], nothing])
    take, whole = _take(modules, routing, ids, rows)
    seen = torch.tensor([[j >= n - length for j in range(n)] for length in [*lengths, 0]], device=take.device)
    parts = stack[take, torch.arange(rows, device=take.device).unsqueeze(1)] if own else stack[take]
    seen = seen[take]  # (rows, k, …, n, d) and (rows, k, n)
    if routing.weights is not None:
        weights = routing.weights.expand(rows, -1).to(parts)
        parts = parts * weights.view(*weights.shape, *[1] * (parts.ndim - 2))
    every = whole and len(set(lengths)) == 1
    if take.shape[1] == 1:
        return parts[:, 0], None if every else seen[:, 0]
    if mode == "sum":
        _same_length(modules, ids, each)
        return parts.sum(1), None if every else seen.any(1)
    parts, seen = parts.movedim(1, -3).flatten(-3, -2), seen.flatten(1)
    return (parts, None) if every else _to_the_right(parts, seen)


def _to_the_right(parts: Tensor, seen: Tensor) -> Extension:
    """Gaps between prompts moved to the front, so that those of a row stand side by side, next to its input."""
    order = torch.argsort(seen.to(torch.uint8), dim=-1, stable=True)
    shape = (len(order), *[1] * (parts.ndim - 3), order.shape[1], 1)
    return torch.take_along_dim(parts, order.view(shape), -2), seen.gather(1, order)


def _take(modules: Modules, routing: Routing, ids: Sequence[int], rows: int) -> tuple[Tensor, bool]:
    """(rows, k): each module's place in the stack, the last one for none; and whether it is known that none lacks."""
    index, none = routing.index, len(ids)
    assert index is not None
    key = ("take", tuple(ids))
    if routing.host is not None:
        if key not in routing.cache:
            place = {i: at for at, i in enumerate(ids)}
            slots = max(1, *(len(host) for host in routing.host))
            host = [[place.get(i, none) for i in (*some, *[-1] * (slots - len(some)))] for some in routing.host]
            whole = all(i < none for some in host for i in some)
            device = modules.parts[ids[0]].tensors()
            device = next(iter(device.values())).device if device else index.device
            routing.cache[key] = (torch.tensor(host, device=device), whole)
        return routing.cache[key]
    place = [none] * (len(modules) + 1)
    for at, i in enumerate(ids):
        place[i] = at
    index = index.expand(rows, -1)
    return torch.tensor(place, device=index.device)[index % len(place)], False


def _average(modules: Modules, routing: Routing, ids: Sequence[int], x: Tensor, c: Context) -> Extension:
    """The extension of the averaged parameters; it must not matter to a row without a module, which is masked."""
    rows = len(x)
    kind, params, apart = modules.averaged(routing, rows)
    if not kind.place:
        _extend(modules, ids[0], routing, x, c)  # raises
    if not apart:
        out = kind.extend(params, c)  # type: ignore[attr-defined]
        return out.expand(rows, *out.shape), None
    run = lambda p: kind.extend(p, c)  # type: ignore[attr-defined]
    out = run(params) if kind.batched else torch.func.vmap(run)(params)
    if routing.index is None:
        return out, None
    take, whole = _take(modules, routing, ids, rows)
    has = (take < len(ids)).any(1, keepdim=True)
    return out, None if whole else has.expand(rows, out.shape[-2])
