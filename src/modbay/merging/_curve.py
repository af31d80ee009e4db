"""Paths between two sets of parameters: the segment, and curves that bend through a third.

Frankle, Dziugaite, Roy and Carbin, "Linear Mode Connectivity and the Lottery Ticket Hypothesis", 2020 (arXiv
1912.05671); Garipov, Izmailov, Podoprikhin, Vetrov and Wilson, "Loss Surfaces, Mode Connectivity, and Fast Ensembling
of DNNs", 2018 (arXiv 1802.10026).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import CompositionError, listed
from ..types import Params


def interpolated(a: Params, b: Params, t: float) -> dict[str, Tensor]:
    """(1 − t) a + t b of every tensor; whole numbers, as counters and indices, are a's.

    At t = 0 and t = 1 it is a and b, bit for bit. Raises CompositionError for other names or shapes.
    """
    return _weighed((a, b), (1 - t, t))


def bezier(a: Params, middle: Params, b: Params, t: float) -> dict[str, Tensor]:
    """φ(t) = (1 − t)² a + 2 t (1 − t) θ + t² b: the quadratic Bézier curve from a to b that θ bends.

    Whole numbers are a's. `methods.connect` learns θ. Raises CompositionError for other names or shapes.
    """
    return _weighed((a, middle, b), ((1 - t) ** 2, 2 * t * (1 - t), t**2))


def polychain(a: Params, middle: Params, b: Params, t: float) -> dict[str, Tensor]:
    """φ(t) = 2 (t θ + (½ − t) a) up to ½, then 2 ((t − ½) b + (1 − t) θ): two segments that meet in θ.

    Whole numbers are a's. Raises CompositionError for other names or shapes.
    """
    return _weighed((a, middle, b), (max(0.0, 1 - 2 * t), 1 - abs(1 - 2 * t), max(0.0, 2 * t - 1)))


def _weighed(states: Sequence[Params], weights: Sequence[float]) -> dict[str, Tensor]:
    first, *others = states
    for other in others:
        wrong = set(first) ^ set(other) or {n for n, w in first.items() if w.shape != other[n].shape}
        if wrong:
            raise CompositionError(
                f"the ends of a path have other names or shapes: {listed(sorted(wrong))}. They are states of one "
                f"network, or modules of one kind at the same sites."
            )
    out = {}
    for name, tensor in first.items():
        if tensor.is_floating_point() or tensor.is_complex():
            # One whose weight is 0 stays out, so that an end is itself, whatever the others hold.
            parts = [w * state[name] for state, w in zip(states, weights, strict=True) if w != 0]
            out[name] = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
        else:
            out[name] = tensor
    return out
