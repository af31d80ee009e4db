"""The engine: runs the active modules of a site, grouped by kind, and knows nothing of methods, routers or models.

Kinds see only groups, aggregators only routings; this is where the two meet.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..abstract import (
    Context,
    FunctionComposition,
    Generator,
    InputComposition,
    Kind,
    ParameterComposition,
    Replacement,
    Routing,
    Site,
)
from ..deltas import LowRank
from ..errors import CompositionError, SiteError
from ..ops import lowrank_mixture
from ..types import Params
from ._plan import Arrangement, Group, Plan, plan

AFFINE = ("linear", "transposed")


class Part(nn.Module):
    """One module's share of one site: its kind, and its parameters there. A network of the user's own is its own kind."""

    def __init__(self, kind: Kind, tensors: Params):
        super().__init__()
        self.kind = kind
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)

    def tensors(self) -> dict[str, Any]:
        return {**self._parameters, **self._buffers} if self._buffers else self._parameters


def difference(kind: Kind, params: Params, f: Callable | None, x: Tensor, y: Any, c: Context, site: Site) -> Tensor:
    """What one module adds to y = f(x); for a replacement, its own output."""
    if isinstance(kind, ParameterComposition):
        return kind.delta(params, site).apply(x, y, site)
    if isinstance(kind, FunctionComposition):
        return kind.change(params, x, y, c)
    if isinstance(kind, Replacement):
        return kind.forward(params, x, f, c)
    raise CompositionError(
        f"{type(kind).__name__} at site {site.name!r}: an input composition has no output of its own; it needs an "
        f"aggregator that puts modules in front of the input (WeightedSum, Concatenate) at a seam that takes it."
    )


def apply(kind: Kind, params: Params, f: Any, x: Tensor, y: Any, c: Context, site: Site, grouped: bool) -> Tensor:
    """`difference`, in the dtype of the parameters, for one module or for a group: params (g, …), x and y (g, m, …)."""
    if isinstance(kind, Generator):
        return generated(kind, params, f, x, y, c, site, grouped)
    dtype = x.dtype
    first = next(iter(params.values()), x)
    casts = first.dtype != dtype and _casts(params, x)
    if casts:
        learned = next(p.dtype for p in params.values() if p.is_floating_point())
        x, y = x.to(learned), y if y is None else y.to(learned)
    if not grouped or kind.batched:
        out = difference(kind, params, f, x, y, c, site)
    elif isinstance(kind, ParameterComposition):
        run = lambda p, x, y: kind.delta(p, site).apply(x, y, site)
        out = torch.func.vmap(run, in_dims=(0, 0, None if y is None else 0), randomness="different")(params, x, y)
    else:
        run = partial(_one, kind, f, c, site)
        out = torch.func.vmap(run, in_dims=(0, 0, None if y is None else 0), randomness="different")(params, x, y)
    return out.to(dtype) if casts else out


def updated(kind: ParameterComposition, params: Params, x: Tensor, y: Tensor, out: Tensor, c: Context, site: Site):
    """out + Δ(x, y) of one module, in one product where its delta has one: `out` is y, or y with other updates."""
    if out is y and next(iter(params.values()), x).dtype == x.dtype:
        return kind.delta(params, site).onto(x, y, site)
    return out + apply(kind, params, None, x, y, c, site, False)


def _casts(params: Params, x: Tensor) -> bool:
    """Whether x must be cast to the dtype of the parameters."""
    learned = next((p.dtype for p in params.values() if p.is_floating_point()), x.dtype)
    return learned != x.dtype and x.is_floating_point() and not torch.is_autocast_enabled(x.device.type)


def _one(kind: Kind, f: Any, c: Context, site: Site, params: Params, x: Tensor, y: Any) -> Tensor:
    return difference(kind, params, f, x, y, c, site)


def generated(
    kind: Generator, params: Params, f: Any, x: Tensor, y: Any, c: Context, site: Site, grouped: bool
) -> Tensor:
    """A kind whose parameters differ by example: generate them, then run its inner kind with one group an example."""
    if grouped:  # several generators, each with rows of its own
        rows = None if c.rows is None else c.rows.view(len(x), -1)
        several = [
            generated(kind, {k: v[i] for k, v in params.items()}, f, x[i], None if y is None else y[i],
                      c if rows is None else Context(**{**vars(c), "rows": rows[i]}), site, False)
            for i in range(len(x))
        ]  # fmt: skip
        return torch.stack(several)
    each = kind.generate(params, x, c)
    out = apply(kind.kind, each, f, x.unsqueeze(1), None if y is None else y.unsqueeze(1), c, site, True)
    return out.squeeze(1)


class Modules:
    """The modules of one site in one call: what an aggregator is given to run them, all of it grouped."""

    __slots__ = ("parts", "kinds", "site", "names", "router")

    def __init__(self, parts: Sequence[Any], kinds: Arrangement, site: Site, names: Sequence[str], router: Any):
        self.parts, self.kinds, self.site, self.names, self.router = parts, kinds, site, names, router

    def __len__(self) -> int:
        return len(self.parts)

    def route(self, x: Tensor, c: Context) -> Routing:
        """Ask the router again, with another input (recursion, trees)."""
        return self.router(x, c)

    def active(self, routing: Routing) -> list[int]:
        """The modules that a routing for the whole batch names, as far as the host knows: else all of them."""
        return self._facts(routing)[0]

    def _facts(self, routing: Routing) -> tuple[list[int], bool, bool]:
        """(the active modules, whether one enters f, whether one replaces it), found once a routing and arrangement."""
        key = ("facts", self.kinds)
        found = routing.cache.get(key)
        if found is None:
            host = routing.host
            said = self.kinds.live if host is None else dict.fromkeys(i for ids in host for i in ids)
            ids = [i for i in said if i >= 0 and self.kinds[i] >= 0]
            kinds = [self.parts[i].kind for i in ids]
            enters, replaces = any(k.enters for k in kinds), any(isinstance(k, Replacement) for k in kinds)
            found = routing.cache[key] = (ids, enters, replaces)
        return found

    def one(self, i: int, f: Any, x: Tensor, y: Any, c: Context) -> Tensor:
        """What module i adds to y = f(x) for all rows; for a replacement, its output."""
        part = self.parts[i]
        return apply(part.kind, part.tensors(), f, x, y, c, self.site, False)

    def output(self, i: int, f: Any, x: Tensor, c: Context, y: Any = None) -> Tensor:
        """m_i(x): the output of the site with module i alone."""
        kind = self.parts[i].kind
        if isinstance(kind, Replacement):
            return self.one(i, f, x, None, c)
        if kind.enters:
            return f(x + self.one(i, f, x, x, c))
        y = (f(x) if f is not None else torch.zeros_like(x)) if y is None else y
        return y + self.one(i, f, x, y, c)

    def stacked(self, ids: Sequence[int]) -> dict[str, Tensor]:
        """The parameters of modules of one kind, along a new leading axis. What they share is expanded, not copied."""
        parts = self.parts
        several = [parts[i].tensors() for i in ids]
        first, last, stack = several[0], several[-1], {}
        for name, tensor in first.items():
            if last[name] is tensor and all(other[name] is tensor for other in several):
                stack[name] = tensor.expand(len(ids), *tensor.shape)
            else:
                stack[name] = torch.stack([other[name] for other in several])
        return stack

    def averaged(self, routing: Routing, rows: int) -> tuple[Kind, Params, bool]:
        """(kind, Σ_i α_i φ_i, whether an example): the modules' parameters, averaged; they must be of one kind."""
        ids = self.active(routing)
        weights = routing.dense(len(self))
        kind = self.alike(ids)
        if weights.ndim > 1:
            weights = weights.reshape(rows, len(self))
        stack = self.stacked(ids)
        chosen = weights if ids == list(range(len(self))) else weights[..., ids]
        mixed = {}
        for name, tensor in stack.items():
            if tensor.is_floating_point() and name not in kind.constants:
                flat = chosen.to(tensor.dtype) @ tensor.flatten(1)
                mixed[name] = flat.view(*flat.shape[:-1], *tensor.shape[1:])
            else:
                same = all(torch.equal(tensor[0], other) for other in tensor[1:])
                if not same:
                    raise CompositionError(
                        f"ParameterAverage at site {self.site.name!r}: {type(kind).__name__}'s {name!r} is not learned and "
                        f"differs between modules, so that their parameters have no average; use of='deltas' or WeightedSum."
                    )
                mixed[name] = tensor[0].expand(rows, *tensor.shape[1:]) if weights.ndim > 1 else tensor[0]
        return kind, mixed, weights.ndim > 1

    def alike(self, ids: Sequence[int]) -> Kind:
        """The one kind of these modules; raises CompositionError if there are several, or none."""
        kinds = {self.kinds[i]: self.parts[i].kind for i in ids}
        if len(kinds) != 1:
            raise CompositionError(
                f"the parameters of {len(kinds)} kinds at site {self.site.name!r} can't be averaged: "
                f"{', '.join(sorted(repr(kind) for kind in kinds.values())) or 'no module is here'}. Use WeightedSum."
            )
        return next(iter(kinds.values()))

    # Sums

    def add(self, f: Any, x: Tensor, routing: Routing, c: Context) -> Tensor:
        """f(x) + Σ_i α_i Δ_i, where a replacement's Δ is m(x) − f(x). Only active modules run."""
        if self._entered(routing):
            x, x0 = x + self._sum(None, x, x, routing, c, True), x
            y = f(x)
            return y + self._sum(f, x0, y, routing, c, False)
        fused = self._fused(f, x, routing)
        if fused is not None:
            return fused
        ids = self.active(routing) if routing.axes == 0 else None
        if ids is not None and routing.weights is None and routing.host is not None:
            return self._alone(ids, f, x, c)
        if ids is None and self._chosen(routing) and self._replaced(routing):
            return self._replace(f, x, routing, c)
        y = f(x) if f is not None else torch.zeros_like(x)
        return y + self._sum(f, x, y, routing, c, False)

    def _fused(self, f: Any, x: Tensor, routing: Routing) -> Tensor | None:
        """The commonest case in the fewest passes: rows in order, in one group of one kind of delta, at weight one."""
        if routing.axes != 1 or routing.host is None or routing.weights is not None or torch.compiler.is_compiling():
            return None
        rows, _ = self._rows(x, routing)
        p = plan(routing, self.kinds, len(rows), x.device)
        if p.order is not None or len(p.groups) != 1:
            return None
        ids, each = p.groups[0].ids, p.groups[0].each
        kind = self.parts[ids[0]].kind
        if not isinstance(kind, ParameterComposition) or not kind.batched or self.site.form not in AFFINE:
            return None
        params = self.stacked(ids)
        if next(iter(params.values())).dtype != x.dtype:
            return None
        y = f(x) if f is not None else torch.zeros_like(x)
        shape = (len(ids), each)
        return kind.delta(params, self.site).onto(x.unflatten(0, shape), y.unflatten(0, shape), self.site).flatten(0, 1)

    def _alone(self, ids: Sequence[int], f: Any, x: Tensor, c: Context) -> Tensor:
        """The same modules at weight one for all rows: no weights, no sorting, no copies."""
        if len(ids) == 1 and isinstance(self.parts[ids[0]].kind, Replacement):
            return self.one(ids[0], f, x, None, c)
        y = f(x) if f is not None else torch.zeros_like(x)
        out = y
        for i in ids:
            part = self.parts[i]
            if isinstance(part.kind, ParameterComposition):
                out = updated(part.kind, part.tensors(), x, y, out, c, self.site)
                continue
            change = self.one(i, f, x, y, c)
            out = out + (self._less(change, y, i) if isinstance(part.kind, Replacement) else change)
        return out

    def _chosen(self, routing: Routing) -> bool:
        """Whether each row has at most one module, at weight one, so that replacements need no arithmetic."""
        one = routing.index is not None and routing.index.shape[-1] == 1
        return one and routing.weights is None and not torch.compiler.is_compiling()

    def _entered(self, routing: Routing) -> bool:
        return self._facts(routing)[1]

    def _replaced(self, routing: Routing) -> bool:
        return self._facts(routing)[2]

    def _replace(self, f: Any, x: Tensor, routing: Routing, c: Context) -> Tensor:
        """Each row by its module, in rooms of their own; f runs only if some row needs it. Narrow outputs are filled up."""
        rows, flat = self._rows(x, routing)
        p = plan(routing, self.kinds, len(rows), x.device)
        y = None
        needs = p.idle or not all(isinstance(self.parts[g.ids[0]].kind, Replacement) for g in p.groups)
        if needs:
            y = f(x) if f is not None else torch.zeros_like(x)
            y = y.flatten(0, flat - 1) if flat > 1 else y
        outs = list(self._groups(p, f, rows, y, c, full=True))
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
            out = out[torch.where(take >= len(p.order), take + torch.arange(len(take), device=take.device), take)]
        return out.unflatten(0, x.shape[:flat]) if flat > 1 else out

    def _less(self, out: Tensor, y: Any, i: int) -> Tensor:
        """m_i(x) − f(x), of what stands instead of f; a head of another width is not to be weighed."""
        if out.shape != y.shape:
            raise CompositionError(
                f"site {self.site.name!r}: {type(self.parts[i].kind).__name__} gives {tuple(out.shape)} where f gives "
                f"{tuple(y.shape)}. A module of another width can be chosen, one an example, but not weighed, nor added."
            )
        return out - y

    def check(self, routing: Routing, x: Tensor) -> None:
        """Raise SiteError if a routing is not for the rows of x, CompositionError if it tears apart what must not be."""
        table = routing.weights if routing.index is None else routing.index
        want, have = tuple(table.shape[:-1]), tuple(x.shape[: routing.axes])  # type: ignore[union-attr]
        if want != have:
            raise SiteError(
                f"site {self.site.name!r} has rows {have}, but the routing is for {want}: the rows of this "
                f"site are not the examples of the batch. Attach to another site, or route it by mb.Fixed or bay.use(name)."
            )
        if routing.axes == 2:
            tied = [self.names[i] for i in self.active(routing) if not self.parts[i].kind.tokenwise]
            if tied or self.site.axis != -1:
                why = f"the modules {', '.join(map(repr, tied))} look at whole examples" if tied else "it has no tokens"
                raise CompositionError(
                    f"site {self.site.name!r}: the tokens of one example were routed apart, but {why}. Route it by example."
                )

    def _sum(self, f: Any, x: Tensor, y: Tensor, routing: Routing, c: Context, entering: bool) -> Any:
        """Σ_i α_i Δ_i over the modules that enter, or over those that don't; 0 if there are none."""
        if routing.axes == 0 or routing.index is None or torch.compiler.is_compiling():
            return self._dense(f, x, y, routing, c, entering)
        return self._sparse(f, x, y, routing, c, entering)

    def _dense(self, f: Any, x: Tensor, y: Tensor, routing: Routing, c: Context, entering: bool) -> Any:
        """Every module on all rows, weighted. Low-rank updates of one shape become one product."""
        ids = [i for i in self.active(routing) if self.parts[i].kind.enters == entering]
        if not ids:
            return 0.0
        gathered = self._gathered(f, x, y, routing, c, ids)
        if gathered is not None:
            return gathered
        weights = routing.dense(len(self)).to(y.dtype)
        if len({self.kinds[i] for i in ids}) == 1 and len(ids) > 1 and self.site.form in AFFINE:
            kind = self.parts[ids[0]].kind
            delta = kind.delta(self.stacked(ids), self.site) if isinstance(kind, ParameterComposition) else None
            if isinstance(delta, LowRank) and isinstance(delta.s, float) and delta.a.dtype == x.dtype:
                chosen = weights if ids == list(range(len(self))) else weights[..., ids]
                return lowrank_mixture(x, delta.a, delta.b, chosen * delta.s)
        total: Any = 0.0
        for i in ids:
            change = self.one(i, f, x, y, c)
            if isinstance(self.parts[i].kind, Replacement):
                change = self._less(change, y, i)
            w = weights[..., i]
            total = total + w.view(*w.shape, *[1] * (change.ndim - w.ndim)) * change
        return total

    def _gathered(self, f: Any, x: Tensor, y: Tensor, routing: Routing, c: Context, ids: Sequence[int]) -> Any:
        """Under compile, one module an example: its parameters gathered by index. Shapes are static; None if it can't be."""
        index = routing.index
        if index is None or index.ndim != 2 or index.shape[-1] != 1 or len({self.kinds[i] for i in ids}) > 1:
            return None
        if len(ids) < len(self) or isinstance(self.parts[ids[0]].kind, (Generator, InputComposition)):
            return None
        kind, chosen = self.parts[ids[0]].kind, index[:, 0]
        params = {name: tensor[chosen.clamp(min=0)] for name, tensor in self.stacked(ids).items()}
        change = apply(kind, params, f, x.unsqueeze(1), y.unsqueeze(1), c, self.site, True).squeeze(1)
        change = self._less(change, y, ids[0]) if isinstance(kind, Replacement) else change
        w = (chosen >= 0).to(y.dtype)
        w = w if routing.weights is None else w * routing.weights[:, 0].to(y.dtype)
        return change * w.view(-1, *[1] * (change.ndim - 1))

    def _rows(self, x: Tensor, routing: Routing) -> tuple[Tensor, int]:
        """x with one leading axis of routed rows, and how many axes of x that is."""
        return (x.flatten(0, 1), 2) if routing.axes == 2 else (x, 1)

    def _sparse(self, f: Any, x: Tensor, y: Tensor, routing: Routing, c: Context, entering: bool) -> Any:
        """Rows sorted by module, one product a group, and each row's changes gathered back, weighted and summed."""
        rows, flat = self._rows(x, routing)
        p = plan(routing, self.kinds, len(rows), x.device)
        outputs = y.flatten(0, 1) if flat == 2 else y
        outs = list(self._groups(p, f, rows, outputs, c, entering=entering))
        return self._back(outs, p, rows, routing, x, flat) if outs else 0.0

    def _back(self, outs: Sequence[Tensor], p: Plan, rows: Tensor, routing: Routing, x: Tensor, flat: int) -> Tensor:
        """What the groups gave, back in the order of the rows, weighted and summed."""
        if p.back is None and len(outs) == 1 and routing.weights is None:
            return outs[0].unflatten(0, x.shape[:flat]) if flat == 2 else outs[0]
        change = torch.cat([*outs, outs[0].new_zeros(1, *outs[0].shape[1:])]) if p.idle or len(outs) > 1 else outs[0]
        if p.back is not None and p.slots == 1:
            change = change[p.back[:, 0]]
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

    def _groups(self, p: Plan, f: Any, x: Tensor, y: Any, c: Context, full: bool = False, entering: bool = False):
        """The changes, or with `full` the outputs, of each group in the plan's order, flat in rows."""
        sorted_x = x if p.order is None else x[p.order]
        sorted_y = y if p.order is None or y is None else y[p.order]
        for group in p.groups:
            kind = self.parts[group.ids[0]].kind
            if kind.enters != entering:
                yield (
                    sorted_x.new_zeros(group.stop - group.start, *sorted_x.shape[1:])
                    if entering
                    else (sorted_y.new_zeros(group.stop - group.start, *sorted_y.shape[1:]))
                )
                continue
            seen = c if isinstance(kind, ParameterComposition) else self._at(c, p, group)
            yield self._group(group, kind, f, sorted_x, sorted_y, seen, full)

    def _at(self, c: Context, p: Plan, group: Group) -> Context:
        if p.order is not None:
            return c.at(p.order[group.start : group.stop])
        return c if len(p.groups) == 1 else c.at(torch.arange(group.start, group.stop))

    def _group(self, group: Group, kind: Kind, f: Any, x: Tensor, y: Any, c: Context, full: bool) -> Tensor:
        whole = group.stop - group.start == len(x)
        x = x if whole else x[group.start : group.stop]
        y = y if whole or y is None else y[group.start : group.stop]
        if len(group.ids) == 1:
            out = apply(kind, self.parts[group.ids[0]].tensors(), f, x, y, c, self.site, False)
        else:
            shape = (len(group.ids), group.each)
            grouped_y = None if y is None else y.unflatten(0, shape)
            out = apply(kind, self.stacked(group.ids), f, x.unflatten(0, shape), grouped_y, c, self.site, True)
            out = out.flatten(0, 1)
        if isinstance(kind, Replacement):
            return out if full else self._less(out, y, group.ids[0])
        return y + out if full else out

    def changes(self, f: Any, x: Tensor, y: Any, routing: Routing, c: Context) -> Any:
        """Σ_i α_i Δ_i, given y = f(x), of the modules that act on the output; 0 if there are none."""
        return self._sum(f, x, y, routing, c, False)

    def mix(self, f: Any, x: Tensor, routing: Routing, c: Context) -> Tensor:
        """Σ_i α_i m_i(x) of replacements, without f. Only active ones run; a row without any is zero."""
        ids = self.active(routing)
        if ids and (routing.axes == 0 or routing.index is None or torch.compiler.is_compiling()):
            weights = routing.dense(len(self))
            outs = [(weights[..., i], self.one(i, f, x, None, c)) for i in ids]
            return sum(w.to(m.dtype).view(*w.shape, *[1] * (m.ndim - w.ndim)) * m for w, m in outs)  # type: ignore
        if ids:
            rows, flat = self._rows(x, routing)
            p = plan(routing, self.kinds, len(rows), x.device)
            outs = list(self._groups(p, f, rows, None, c, full=True))
            if outs:
                return self._back(outs, p, rows, routing, x, flat)
        return x.new_zeros(*x.shape[:-1], self.site.outputs or x.shape[-1], dtype=self.site.dtype)

    def outputs(self, f: Any, x: Tensor, routing: Routing, c: Context) -> tuple[Tensor, Any]:
        """(m_i(x) stacked along a new first axis, y = f(x)): one entry a slot of the routing, or one a module."""
        y = f(x) if f is not None else None
        if routing.axes == 0 or routing.index is None:
            return torch.stack([self.output(i, f, x, c, y) for i in self.active(routing)]), y
        slots = [Routing(index=routing.index[..., k : k + 1]) for k in range(routing.index.shape[-1])]
        plain = y is not None and not self._replaced(routing) and not self._entered(routing)
        run = (lambda slot: y + self.changes(f, x, y, slot, c)) if plain else (lambda slot: self.add(f, x, slot, c))
        return torch.stack([run(slot) for slot in slots]), y
