"""Attention of each position over several changes of it, whose keys and values are never made one by one.

K and V are linear: (Q y) · (K Δ_i + β) = (Kᵀ Q y) · Δ_i + (Q y) · β, and Σ_i s_i V Δ_i = V Σ_i s_i Δ_i, so that three
products with (d, d) do for any number of changes. Where all are in factors, Δ_i = U_i a_i, K and V may meet the U_i
instead, Qᵀ K U_i and V U_i, which is cheaper as soon as there are more rows than columns of U, and needs nothing but
small products where these are known from the call before.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..abstract import Factors

Folded = tuple[Tensor, Tensor, Tensor]  # [Qᵀ K U, Qᵀ β]ᵀ (m + 1, d), [K U, β]ᵀ b (m + 1,), V U (d, m)


@dataclass(eq=False)
class Kept:
    """What was folded for one site, and marks of all that it was made of: it holds as long as they do."""

    marks: list[Tensor]
    folded: Folded | None


class Attention:
    """Attention of y (…, d) over changes Δ_i, given as `Modules.differences` gives them: query Q y + b, keys K Δ_i + β,
    values V Δ_i. Computed in the dtype of V, perhaps not that of a base in bfloat16."""

    def __init__(self, query: nn.Linear, key: nn.Linear, value: nn.Linear, kept: dict[str, Kept], site: str):
        self.query, self.key, self.value, self.kept, self.site = query, key, value, kept, site

    def read(self, y: Tensor, changes: Sequence[tuple[list[int], Factors | Tensor]]) -> Tensor:
        """The scores (…, k), in the order of places."""
        y = self._own(y)
        self.small = [(places, self._grouped(change)) for places, change in changes if isinstance(change, Factors)]
        self.wide = [(places[0], self._own(change)) for places, change in changes if isinstance(change, Tensor)]
        self.folded = None if self.wide else self._folded(y.numel() // y.shape[-1])
        if self.folded is None:
            query = self.query(y)
            toward = query @ self.key.weight  # Kᵀ Q y
            self.u = _columns([change for _, change in self.small])
            said = toward if self.u is None else toward @ self.u
            same = query @ self.key.bias.unsqueeze(-1)  # no matter for the softmax, unless scores are dropped
            each = [(toward * change).sum(-1, keepdim=True) for _, change in self.wide]
        else:
            said = F.linear(y, self.folded[0], self.folded[1])
            same, each = said[..., -1:], []
        scores = torch.cat([*self._inner(said), *each], -1) + same
        places = [place for several, _ in self.small for place in several] + [place for place, _ in self.wide]
        back = sorted(range(len(places)), key=places.__getitem__)
        return scores if places == sorted(places) else scores[..., back]

    def write(self, shares: Tensor) -> Tensor:
        """V Σ_i s_i Δ_i, for shares (…, k) of what `read` has read."""
        shares, hidden = self._own(shares), []
        for places, change in self.small:
            own = shares if len(places) == shares.shape[-1] and places == sorted(places) else shares[..., places]
            hidden.append((change.code * own.unsqueeze(-1)).flatten(-2))
            hidden += [] if change.offset is None else [own]
        code = torch.cat(hidden, -1) if hidden else None
        if self.folded is not None:
            return F.linear(code, self.folded[2])  # type: ignore[arg-type]
        total: Any = None if code is None else F.linear(code, self.u)  # type: ignore[arg-type]
        for place, change in self.wide:
            share = shares[..., place : place + 1]
            total = share * change if total is None else torch.addcmul(total, share, change)
        return self.value(total)

    def _own(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.value.weight.dtype)

    def _grouped(self, change: Factors) -> Factors:
        """The factors of a group with its axis beside the code's, (…, g, m), where a product has left it."""
        offset = None if change.offset is None else self._own(change.offset)
        return Factors(self._own(change.code.movedim(0, -2)), self._own(change.out), offset)

    def _inner(self, said: Tensor) -> Iterator[Tensor]:
        """Scores (…, g) of each group, given what is said to each column of U."""
        start = 0
        for _, change in self.small:
            g, m = change.code.shape[-2:]
            score = (said[..., start : start + g * m].unflatten(-1, (g, m)) * change.code).sum(-1)
            start += g * m
            yield score if change.offset is None else score + said[..., start : start + g]
            start += 0 if change.offset is None else g

    def _folded(self, rows: int) -> Folded | None:
        """The products with U; None where it is cheaper to do without. Kept from the second call without gradients that
        finds all as it was; on the CPU alone, as elsewhere to look would be to wait for the device."""
        groups = [change for _, change in self.small]
        worth = rows >= sum(change.out.shape[0] * (change.out.shape[-1] + 1) for change in groups)
        made = [self.query.weight, self.query.bias, self.key.weight, self.key.bias, self.value.weight]
        made += [tensor for change in groups for tensor in (change.out, change.offset) if tensor is not None]
        if not _still(made):
            return self._fold(groups) if worth else None
        marks, before = [_mark(tensor) for tensor in made], self.kept.get(self.site)
        if before is None or not _equal(marks, before.marks):
            self.kept[self.site] = before = Kept(marks, self._fold(groups) if worth else None)
        elif before.folded is None:
            before.folded = self._fold(groups)
        return before.folded

    def _fold(self, groups: Sequence[Factors]) -> Folded:
        u: Any = _columns(groups)
        keys = torch.cat([self.key.weight @ u, self.key.bias.unsqueeze(-1)], -1).mT  # (m + 1, d)
        return keys @ self.query.weight, keys @ self.query.bias, self.value.weight @ u


def _columns(groups: Sequence[Factors]) -> Tensor | None:
    """U of all groups (d, m), an offset being one more column for each module; None for no group."""
    columns = []
    for change in groups:
        columns.append(change.out.movedim(1, 0).flatten(1))
        columns += [] if change.offset is None else [change.offset.mT]
    return torch.cat(columns, -1) if columns else None


def _still(made: Sequence[Tensor]) -> bool:
    """Whether products of these tensors may be kept for the next call."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    plain = all(type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu" for tensor in made)
    stack = torch._C._functorch.peek_interpreter_stack()  # type: ignore[attr-defined] (vmap and its like)
    return plain and stack is None and not torch.is_autocast_enabled("cpu")


def _mark(tensor: Tensor) -> Tensor:
    """Each row's product with one fixed vector: a change that this does not show is below the digits of the products,
    too. Versions of tensors would not show what is written to `.data`."""
    return tensor @ torch.arange(tensor.shape[-1]).cos().to(tensor.dtype)


def _equal(marks: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether all are as they were; in number, too."""
    same = len(marks) == len(others) and all(a.dtype == b.dtype for a, b in zip(marks, others, strict=True))
    return same and all(map(torch.equal, marks, others))
