"""What a gate reads of a site's input: each token, or an example's mean without padding."""

import torch
from torch import Tensor

from ..abstract import Context, Site
from ..errors import CompositionError, SiteError


def readable(who: str, site: Site, old: int | None) -> int:
    """The width that a linear gate reads at a site; raises CompositionError where it can't, or read another width."""
    if site.form == "embedding":
        raise CompositionError(f"{who} at site {site.name!r}: its input is token ids, which no linear gate can read.")
    width = site.features("inputs")
    if old is not None and old != width:
        raise CompositionError(
            f"{who} reads {old} features, but site {site.name!r} has {width}: one router object is one gate. Pass a "
            f"callable, router=lambda: mb.{who}(…), for a gate at each site."
        )
    return width


def rows(who: str, x: Tensor, c: Context, axis: int, by: str) -> Tensor:
    """x with one vector a routed row, in float32: (b, d) by example, (b, t, d) by token; of x (b, d) as it is."""
    x = x if axis == -1 or x.ndim == 2 else x.movedim(axis, -1)
    x = x.float()
    if x.ndim == 2:
        return x
    if by == "token":
        if x.ndim > 3:
            raise CompositionError(
                f"{who}(by='token') at an input {tuple(x.shape)}: tokens are the rows of (batch, time, features). Use "
                f"by='example'."
            )
        return x
    mask = c.mask if x.ndim == 3 else None
    if mask is None:
        return x.flatten(1, -2).mean(1)
    if mask.shape[1] < x.shape[1]:
        raise SiteError(
            f"{who}: the input has {x.shape[1]} positions, the attention mask {mask.shape[1]}: they are not the same "
            f"positions. Give the router a site of its own, or the call no attention mask."
        )
    count = mask[:, -x.shape[1] :].to(x.dtype).unsqueeze(-1)  # of a cached generation, the newest positions
    return (x * count).sum(1) / count.sum(1).clamp(min=1)


def granularity(who: str, by: str) -> str:
    """by, checked."""
    if by not in ("token", "example"):
        raise CompositionError(f"{who}(by={by!r}): a route is chosen by 'token' or by 'example'.")
    return by


def top(logits: Tensor, k: int | None, allowed: Tensor | None = None) -> tuple[Tensor | None, Tensor]:
    """(index, weights): the softmax over all that are allowed (None, (…, n)), or over the k best of them (…, k).

    allowed: (…, n), or None for all. An index is −1, and a weight nought, where nothing is left to choose.
    """
    if allowed is not None:
        logits = logits.masked_fill(~allowed, torch.finfo(logits.dtype).min)  # not −∞: a row of these has a gradient
    if k is None:
        p = torch.softmax(logits, -1)
        return None, p if allowed is None else p * allowed
    best, index = logits.topk(min(k, logits.shape[-1]), dim=-1)
    p = torch.softmax(best, -1)
    if allowed is None:
        return index, p
    there = allowed.gather(-1, index)
    return torch.where(there, index, -1), p * there
