"""What learned gates share: the rows of x that they read, which of them count, scores of them, and the best."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..abstract import Context, Router, Site
from ..errors import CompositionError, SiteError


def by(router: str, given: str | None, ways: Sequence[str | None] = ("token", "example")) -> str:
    """The granularity, checked; raises CompositionError."""
    if given not in ways:
        said = " or ".join("None" if way is None else f"by {way!r}" for way in ways)
        raise CompositionError(f"{router}(by={given!r}): a route is chosen {said}.")
    return given  # type: ignore[return-value]


def width(router: Router, site: Site, before: Tensor | None = None) -> int:
    """How many features x has at the site; raises CompositionError where no linear gate, or not this one, can read it.

    before: the gate that the router has already, (…, features).
    """
    name, features = type(router).__name__, site.features("inputs")
    if site.form == "embedding":
        raise CompositionError(f"{name} at site {site.name!r}: its input is token ids, which no linear gate can read.")
    if before is not None and before.shape[-1] != features:
        raise CompositionError(
            f"{name} reads {before.shape[-1]} features, but site {site.name!r} has {features}: one router object is "
            f"one gate. Pass a callable, router=lambda: mb.{name}(…), for a gate at each site."
        )
    return features


def rows(router: Router, x: Tensor, c: Context, by: str, axis: int) -> tuple[Tensor, Tensor | None]:
    """(x with one vector a routed row, which rows are not padding): (b, d), or (b, t, d) with the mask (b, t) or None.

    by: "token", x (b, t, d) or (b, d); or "example", the mean over positions that are not padding. axis: of features.
    """
    name, x = type(router).__name__, x if axis == -1 or x.ndim == 2 else x.movedim(axis, -1)
    if x.ndim == 2:
        return x, None
    if by == "token" and x.ndim > 3:
        raise CompositionError(
            f"{name}(by='token') at an input {tuple(x.shape)}: tokens are the rows of (batch, time, features). Use "
            f"by='example'."
        )
    mask = c.mask if x.ndim == 3 else None
    if mask is not None:
        if mask.shape[1] < x.shape[1]:
            raise SiteError(
                f"{name}: the input has {x.shape[1]} positions, the attention mask {mask.shape[1]}: they are not the "
                f"same positions. Give the router a site of its own, or the call no attention mask."
            )
        mask = mask[:, -x.shape[1] :]  # of a cached generation, the newest positions
    if by == "token":
        return x, mask
    if mask is None:
        return x.flatten(1, -2).mean(1), None
    count = mask.to(x.dtype).unsqueeze(-1)
    return (x * count).sum(1) / count.sum(1).clamp(min=1), None


def full(x: Tensor) -> Tensor:
    """x in fp32 at least: gates are small, and their softmax is not."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """W x + b in the precision of x."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


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
