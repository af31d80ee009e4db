"""The laws that every kind, routing and aggregator keeps (those of files, folding, DDP and real models are elsewhere).

Rows of tests/helpers.py are picked up here by themselves. Numbers are compared in float64.
"""

import functools

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import modbay as mb
from helpers import AGGREGATORS, KINDS, ROUTINGS, SITES, B, Case, Form, N, Part, T, cases, function, ids, site_of
from modbay.core._engine import apply

NAMES = ("a", "b", "c", "d")
EXACT = {"rtol": 1e-9, "atol": 1e-9}
EVERY = pytest.mark.parametrize("case, place", cases(), ids=ids)
FIRST = [(case, case.sites[0]) for case in KINDS]  # where one site is enough
EACH = pytest.mark.parametrize("case, place", FIRST, ids=ids)


def admitted(part: Part, case: Case, place: str) -> bool:
    """Whether an aggregator takes a kind at a site; what it refuses is tested in tests/test_aggregators.py."""
    try:
        part.make().admit(case.make(), site_of(place)[1])
    except mb.errors.CompositionError:
        return False
    return True


@functools.cache
def keeps_width(which: str, place: str) -> bool:
    """Whether the output of a kind's module has f's shape: a head's has not."""
    case = next(case for case in KINDS if case.id == which)
    layer, x = plugged(case, place), example(place)
    return layer(x, routing=route(0), **labels(case)).shape == layer.f(x).shape


def fits(form: Form, case: Case, place: str, part: Part = AGGREGATORS[0]) -> bool:
    """Whether a kind may be routed so: tokens apart, weighed, one after another, only if it does not forbid it."""
    kind = case.make()
    if form.tokens and (place == "conv2d" or not kind.tokenwise):
        return False
    if part.id == "sequence" and isinstance(kind, mb.Replacement) and place not in ("norm", "block"):
        return form.one  # experts that change the width do not follow each other
    return keeps_width(case.id, place) or (form.one and part.id == "sum")


# Every kind at every site under the sum, and at one site under each other aggregator that takes it.
PAIRS = [
    (case, place, part)
    for case, place in cases()
    for part in AGGREGATORS
    if (part.id == "sum" or place == case.sites[0]) and admitted(part, case, place)
]
ALL = pytest.mark.parametrize("case, place, part", PAIRS, ids=ids)


def companion(part: Part, place: str) -> mb.Kind | None:
    """A kind to stand among those of a case, where the aggregator takes several."""
    kinds = {"average": None, "average-deltas": mb.BitFit(), "mixture": mb.Full()}
    return kinds.get(part.id, mb.Bottleneck(2))


def plugged(
    case: Case, place: str, part: Part = AGGREGATORS[0], names=NAMES, other: mb.Kind | None = None
) -> mb.Modular:
    """A frozen site with four modules, as if trained, one of them perhaps of another kind; in float64."""
    module = SITES[place].make().requires_grad_(False)
    kinds = {name: case.make() for name in names}
    kinds |= {} if other is None else {"c": other}
    layer = mb.Modular(module, kinds, mb.Uniform(), part.make()).double()
    return shaken(layer)


def shaken(layer: nn.Module) -> nn.Module:
    """Every learned tensor moved at random, as by training."""
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def example(place: str, rows: int = B) -> Tensor:
    x = SITES[place].example(rows)
    return x.double().requires_grad_() if x.is_floating_point() else x


def labels(case: Case, rows: int = B) -> dict[str, list]:
    return {keyword: make(rows) for keyword, make in case.labels.items()}


def route(*which: int) -> mb.Routing:
    """These modules for all rows, at weight one."""
    return mb.Routing(index=torch.tensor(which, dtype=torch.long))


def of_row(routing: mb.Routing, at: tuple[int, ...]) -> mb.Routing:
    """The route of one row, as a route for all."""
    if routing.axes == 0:
        return routing
    if routing.index is None:
        return mb.Routing(weights=routing.weights[at])
    there = routing.index[at] >= 0
    return mb.Routing(
        index=routing.index[at][there], weights=None if routing.weights is None else routing.weights[at][there]
    )


def looped(layer: mb.Modular, x: Tensor, routing: mb.Routing, given: dict) -> Tensor:
    """The same, an example or a token at a time."""
    one = [{keyword: [values[r]] for keyword, values in given.items()} for r in range(B)]
    if routing.axes < 2:
        return torch.cat(filled([layer(x[r : r + 1], routing=of_row(routing, (r,)), **one[r]) for r in range(B)]))
    places = [(r, t) for r in range(B) for t in range(T)]
    outs = [layer(x[r : r + 1, t : t + 1], routing=of_row(routing, (r, t)), **one[r]) for r, t in places]
    return torch.cat(filled(outs)).unflatten(0, (B, T)).squeeze(2)


def filled(outs: list[Tensor]) -> list[Tensor]:
    """Outputs of several widths (heads), the narrow ones filled up as a mixed batch fills them."""
    width = max(out.shape[-1] for out in outs)
    return [nn.functional.pad(out, (0, width - out.shape[-1]), value=float("-inf")) for out in outs]


def learned(layer: mb.Modular, x: Tensor, routing: mb.Routing) -> list[Tensor]:
    """What a gradient may reach."""
    leaves = [p for p in layer.parameters() if p.requires_grad]
    return leaves + [t for t in (x, routing.weights) if t is not None and t.requires_grad]


def gradients(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Of a fixed random projection of the output; zeros where none arrives."""
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    out = torch.where(torch.isfinite(out), out, 0.0)
    if not out.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return torch.autograd.grad((out * direction).sum(), leaves, allow_unused=True, materialize_grads=True)


def alone(layer: mb.Modular, name: str, x: Tensor, given: dict) -> Tensor:
    """What the contract says that a module does on the plain network."""
    part, f, c = layer.parts._modules[name], function(layer.f, x), mb.Context(labels=given)
    kind, params = part.kind, part.tensors()
    run = lambda y: apply(kind, params, f, x, y, c, layer.site, False)
    if isinstance(kind, mb.Replacement):
        return run(None)
    return f(x + run(x)) if kind.enters else f(x) + run(f(x))


ALONE = [
    Form("set", lambda: route(1), one=True),
    Form("set-dense", lambda: mb.Routing(weights=one_hot(N))),
    Form("set-weighted", lambda: mb.Routing(index=torch.tensor([1]), weights=torch.ones(1))),
    Form("example-list", lambda: mb.Routing(index=torch.ones(B, 1, dtype=torch.long), host=((1,),) * B), one=True),
    Form("example-index", lambda: mb.Routing(index=torch.ones(B, 1, dtype=torch.long)), one=True),
    Form("example-dense", lambda: mb.Routing(weights=one_hot(B, N))),
    Form("token-index", lambda: mb.Routing(index=torch.ones(B, T, 1, dtype=torch.long)), tokens=True, one=True),
    Form("token-dense", lambda: mb.Routing(weights=one_hot(B, T, N)), tokens=True),
]


def one_hot(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64).index_fill(-1, torch.tensor([1]), 1.0)


# 1, 2: a module alone, and a mixed batch


@ALL
def test_1_a_one_hot_route_is_that_module_alone(case: Case, place: str, part: Part):
    layer, x, given = plugged(case, place, part, other=companion(part, place)), example(place), labels(case)
    want = alone(layer, "b", x, given)
    if part.id == "fusion":  # its value matrix starts near the identity, and was shaken
        layer.aggregator.value.weight.data.copy_(torch.eye(layer.aggregator.width))
    for form in ALONE:
        if fits(form, case, place, part):
            assert_close(layer(x, routing=form.make(), **given), want, **EXACT, msg=lambda m, form=form: f"{form}: {m}")


@ALL
@pytest.mark.parametrize("form", ROUTINGS, ids=ids)
def test_2_a_mixed_batch_is_a_loop(case: Case, place: str, part: Part, form: Form):
    if not fits(form, case, place, part):
        return
    layer, x, given = plugged(case, place, part, other=companion(part, place)), example(place), labels(case)
    routing = form.make()
    leaves = learned(layer, x, routing)
    want = looped(layer, x, routing, given)
    assert_close(layer.eval()(x, routing=routing, **given), want, **EXACT)  # nothing is drawn here, so that all are equal
    got = layer.train()(x, routing=routing, **given)
    assert_close(got, want, **EXACT)
    for mine, theirs in zip(gradients(got, leaves), gradients(want, leaves), strict=True):
        assert_close(mine, theirs, **EXACT)
