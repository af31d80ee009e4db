"""ColD Fusion: many fine-tune one model, each on data of their own, and their mean is what they go on from.

Don-Yehiya, Venezian, Raffel, Slonim, Katz and Choshen, "ColD Fusion: Collaborative Descent for Distributed Multitask
Finetuning", 2022 (arXiv 2212.01378); one round of it: Choshen, Venezian, Slonim and Katz, "Fusing Finetuned Models for
Better Pretraining", 2022 (arXiv 2204.03044).
"""

from collections.abc import Callable, Iterable, Mapping
from random import Random

import torch
from torch import Tensor

from ..errors import CompositionError, MergeError, listed
from ..merging import RunningMean
from ..types import System, systems

TESTS = "tests/test_soups.py::"
TESTED = (
    TESTS + "test_cold_fusion_averages_what_contributors_make_of_one_start",
    TESTS + "test_cold_fusion_of_a_module_leaves_all_else",
    TESTS + "test_a_round_that_fails_leaves_its_start",
)


@systems(
    System(
        (129,),
        "methods.cold_fusion(model.trunk.parameters(), {name: finetune, …}, rounds=30, k=8)",
        (*TESTED, TESTS + "test_cold_fusion_nears_the_joint_optimum"),
        "ColD Fusion",
        section="5.1",
    ),
    System(
        (129,),
        "methods.cold_fusion(model.trunk.parameters(), {name: finetune, …})",
        (*TESTED, TESTS + "test_one_round_is_the_average_of_models"),
        "fused fine-tuned models",
        "θ ← 1/n Σ_i finetune_i(θ)",
        "Choshen, Venezian, Slonim and Katz, 2022 (arXiv 2204.03044)",
        "5.1",
    ),
)
def cold_fusion(
    shared: Iterable[Tensor],
    contributors: Mapping[str, Callable[[], object]],
    rounds: int = 1,
    k: int | None = None,
    seed: int = 0,
    after: Callable[[int, list[str]], object] | None = None,
) -> list[list[str]]:
    """θ ← 1/k Σ_{i ∈ S} finetune_i(θ), round by round, in place; who contributed to each round.

        finetune = {"nli": lambda: train(model, nli), "qa": lambda: train(model, qa), …}    # train in place
        methods.cold_fusion(model.trunk.parameters(), finetune, rounds=30)                  # whole models
        methods.cold_fusion(bay.parameters("all"), finetune, rounds=30)                     # a module of a bay

    shared: θ, the tensors that are distributed and averaged; what else a contributor trains, as its head, stays with it
    and as it left it (the papers draw heads anew each time: so may `finetune`). contributors: by name, each trains the
    model that θ is part of, with an optimiser of its own, made anew in each round: a state kept from the last would not
    be of these weights. rounds, k: how many, and how many of them take part in each (S, drawn anew by seed), all if
    None. One round of all is fused fine-tuned models, a start for further fine-tuning. after: is told (round, S) after
    each, to judge or to save. One copy of θ and its mean are held, whatever k is. Integers among θ (batch norm's
    counters) are as the last contributor left them.
    If a contributor raises, or leaves what is not finite, θ is what it was when the round began, and the error is
    raised: MergeError for the latter. Raises CompositionError for k or rounds that can't be.
    """
    own = list({id(tensor): tensor for tensor in shared}.values())
    k = len(contributors) if k is None else k
    if not own or not 1 <= k <= len(contributors) or rounds < 1:
        raise CompositionError(
            f"cold_fusion(rounds={rounds}, k={k}) of {len(own)} tensors by {listed(contributors)}: one round or more, "
            f"of one tensor or more, by one of the contributors or up to all."
        )
    draw, took_part = Random(f"cold-fusion-{seed}"), []
    for number in range(rounds):
        several = list(contributors) if k == len(contributors) else draw.sample(list(contributors), k)
        _round(own, {name: contributors[name] for name in several})
        took_part.append(several)
        if after is not None:
            after(number, several)
    return took_part


def _round(own: list[Tensor], contributors: Mapping[str, Callable[[], object]]) -> None:
    """θ ← the mean of what each contributor makes of θ."""
    start, mean = [tensor.detach().clone() for tensor in own], RunningMean()
    try:
        for name, finetune in contributors.items():
            _write(own, start)
            finetune()
            if not all(bool(tensor.isfinite().all()) for tensor in own):
                raise MergeError(f"cold_fusion: contributor {name!r} left weights that are not finite.")
            mean.update({str(i): tensor.detach() for i, tensor in enumerate(own)})
    except BaseException:
        _write(own, start)
        raise
    _write(own, list(mean.average().values()))


@torch.no_grad()
def _write(own: list[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(own, values, strict=True):
        tensor.copy_(value)
