"""Which weights count: criteria, the masks that they give, and modules that become sparse (survey section 3.1).

    weights = sparsity.weights(model, nn.Linear)
    masks = sparsity.top(sparsity.magnitude(weights), 0.2)
    mb.SubNetwork(mask=masks)  # only these are used; or mb.SparseDelta(mask=masks): only these learn

Criteria are pure functions of tensors by site, and so are masks.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .abstract import Kind
from .attach import Bay
from .deltas import Mask
from .errors import BayError, CompositionError, listed
from .modules import SparseDelta, SubNetwork
from .ops import top_share
from .seams import places
from .types import System, systems

Tensors = Mapping[str, Tensor]
FORMULA = "tests/test_sparse.py::test_criteria_are_their_formulas"


def _row(number: int, name: str, build: str, source: str, *tests: str, equation: str | None = None) -> Any:
    """Say which system a function makes."""
    return systems(System((number,), build, tests or (FORMULA,), name, equation, source, "3.1"))


def weights(model: torch.nn.Module, at: Any) -> dict[str, Tensor]:
    """The weights of the sites that `at` names, as for `mb.attach`, by the site's name: what masks are by."""
    return {place.site.name: place.site.weight for place in places(model, at)}


def gradients(loss: Tensor, weights: Tensors) -> dict[str, Tensor]:
    """∂L/∂W by site; weights must require it. Where the loss does not depend on one, zero."""
    found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(weights, found, strict=True))


# Criteria


@_row(1, "magnitude pruning", "sparsity.top(sparsity.magnitude(weights), 0.2)", "Han et al., 2015 (arXiv 1506.02626)")
def magnitude(weights: Tensors) -> dict[str, Tensor]:
    """|W|. Han, Pool, Tran and Dally, 2015 (arXiv 1506.02626)."""
    return {name: w.detach().abs() for name, w in weights.items()}


@_row(4, "SNIP", "sparsity.top(sparsity.saliency(weights, gradients), 0.05)", "Lee et al., 2019 (arXiv 1810.02340)")
def saliency(weights: Tensors, gradients: Tensors) -> dict[str, Tensor]:
    """|∂L/∂W ⊙ W|, of the weights as they were drawn. SNIP: Lee, Ajanthan and Torr, 2019 (arXiv 1810.02340)."""
    return {name: (w * gradients[name]).detach().abs() for name, w in weights.items()}


def movement(weights: Tensors, gradients: Tensors) -> dict[str, Tensor]:
    """−∂L/∂W ⊙ W, one step's; summed over steps it is large for weights that move away from zero.

    Sanh, Wolf and Rush, 2020 (arXiv 2005.07683); `mb.Masked("movement")` learns with it at work.
    """
    return {name: -(w * gradients[name]).detach() for name, w in weights.items()}


@_row(
    9,
    "LT-SFT",
    "sparsity.top(sparsity.change(weights, before), 0.08)",
    "Ansell et al., 2022 (arXiv 2110.07560)",
    FORMULA,
    "tests/test_sparse.py::test_sparse_fine_tunings_are_composed_by_adding",
    "tests/test_recipes.py::test_a_language_and_a_task_are_put_together",
)
def change(weights: Tensors, before: Tensors) -> dict[str, Tensor]:
    """|W − W₀|, of full fine-tuning, after which LT-SFT starts anew with the entries that changed most.

    Ansell, Ponti, Korhonen and Vulić, 2022 (arXiv 2110.07560).
    """
    return {name: (w - before[name]).detach().abs() for name, w in weights.items()}


@_row(
    8,
    "FISH mask",
    "sparsity.top(sparsity.fisher(losses, weights), 0.005)",
    "Sung, Nair and Raffel, 2021 (arXiv 2111.09839)",
    FORMULA,
    "tests/test_sparse.py::test_the_fisher_information_of_a_softmax_is_known",
)
def fisher(losses: Iterable[Tensor], weights: Tensors, power: int = 2) -> dict[str, Tensor]:
    """1/N Σ_i |∂L_i/∂W|^power: with the losses L_i = −log p(y_i | x_i) of single examples, the Fisher diagonal.

        fisher((F.cross_entropy(z := net(x), sparsity.sampled(z)) for x in rows), weights)

    losses: one an example, each made when it is asked for. With y_i drawn from p it is the Fisher information, with the
    true label its empirical form. power=1, of gates that are one: the importance of Michel et al., 2019 (1905.10650).
    Sung, Nair and Raffel, 2021 (arXiv 2111.09839), keep 0.5 % by 1024 examples. Raises CompositionError without losses.
    """
    total, count = {name: torch.zeros_like(w) for name, w in weights.items()}, 0
    for loss in losses:
        count += 1
        for name, gradient in gradients(loss, weights).items():
            total[name] += gradient.abs() ** power
    if not count:
        raise CompositionError("fisher(losses=…): there is none: one scalar an example.")
    return {name: t / count for name, t in total.items()}


def sampled(logits: Tensor) -> Tensor:
    """A label of each row, drawn from the model's own softmax: logits (…, n), labels (…)."""
    return torch.distributions.Categorical(logits=logits.detach()).sample()


# Masks


@_row(
    2,
    "lottery ticket",
    'sparsity.top(sparsity.magnitude(weights), 0.8, by="tensor", among=masks)',
    "Frankle and Carbin, 2019 (arXiv 1803.03635)",
    "tests/test_sparse.py::test_the_top_of_all_and_of_each_tensor",
    "tests/test_recipes.py::test_lottery_tickets",
    equation="W₀ ⊙ m: trained, the smallest weights taken away, those left rewound to where they started, and again.",
)
def top(
    scores: Tensors, share: float | Mapping[str, float], by: str = "all", among: Tensors | None = None
) -> dict[str, Tensor]:
    """True where scores are largest: a share of all entries together, or with by="tensor" of those at each site.

    share: of those among which is chosen, 0 to 1; by site, too, with by="tensor". among: True where an entry may be
    chosen (iterative pruning: the mask so far). At least one stays. Raises CompositionError for a bad argument.
    """
    if by not in ("all", "tensor"):
        raise CompositionError(f'top(by={by!r}): it is "all" or "tensor".')
    each = dict.fromkeys(scores, share) if isinstance(share, (int, float)) else dict(share)
    if set(each) != set(scores) or (by == "all" and not isinstance(share, (int, float))):
        raise CompositionError(f'top(share={share!r}): a number, or with by="tensor" one for each of {listed(scores)}.')
    if not all(0 < value <= 1 for value in each.values()):
        raise CompositionError(f"top(share={share!r}): shares are above 0 and at most 1.")
    some = {
        name: (torch.ones_like(s, dtype=torch.bool) if among is None else among[name]) for name, s in scores.items()
    }
    if by == "all":
        chosen = _chosen(torch.cat([s[some[n]] for n, s in scores.items()]), next(iter(each.values())))
        parts = chosen.split([int(m.sum()) for m in some.values()])
    else:
        parts = [_chosen(s[some[name]], each[name]) for name, s in scores.items()]
    return {name: m.masked_scatter(m, part) for (name, m), part in zip(some.items(), parts, strict=True)}


def _chosen(scores: Tensor, share: float) -> Tensor:
    return top_share(scores.float(), torch.tensor(float(share), device=scores.device))


# Gradients


@_row(
    11,
    "Child-Tuning F and D",
    "sparsity.child_tuning(model.parameters(), 0.3)",
    "Xu et al., 2021 (arXiv 2109.05687)",
    "tests/test_sparse.py::test_child_tuning_masks_gradients",
)
def child_tuning(parameters: Iterable[Tensor], share: float, generator: torch.Generator | None = None) -> None:
    """g ← g ⊙ Bernoulli(p)/p, in place, between backward and step: each step a child network learns (Child-Tuning-F).

    For Child-Tuning-D, whose child is fixed by the Fisher diagonal of the task: `mask_gradients`.
    Xu, Luo, Zhang, Tan, Chang, Huang and Huang, 2021 (arXiv 2109.05687); p = 0.2 to 0.4.
    """
    for parameter in parameters:
        if parameter.grad is not None:
            child = torch.rand(parameter.shape, generator=generator).to(parameter.device) < share
            parameter.grad.mul_(child).div_(share)


def mask_gradients(weights: Tensors, masks: Tensors) -> None:
    """g ← g ⊙ m, in place, between backward and step: Child-Tuning-D with m = top(fisher(losses, weights), share).

    The optimiser's weight decay moves the others all the same, as in the official code: give it none to freeze them.
    """
    for name, weight in weights.items():
        if weight.grad is not None:
            weight.grad.mul_(masks[name])


# Modules that become sparse


@_row(
    13,
    "PackNet",
    'sparsity.project(bay, "task2 whole", "task2", 0.1, by="tensor")',
    "Mallya and Lazebnik, 2018 (arXiv 1711.05769)",
    "tests/test_recipes.py::test_packnet_forgets_nothing",
    equation="Σ_{τ ≤ t} ΔW_τ: each task owns the largest of the weights that earlier ones left free, and freezes them.",
)
def project(bay: Bay, name: str, to: str, share: float | Mapping[str, float], by: str = "all") -> Bay:
    """Add the module `to`: a SparseDelta of what module `name` changes where it changes most, of its values there.

    What DiffPruning ends with, and what makes any module that has a delta a sparse one. share, by: as for `top`.
    Raises BayError for a module that is no change of the weights, or that changes biases, too.
    """
    dense = {site: delta.dense(modular.site) for site, modular, delta in _deltas(bay, name)}
    lost = [site for site, (_, bias) in dense.items() if bias is not None]
    if lost:
        raise BayError(f"project({name!r}): it changes biases, too, at {listed(lost)}, which a SparseDelta can't hold.")
    changes = {site: weight for site, (weight, _) in dense.items()}
    masks = top(magnitude(changes), share, by)
    _add(bay, to, SparseDelta(mask=masks), masks)
    for site, change in changes.items():
        _tensors(bay, to, site)["values"].data.copy_(change[masks[site]])
    return bay


def harden(bay: Bay, name: str, to: str) -> Bay:
    """Add the module `to`: a SubNetwork of the weights that the Masked module `name` keeps, at one bit each.

    Raises BayError for a module of another kind.
    """
    deltas = _deltas(bay, name)
    bare = [site for site, _, delta in deltas if not isinstance(delta, Mask)]
    if bare:
        raise BayError(f"harden({name!r}): it has no mask at {listed(bare)}.")
    kept = {site: delta.mask > 0.5 for site, _, delta in deltas}
    return _add(bay, to, SubNetwork(mask=kept), kept)


def set_density(bay: Bay, name: str, share: float) -> None:
    """Set the share that a Masked module of mode edge-popup or movement keeps: `ops.cubic` has the usual schedule.

    Raises CompositionError for no share, BayError for a module that has none.
    """
    if not 0 < share <= 1:
        raise CompositionError(f"set_density(share={share!r}): a share of the entries, above 0 and at most 1.")
    for site, _, _ in _deltas(bay, name):
        tensors = _tensors(bay, name, site)
        if "density" not in tensors:
            raise BayError(f"set_density({name!r}): the module at site {site!r} has no density; edge-popup has one.")
        tensors["density"].fill_(share)


def _deltas(bay: Bay, name: str) -> list[tuple[str, Any, Any]]:
    """(site, its modular, the module's delta there), without noise."""
    found = []
    for site, modular in bay.modulars.items():
        part: Any = modular.parts._modules.get(name)
        if part is None:
            continue
        if not hasattr(part.kind, "delta"):
            raise BayError(f"{name!r} at site {site!r}: {type(part.kind).__name__} is no change of the weights.")
        with torch.no_grad():
            found.append((site, modular, part.kind.delta(part.tensors(), modular.site)))
    if not found:
        raise BayError(f"no module {name!r} in bay {bay.state.name!r}; there are {listed(bay.names())}.")
    return found


def _add(bay: Bay, to: str, kind: Kind, masks: Tensors) -> Bay:
    """Add a module at the sites that have masks."""
    return bay.add(to, kind if set(masks) == set(bay.modulars) else dict.fromkeys(masks, kind))


def _tensors(bay: Bay, name: str, site: str) -> dict[str, Tensor]:
    part: Any = bay.modulars[site].parts._modules[name]
    return part.tensors()
