"""What task vectors do to each other in a sum: where their signs differ, how they are turned, what of each is left.

Signs and mass: Yadav et al., "TIES-Merging", 2023 (arXiv 2306.01708), section 3; cosines between task vectors: Ilharco
et al., "Editing Models with Task Arithmetic", 2023 (arXiv 2212.04089), figure 5.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ._models import weighing

Number = float | None  # None: of nothing, as the cosine of a vector that is zero
PIECE = 1 << 17  # numbers of all rows together: 1 MiB of float64, so that what is made of them stays in the cache


@dataclass
class Conflicts:
    """Sums over entries of n task vectors τ_i, from which all figures follow; those of two tensors are added by `+`.

    v_i is λ w_i τ_i, θ₀ the base, Δ the merged change, and mass is Σ |τ_i|.

    - gram: (n + 3, n + 3), products of τ_1 … τ_n, θ₀, Δ, and what rounding adds to Δ; summed: (n, n), of v_1 … v_n;
      asked: (n,), of v_i and τ_i.
    - both, differ: (n, n), entries where neither τ_i nor τ_j is zero, and those of them where their signs differ;
      mass_both, mass_differ: Σ |τ_i| + |τ_j| there. n_any, mass_any: entries, and mass of all, where two of all signs
      differ; moved: entries that any changes.
    - mass: (n,); voted: Σ_i |v_i|; left: |Σ_i v_i|, summed over entries.
    - against, still: (n,), mass where Δ has the other sign than v_i, and where it is zero; trimmed, outvoted: (n,),
      mass that was taken out before the sum, and that was left in and lost the vote.
    """

    numbers: Tensor
    gram: Tensor
    summed: Tensor
    asked: Tensor
    both: Tensor
    differ: Tensor
    mass_both: Tensor
    mass_differ: Tensor
    n_any: Tensor
    mass_any: Tensor
    moved: Tensor
    mass: Tensor
    voted: Tensor
    left: Tensor
    against: Tensor
    still: Tensor
    trimmed: Tensor
    outvoted: Tensor

    @classmethod
    def none(cls, n: int) -> "Conflicts":
        """Of no entries of n task vectors."""
        one, each, pairs = (), (n,), (n, n)
        sizes = (one, (n + 3, n + 3), pairs, each, *[pairs] * 4, *[one] * 3, each, one, one, *[each] * 4)
        return cls(*(torch.zeros(size, dtype=torch.float64) for size in sizes))

    def __add__(self, other: "Conflicts") -> "Conflicts":
        return Conflicts(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    @property
    def n(self) -> int:
        return len(self.mass)

    def norms(self) -> list[float]:
        """‖τ_1‖ … ‖τ_n‖, ‖θ₀‖, ‖Δ‖, ‖what rounding added‖."""
        return self.gram.diagonal().clamp(min=0).sqrt().tolist()

    def cosines(self) -> list[list[Number]]:
        """Between τ_1 … τ_n, θ₀, Δ."""
        sizes = self.norms()
        return [
            [_over(self.gram[i, j], sizes[i] * sizes[j]) for j in range(len(sizes) - 1)] for i in range(len(sizes) - 1)
        ]

    def pairs(self) -> list[dict[str, Any]]:
        """Of each two: their cosine, what both change, and where they differ in sign; shares of one.

        of: their places. models: the cosine of θ_i = θ₀ + τ_i and θ_j; apart: ‖τ_i − τ_j‖ / ‖θ₀‖. both: of the entries
        that one changes. differ, mass_differ: of the entries that both change, and of |τ_i| + |τ_j| there: a half for
        vectors that have nothing to do with each other.
        """
        turned, g, n = self.cosines(), self.gram, self.n
        whole = lambda i, j: g[n, n] + g[n, i] + g[n, j] + g[i, j]
        return [
            {
                "of": (i, j),
                "cosine": turned[i][j],
                "models": _over(whole(i, j), (whole(i, i) * whole(j, j)).clamp(min=0).sqrt()),
                "apart": _over((g[i, i] + g[j, j] - 2 * g[i, j]).clamp(min=0).sqrt(), g[n, n].sqrt()),
                "both": _over(self.both[i, j], self.both[i, i] + self.both[j, j] - self.both[i, j]),
                "differ": _over(self.differ[i, j], self.both[i, j]),
                "mass_differ": _over(self.mass_differ[i, j], self.mass_both[i, j]),
            }
            for i in range(n)
            for j in range(i + 1, n)
        ]

    def models(self) -> list[dict[str, Number]]:
        """Of each task vector.

        norm: ‖τ‖; relative: ‖τ‖ / ‖θ₀‖; changed: the share of entries that are not zero; along: ⟨Δ, τ⟩ / ‖τ‖², 1 where
        the merged change goes as far along τ as τ; cosine: of Δ and τ; distance: ‖Δ − τ‖ / ‖τ‖, of the merged model to
        this one; weight: λ w, the mean over tensors by ‖τ‖². Shares of Σ |τ|: against, where the merged change has the
        other sign; still, where it is zero; trimmed; outvoted.
        """
        g, merged, sizes, turned = self.gram, self.n + 1, self.norms(), self.cosines()
        found = []
        for i in range(self.n):
            apart = (g[i, i] + g[merged, merged] - 2 * g[i, merged]).clamp(min=0).sqrt()
            shares = {
                key: _over(getattr(self, key)[i], self.mass[i]) for key in ("against", "still", "trimmed", "outvoted")
            }
            found.append({
                "norm": sizes[i],
                "relative": _over(sizes[i], sizes[self.n]),
                "changed": _over(self.both[i, i], self.numbers),
                "along": _over(g[i, merged], g[i, i]),
                "cosine": turned[i][merged],
                "distance": _over(apart, sizes[i]),
                "weight": _over(self.asked[i], g[i, i]),
                **shares,
            })  # fmt: skip
        return found

    def whole(self) -> dict[str, Number]:
        """Of all together.

        differ, mass_differ: the share of the entries that any changes, and of mass, where two signs differ; cancelled:
        1 − Σ |Σ_i v_i| / Σ_i |v_i|, the share of mass that is lost in the sum; kept: ‖Σ v_i‖ / Σ ‖v_i‖, and unrelated:
        what that would be at right angles; base: ‖θ₀‖, norm: ‖Δ‖, relative: ‖Δ‖ / ‖θ₀‖; rounding: ‖what rounding to
        the output's dtype adds‖ / ‖Δ‖.
        """
        sizes, own = self.norms(), self.summed.diagonal().clamp(min=0).sqrt()
        return {
            "numbers": float(self.numbers),
            "differ": _over(self.n_any, self.moved),
            "mass_differ": _over(self.mass_any, self.mass.sum()),
            "cancelled": None if self.voted == 0 else 1 - float(self.left / self.voted),
            "kept": _over(self.summed.sum().clamp(min=0).sqrt(), own.sum()),
            "unrelated": _over(own.square().sum().sqrt(), own.sum()),
            "base": sizes[self.n],
            "norm": sizes[self.n + 1],
            "relative": _over(sizes[self.n + 1], sizes[self.n]),
            "rounding": _over(sizes[self.n + 2], sizes[self.n + 1]),
        }


def conflicts(
    vectors: Sequence[Tensor],
    weights: Sequence[float] | None = None,
    merged: Tensor | None = None,
    base: Tensor | None = None,
    parts: Sequence[Tensor] | None = None,
    voting: bool = False,
    rounded: Tensor | None = None,
) -> Conflicts:
    """The `Conflicts` of task vectors τ_i of one tensor's shape.

    weights: λ w_i, 1 if None; what is said of pairs is of τ_i as they are. merged: Δ, Σ λ w_i τ_i if None; rounded: Δ
    as it is written. base: θ₀, for what is relative to it. parts: what of each τ_i goes into the sum, trimmed or drawn;
    voting: whether signs are then elected, by Σ w_i part_i, and even votes go to plus.
    Computed in float64, in pieces. Raises MergeError for weights that are not one a task vector.
    """
    n = len(vectors)
    given = torch.tensor(weighing("conflicts", weights, n), dtype=torch.float64)
    total, step = Conflicts.none(n), max(1, PIECE // (n + 3))
    rows = [t.detach().reshape(-1) for t in (*vectors, *(parts or ()))]
    others = [None if t is None else t.detach().reshape(-1) for t in (base, merged, rounded)]
    cut = lambda t, at: t[at : at + step].to("cpu", torch.float64)
    for at in range(0, vectors[0].numel(), step):
        piece = torch.stack([cut(t, at) for t in rows])
        start, change, final = (None if t is None else cut(t, at) for t in others)
        taken = piece[n:] if parts is not None else None
        total = total + _piece(piece[:n], given, start, change, final, taken, voting)
    return total


def _piece(
    tau: Tensor, w: Tensor, base: Tensor | None, merged: Tensor | None, rounded: Tensor | None, parts: Tensor | None,
    voting: bool,
) -> Conflicts:  # fmt: skip
    """Of rows (n, entries), in float64."""
    v = tau * w[:, None]
    total, zero = v.sum(0), tau.new_zeros(tau.shape[1])
    change = total if merged is None else merged
    rounding = zero if rounded is None else rounded - change
    everything = torch.cat([tau, torch.stack([zero if base is None else base, change, rounding])])
    gram = everything @ everything.T
    if not bool(gram.isfinite().all()):  # a mask of −inf in every model: it is no change
        others = (base, change, rounded, parts)
        base, change, rounded, parts = (None if t is None else t.nan_to_num(0, 0, 0) for t in others)
        return _piece(tau.nan_to_num(0, 0, 0), w, base, change, rounded, parts, voting)
    size, sign = tau.abs(), tau.sign()
    there = sign.abs()
    both, alike = there @ there.T, sign @ sign.T
    mass_both, mass_alike = size @ there.T, tau @ sign.T  # of the row's vector, where the column's is not zero
    split = (sign.amax(0) - sign.amin(0)) == 2
    final = change if rounded is None else rounded
    # A vector without a weight asks for nothing: it is measured by its own sign.
    asked = sign * torch.where(w == 0, 1.0, w.sign())[:, None]
    trimmed, outvoted = zero.new_zeros(len(tau)), zero.new_zeros(len(tau))
    if parts is not None:
        kept = parts != 0
        trimmed = (size * ~kept).sum(1)
        if voting:
            votes = parts * w[:, None]
            elected = torch.where(votes.sum(0) >= 0, 1.0, -1.0)
            outvoted = (size * (kept & (votes.sign() != elected))).sum(1)
    return Conflicts(
        numbers=tau.new_tensor(float(tau.shape[1])),
        gram=gram,
        summed=v @ v.T,
        asked=(v * tau).sum(1),
        both=both,
        differ=(both - alike) / 2,
        mass_both=mass_both + mass_both.T,
        mass_differ=(mass_both + mass_both.T - mass_alike - mass_alike.T) / 2,
        n_any=split.sum(dtype=tau.dtype),
        mass_any=(size * split).sum(),
        moved=there.amax(0).sum(),
        mass=size.sum(1),
        voted=v.abs().sum(),
        left=total.abs().sum(),
        against=(size * (final.sign() == -asked)).sum(1),
        still=(size * (final == 0)).sum(1),
        trimmed=trimmed,
        outvoted=outvoted,
    )


def _over(a: Tensor | float, b: Tensor | float) -> Number:
    """a / b, or None where there is no b, or a number is not finite."""
    b = float(b)
    share = float(a) / b if b else math.nan
    return share if math.isfinite(share) else None
