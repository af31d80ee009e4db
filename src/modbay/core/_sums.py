"""Sums over the modules of a site: dense, sparse, replaced, fused. Each runs only what is active, in groups.

`m` is a site's Modules; p a Plan. Rows are examples, or tokens flattened.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..abstract import Context, Generator, InputComposition, Kind, ParameterComposition, Routing
from ..deltas import LowRank
from ..errors import CompositionError, listed
from ..ops import lowrank_mixture
from ._engine import AFFINE, apply, updated
from ._plan import Group, Plan, plan


def add(m: Any, f: Any, x: Tensor, routing: Routing, c: Context) -> Tensor:
    """f(x) + Σ_i α_i Δ_i, where a replacement's Δ is m(x) − f(x). Only active modules run."""
    if m.facts(routing)[1]:
        x, x0 = x + _sum(m, None, x, x, routing, c, True), x
        y = f(x)
        return y + _sum(m, f, x0, y, routing, c, False)
    fused = _fused(m, f, x, routing)
    if fused is not None:
        return fused
    ids = m.active(routing) if routing.axes == 0 else None
    if ids is not None and routing.weights is None and routing.host is not None:
        return _alone(m, ids, f, x, c)
    if ids is None and _chosen(m, routing) and m.facts(routing)[2]:
        return _replace(m, f, x, routing, c)
    y = f(x) if f is not None else torch.zeros_like(x)
    return y + _sum(m, f, x, y, routing, c, False)


def _fused(m: Any, f: Any, x: Tensor, routing: Routing) -> Tensor | None:
    """The commonest case in the fewest passes: every row has one module at weight one, and all are one kind of delta.

    Where rows stay in place the update is added to f(x) in one product: rows in order do, and rows in another order,
    too, where it is cheaper to repeat the parameters by example than to sort the activations there and back.
    """
    if routing.axes != 1 or routing.host is None or routing.weights is not None or torch.compiler.is_compiling():
        return None
    if m.site.form not in AFFINE or x.ndim < 2:
        return None
    p = plan(routing, m.kinds, x.shape[0], x.device)
    kind = p.alone and m.parts[p.groups[0].ids[0]].kind
    if not isinstance(kind, ParameterComposition) or not kind.batched or kind.tied:
        return None
    if p.order is None and len(p.groups) == 1:
        ids, each = p.groups[0].ids, p.groups[0].each
    elif _by_example(m, p, x):
        ids, each = [ids[0] for ids in routing.host], 1
    else:
        return _sorted(m, kind, p, f, x)
    params = m.stacked(ids)
    if next(iter(params.values())).dtype != x.dtype:
        return None
    y = f(x) if f is not None else torch.zeros_like(x)
    shape = (len(ids), each)
    return kind.delta(params, m.site).onto(x.unflatten(0, shape), y.unflatten(0, shape), m.site).flatten(0, 1)


def _sorted(m: Any, kind: ParameterComposition, p: Plan, f: Any, x: Tensor) -> Tensor | None:
    """The same by rows sorted by module; f(x) is sorted only if an update reads it."""
    deltas = []
    for group in p.groups:
        params = m.stacked(group.ids)
        if next(iter(params.values())).dtype != x.dtype:
            return None
        deltas.append(kind.delta(params, m.site))
    y = f(x) if f is not None else torch.zeros_like(x)
    rows = x if p.order is None else x.index_select(0, p.order)
    outputs = y
    if p.order is not None and any(delta.reads_output for delta in deltas):
        outputs = y.index_select(0, p.order)
    outs = []
    for group, delta in zip(p.groups, deltas, strict=True):
        ids, each, part = len(group.ids), group.each, slice(group.start, group.stop)
        own, theirs = rows[part].view(ids, each, *x.shape[1:]), outputs[part].view(ids, each, *y.shape[1:])
        outs.append(delta.apply(own, theirs, m.site).flatten(0, 1))
    change = outs[0] if len(outs) == 1 else torch.cat(outs)
    return y + (change if p.back is None else change.index_select(0, p.back[:, 0]))


A_GROUP = 100_000  # what one more product costs, in numbers that could be moved meanwhile


def _by_example(m: Any, p: Plan, x: Tensor) -> bool:
    """Whether repeating the parameters for each row moves fewer numbers than sorting x, and the update back."""
    size = m.parts[p.groups[0].ids[0]].size
    active = sum(len(group.ids) for group in p.groups if not m.sliced(group.ids))
    moved = x.numel() * (1 + 2 * m.site.outputs / m.site.inputs)
    return x.shape[0] * size < active * size + moved + A_GROUP * len(p.groups)


def _alone(m: Any, ids: Sequence[int], f: Any, x: Tensor, c: Context) -> Tensor:
    """The same modules at weight one for all rows: no weights, no sorting, no copies."""
    if len(ids) == 1 and m.parts[ids[0]].kind.replaces:
        return m.one(ids[0], f, x, None, c)
    y = f(x) if f is not None else torch.zeros_like(x)
    out = y
    for i in ids:
        part = m.parts[i]
        if isinstance(part.kind, ParameterComposition):
            out = updated(part.kind, part.tensors(), x, y, out, c, m.site)
            continue
        change = m.one(i, f, x, y, c)
        out = out + (less(m, change, y, i) if part.kind.replaces else change)
    return out


def _chosen(m: Any, routing: Routing) -> bool:
    """Whether each row has at most one module, at weight one, so that replacements need no arithmetic."""
    one = routing.index is not None and routing.index.shape[-1] == 1
    return one and routing.weights is None and not torch.compiler.is_compiling()


def _replace(m: Any, f: Any, x: Tensor, routing: Routing, c: Context) -> Tensor:
    """Each row by its module, in rooms of their own; f runs only if some row needs it. Narrow outputs are filled up."""
    rows, flat, tokens = _rows(x, routing)
    p = plan(routing, m.kinds, len(rows), x.device)
    y: Any = None
    needs = p.idle or not all(m.parts[g.ids[0]].kind.replaces for g in p.groups)
    if needs:
        y = f(x) if f is not None else torch.zeros_like(x)
        y = m.each(y, len(rows)) if flat == 1 else y.flatten(0, flat - 1)
    outs = list(_groups(m, p, f, rows, y, c, tokens, full=True))
    if p.idle:  # without f, nothing is added: zeros as wide as what the modules give
        outs.append(outs[0].new_zeros(len(rows), *outs[0].shape[1:]) if f is None and outs else y)
    elif p.order is None and len(outs) == 1:
        return outs[0].unflatten(0, x.shape[:flat]) if flat > 1 else outs[0]
    width = max(out.shape[-1] for out in outs)
    fill = float("-inf")  # of a head with fewer labels than its neighbour in the batch
    outs = [
        out if out.shape[-1] == width else torch.nn.functional.pad(out, (0, width - out.shape[-1]), value=fill)
        for out in outs
    ]
    out = torch.cat(outs)
    if p.back is not None:
        take = p.back[:, 0]
        done = sum(len(group.ids) * group.each for group in p.groups)  # beyond it stands y, row by row
        out = out.index_select(0, torch.where(take >= done, take + torch.arange(len(take), device=take.device), take))
    return out.unflatten(0, x.shape[:flat]) if flat > 1 else out


def less(m: Any, out: Tensor, y: Any, i: int) -> Tensor:
    """m_i(x) − f(x), of what stands instead of f; a head of another width is not to be weighed."""
    if out.shape != y.shape:
        raise CompositionError(
            f"site {m.site.name!r}: {type(m.parts[i].kind).__name__} gives {tuple(out.shape)} where f gives "
            f"{tuple(y.shape)}. A module of another width can be chosen, one an example, but not weighed, nor added."
        )
    return out - y


def _sum(m: Any, f: Any, x: Tensor, y: Tensor, routing: Routing, c: Context, entering: bool) -> Any:
    """Σ_i α_i Δ_i over the modules that enter, or over those that don't; 0 if there are none."""
    if routing.axes == 0 or routing.index is None or torch.compiler.is_compiling():
        return _dense(m, f, x, y, routing, c, entering)
    return _sparse(m, f, x, y, routing, c, entering)


def _dense(m: Any, f: Any, x: Tensor, y: Tensor, routing: Routing, c: Context, entering: bool) -> Any:
    """Every module on all rows, weighted. Low-rank updates of one shape become one product."""
    ids = [i for i in m.active(routing) if m.parts[i].kind.enters == entering]
    if not ids:
        return 0.0
    _untied(m, ids, routing)
    gathered = _gathered(m, f, x, y, routing, c, ids)
    if gathered is not None:
        return gathered
    weights = routing.dense(len(m)).to(y.dtype)
    if len({m.kinds[i] for i in ids}) == 1 and len(ids) > 1 and m.site.form in AFFINE:
        kind = m.parts[ids[0]].kind
        grouped = isinstance(kind, ParameterComposition) and kind.batched
        delta = kind.delta(m.stacked(ids), m.site) if grouped else None
        if isinstance(delta, LowRank) and isinstance(delta.s, float) and delta.a.dtype == x.dtype:
            chosen = weights if ids == list(range(len(m))) else weights[..., ids]
            return lowrank_mixture(x, delta.a, delta.b, chosen * delta.s)
    total: Any = 0.0
    for i in ids:
        change = m.one(i, f, x, y, c)
        if m.parts[i].kind.replaces:
            change = less(m, change, y, i)
        w = weights[..., i]
        total = total + w.view(*w.shape, *[1] * (change.ndim - w.ndim)) * change
    return total


def _gathered(m: Any, f: Any, x: Tensor, y: Tensor, routing: Routing, c: Context, ids: Sequence[int]) -> Any:
    """Under compile, one module an example: its parameters gathered by index, in static shapes; None if it can't."""
    index = routing.index
    if index is None or index.ndim != 2 or index.shape[-1] != 1 or len({m.kinds[i] for i in ids}) > 1:
        return None
    if len(ids) < len(m) or isinstance(m.parts[ids[0]].kind, (Generator, InputComposition)):
        return None
    kind, chosen = m.parts[ids[0]].kind, index[:, 0]
    params = {name: tensor[chosen.clamp(min=0)] for name, tensor in m.stacked(ids).items()}
    change = apply(kind, params, f, x.unsqueeze(1), y.unsqueeze(1), c, m.site, True).squeeze(1)
    change = less(m, change, y, ids[0]) if kind.replaces else change
    w = (chosen >= 0).to(y.dtype)
    w = w if routing.weights is None else w * routing.weights[:, 0].to(y.dtype)
    return change * w.view(-1, *[1] * (change.ndim - 1))


def _rows(x: Tensor, routing: Routing) -> tuple[Tensor, int, int]:
    """x with one leading axis of routed rows, how many axes of x that is, and how many rows an example has."""
    return (x.flatten(0, 1), 2, x.shape[1]) if routing.axes == 2 else (x, 1, 1)


def _sparse(m: Any, f: Any, x: Tensor, y: Tensor, routing: Routing, c: Context, entering: bool) -> Any:
    """Rows sorted by module, one product a group, and each row's changes gathered back, weighted and summed."""
    rows, flat, tokens = _rows(x, routing)
    p = plan(routing, m.kinds, len(rows), x.device)
    outputs = y.flatten(0, 1) if flat == 2 else y
    outs = list(_groups(m, p, f, rows, outputs, c, tokens, entering=entering))
    return _back(m, outs, p, rows, routing, x, flat) if outs else 0.0


def _back(m: Any, outs: Sequence[Tensor], p: Plan, rows: Tensor, routing: Routing, x: Tensor, flat: int) -> Tensor:
    """What the groups gave, back in the order of the rows, weighted and summed."""
    if p.back is None and len(outs) == 1 and routing.weights is None:
        return outs[0].unflatten(0, x.shape[:flat]) if flat == 2 else outs[0]
    change = torch.cat([*outs, outs[0].new_zeros(1, *outs[0].shape[1:])]) if p.idle or len(outs) > 1 else outs[0]
    if p.back is not None and p.slots == 1:
        change = change.index_select(0, p.back[:, 0])
    elif p.back is not None:
        change = change[p.back]  # (rows, k, …)
    elif len(change) > len(rows):
        change = change[:-1]
    if routing.weights is not None:
        w = routing.weights.reshape(len(rows), -1).to(change.dtype)
        w = w[:, 0] if p.slots == 1 else w
        change = change * w.view(*w.shape, *[1] * (change.ndim - w.ndim))
    change = change.sum(1) if p.slots > 1 else change
    return change.unflatten(0, x.shape[:flat]) if flat == 2 else change


def _groups(
    m: Any, p: Plan, f: Any, x: Tensor, y: Any, c: Context, tokens: int, full: bool = False, entering: bool = False
) -> Iterator[Tensor]:
    """The changes, or with `full` the outputs, of each group in the plan's order, flat in rows."""
    sorted_x = x if p.order is None else x.index_select(0, p.order)
    sorted_y: Any = y if p.order is None or y is None else y.index_select(0, p.order)
    for group in _apart(m, p.groups):
        kind = m.parts[group.ids[0]].kind
        if kind.enters != entering:
            like = sorted_x if entering else sorted_y
            yield like.new_zeros(group.stop - group.start, *like.shape[1:])
            continue
        seen = c if isinstance(kind, ParameterComposition) else _at(c, p, group, tokens)
        yield _group(m, group, kind, f, sorted_x, sorted_y, seen, full)


def _apart(m: Any, groups: Sequence[Group]) -> Iterator[Group]:
    """The groups; modules that tie their rows one by one, since what they keep of them is in their own tensors."""
    for group in groups:
        if m.parts[group.ids[0]].kind.tied:
            yield from (Group((i,), group.start + k * group.each, group.each) for k, i in enumerate(group.ids))
        else:
            yield group


def _untied(m: Any, ids: Sequence[int], routing: Routing) -> None:
    """Raise CompositionError where compiled code would run a module that ties its rows on those of others as well."""
    tied = [m.names[i] for i in ids if m.parts[i].kind.tied and m.parts[i].training]
    if tied and routing.axes and routing.index is not None:
        raise CompositionError(
            f"site {m.site.name!r}: {listed(tied)} take statistics of their own rows in training, which compiled code "
            f"does not tell apart. Train it without torch.compile, or freeze them and call model.eval()."
        )


def _at(c: Context, p: Plan, group: Group, tokens: int) -> Context:
    """The context of a group's rows: their examples, of which each has so many tokens."""
    if p.order is None and len(p.groups) == 1 and tokens == 1:
        return c
    rows = torch.arange(group.start, group.stop) if p.order is None else p.order[group.start : group.stop]
    return c.at(rows if tokens == 1 else rows // tokens)


def _group(m: Any, group: Group, kind: Kind, f: Any, x: Tensor, y: Any, c: Context, full: bool) -> Tensor:
    whole = group.stop - group.start == len(x)
    x = x if whole else x[group.start : group.stop]
    y = y if whole or y is None else y[group.start : group.stop]
    if len(group.ids) == 1:
        out = apply(kind, m.parts[group.ids[0]].tensors(), f, x, y, c, m.site, False)
    else:
        shape = (len(group.ids), group.each)
        grouped_y = None if y is None else y.unflatten(0, shape)
        out = apply(kind, m.stacked(group.ids), f, x.unflatten(0, shape), grouped_y, c, m.site, True)
        out = out.flatten(0, 1)
    if kind.replaces:
        return out if full else less(m, out, y, group.ids[0])
    return y + out if full else out  # type: ignore[operator]


def changes(m: Any, f: Any, x: Tensor, y: Any, routing: Routing, c: Context) -> Any:
    """Σ_i α_i Δ_i, given y = f(x), of the modules that act on the output; 0 if there are none."""
    return _sum(m, f, x, y, routing, c, False)


def mix(m: Any, f: Any, x: Tensor, routing: Routing, c: Context) -> Tensor:
    """Σ_i α_i m_i(x) of replacements, without f. Only active ones run; a row without any is zero."""
    ids = m.active(routing)
    if ids and (routing.axes == 0 or routing.index is None or torch.compiler.is_compiling()):
        _untied(m, ids, routing)
        weights = routing.dense(len(m))
        outs = [(weights[..., i], m.one(i, f, x, None, c)) for i in ids]
        return sum(w.to(o.dtype).view(*w.shape, *[1] * (o.ndim - w.ndim)) * o for w, o in outs)  # type: ignore
    if ids:
        rows, flat, tokens = _rows(x, routing)
        p = plan(routing, m.kinds, len(rows), x.device)
        outs = list(_groups(m, p, f, rows, None, c, tokens, full=True))
        if outs:
            return _back(m, outs, p, rows, routing, x, flat)
    shape = list(x.shape)
    shape[m.site.axis] = m.site.outputs or shape[m.site.axis]
    return x.new_zeros(shape, dtype=m.site.dtype)
