"""Entropy minimised at test time: how much each module counts is what makes the model sure of the inputs at hand.

Wang, Tsvetkov, Ruder and Neubig, "Efficient Test Time Adapter Ensembling for Low-resource Language Varieties" (EMEA),
2021 (arXiv 2109.04877); weights by layer, rate and start as in the authors' code.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..abstract import Routing
from ..attach import Bay
from ..types import System, systems
from ._weighed import as_before, members, slope

TESTS = "tests/test_outputs.py::"


@systems(
    System(
        (137,),
        "methods.minimal_entropy(bay, lambda: losses.entropy(model(**batch).logits))",
        (
            TESTS + "test_entropy_is_minimised_by_these_steps",
            TESTS + "test_minimal_entropy_makes_a_model_surer_and_leaves_it_as_it_was",
        ),
        "EMEA",
        "f(x) + Σ_i softmax(w)_i Δ_i, w ← w − γ ∇_w H(p(y | x; w)), T times",
        section="5.2",
    )
)
@contextmanager
def minimal_entropy(
    bay: Bay,
    objective: Callable[[], Tensor],
    names: Sequence[str] | None = None,
    steps: int = 10,
    lr: float = 10.0,
    per_site: bool = True,
) -> Iterator[Tensor]:
    """α = softmax(w) at each site, with w ← w − lr ∇_w H in each of so many steps from w = 0; yields α (sites, n).

        real = batch["attention_mask"].bool()
        sure = lambda: losses.entropy(model(**batch).logits[real])            # padding does not count
        with methods.minimal_entropy(bay, sure, ["is", "fo", "nb"], steps=10):
            logits = model(**batch).logits

    bay: of modules that exist, language adapters, under an aggregator that weighs (WeightedSum). objective: runs the
    model on the batch, and gives H, the mean entropy of its predictions. names: the modules that take part, all if
    None. steps, lr: T and γ; the paper has 1 or 10 steps of 10. per_site: w of its own at each site, the paper's at
    each layer; False: one for all, α (1, n).
    Only w moves, and no parameter gets a gradient; in the with-block the bay is routed by α, and then as before. Give
    the bay no label inside it, which would go before. Put the model into evaluation mode: dropout would tell of itself.
    Raises BayError for a name that is no module, CompositionError if H does not depend on the route.
    """
    ids, sites = tuple(members("minimal_entropy", bay, names).values()), tuple(bay.modulars)
    device = next(iter(bay.modulars.values())).site.device
    w = torch.zeros(len(sites) if per_site else 1, len(ids), device=device)
    route = lambda w: _route(w.softmax(-1), ids, sites)
    with as_before(bay):
        for _ in range(steps):
            w = w - lr * slope("minimal_entropy", bay, objective, w, route)
        bay.state.chosen = route(w)
        yield w.softmax(-1)


def _route(alpha: Tensor, ids: tuple[int, ...], sites: tuple[str, ...]) -> Routing:
    """These modules for all rows, by weights of each site."""
    index = torch.tensor(ids, device=alpha.device).expand(len(sites), -1)
    return Routing(index=index, weights=alpha.expand(len(sites), -1), sites=sites)
