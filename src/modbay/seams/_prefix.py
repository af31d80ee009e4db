"""Prefixes: keys and values put in front of an attention's own, by transformers' interface of attention functions."""

import copy
import inspect
import sys
from collections.abc import Callable
from itertools import takewhile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..abstract import Context
from ..core import Function, Modular, base_type, extended
from ..errors import CompositionError, SiteError
from ._match import named
from ._seat import Seam, Seat

NAME = "modbay"
KNOWN = ("sdpa", "eager")


class PrefixSeam(Seam):
    """The attention module gets a copy of its config that names our function; nothing else of the model changes.

    The function is called with the module, finds the prefixes of the call in its seat, puts them in front of the keys
    and values (after the cache, which never holds them), and calls the kernel that the model's own config names.
    """

    place = "attention"

    def __init__(self, target: nn.Module, seat: Seat, table: nn.Module | None = None):
        base = base_type(target)
        config = getattr(target, "config", None)
        names = inspect.unwrap(base.forward).__code__.co_names
        if config is None or "ALL_ATTENTION_FUNCTIONS" not in names:
            raise CompositionError(
                f"Prefix at {base.__name__}: it does not call transformers' attention interface. Attach at the modules "
                f"that do (mb.role.attention; BERT's attention.self, GPT-2's attn, Llama's self_attn)."
            )
        if getattr(target, "reorder_and_upcast_attn", False):
            raise CompositionError(f"Prefix at {base.__name__}: reorder_and_upcast_attn has no place for a prefix.")
        other = next((s for s in seat.seams.values() if isinstance(s, PrefixSeam)), None)
        self.config = config if other is None else other.config  # the model's own, and its kernel
        self.target, self.table = target, table
        self.owner = other is None
        self.now: tuple[Tensor, Tensor | None] | None = None  # the prefixes of the call that is under way
        self.relative: str | None = None  # how they have positions, under a bias or a window
        self.past: Any = 0  # how much of the text is in the cache
        self.met = False
        self.source = base.__module__  # where its eager attention is written
        _kernel(self.source, self.config)
        register()
        if self.owner:
            target.config = copy.copy(config)
            target.config._attn_implementation_internal = NAME

    def through(self, modular: Modular, run: Callable, target: nn.Module, args: tuple, kwargs: dict, c: Context,
                route: Any, aggregator: Any) -> Any:  # fmt: skip
        x = Function(run, args, kwargs, target, modular.site.name).x
        before, self.met = self.now, False
        self.relative = self._counted(modular, kwargs)
        cache = _cache(kwargs)
        self.past = 0 if cache is None or self.relative is None else cache.get_seq_length(target.layer_idx)
        self.now = extended(modular, x, c, route, aggregator)
        try:
            out = run(*args, **kwargs)
        finally:
            self.now = before
        if not self.met:
            raise SiteError(
                f"site {modular.site.name!r}: the attention ran without asking for its function, so that the prefix "
                f"did nothing. Its config may have been replaced after modbay was attached."
            )
        return out

    def _counted(self, modular: Modular, kwargs: dict) -> str | None:
        """How the prefixes of a bay have positions; raises CompositionError where not all are alike, or none can."""
        said = {relative(part.kind) for part in modular.order if part is not None}
        how = max(said, key=str, default=None) if said != {None} else None
        if len(said) > 1:
            raise CompositionError(
                f"Prefix(relative={how!r}) at site {modular.site.name!r}: another module of the bay has relative="
                f"{next(one for one in said if one != how)!r}, and positions are counted in one way for all rows. Put "
                f"it into a bay of its own."
            )
        other = how == "front" and window(self.target) is not None
        none = self.table is None and not other
        if how is not None and (none or kwargs.get("key_value_states") is not None):
            raise CompositionError(
                f"Prefix(relative={how!r}) at site {modular.site.name!r}: this attention has no bias of relative "
                f"positions in which a prefix could have its own{' and no window' * (how == 'front')}. Leave relative "
                f"out there."
            )
        if how is not None and self.table is not None and getattr(_cache(kwargs), "is_compileable", False):
            raise CompositionError(
                f"Prefix(relative={how!r}) at site {modular.site.name!r}: in a static cache it can't be told where the "
                f"text stands. Generate with the dynamic cache."
            )
        return how

    def undo(self) -> None:
        if self.owner:
            self.target.config = self.config  # type: ignore[assignment]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "now": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        register()  # the copy may live in a process that has not heard of us


def _cache(kwargs: dict) -> Any:
    return kwargs.get("cache", kwargs.get("past_key_values"))


def relative(kind: Any) -> str | None:
    """How a prefix has positions under a bias; of a generator, what it generates."""
    return getattr(getattr(kind, "kind", kind), "relative", None)


def biased(model: nn.Module, target: nn.Module) -> nn.Module | None:
    """The attention whose table of relative positions biases this one: the nearest by name; None if there is none."""
    names = {id(module): name.split(".") for name, module in named(model).items()}
    own = names[id(target)]
    tables = [m for m in model.modules() if getattr(m, "has_relative_attention_bias", False) and id(m) in names]
    shared = lambda module: sum(1 for _ in takewhile(lambda p: p[0] == p[1], zip(own, names[id(module)], strict=False)))
    return max(tables, key=shared, default=None)


def register() -> None:
    """Make our function known by name; models that do not name it are not touched."""
    from transformers import AttentionInterface  # noqa: PLC0415 (an optional dependency)

    AttentionInterface.register(NAME, prefixed)


def _kernel(source: str, config: Any) -> Callable:
    """The attention function that the model would have used."""
    name = config._attn_implementation or "eager"
    module = sys.modules[source]
    if name not in KNOWN or not hasattr(module, "eager_attention_forward"):
        raise CompositionError(
            f"Prefix: the attention of {source} runs as {name!r}, where prefixes have not been tried. Load the "
            f"model with attn_implementation='sdpa' or 'eager'."
        )
    return module.ALL_ATTENTION_FUNCTIONS.get_interface(name, module.eager_attention_forward)


def prefixed(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any,
             is_causal: bool | None = None, position_bias: Tensor | None = None, **kwargs: Any) -> Any:  # fmt: skip
    """softmax(q [P_k; K]ᵀ + mask) [P_v; V], with the prefixes that the module's seat holds for this call."""
    seams = [seam for seam in module._modules["_bay"].seams.values() if isinstance(seam, PrefixSeam)]  # type: ignore[union-attr]
    given = []
    for seam in seams:
        seam.met = True
        if seam.now is not None:
            given.append((*seam.now, seam))
    if len(given) > 1 and any(seam.relative is not None for _, _, seam in given):
        raise CompositionError(
            "Prefix(relative=…): prefixes of several bays meet in one attention, where none tells which is first. "
            "Put them into one bay, and give it aggregator=mb.Concatenate()."
        )
    kernel = _kernel(seams[0].source, seams[0].config)
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    flags = seams[0].config._attn_implementation == "sdpa"  # eager code knows no flag, only masks that are added
    if given:
        causal = causal and flags
    else:
        kwargs |= {} if is_causal is None else {"is_causal": is_causal}
    for front, has, seam in reversed(given):
        seen = _seen(front.shape[-2], has, query, seam, kwargs.get("sliding_window"))
        attention_mask = _mask(attention_mask, query, key, front, seen, causal, flags)
        key, value = torch.cat([_of(front, 0, key), key], 2), torch.cat([_of(front, 1, value), value], 2)
        if position_bias is not None:
            position_bias = _bias(position_bias, front.shape[-2], has, seam.relative, seam.table)
        kwargs["is_causal"] = causal = False
    if position_bias is not None:
        kwargs["position_bias"] = position_bias
    return kernel(module, query, key, value, attention_mask, *args, **kwargs)


def _bias(bias: Tensor, n: int, has: Tensor | None, how: str | None, table: Any) -> Tensor:
    """The bias β(j − i) of query i and key j, (1, heads, t, s), lengthened: 0 at a prefix; or, with the table that it
    is looked up in, as `how` says. A row's own prefix is where it `has` places."""
    if how is None:
        return F.pad(bias, (n, 0))
    t, s = bias.shape[-2:]
    if how == "front":  # β(j − n − i) at the prefix; queries are the last t of s
        front = table.compute_bias(n + s, n, device=bias.device)[:, :, -t:].to(bias.dtype)
        if has is None:
            return torch.cat([front.expand(len(bias), -1, -1, -1), bias], -1)
        place = n - has.sum(-1, keepdim=True) + has.cumsum(-1) - 1  # the last of a row's places is next to its text
        front, bias = _picked(front, place, len(has)), bias.expand(len(has), -1, -1, -1)
        return torch.cat([front, bias], -1)
    # Queries are the last t of s, or all keys further on are to their right, where a decoder has one bias for all.
    further = table.compute_bias(t, t + n, device=bias.device)[..., t:].to(bias.dtype)
    bias = torch.cat([bias, further.expand(len(bias), -1, -1, -1)], -1)  # β(j − i), j = 0 … s + n − 1
    if has is None:
        return bias
    place = torch.cat([has.cumsum(-1) - 1, has.sum(-1, keepdim=True) + torch.arange(s, device=has.device)], -1)
    return _picked(bias, place, len(has))


def _picked(bias: Tensor, place: Tensor, rows: int) -> Tensor:
    """The columns `place` (rows, k) of a bias, for each row its own."""
    place = place.clamp(0, bias.shape[-1] - 1)[:, None, None, :].expand(-1, bias.shape[1], bias.shape[2], -1)
    return bias.expand(rows, -1, -1, -1).gather(-1, place)


def _of(front: Tensor, which: int, like: Tensor) -> Tensor:
    """The keys (0) or values (1) of the prefixes, (b, heads, n, d)."""
    if front.shape[0] != like.shape[0] or front.shape[2] != like.shape[1] or front.shape[4] != like.shape[3]:
        raise CompositionError(
            f"a prefix of {front.shape[2]} heads, {front.shape[4]} wide, meets keys of {like.shape[1]}, "
            f"{like.shape[3]} wide: say it, mb.Prefix(…, heads={like.shape[1]}, head_dim={like.shape[3]})."
        )
    return front[:, which].to(like.dtype)


def _seen(n: int, has: Tensor | None, query: Tensor, seam: PrefixSeam, window: int | None) -> Tensor | None:
    """Whether a query sees a place of the prefix, (b or 1, t or 1, n); None if all do. A prefix that is right before
    the text is left behind by the window."""
    if window is None or seam.relative != "front":
        return None if has is None else has[:, None]
    last = torch.arange(n, 0, -1, device=query.device)[None] if has is None else has.sum(-1, True) - has.cumsum(-1) + 1
    steps = last[:, None] + (seam.past + torch.arange(query.shape[2], device=query.device))[:, None]
    near = steps < window
    return near if has is None else near & has[:, None]


def _mask(mask: Any, query: Tensor, key: Tensor, front: Tensor, seen: Tensor | None, causal: bool,
          boolean: bool) -> Tensor | None:  # fmt: skip
    """The mask, lengthened by what is seen of the prefix."""
    n, t, s = front.shape[-2], query.shape[2], key.shape[2]
    if mask is None:
        if causal and t > 1:  # the kernel's flag can't say that all see the prefix
            mask = torch.ones(t, s, dtype=torch.bool, device=query.device).tril()[None, None]
        elif seen is None:
            return None
        else:
            mask = torch.ones(1, 1, t, s, dtype=torch.bool, device=query.device)
            mask = mask if boolean else torch.zeros_like(mask, dtype=query.dtype)
    if not isinstance(mask, Tensor):
        raise CompositionError(f"an attention mask of type {type(mask).__name__} can't be lengthened for a prefix.")
    if seen is None:
        return F.pad(mask, (n, 0), value=True if mask.dtype is torch.bool else 0)
    rows = max(len(seen), len(mask))
    seen = seen[:, None].expand(rows, mask.shape[1], mask.shape[2], -1)
    if mask.dtype is not torch.bool:
        seen = torch.zeros_like(seen, dtype=mask.dtype).masked_fill(~seen, torch.finfo(mask.dtype).min)
    return torch.cat([seen, mask.expand(rows, -1, -1, -1)], -1)


def window(attention: nn.Module) -> int | None:
    """How far an attention looks back, itself or by its config; None if it sees all."""
    config = getattr(attention, "config", None)
    own = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
    return own if isinstance(own, int) else None
