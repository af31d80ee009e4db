"""The laws that every kind, routing and aggregator keeps (those of files, folding, DDP and real models are elsewhere).

Rows of tests/helpers.py are picked up here by themselves. Numbers are compared in float64.
"""

import copy
import functools
import pickle

import pytest
import torch
import torch._dynamo.testing
import transformers
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import modbay as mb
from helpers import (
    AGGREGATORS,
    KINDS,
    MAPS,
    ROUTERS,
    ROUTINGS,
    SITES,
    B,
    Case,
    Form,
    N,
    Part,
    T,
    cases,
    function,
    ids,
    site_of,
)
from modbay import core
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
    if form.tokens and (place in MAPS or not kind.tokenwise):
        return False
    if part.id == "sequence" and kind.replaces and place not in ("norm", "block"):
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
    kinds = {
        "average": None,
        "average-deltas": mb.BitFit(),
        "mixture": mb.Full() if place in MAPS else mb.FeedForward(2),
    }
    return kinds.get(part.id, mb.BitFit() if place == "batchnorm1d" else mb.Bottleneck(2))


def plugged(
    case: Case, place: str, part: Part = AGGREGATORS[0], names=NAMES, other: mb.Kind | None = None
) -> mb.Modular:
    """A frozen site with four modules, as if trained, one of them perhaps of another kind; in float64, and in the mode
    in which rows and calls are to be compared."""
    module = SITES[place].make().requires_grad_(False)
    kinds = {name: case.make() for name in names}
    kinds |= {} if other is None else {"c": other}
    layer = mb.Modular(module, kinds, mb.Uniform(), part.make()).double()
    return shaken(layer).train(case.trains)


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
    if kind.replaces:
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
    if part.id == "ensemble":  # gives log-probabilities
        want = want.log_softmax(layer.site.axis)
    for form in ALONE:
        if fits(form, case, place, part):
            assert_close(layer(x, routing=form.make(), **given), want, **EXACT, msg=lambda m, form=form: f"{form}: {m}")


# The sum takes all forms at a kind's first site; elsewhere, those that go different ways through the engine.
FEW = ("set-all", "example-list-several", "example-sparse", "token-sparse")
MORE = (*FEW, "set-dense", "example-index", "example-dense")


def wanted(case: Case, place: str, part: Part, form: Form) -> bool:
    if part.id != "sum":
        return form.id in MORE
    return place == case.sites[0] or form.id in FEW


LOOPS = [(*pair, form) for pair in PAIRS for form in ROUTINGS if wanted(*pair, form)]
LOOPS = [(case, place, part, form) for case, place, part, form in LOOPS if fits(form, case, place, part)]


@pytest.mark.parametrize("case, place, part, form", LOOPS, ids=ids)
def test_2_a_mixed_batch_is_a_loop(case: Case, place: str, part: Part, form: Form):
    layer, x, given = plugged(case, place, part, other=companion(part, place)), example(place), labels(case)
    routing = form.make()
    leaves = learned(layer, x, routing)
    want = looped(layer.train(case.trains), x, routing, given)  # what ties rows does so in training alone
    assert_close(layer.eval()(x, routing=routing, **given), want, **EXACT)  # nothing is drawn: all are equal
    got = layer.train(case.trains)(x, routing=routing, **given)
    assert_close(got, want, **EXACT)
    for mine, theirs in zip(gradients(got, leaves), gradients(want, leaves), strict=True):
        assert_close(mine, theirs, **EXACT)


@EACH
def test_2_rows_that_are_sorted_already_are_a_loop(case: Case, place: str):
    layer, x, given = plugged(case, place), example(place, N), labels(case, N)
    which = torch.arange(N).unsqueeze(1)
    one = [layer(x[i : i + 1], routing=route(i), **{k: v[i : i + 1] for k, v in given.items()}) for i in range(N)]
    routing = mb.Routing(index=which, host=tuple((i,) for i in range(N)))
    assert_close(layer(x, routing=routing, **given), torch.cat(one), **EXACT)


@pytest.mark.parametrize("part", ROUTERS, ids=ids)
@pytest.mark.parametrize("kind", [mb.LoRA(2), mb.Bottleneck(3)], ids=["lora", "bottleneck"])
def test_2_a_router_routes_a_batch_as_its_examples(part: Part, kind: mb.Kind):
    modules = dict.fromkeys(NAMES, kind)
    layer = shaken(mb.Modular(nn.Linear(8, 6), modules, part.make(), mb.WeightedSum()).double()).eval()
    x, given = torch.randn(B, T, 8, dtype=torch.float64), {keyword: make(B) for keyword, make in part.labels.items()}
    one = [layer(x[r : r + 1], **{keyword: [values[r]] for keyword, values in given.items()}) for r in range(B)]
    assert_close(layer(x, **given), torch.cat(one), rtol=1e-6, atol=1e-6)  # routers compute in float32


@pytest.mark.parametrize("part", ROUTERS, ids=ids)
@pytest.mark.parametrize("learned", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_2_every_router_in_bfloat16(part: Part, learned: torch.dtype):
    layer = mb.Modular(nn.Linear(8, 6), dict.fromkeys(NAMES, mb.LoRA(2)), part.make(), mb.WeightedSum()).eval()
    in_bfloat16(layer, learned, {keyword: make(B) for keyword, make in part.labels.items()})


@pytest.mark.parametrize("part", AGGREGATORS, ids=ids)
@pytest.mark.parametrize("learned", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("router", [mb.Uniform, mb.TopK], ids=["uniform", "top-1"])
def test_2_every_aggregator_in_bfloat16(part: Part, learned: torch.dtype, router: type):
    kind = {"mixture": mb.FeedForward(5), "sequence": mb.Bottleneck(2)}.get(part.id, mb.LoRA(2))
    in_bfloat16(mb.Modular(nn.Linear(8, 6), dict.fromkeys(NAMES, kind), router(), part.make()), learned, {})


def in_bfloat16(layer: mb.Modular, learned: torch.dtype, given: dict) -> None:
    """On a base in bfloat16 the same weights give nearly what they give in float32, with gradients for what learns."""
    layer.f.requires_grad_(False).bfloat16()
    shaken(layer)
    for part in (layer.parts, layer.router, layer.aggregator):
        part.to(learned)
    wide, x = copy.deepcopy(layer).float(), torch.randn(B, T, 8).bfloat16()
    ours, theirs = layer(x, **given), wide(x.float(), **given)
    assert ours.dtype == torch.bfloat16 and (ours - theirs).norm() < 0.02 * theirs.norm()
    ours.float().sin().sum().backward()
    theirs.sin().sum().backward()
    for narrow, full in zip(layer.parameters(), wide.parameters(), strict=True):
        assert (narrow.grad is None) == (full.grad is None)
        if full.grad is not None:
            assert narrow.grad.dtype == narrow.dtype
            assert (narrow.grad - full.grad).norm() < 0.1 * full.grad.norm() + 1e-2


# 3: only the active run


@EACH
@pytest.mark.parametrize(
    "form", [f for f in ROUTINGS if f.id in ("set-sparse", "example-list", "example-list-several")]
)
def test_3_only_active_modules_are_touched(case: Case, place: str, form: Form, monkeypatch):
    if not fits(form, case, place):
        return
    names = (*NAMES, *(f"idle {i}" for i in range(20)))
    layer, routing, touched = plugged(case, place, names=names), form.make(), set()
    real = core.Part.tensors
    monkeypatch.setattr(core.Part, "tensors", lambda self: touched.add(id(self)) or real(self))
    layer(example(place), routing=routing, **labels(case))
    assert touched == {id(layer.order[i]) for i in {i for row in routing.host for i in row}}


# 4, 8: what a new module, a frozen one and one that is taken out leave as it was


class Net(nn.Module):
    """A site between two layers that are no site."""

    def __init__(self, place: str):
        super().__init__()
        self.site = SITES[place].make()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.saves = False  # whether the site's activations are made anew in the backward pass

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(self.site, x, use_reentrant=False) if self.saves else self.site(x)
        return torch.tanh(h * self.scale)


def attached(case: Case, place: str) -> tuple[Net, mb.Bay]:
    """A small network with four modules at its site, as if trained, routed by the label `which`."""
    net = Net(place)
    bay = mb.attach(net, at="site", modules={name: case.make() for name in NAMES}, router=mb.ByLabel("which"))
    return shaken(net.double().train(case.trains)), bay


def chosen(case: Case) -> dict[str, list]:
    """A module for each example, and one without, beside what the kind itself reads."""
    return labels(case) | {"which": ["b", "c", "d", "b", "a"] if case.id == "head" else ["b", None, "d", "b", "a"]}


@EVERY
def test_4_a_new_module_changes_nothing_and_detaching_restores_every_bit(case: Case, place: str):
    net, x = Net(place).double().train(case.trains), example(place)
    state, before = copy.deepcopy(net.state_dict()), net(x)
    bay = mb.attach(net, at="site", modules={name: case.make() for name in NAMES}, router=mb.ByLabel("which"))
    net.double()
    if case.make().neutral:
        assert_close(net(x, **chosen(case)), before, **EXACT)
    shaken(net)
    assert bay.detach() is net and type(net) is Net and type(net.site) is type(SITES[place].make())
    assert net.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in net.state_dict().items())
    assert torch.equal(net(x), before) and all(p.requires_grad for p in net.parameters())


@EACH
def test_8_what_is_frozen_or_not_routed_stays_bit_for_bit(case: Case, place: str):
    net, bay = attached(case, place)
    given = labels(case) | {"which": ["a", "b", "a", "b", "a"]}
    net(example(place), **given).square().sum().backward()
    bay.freeze("b")
    assert all(p.grad is None for p in bay.parameters("b"))
    before, start = snapshot(bay, "b", "c", "d"), snapshot(bay, "a")
    for parameter in net.parameters():
        parameter.grad = None
    optimiser = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(2):
        net(example(place), **given).square().sum().backward()
        assert all(p.grad is None for p in bay.parameters("b", "c", "d"))
        optimiser.step()
    assert all(map(torch.equal, before, snapshot(bay, "b", "c", "d")))
    assert not case.learns or not all(map(torch.equal, start, snapshot(bay, "a")))


def snapshot(bay: mb.Bay, *names: str) -> list[Tensor]:
    return [p.detach().clone() for p in bay.parameters(*names)]


# 9: order and removal


@EACH
@pytest.mark.parametrize("form", [f for f in ROUTINGS if not f.tokens], ids=ids)
def test_9_permuting_modules_permutes_weights(case: Case, place: str, form: Form):
    if not fits(form, case, place):
        return
    layer, x, routing, given = plugged(case, place), example(place), form.make(), labels(case)
    order = [2, 0, 3, 1]
    other = mb.Modular(layer.f, {}, mb.Uniform(), mb.WeightedSum())
    for i in order:
        other.inventory.names.append(NAMES[i])
        other.plug(NAMES[i], layer.order[i].kind, dict(layer.order[i].tensors()))
    place_of = torch.tensor([order.index(i) for i in range(N)] + [-1])
    if routing.index is None:
        permuted = mb.Routing(weights=routing.weights[..., order])
    else:
        permuted = mb.Routing(index=place_of[routing.index], weights=routing.weights)
    assert_close(other(x, routing=permuted, **given), layer(x, routing=routing, **given), **EXACT)


@EACH
def test_9_removing_an_inactive_module_changes_nothing(case: Case, place: str):
    net, bay = attached(case, place)
    x, given = example(place), labels(case) | {"which": ["b", "d", "d", "b", "a"]}
    before = net(x, **given)
    bay.remove("c")
    assert bay.names() == ["a", "b", "d"]
    assert_close(net(x, **given), before, **EXACT)


# 10: what torch and Python do to a model


@EVERY
def test_10_copies_and_pickles_are_the_same_and_apart(case: Case, place: str):
    net, _ = attached(case, place)
    x, given = example(place).detach(), chosen(case)
    want = net(x, **given)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert_close(twin(x, **given), want, **EXACT)
        shaken(twin)
        assert not case.learns or not torch.equal(twin(x, **given), want)
        assert torch.equal(net(x, **given), want)
        own = {id(p) for p in net.parameters()}
        assert not own & {id(p) for p in twin.parameters()}


@pytest.mark.parametrize("case", [case for case in KINDS if "linear" in case.sites], ids=ids)
def test_10_what_sites_share_they_share_in_any_dtype(case: Case):
    net = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 6))
    bay = mb.attach(net, at=["0", "2"], modules={"a": case.make(), "b": case.make()}, router=mb.ByLabel("which"))
    own = lambda: [t for m in bay.modulars.values() for part in m.order for t in part.tensors().values()]

    def shared() -> list[int]:
        """The first that each of all tensors is one with."""
        first: dict[int, int] = {}
        return [first.setdefault(id(tensor), i) for i, tensor in enumerate(own())]

    before, kept = shared(), [id(tensor) for tensor in own()]
    shaken(net.double().train(case.trains))
    assert shared() == before and {t.dtype for t in own() if t.is_floating_point()} <= {torch.float64}
    twin = copy.deepcopy(net).float()
    assert twin[0].weight.dtype == torch.float32 and shared() == before
    assert {t.dtype for t in own() if t.is_floating_point()} <= {torch.float64}  # a copy has its own
    assert [id(tensor) for tensor in own()] == kept
    if keeps_width(case.id, "linear"):
        x, given = torch.randn(2, 8, dtype=torch.float64), labels(case, 2) | {"which": ["a", "b"]}
        assert_close(twin(x.float(), **given).double(), net(x, **given), rtol=1e-3, atol=1e-3)


@EVERY
def test_10_autocast_and_checkpoints_give_the_same(case: Case, place: str):
    net, _ = attached(case, place)
    x, first = example(place), chosen(case)
    second = first | {"which": ["d", "a", "a", "c", "b"]}
    net.scale.requires_grad_()
    leaves = [p for p in net.parameters() if p.requires_grad]

    def step() -> list[Tensor]:  # two forwards before one backward: each must be recomputed under its own labels
        torch.manual_seed(1)  # and, where it draws noise, under its own draw
        out = net(x, **first).square().sum() - net(x, **second).sin().sum()
        return torch.autograd.grad(out, leaves, allow_unused=True, materialize_grads=True)

    net.train()
    want, net.saves = step(), True
    for mine, theirs in zip(step(), want, strict=True):
        assert_close(mine, theirs, **EXACT)
    net.float().train(case.trains)
    x = x.detach().float() if x.is_floating_point() else x
    want = net(x, **first)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(net(x, **first).float(), want, rtol=0.1, atol=0.1)


def once(model: nn.Module, x: Tensor, case: Case) -> None:
    """One graph serves all labels, and gives what eager code gives, forward and gradients."""
    leaves = [p for p in model.parameters() if p.requires_grad]
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for which in ([1, 0, 3, 1, 0], [2, 2, 2, 2, 2], [3, 1, 0, 2, -1]):
        given = {keyword: torch.tensor([0, 1, 2, 1, 0]) for keyword in case.labels} | {"which": torch.tensor(which)}
        want = model(x, **given)  # before it is compiled: that sites fire is noted in the first pass
        got = compiled(x, **given)
        assert_close(got, want, **EXACT)
        for mine, theirs in zip(gradients(got, leaves), gradients(want, leaves), strict=True):
            assert_close(mine, theirs, **EXACT)
    assert counter.frame_count == 1


# A graph takes seconds to trace: one kind of each composition every time, and all of them in `make test-all`.
QUICK = ("lora", "bottleneck", "ia3-input", "feed-forward", "hyper-lora")
TRACED = [pytest.param(*pair, marks=[] if pair[0].id in QUICK else pytest.mark.slow) for pair in FIRST]


@pytest.mark.parametrize("case, place", TRACED, ids=ids)
def test_10_compiled_once_for_all_labels(case: Case, place: str):
    if not keeps_width(case.id, place):
        return  # which rows have a head is not known when the graph is made
    layer = plugged(case, place).train(case.trains)
    layer.router = mb.ByLabel("which")
    layer.router.build(layer.inventory.names, layer.site)
    once(layer, example(place).detach(), case)


def test_10_a_network_with_modules_compiles_once():
    once(attached(KINDS[0], "linear")[0], example("linear").detach(), KINDS[0])


# What can't be done raises


@EACH
def test_rows_that_are_not_the_routing_s_raise(case: Case, place: str):
    layer, x = plugged(case, place), example(place)
    for routing in (
        mb.Routing(weights=torch.ones(B + 1, N)),
        mb.Routing(weights=torch.ones(1, N)),
        mb.Routing(index=torch.zeros(B - 1, 1, dtype=torch.long)),
        mb.Routing(weights=torch.ones(B, T + 2, N)),
    ):
        with pytest.raises(mb.errors.SiteError, match="rows"):
            layer(x, routing=routing, **labels(case))


@pytest.mark.parametrize(
    "case, place",
    [(c, p) for c, p in cases() if p in MAPS or (p == c.sites[0] and not c.make().tokenwise)],
    ids=ids,
)
def test_tokens_that_can_t_be_routed_apart_raise(case: Case, place: str):
    layer, x = plugged(case, place), example(place)
    rows = tuple(x.shape[:2])
    for routing in (
        mb.Routing(weights=torch.ones(*rows, N)),
        mb.Routing(index=torch.zeros(*rows, 1, dtype=torch.long)),
    ):
        with pytest.raises(mb.errors.CompositionError, match="token"):
            layer(x, routing=routing, **labels(case))


def test_modules_of_another_width_can_t_be_weighed():
    head = next(case for case in KINDS if case.id == "head")
    layer, x = plugged(head, "linear"), example("linear")
    for form in ROUTINGS:
        if form.one:
            continue
        with pytest.raises(mb.errors.CompositionError, match="width"):
            layer(x, routing=form.make())


# What is padding


def t5() -> transformers.T5ForConditionalGeneration:
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0)).eval()


AVERAGES = {
    "gate": {"modules": {"a": mb.Bottleneck(3), "b": mb.Bottleneck(3)}, "router": mb.Gate},
    "top-1": {"modules": {"a": mb.Bottleneck(3), "b": mb.Bottleneck(3)}, "router": lambda: mb.TopK(by="example")},
    "input": {"modules": {"a": mb.Hyper(mb.Bottleneck(3), where=("input",), size=4)}, "router": mb.Uniform},
    "squeeze": {"modules": {"a": mb.SqueezeExcite(2)}, "router": mb.Uniform},
}
SIDES = ["encoder.block.*.layer.1", "decoder.block.*.layer.2", "*EncDecAttention.[qkv]", "*.SelfAttention.v", "lm_head"]


@pytest.mark.parametrize("at", SIDES)
@pytest.mark.parametrize("which", AVERAGES)
def test_an_encoder_s_padding_is_not_its_decoder_s(which: str, at: str):
    """What averages over positions leaves out those of its own side that are padding: a mixed batch is a loop."""
    model = t5()
    mb.attach(model, at=at, **AVERAGES[which])
    shaken(model)
    ids, said = torch.randint(1, 50, (3, 5)), torch.randint(1, 50, (3, 5))
    read, wrote = torch.tensor([5, 2, 3]), torch.tensor([2, 5, 4])
    mask, own = (torch.arange(5) < lengths[:, None] for lengths in (read, wrote))
    full = {"input_ids": ids, "attention_mask": mask.long(), "decoder_input_ids": said}
    masked = model(**full, decoder_attention_mask=own.long()).logits
    plain = model(**full).logits
    for i in range(3):
        one = {"input_ids": ids[i : i + 1, : read[i]], "decoder_input_ids": said[i : i + 1]}
        assert_close(plain[i], model(**one).logits[0], atol=1e-5, rtol=1e-5)
        one["decoder_input_ids"] = said[i : i + 1, : wrote[i]]
        assert_close(masked[i, : wrote[i]], model(**one).logits[0], atol=1e-5, rtol=1e-5)
