"""Greedy soups: of many models of one base, those are averaged that make the average better.

Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing
inference time", 2022 (arXiv 2203.05482), recipe 1.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from ..errors import MergeError
from ..types import System, systems
from ._average import average
from ._models import State, fit


class Soup(NamedTuple):
    """model: the average. kept: which of the models are in it, in the order taken. score: the average's."""

    model: dict[str, Tensor]
    kept: list[int]
    score: float


@systems(
    System(
        (123,),
        "merging.greedy_soup(models, score)",
        ("tests/test_merging.py::test_a_greedy_soup_keeps_what_makes_it_better",),
        "greedy soup",
        section="5.1",
    )
)
def greedy_soup(
    models: Sequence[State],
    score: Callable[[dict[str, Tensor]], float],
    scores: Sequence[float] | None = None,
    even: bool = False,
) -> Soup:
    """Average of the kept: from the best by score down, a model is kept if score(average of kept and it) is higher.

    score: of a state dict on held-out data, higher is better; called once for each model after the first, and for each
    alone unless `scores` has these. Of equal scores the first model counts as better. The soup is never worse than the
    best model. even: a model is kept, too, if the score stays: the paper's recipe; its code wants it higher.
    Raises MergeError for models that do not fit, or scores that are not one a model.
    """
    fit("greedy_soup", models)
    if scores is not None and len(scores) != len(models):
        raise MergeError(f"greedy_soup(scores=…): there are {len(scores)} of {len(models)} models. Give one a model.")
    known = [float(s) for s in scores] if scores is not None else [float(score(average([m]))) for m in models]
    first, *others = sorted(range(len(models)), key=lambda i: -known[i])
    kept, soup, best = [first], average([models[first]]), known[first]
    for i in others:
        tried = average([models[j] for j in (*kept, i)])
        reached = float(score(tried))
        if reached > best or (even and reached == best):
            kept, soup, best = [*kept, i], tried, reached
    return Soup(soup, kept, best)
