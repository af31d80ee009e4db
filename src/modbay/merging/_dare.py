"""DARE: most entries of a task vector are dropped at random, and what is left is made larger for it.

Yu, Yu, Yu, Huang and Li, "Language Models are Super Mario", 2024 (arXiv 2311.03099).
"""

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..types import System, systems
from ._arithmetic import onto, vectors
from ._models import State, alone, each, one_of, share, weighing, weighted_sum
from ._ties import resolve

RESCALE = ("density", "l1", None)
DRAWN = 1 << 16  # numbers: so many draws at a time lie in the cache


def draw(n: int, density: float, seed: int, place: int = 0) -> Tensor:
    """n independent bools, True with probability `density`, which follow from the seed and a model's place; on the CPU.

    Eight random bits decide each, with probability b/256; of the rest each is chosen with what 1 − b/256 lacks of
    1 − `density`, by the gaps between those that are, which are geometric.
    """
    bits = np.random.SFC64(np.random.SeedSequence([seed, place]))
    found, bound = np.empty(n, dtype=bool), int(density * 256)
    for at in range(0, n, DRAWN):
        part = found[at : at + DRAWN]
        drawn = bits.random_raw(-(-len(part) // 8)).astype("<u8", copy=False).view("u1")
        np.less(drawn[: len(part)], bound, out=part)
    rest, at = 1 - (1 - density) / (1 - bound / 256) if bound < 256 else 0.0, -1
    while rest > 0 and at < n:
        gaps = np.random.Generator(bits).geometric(rest, size=int((n - at) * rest * 1.1) + 16)
        places = at + np.minimum(gaps, n + 1).cumsum()
        found[places[places < n]] = True
        at = int(places[-1])
    return torch.from_numpy(found)


def drop(
    vector: Tensor,
    density: float,
    rescale: str | None = "density",
    generator: torch.Generator | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """m ⊙ τ / p, m ~ Bernoulli(p): its mean over draws is τ. Arguments as `dare`'s; drawn on the generator's device.

    mask: m, if it was drawn before (`draw`).
    """
    share("dare", density)
    one_of("dare", "rescale", rescale, RESCALE)
    if density == 1:
        return vector
    if mask is None:
        device = vector.device if generator is None else generator.device
        mask = torch.full(vector.shape, density, device=device).bernoulli(generator=generator)
    kept = vector * numbers(mask, vector.dtype).to(vector.device)
    if rescale == "density":
        return kept.div_(density)
    if rescale == "l1":
        return kept.mul_(factor(vector.abs().sum(), kept.abs().sum()))
    return kept


def numbers(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as 0 and 1; torch converts bools, as such, nine times as slowly."""
    return (mask.view(torch.uint8) if mask.dtype is torch.bool else mask).to(dtype)


def factor(before: Tensor, after: Tensor) -> Tensor:
    """What makes Σ|m ⊙ τ| (after) Σ|τ| (before) again; 1 where one of them is next to nothing."""
    return torch.where((before < 1e-7) | (after < 1e-7), torch.ones_like(before), before / after)


@systems(
    System(
        (127,),
        "merging.dare(models, base, density=0.1)",
        (
            "tests/test_merging.py::test_the_laws_of_merging",
            "tests/test_merging.py::test_dare_keeps_its_share_and_its_mean",
            "tests/test_merging.py::test_dare_is_peft_s_and_mergekit_s",
        ),
        "DARE",
        section="5.1",
    ),
    System(
        (127,),
        'merging.dare(models, base, density=0.1, elect="mass")',
        ("tests/test_merging.py::test_dare_is_peft_s_and_mergekit_s",),
        "DARE-TIES",
        "TIES of m_i ⊙ τ_i / p, m_i ~ Bernoulli(p), instead of trimmed τ_i",
        section="5.1",
    ),
)
def dare(
    models: Sequence[State],
    base: State | None,
    weights: Sequence[float] | None = None,
    density: float = 0.1,
    scale: float = 1.0,
    rescale: str | None = "density",
    elect: str | None = None,
    weighted: bool = True,
    mean: str = "sum",
    seed: int = 0,
) -> dict[str, Tensor]:
    """θ₀ + λ Σ_i w_i m_i ⊙ τ_i / p, m_i ~ Bernoulli(p), p the `density`, λ the `scale`; or TIES of these with `elect`.

    density: the share that is kept; the paper drops 0.9 and more. base: None if the models are task vectors already.
    rescale: "density", by 1/p, the paper's, peft's and fusion_bench's; "l1", so that Σ|τ| stays, which is what mergekit
    does now; None, not at all. elect: None, a sum ("dare_linear"); or how signs are elected ("dare_ties"), and then
    weighted and mean: as for `ties`. mergekit's dare_ties: rescale="l1", elect="mass". peft's: base=None, elect="mass",
    weighted=False, mean="count".
    seed: what is dropped follows from it, the tensor's name and the model's place, and not from what else is merged.
    Raises MergeError for models that do not fit, weights that are not one a model, or an argument that there is not.
    """

    def core(name: str, tensors: list[Tensor], start: Tensor | None) -> Tensor:
        return dare_tensor(
            tensors, start, weights, density, scale, rescale, elect, weighted, mean, seed=named(seed, name)
        )

    return each("dare", models, base, core)


def dare_tensor(
    tensors: Sequence[Tensor],
    base: Tensor | None,
    weights: Sequence[float] | None = None,
    density: float = 0.1,
    scale: float = 1.0,
    rescale: str | None = "density",
    elect: str | None = None,
    weighted: bool = True,
    mean: str = "sum",
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> Tensor:
    """`dare`, of the tensors of one name. seed: of this name; if None they are drawn one after the other by torch.

    generator: of these draws, torch's own if None.
    """
    given = weighing("dare", weights, len(tensors))
    one = alone([scale * w for w in given])
    if one is not None and density == 1 and (elect is None or weighted):
        return tensors[one].clone()
    dropped = []
    for i, delta in enumerate(vectors(tensors, base)):
        mask = None if seed is None or density == 1 else draw(delta.numel(), density, seed, i).view_as(delta)
        dropped.append(drop(delta, density, rescale, generator, mask))
    mixed = weighted_sum(dropped, given) if elect is None else resolve(dropped, given, elect, weighted, mean)
    return onto(base, mixed if scale == 1 else mixed.mul_(scale), tensors[0])


def named(seed: int, name: str) -> int:
    """The seed of one tensor's draws, whatever else is merged."""
    return zlib.crc32(f"{seed} {name}".encode())
