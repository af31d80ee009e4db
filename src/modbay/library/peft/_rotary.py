"""Keys of peft's prefixes under rotary positions: there they stand as the cache has them, with the text behind them.

The text's query at i meets such a key k as (R(i + n) q)·k = (R(i) q)·(R(−n) k), so that R(−n) k is the key of a prefix
that has no position, as modbay's. R is the model's own: its `rotary_emb` tells cosine and sine, and
`apply_rotary_pos_emb` of the file that the attention is from turns by them.
"""

import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import FileError
from ...seams import named

ROTARY, APPLY = "rotary_emb", "apply_rotary_pos_emb"
FORMS = (["q", "k", "cos", "sin"], ["tensor", "sin", "cos"])  # arguments of APPLY; the second takes (b, n, heads, d)

Turn = Callable[[Tensor], Tensor]


def turning(model: nn.Module, site: str, n: int) -> tuple[Turn, Turn]:
    """(into modbay's, into peft's): what each makes of keys (heads, ·, d) of the attention `site`. FileError where the
    model's positions are rotary in a way that is not known."""
    modules = named(model)
    rotary = max((name for name in modules if _over(name, site)), key=len, default=None)
    if rotary is None:
        return _as_is, _as_is
    attention: Any = modules[site]
    apply = getattr(sys.modules[type(attention).__module__], APPLY, None)
    form = list(inspect.signature(apply).parameters) if apply else []
    form = next((known for known in FORMS if form[: len(known)] == known), None)
    if apply is None or form is None:
        raise FileError(
            f"prefix tuning as peft keeps it, at {type(attention).__name__} ({site!r}): its keys are turned by their "
            f"positions in a way that modbay does not know (no {APPLY} of a known form), so that they can't be told."
        )
    table = modules[rotary]
    at = next(table.buffers(), torch.zeros(1)).device
    by_type = "layer_type" in inspect.signature(table.forward).parameters
    known = {"layer_type": attention.config.layer_types[attention.layer_idx]} if by_type else {}
    told = table(torch.zeros(1, 1, 1, device=at), torch.tensor([[n]], device=at), **known)
    waves: dict[str, Tensor] = dict(zip(form[-2:], told, strict=True))
    length = (waves["cos"].square() + waves["sin"].square()).sqrt()  # some scale queries and keys as they turn them
    waves = {name: wave / length for name, wave in waves.items()}
    back = waves | {"sin": -waves["sin"]}
    return partial(_turn, apply, form, back), partial(_turn, apply, form, waves)


def _over(name: str, site: str) -> bool:
    """Whether this is the table of positions of a part of the model that the site is in."""
    parent, _, last = name.rpartition(".")
    return last == ROTARY and (not parent or site.startswith(f"{parent}."))


def _as_is(keys: Tensor) -> Tensor:
    return keys


def _turn(apply: Callable, form: list[str], waves: dict[str, Tensor], keys: Tensor) -> Tensor:
    """keys (heads, n, d); where a model turns fewer features than d, they are the first."""
    first, second = (waves[name].to(keys) for name in form[-2:])
    for features in (first.shape[-1], 2 * first.shape[-1]):  # some tell each wave once, for two features
        own, rest = keys[None].split([features, keys.shape[-1] - features], -1)
        try:
            if form == FORMS[0]:
                out = apply(own, own, first, second)[1]
            else:
                out = apply(own.transpose(1, 2), first, second).transpose(1, 2)
        except RuntimeError:
            continue
        return torch.cat([out, rest], -1)[0]
    raise FileError(f"prefix tuning as peft keeps it: keys {tuple(keys.shape)} are not turned by {APPLY} of the model.")
