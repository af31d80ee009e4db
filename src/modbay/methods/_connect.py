"""Mode connectivity: the loss along a path between two networks, its barrier, and a curve that goes round it.

Frankle, Dziugaite, Roy and Carbin, "Linear Mode Connectivity and the Lottery Ticket Hypothesis", 2020 (arXiv
1912.05671); Garipov, Izmailov, Podoprikhin, Vetrov and Wilson, "Loss Surfaces, Mode Connectivity, and Fast Ensembling
of DNNs", 2018 (arXiv 1802.10026); of modules: Qin, Qian, Yi, Chen, Lin, Han, Liu, Sun and Zhou, "Exploring Mode
Connectivity for Pre-trained Language Models", 2022 (arXiv 2210.14102).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from ..attach import Bay
from ..errors import CompositionError, listed
from ..merging import bezier, interpolated
from ..types import Params, System, systems
from ._swapped import called_with

Loss = Callable[[Callable, Any], Tensor]
"""(model, batch) → the mean loss of its rows, as `lambda model, batch: model(**batch).loss`."""

TESTS = "tests/test_alignment.py::"


@dataclass(frozen=True)
class Path:
    """The losses (n,) at the places t (n,) of a path, from 0 to 1."""

    t: list[float]
    losses: list[float]

    @property
    def barrier(self) -> float:
        """max_t L(t) − [(1 − t) L(0) + t L(1)]; 0 where nothing rises above the line between the ends."""
        first, last = self.losses[0], self.losses[-1]
        return max(loss - (1 - t) * first - t * last for t, loss in zip(self.t, self.losses, strict=True))

    @property
    def mean(self) -> float:
        """∫ L(t) dt, by trapezia."""
        return float(torch.trapezoid(torch.tensor(self.losses), torch.tensor(self.t)))


@torch.no_grad()
def along(model: nn.Module, curve: Callable[[float], Params], batches: Iterable[Any], loss: Loss, n: int = 25) -> Path:
    """L(φ(t)) at n places t = 0 … 1 of a path φ, the mean over batches of one size.

    model: left as it is; curve: a state, or the part of one that moves, at t, as `merging.interpolated` and
    `merging.bezier` give; batches: gone through n times. Raises CompositionError for n below 2, and for batches that
    can be gone through only once.
    """
    if n < 2 or iter(batches) is batches:
        raise CompositionError(
            f"along(n={n}) of {type(batches).__name__}: 2 places or more, and batches that can be gone through again, "
            f"as a list or a DataLoader."
        )
    places, losses = [i / (n - 1) for i in range(n)], []
    for t in places:
        run = called_with(model, curve(t))
        losses.append(torch.stack([loss(run, batch).double() for batch in batches]).mean().item())
    return Path(places, losses)


@systems(
    System(
        (117,),
        "methods.barrier(model, a, b, batches, loss)",
        (
            TESTS + "test_the_barrier_of_a_network_with_itself_is_nought",
            TESTS + "test_a_barrier_is_written_out",
            "tests/test_recipes.py::test_permuted_networks_have_no_barrier",
        ),
        "linear mode connectivity",
        section="5.1",
    ),
    System(
        (119,),
        "methods.barrier(bay.model, *methods.ends(bay, 'a', 'b'), batches, loss)",
        (
            TESTS + "test_the_barrier_of_two_modules",
            TESTS + "test_a_curve_between_modules_moves_modules_alone",
            "tests/test_recipes.py::test_permuted_networks_have_no_barrier",
        ),
        "mode connectivity of modules",
        "max_λ L(θ ⊕ [(1 − λ) φ_a + λ φ_b]) − [(1 − λ) L(θ ⊕ φ_a) + λ L(θ ⊕ φ_b)]",
        section="5.1",
    ),
)
def barrier(
    model: nn.Module, a: Params, b: Params, batches: Iterable[Any], loss: Loss, n: int = 25
) -> float:  # fmt: skip
    """max_λ L((1 − λ) a + λ b) − [(1 − λ) L(a) + λ L(b)], of n places λ: near 0 where two networks share a basin.

        batches = [(x, y)]
        methods.barrier(net, a, b, batches, lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]))

    a, b: states, or the parts that differ, as two modules' (`ends`). The model runs in the mode it is in. Batch norm's
    running statistics are interpolated, which is not what they are in the middle: see `repair`. The whole line of
    losses: `along(model, lambda t: merging.interpolated(a, b, t), batches, loss)`. Frankle et al. subtract the mean of
    the ends, the same where these are alike. Raises CompositionError for ends of other names or shapes.
    """
    return along(model, lambda t: interpolated(a, b, t), batches, loss, n).barrier


@systems(
    System(
        (118,),
        "methods.connect(model, a, b, batches, loss)",
        (
            TESTS + "test_a_curve_goes_round_a_barrier",
            TESTS + "test_curves_start_and_end_in_their_ends",
            TESTS + "test_a_curve_between_modules_moves_modules_alone",
        ),
        "mode connectivity by curves",
        section="5.1",
    )
)
def connect(
    model: nn.Module,
    a: Params,
    b: Params,
    batches: Iterable[Any],
    loss: Loss,
    steps: int = 1000,
    optimiser: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
    curve: Callable[[Params, Params, Params, float], Params] = bezier,
    seed: int = 0,
) -> dict[str, Tensor]:
    """θ = arg min E_{t ~ U(0, 1)} L(φ_θ(t)) of the bend θ of a curve from a to b, from their mean on.

        middle = methods.connect(net, a, b, batches, loss)
        methods.along(net, lambda t: merging.bezier(a, middle, b, t), batches, loss).barrier

    One t a batch and step; batches: gone through again and again. optimiser: of the parameters given, SGD(lr=0.01,
    momentum=0.9) if None, the defaults of the paper's code, whose runs add a weight decay of φ(t) itself (5e-4): add it
    to the loss if wanted. curve: `merging.bezier` or `merging.polychain`. Only parameters of the model bend; buffers,
    as batch norm's statistics, are their mean, and the model's own are left. Raises CompositionError for ends of
    other names or shapes, and for batches that are none.
    """
    middle = {name: w.detach().clone() for name, w in interpolated(a, b, 0.5).items()}
    learned = {name for name, _ in model.named_parameters()}
    bends = [w.requires_grad_() for name, w in middle.items() if name in learned]
    step = (optimiser or (lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9)))(bends)
    draw = torch.Generator().manual_seed(seed)
    fixed = [{name: w.detach() for name, w in end.items()} for end in (a, b)]
    for _, batch in zip(range(steps), over_again(batches), strict=False):
        t = torch.rand((), generator=draw).item()
        value = loss(called_with(model, curve(fixed[0], middle, fixed[1], t)), batch)
        gradients = torch.autograd.grad(value, bends, allow_unused=True)
        for w, gradient in zip(bends, gradients, strict=True):
            w.grad = gradient
        step.step()
    return {name: w.detach() for name, w in middle.items()}


def ends(bay: Bay, a: str, b: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two modules as the ends of a path, for `barrier`, `along` and `connect` of `bay.model` while `bay.use(a)` holds.

        bay.use("a")
        methods.barrier(bay.model, *methods.ends(bay, "a", "b"), batches, loss)

    Both are by the names of a's parameters in the model, so that whatever is between them takes a's place. Raises
    CompositionError for modules of other kinds or sites, and for a module that the two share or hold packed.
    """
    states: list[dict[str, Tensor]] = []
    for name in (a, b):
        i = bay._part(name)
        parts = {site: part for site, m in bay.modulars.items() if (part := m.order[i]) is not None}
        states.append({f"{site}/{key}": p for site, part in parts.items() for key, p in _held(part)})
    names = {id(p): name for name, p in [*bay.model.named_parameters(), *bay.model.named_buffers()]}
    lost = [key for key in states[0] if id(states[0][key]) not in names]
    wrong = set(states[0]) ^ set(states[1]) or {k for k, p in states[0].items() if p.shape != states[1][k].shape}
    if wrong or lost:
        raise CompositionError(
            f"ends({a!r}, {b!r}): {listed(sorted(wrong or lost))} "
            f"{'is not the same in both' if wrong else 'is packed; bay.unpack() first'}. They are modules of one kind "
            f"at the same sites."
        )
    return tuple({names[id(states[0][key])]: p.detach() for key, p in s.items()} for s in states)  # type: ignore


def _held(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from part.named_parameters()
    yield from part.named_buffers()


def over_again(batches: Iterable[Any]) -> Iterator[Any]:
    """A DataLoader draws anew every time; what can be gone through once is kept."""
    if iter(batches) is batches:
        yield from cycle(batches)
    some = True
    while some:
        some = False
        for batch in batches:
            some = True
            yield batch
    raise CompositionError("there are no batches to learn from.")
