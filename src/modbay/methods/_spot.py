"""Prompts that start from the prompts of similar tasks.

Vu, Lester, Constant, Al-Rfou and Cer, "SPoT: Better Frozen Model Adaptation through Soft Prompt Transfer", 2022 (arXiv
2110.07904).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attach import Bay
from ..errors import BayError, CompositionError, listed
from ..types import System, systems

TESTS = "tests/test_outputs.py::"


@systems(
    System(
        (142,),
        'methods.spot(bay, "rte", ["mnli", "squad"])',
        (TESTS + "test_a_prompt_starts_from_the_nearest", TESTS + "test_what_spot_can_t_do_raises"),
        "SPoT",
        "P_name ← Σ_j α_j P_j over the k most similar prompts, α_j = s_j / Σ s; s = cos(mean P_name, mean P_j)",
        section="5.3",
    )
)
def spot(
    bay: Bay, name: str, sources: Sequence[str] | None = None, k: int = 1, per_token: bool = False
) -> dict[str, float]:
    """P_name ← Σ_j α_j P_j over the k sources most similar to it, α_j = s_j / Σ s, in place; s of each, by name.

        ...                                    # train the prompt "rte" for a little while: what it becomes is its key
        methods.spot(bay, "rte", ["mnli", "squad"])
        ...                                    # and then from there

    s: the cosine of the prompts' means over their places; per_token: the mean cosine over all pairs of places. k: 1 is
    the best source alone; a source that is not similar at all, s ≤ 0, takes no part among several. sources: the others
    if None. Raises BayError for a name that is no module, CompositionError for what is no prompt of one length.
    """
    have = bay.names()
    taking = [one for one in have if one != name] if sources is None else list(sources)
    unknown = [one for one in (name, *taking) if one not in have]
    if unknown or not taking or name in taking or k < 1:
        raise BayError(
            f"spot({name!r}, {taking}, k={k}): a module, other ones to start from, and one of them at least; the "
            f"modules are {listed(have)}."
        )
    own, others = _prompt(bay, name), [_prompt(bay, one) for one in taking]
    if any(other.shape != own.shape for other in others):
        raise CompositionError(
            f"spot({name!r}): prompts {[tuple(p.shape) for p in (own, *others)]} differ in length; give them one."
        )
    with torch.no_grad():
        near = torch.stack([_similarity(own, other, per_token) for other in others])
        best = near.topk(min(k, len(others)))
        share = best.values.clamp(min=0) if len(best.values) > 1 else torch.ones_like(best.values)
        if not bool(share.sum() > 0):
            share = F.one_hot(torch.tensor(0), len(share)).to(share)
        picked = torch.stack([others[i] for i in best.indices.tolist()])
        own.copy_(torch.einsum("k,knd->nd", (share / share.sum()).to(picked), picked))
    return dict(zip(taking, near.tolist(), strict=True))


def _similarity(a: Tensor, b: Tensor, per_token: bool) -> Tensor:
    if per_token:
        return (F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).mT).mean()
    return F.cosine_similarity(a.float().mean(0), b.float().mean(0), dim=0)


def _prompt(bay: Bay, name: str) -> Tensor:
    """The one prompt (n, d) of a module."""
    found = [part for m in bay.modulars.values() if (part := m.parts._modules.get(name)) is not None]
    prompts = [part.tensors().get("prompt") for part in found]  # type: ignore[union-attr, operator]
    if len(prompts) != 1 or prompts[0] is None:
        raise CompositionError(f"spot: module {name!r} is no mb.Prompt at one place.")
    return prompts[0]
