"""Masks: which entries of a tensor count, told from scores, and learned through the scores.

Straight-through: Bengio, Léonard and Courville, 2013 (arXiv 1308.3432). Hard concrete: Louizos, Welling and Kingma,
2018 (arXiv 1712.01312). Cubic schedule: Zhu and Gupta, 2017 (arXiv 1710.01878). Smooth step: Hazimeh, Ponomareva, Mol,
Tan and Mazumder, 2020 (arXiv 2002.07772).
"""

import math

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor


def top_share(scores: Float[Tensor, "*g n"], share: Float[Tensor, "*g"]) -> Bool[Tensor, "*g n"]:
    """True at the round(share · n) largest scores, at least one; of equal scores the first. One share a group."""
    n = scores.shape[-1]
    k = (share.float() * n).round().clamp(min=1)
    order = scores.argsort(stable=True, dim=-1, descending=True)
    among = torch.arange(n, device=scores.device) < k.unsqueeze(-1)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, among)


def top_share_reference(scores: Tensor, share: Tensor) -> Tensor:
    """`top_share`, one entry at a time: how many are larger, or equal and before it."""
    place = [sum(bool(o > s) or (bool(o == s) and j < i) for j, o in enumerate(scores)) for i, s in enumerate(scores)]
    return torch.tensor(place) < max(1, round(float(share) * len(scores)))


def straight_through(hard: Tensor, soft: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The values of `hard`, to the bit, with the gradient of `soft`."""
    return hard.to(soft.dtype) + (soft - soft.detach())


def logistic(like: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """log u − log(1 − u), u uniform: σ(s + it) > ½ with probability σ(s)."""
    u = torch.rand_like(like, dtype=torch.float32).clamp(1e-6, 1 - 1e-6)
    return torch.logit(u).to(like.dtype)


def hard_concrete(
    logits: Float[Tensor, "*shape"],
    noise: Float[Tensor, "*shape"] | None = None,
    low: float = -0.1,
    high: float = 1.1,
    temperature: float = 2 / 3,
) -> Float[Tensor, "*shape"]:
    """z = min(1, max(0, s (high − low) + low)), s = σ((α + noise)/β); without noise s = σ(α). Often exactly 0 or 1.

    Computed in float32 or wider: bfloat16 has not enough digits of an s near 1 for its gradient s (1 − s).
    """
    wide = _wide(logits)
    s = torch.sigmoid(wide if noise is None else (wide + noise) / temperature)
    return (s * (high - low) + low).clamp(0, 1).to(logits.dtype)


def open_probability(
    logits: Float[Tensor, "*shape"], low: float = -0.1, high: float = 1.1, temperature: float = 2 / 3
) -> Float[Tensor, "*shape"]:
    """P(z > 0) of a hard concrete z, σ(α − β log(−low/high)), in float32 at least: its sum is the expected L0 norm."""
    return torch.sigmoid(_wide(logits) - temperature * math.log(-low / high))


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def smooth_step(x: Float[Tensor, "*shape"], gamma: float = 1.0) -> Float[Tensor, "*shape"]:
    """S(x) = −2 (x/γ)³ + 3/2 (x/γ) + ½ for |x| ≤ γ/2, 0 below and 1 above: a sigmoid that gets there."""
    x = (x / gamma).clamp(-0.5, 0.5)
    return -2 * x**3 + 1.5 * x + 0.5


def cubic(step: int, steps: int, last: float, first: float = 1.0, begin: int = 0, end: int = 0) -> float:
    """v_f + (v_i − v_f) (1 − t)³, t the part done of the steps after the first `begin` and before the last `end`."""
    done = (step - begin) / max(1, steps - begin - end)
    return last + (first - last) * (1 - min(1.0, max(0.0, done))) ** 3


def pack_bits(mask: Bool[Tensor, "n"]) -> UInt8[Tensor, "bytes"]:
    """Eight entries a byte, the first in the lowest bit; the last byte is filled up with zeros."""
    rows = torch.nn.functional.pad(mask.to(torch.uint8), (0, -len(mask) % 8)).view(-1, 8)
    return (rows << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: UInt8[Tensor, "*g bytes"], n: int) -> Bool[Tensor, "*g n"]:
    """What `pack_bits` packed."""
    bits = packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (bits & 1).bool().flatten(-2)[..., :n]
