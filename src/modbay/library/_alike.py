"""How alike modules are, from their files alone: inner products of what they change, as far as that needs no base.

Cosines of updates, not of factors: A and B of a low-rank update are only known up to an invertible matrix between them.
⟨B₁A₁, B₂A₂⟩ = Σ (B₁ᵀB₂ ⊙ A₁A₂ᵀ) is of matrices as small as the ranks, so that nothing is made dense.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..abstract import Delta, Kind, ParameterComposition, Site
from ..deltas import Bias, Dense, Kronecker, LowRank, Sparse, Sum
from ..errors import ModbayError
from ._format import make
from ._read import ModuleFile

KNOWN = (LowRank, Kronecker, Sparse, Dense, Bias)  # which can be compared without the base's weight

Piece = Delta | Tensor
Pieces = dict[str, dict[str, list[Piece]]]  # by site, by what is changed there


@dataclass(frozen=True, eq=False)
class Changes:
    """What a module changes: "deltas" by site; else its "parameters" by site, where deltas need the base, or aren't."""

    file: ModuleFile

    @cached_property
    def deltas(self) -> Pieces | None:
        """None if the module has none that can be told from its files."""
        try:
            return _deltas(self.file)
        except (ModbayError, LookupError, AttributeError, TypeError, ValueError, RuntimeError):
            return None  # a class that isn't known here, tensors that are made anew, a site's weight that is read

    @cached_property
    def parameters(self) -> Pieces:
        out: Pieces = {}
        for key, tensor in self.file.tensors.items():
            site = key.partition("/")[0]
            if tensor.is_floating_point():
                out.setdefault(site, {})[f"{key} {tuple(tensor.shape)}"] = [_wide(tensor)]
        return out


@dataclass(frozen=True)
class Alike:
    """⟨a, b⟩, ‖a‖², ‖b‖² by site that both have; `of` what."""

    of: str
    sites: Mapping[str, tuple[float, float, float]]

    @property
    def cosine(self) -> float | None:
        """Over all common sites; None if there are none."""
        return cosine(*map(sum, zip(*self.sites.values(), strict=True))) if self.sites else None


def cosine(product: float, one: float, two: float) -> float:
    scale = (max(one, 0.0) * max(two, 0.0)) ** 0.5
    return 0.0 if scale == 0 else max(-1.0, min(1.0, product / scale))


@torch.no_grad()
def alike(one: Changes, two: Changes) -> Alike:
    """Two modules, site by site."""
    of = "deltas" if one.deltas is not None and two.deltas is not None else "parameters"
    a, b = getattr(one, of), getattr(two, of)
    sites = {}
    for site in a:
        whats = [what for what in a[site] if what in b.get(site, {})]
        if whats:
            at = site_of(one.file, site)
            sums = [sum(_product(x[site][w], y[site][w], at) for w in whats) for x, y in ((a, b), (a, a), (b, b))]
            sites[site] = (sums[0], sums[1], sums[2])
    return Alike(of, sites)


def _deltas(file: ModuleFile) -> Pieces | None:
    kinds = [make(said, (Kind,), "") for said in file.record["kinds"]]
    out: Pieces = {}
    for name, said in file.sites.items():
        kind, site = kinds[said["kind"]], site_of(file, name)
        if not isinstance(kind, ParameterComposition) or kind.reads_weight:
            return None
        own = {k.removeprefix(f"{name}/"): _wide(t) for k, t in file.tensors.items() if k.startswith(f"{name}/")}
        for leaf in _leaves(kind.delta(own, site)):
            if not isinstance(leaf, KNOWN):
                return None
            what, piece = ("bias", leaf.bias) if isinstance(leaf, Bias) else ("weight", leaf)
            out.setdefault(name, {}).setdefault(what, []).append(piece)
    return out


def site_of(file: ModuleFile, name: str) -> Site:
    """A site as far as a file tells of it."""
    said = file.sites.get(name, {})
    return Site(name, said.get("form", "other"), said.get("inputs"), said.get("outputs"))


def _leaves(delta: Delta) -> list[Delta]:
    return [leaf for part in delta.parts for leaf in _leaves(part)] if isinstance(delta, Sum) else [delta]


def _wide(tensor: Tensor) -> Tensor:
    known = tensor.is_floating_point()
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)) if known else tensor


def _product(one: list[Any], two: list[Any], site: Site) -> float:
    return sum(_pair(a, b, site) for a in one for b in two)


def _pair(a: Any, b: Any, site: Site) -> float:
    """⟨a, b⟩ of two updates of one weight; zero if they can't be of one."""
    if isinstance(a, LowRank) and isinstance(b, LowRank):
        if a.b.ndim != b.b.ndim or a.a.ndim != b.a.ndim:
            return 0.0
        experts = a.b.ndim == 3  # (E, r, i) and (E, o, r); else (r, i, …) and (o, r)
        left, right = (d.a if experts else d.a.flatten(1) for d in (a, b))
        if left.shape[-1] != right.shape[-1] or a.b.shape[-2] != b.b.shape[-2]:
            return 0.0
        return float(((a.b.mT @ b.b) * (left @ right.mT)).sum() * a.s * b.s)
    if isinstance(a, Kronecker) and isinstance(b, Kronecker) and (a.c.shape, a.d.shape) == (b.c.shape, b.d.shape):
        return float((a.c * b.c).sum() * (a.d * b.d).sum())
    if isinstance(a, Sparse) and isinstance(b, Sparse):
        where = {int(i): n for n, i in enumerate(a.indices)}
        both = [(where[int(i)], n) for n, i in enumerate(b.indices) if int(i) in where]
        return float(sum(a.values[i] * b.values[j] for i, j in both))
    if isinstance(b, Sparse):
        a, b = b, a
    other = b.dense(site)[0] if isinstance(b, Delta) else b
    if isinstance(a, Sparse):
        return float((other.flatten()[a.indices] * a.values).sum())
    own = a.dense(site)[0] if isinstance(a, Delta) else a
    return float((own * other).sum()) if own.shape == other.shape else 0.0
