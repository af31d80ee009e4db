"""A part of any kind that changes weights, as a plain low-rank update: exactly where it is one, else the nearest."""

from dataclasses import dataclass

from torch import Tensor

from ..core import Part, base_type, quantised
from ..errors import CompositionError
from ..fold import leaves, part_delta
from ..modules import Full
from ..seams import Place
from ._deltas import summed
from ._lowrank import split, truncated


@dataclass(frozen=True)
class Plain:
    """ΔW = B A, A (r, i, …), B (o, r), with its relative error; what was added to the bias, or None."""

    a: Tensor
    b: Tensor
    bias: Tensor | None
    error: float


def as_lora(place: Place, part: Part, rank: int | None = None, error: float = 0.05) -> Plain:
    """The low-rank update that a part is, or the nearest one: of a rank, or of the lowest whose relative error
    ‖ΔW − B A‖/‖ΔW‖ is at most `error`.

    Raises CompositionError for a part that changes no weight, and where the error is larger than that.
    """
    site, view = place.site, place.view()
    if not isinstance(part.kind, Full) and not hasattr(part.kind, "delta"):
        raise CompositionError(
            f"at site {site.name!r}: {type(part.kind).__name__} is no change of a weight, so that no LoRA is equal to "
            f"it. Serve it with modbay."
        )
    made = summed(place, view, list(leaves(part_delta(part, 1.0, view))), None)
    own = dict(made.tensors)
    if set(own) <= {"A", "B", "bias"} and "A" in own:
        a, b = own["A"], own["B"]
        if rank is None or rank >= b.shape[-1]:
            return Plain(a, b, own.get("bias"), 0.0)
        shape = a.shape
        flat, b, lost = truncated(a.flatten(b.ndim - 1), b, rank)
        a = flat.reshape(*shape[: b.ndim - 2], -1, *shape[b.ndim - 1 :])
        return _bounded(Plain(a, b, own.get("bias"), lost), site.name, error)
    if "weight" in own:
        weight, bias = own["weight"], own.get("bias")
    else:  # offsets, scales and sparse entries, materialised
        if quantised(place.target, site.parameter):
            raise CompositionError(
                f"at site {site.name!r}: what {type(part.kind).__name__} changes is told by the weight, and that of "
                f"this {base_type(place.target).__name__} is quantised, so that no LoRA can be made of it. "
                f"mb.dequantise(model) before; or serve it with modbay."
            )
        pairs = [leaf.dense(view) for leaf in leaves(part_delta(part, 1.0, view))]
        weight = sum((w for w, _ in pairs[1:]), start=pairs[0][0])
        biases = [b for _, b in pairs if b is not None]
        bias = sum(biases[1:], start=biases[0]) if biases else None
    if getattr(place.target, "groups", 1) > 1:
        raise CompositionError(f"at site {site.name!r}: a convolution of groups has no rank that it could be cut by.")
    matrix = weight.mT if site.form in ("transposed", "embedding") else weight
    shape, experts = matrix.shape, site.form == "experts"
    matrix = matrix if experts else matrix.flatten(1)
    a, b, lost = split(matrix, min(matrix.shape[-2:]) if rank is None else rank)
    if rank is None:
        a, b, lost = _shortest(a, b, error)
    return _bounded(Plain(a if experts else a.reshape(-1, *shape[1:]), b, bias, lost), site.name, error)


def _shortest(a: Tensor, b: Tensor, error: float) -> tuple[Tensor, Tensor, float]:
    """As few of the singular values as leave at most this error; their roots are the lengths of A's rows."""
    squares = a.square().sum(-1).double().square()  # σ², as the rows of A are √σ v
    while squares.ndim > 1:
        squares = squares.amax(0)
    left = squares.flip(0).cumsum(0).flip(0)  # what is lost from each on
    whole = float(left[0])
    n = max(1, int((left > error**2 * whole).sum())) if whole else 1
    lost = float(left[n]) if n < len(left) else 0.0
    return a[..., :n, :], b[..., :n], (lost / whole) ** 0.5 if whole else 0.0


def _bounded(made: Plain, site: str, error: float) -> Plain:
    if made.error > error:
        raise CompositionError(
            f"at site {site!r}: the nearest update of rank {made.b.shape[-1]} is off by a relative {made.error:.3f}, "
            f"more than error={error}. Give a higher rank, or error=… if that much is accepted."
        )
    return made
