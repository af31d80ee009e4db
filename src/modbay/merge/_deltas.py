"""Σ_i w_i Δ_i at one site, and other methods on ΔW: kept in the smallest kind that holds it exactly.

A sum of low-rank updates is one of the sum of their ranks; of offsets, of scales, of sparse updates, of 1 × 1 maps, one
of the same. What has no form in common is materialised.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..abstract import Delta, Kind, Site
from ..core import Part, base_type, quantised
from ..deltas import Affine, After, Beside, Bias, Dense, InputScale, Kronecker, LowRank, Mask, Scale, Sparse
from ..errors import CompositionError
from ..fold import MIXING, leaves, part_delta, plain
from ..modules import IA3, BitFit, DenseDelta, LoRA, Norm, ResidualAdapter, SparseDelta
from ..seams import Place
from ._lowrank import concatenated, split, truncated
from ._methods import Method

VECTORS = (Bias, Scale, Affine)  # changes of an output's features, each for itself, that need no weight
ALONE = (LowRank, Kronecker, Sparse, Dense, Mask, Beside, Bias)  # that do not read f(x): f need be no product with W


@dataclass(frozen=True)
class Result:
    """A merged part: its kind and tensors, what was done, and the relative error of it."""

    kind: Kind
    tensors: Mapping[str, Tensor]
    how: str
    error: float = 0.0


def merged(place: Place, parts: Mapping[str, Part], method: Method, rank: int | None) -> Result:
    """The parts of several modules at one place, merged by what they change of f's parameters.

    Raises CompositionError where some act on the input and some on the output, and where no kind can hold the result.
    """
    view, site = place.view(), place.site
    entering = {part.kind.enters for part in parts.values()}
    if len(entering) > 1:
        raise CompositionError(
            f"merge at site {site.name!r}: {named(parts)} act in part on the input and in part on the output of f; "
            f"together they are no sum. Merge those alike, and keep the two in bays of their own."
        )
    each = {name: list(leaves(part_delta(part, 1.0, view))) for name, part in parts.items()}
    every = [leaf for some in each.values() for leaf in some]
    if place.site.bare and any(isinstance(leaf, Bias) for leaf in every):
        raise CompositionError(f"merge at site {site.name!r}: a parameter has no bias, so that Δb would be lost.")
    weights = dict(method.weights)
    if method.name == "slerp":
        weights = dict(zip(each, method.arc(site.name, _flat(place, each, view)), strict=True))
    if method.linear or method.name == "slerp":
        return summed(place, view, [_times(leaf, weights[name]) for name, some in each.items() for leaf in some], rank)
    return _by_entries(place, view, each, every, method, rank)


def _times(leaf: Delta, weight: float) -> Delta:
    return leaf if weight == 1 else leaf.scale(weight)


def summed(place: Place, view: Site, every: Sequence[Any], rank: int | None) -> Result:
    """Σ of updates, in the smallest form."""
    if all(isinstance(leaf, (LowRank, Bias)) for leaf in every) and any(isinstance(leaf, LowRank) for leaf in every):
        return _low_rank(place, every, rank)
    if all(isinstance(leaf, Bias) for leaf in every):
        return Result(BitFit(), {"bias": _add([leaf.bias for leaf in every])}, "offsets added up")
    if all(isinstance(leaf, (Scale, InputScale)) for leaf in every):
        of = "input" if isinstance(every[0], InputScale) else "output"
        return Result(IA3(of), {"l": 1 + _add([leaf.gain for leaf in every])}, "scales added up")
    if all(isinstance(leaf, VECTORS) for leaf in every):
        return _norm(*_gain_and_shift(every, view), "scales and offsets added up")
    if all(isinstance(leaf, Sparse) for leaf in every):
        indices, where = torch.cat([leaf.indices for leaf in every]).unique(return_inverse=True)
        values = torch.cat([leaf.values for leaf in every])
        values = values.new_zeros(len(indices)).index_add(0, where, values)
        return Result(SparseDelta(None), {"indices": indices, "values": values}, "sparse entries added up")
    if all(isinstance(leaf, After) for leaf in every) or all(isinstance(leaf, Beside) for leaf in every):
        kind = ResidualAdapter("series" if isinstance(every[0], After) else "parallel")
        return Result(kind, {"alpha": _add([leaf.map for leaf in every])}, "maps added up")
    return _held(place, *_dense(place, every, view), rank)


def _by_entries(
    place: Place, view: Site, each: Mapping[str, list[Any]], every: Sequence[Any], method: Method, rank: int | None
) -> Result:
    """A method that treats entries apart, on the materialised ΔW and Δb of each module."""
    site, said = place.site, f"{method.name} of "
    if all(isinstance(leaf, Bias) for leaf in every):
        (bias,) = method.merged(site.name, list(each), [_add([leaf.bias for leaf in some]) for some in each.values()])
        assert bias is not None
        return Result(BitFit(), {"bias": bias}, said + "offsets")
    if site.form == "other" and all(isinstance(leaf, VECTORS) for leaf in every):
        pairs = [_gain_and_shift(some, view) for some in each.values()]
        gain, shift = method.merged(site.name, list(each), [g for g, _ in pairs], [s for _, s in pairs])
        return _norm(gain, shift, said + "scales and offsets")
    pairs = [_dense(place, some, view) for some in each.values()]
    weight, bias = method.merged(site.name, list(each), [w for w, _ in pairs], [b for _, b in pairs])
    assert weight is not None
    if all(isinstance(leaf, Sparse) for leaf in every):
        indices = torch.cat([leaf.indices for leaf in every]).unique()
        indices = indices[weight.flatten()[indices] != 0]
        kept = {"indices": indices, "values": weight.flatten()[indices]}
        return Result(SparseDelta(None), kept, said + "sparse entries")
    result = _held(place, weight, bias, rank)
    return Result(result.kind, result.tensors, f"{said}ΔW, {result.how}", result.error)


def _low_rank(place: Place, every: Sequence[Any], rank: int | None) -> Result:
    """Σ of low-rank updates and offsets: one LoRA of the sum of the ranks, or of a lower one."""
    low = [leaf for leaf in every if isinstance(leaf, LowRank)]
    offsets = [leaf.bias for leaf in every if isinstance(leaf, Bias)]
    groups = getattr(place.target, "groups", 1) if place.site.form == "convolution" else 1
    a, b = concatenated(low, groups)
    ranks, error = [leaf.b.shape[-1] for leaf in low], 0.0
    how = f"ranks side by side, {' + '.join(map(str, ranks))}" if len(ranks) > 1 else f"rank {ranks[0]}, scaled"
    if rank is not None and rank < b.shape[-1]:
        _mixes(place, groups)
        flat = a.flatten(b.ndim - 1)
        flat, b, error = truncated(flat, b, rank)
        a, how = flat.reshape(*a.shape[: b.ndim - 2], b.shape[-1], *a.shape[b.ndim - 1 :]), _cut(sum(ranks), b)
    return _lora(a, b, _add(offsets) if offsets else None, how, error)


def _held(place: Place, weight: Tensor, bias: Tensor | None, rank: int | None) -> Result:
    """ΔW and Δb as they are, or ΔW cut to a rank."""
    if rank is None:
        tensors = {"weight": weight} | ({} if bias is None else {"bias": bias})
        return Result(DenseDelta(bias is not None), tensors, "kept dense")
    site = place.site
    _mixes(place, getattr(place.target, "groups", 1))
    matrix = weight.mT if site.form in ("transposed", "embedding") else weight
    shape, experts = matrix.shape, site.form == "experts"
    a, b, error = split(matrix if experts else matrix.flatten(1), rank)
    a = a if experts else a.reshape(-1, *shape[1:])
    return _lora(a, b, bias, _cut(min(shape[-2:]) if experts else min(shape[0], shape[1:].numel()), b), error)


def _lora(a: Tensor, b: Tensor, bias: Tensor | None, how: str, error: float) -> Result:
    tensors = {"A": a, "B": b} | ({} if bias is None else {"bias": bias})
    return Result(LoRA(b.shape[-1], bias=bias is not None), tensors, how, error)


def _cut(before: int, b: Tensor) -> str:
    return f"cut from rank {before} to {b.shape[-1]}"


def _mixes(place: Place, groups: int) -> None:
    if groups > 1:
        raise CompositionError(
            f"merge at site {place.site.name!r}: a convolution with {groups} groups has no singular values that a rank "
            f"could be cut by. Merge it without rank=…."
        )


def _norm(gain: Tensor | None, shift: Tensor | None, how: str) -> Result:
    assert gain is not None
    return Result(Norm(shift is not None), {"gain": gain} | ({} if shift is None else {"bias": shift}), how)


def _gain_and_shift(some: Sequence[Any], view: Site) -> tuple[Tensor, Tensor | None]:
    """Changes of the output's features as (1 + g) ⊙ (f(x) − β) + β + b: a scale of all of f(x) moves β as well."""
    width = next(leaf.bias if isinstance(leaf, Bias) else leaf.gain for leaf in some)
    gain, shift = torch.zeros_like(width), None
    for leaf in some:
        moved = leaf.bias if isinstance(leaf, Bias) else leaf.shift if isinstance(leaf, Affine) else None
        if not isinstance(leaf, Bias):
            gain = gain + leaf.gain
        if isinstance(leaf, Scale) and view.bias is not None:
            moved = leaf.gain * view.bias.to(leaf.gain.dtype)
        if moved is not None:
            shift = moved if shift is None else shift + moved
    return gain, shift


def _dense(place: Place, some: Sequence[Any], view: Site) -> tuple[Tensor, Tensor | None]:
    """(ΔW, Δb) of updates together; raises CompositionError where W alone does not say what f is."""
    site = place.site
    if site.form == "other":
        raise CompositionError(
            f"merge at site {site.name!r} ({type(place.target).__name__}): there is no single weight whose change "
            f"could be the sum. Attach at the layers inside it, or merge modules of one kind."
        )
    if quantised(place.target, site.parameter):
        own = getattr(getattr(place.target, "weight", None), "dtype", base_type(place.target).__name__)
        raise CompositionError(
            f"merge at site {site.name!r}: its weight is quantised ({own}), so that no change of it can be written "
            f"down. Merge low-rank modules, whose sum is one; or mb.dequantise(model) before."
        )
    if not all(isinstance(leaf, ALONE) for leaf in some):
        plain("merge", place)
    if getattr(place.target, "groups", 1) > 1 and any(isinstance(leaf, MIXING) for leaf in some):
        raise CompositionError(
            f"merge at site {site.name!r}: at a convolution with {place.target.groups} groups what "
            f"{', '.join(sorted({type(leaf).__name__ for leaf in some}))} change has no weight that is equal to it."
        )
    pairs = [leaf.dense(view) for leaf in some]
    biases = [bias for _, bias in pairs if bias is not None]
    return _add([weight for weight, _ in pairs]), _add(biases) if biases else None


def _flat(place: Place, each: Mapping[str, list[Any]], view: Site) -> list[list[Tensor]]:
    """What each module changes, as a list of tensors, the same for all."""
    vectors = place.site.form == "other" and all(isinstance(leaf, VECTORS) for some in each.values() for leaf in some)
    pairs = [_gain_and_shift(some, view) if vectors else _dense(place, some, view) for some in each.values()]
    like = next((bias for _, bias in pairs if bias is not None), None)
    if like is None:
        return [[weight] for weight, _ in pairs]
    return [[weight, torch.zeros_like(like) if bias is None else bias] for weight, bias in pairs]


def _add(tensors: Sequence[Tensor]) -> Tensor:
    first, *rest = tensors
    return sum(rest, start=first)


def named(parts: Mapping[str, Part]) -> str:
    return ", ".join(f"{name!r}: {part.kind!r}" for name, part in parts.items())
