"""Each aggregator's equation, written out, and what it refuses."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import modbay as mb
from helpers import AGGREGATORS, ids
from modbay.errors import CompositionError

ALPHA = torch.tensor([0.2, -0.5, 1.3])


def layer(kind, aggregator, f=None, n: int = 3) -> mb.Modular:
    f = nn.Linear(8, 8) if f is None else f
    made = mb.Modular(f, dict.fromkeys("abcdef"[:n], kind), mb.Uniform(), aggregator)
    with torch.no_grad():
        for parameter in made.parts.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def weighed(*index: int, weights: Tensor = ALPHA) -> mb.Routing:
    return (
        mb.Routing(index=torch.tensor(index), weights=weights[: len(index)]) if index else mb.Routing(weights=weights)
    )


def adapter(made: mb.Modular, name: str, y: Tensor) -> Tensor:
    """A bottleneck's change, by its own kind."""
    part = made.parts._modules[name]
    return part.kind.change(part.tensors(), y, y, mb.Context())


def test_average_of_parameters_is_of_each_factor():
    made, x = layer(mb.LoRA(2), mb.ParameterAverage()), torch.randn(4, 5, 8)
    parts = [made.parts._modules[name]._parameters for name in "abc"]
    a, b = (sum(w * part[key] for w, part in zip(ALPHA, parts, strict=True)) for key in "AB")
    assert_close(made(x, routing=weighed()), made.f(x) + x @ a.mT @ b.mT)
    each = torch.rand(4, 3)
    for r in range(4):
        assert_close(made(x, routing=mb.Routing(weights=each))[r], made(x[r], routing=mb.Routing(weights=each[r])))


def test_average_of_deltas_is_of_the_products():
    made, x = layer(mb.LoRA(2), mb.ParameterAverage("deltas")), torch.randn(4, 5, 8)
    parts = [made.parts._modules[name] for name in "abc"]
    delta = sum(w * p._parameters["B"] @ p._parameters["A"] for w, p in zip(ALPHA, parts, strict=True))
    assert_close(made(x, routing=weighed()), made.f(x) + x @ delta.mT)


def test_average_leaves_rows_without_a_module_to_f():
    for kind in (mb.LoRA(2), mb.FeedForward(3), mb.IA3("input")):
        made, x = layer(kind, mb.ParameterAverage()), torch.randn(2, 5, 8)
        out = made(x, routing=mb.Routing(index=torch.tensor([[-1, -1], [0, 2]])))
        assert_close(out[0], made.f(x)[0])
        assert not torch.allclose(out[1], made.f(x)[1])


@pytest.mark.parametrize("order", [None, ["c", "a", "b"]], ids=str)
def test_sequence_stacks_adapters_in_its_order(order):
    made, x = layer(mb.Bottleneck(3), mb.Sequence(order)), torch.randn(4, 5, 8)
    y = made.f(x)
    for name in order or "abc":
        y = y + ALPHA["abc".index(name)] * adapter(made, name, y)
    assert_close(made(x, routing=weighed()), y)


def test_sequence_as_routed_is_a_program_an_example():
    made = layer(mb.FeedForward(4), mb.Sequence("routed"))
    made.f, x = None, torch.randn(4, 8)
    programs = torch.tensor([[2, 0, 1], [0, 0, -1], [-1, -1, -1], [1, 2, 2]])
    run = lambda i, v: made.order[i].kind.forward(made.order[i].tensors(), v, None, mb.Context())
    out = made(x, routing=mb.Routing(index=programs))
    for r, program in enumerate(programs.tolist()):
        v = x[r]
        for i in program:
            v = v if i < 0 else run(i, v)
        assert_close(out[r], v)
    in_order = mb.Modular.run(made, None, x, mb.Context(), mb.Routing(index=programs), mb.Sequence())
    assert_close(in_order[0], run(2, run(1, run(0, x[0]))))


def test_sequence_mixes_adapters_and_experts():
    made = mb.Modular(
        nn.Linear(8, 8), {"a": mb.Bottleneck(2), "b": mb.FeedForward(3)}, mb.Uniform(), mb.Sequence(["b", "a"])
    )
    nn.init.normal_(made.parts._modules["a"]._parameters["up"] if "up" in made.parts._modules["a"]._parameters else
                    next(iter(made.parts._modules["a"].parameters())))  # fmt: skip
    x = torch.randn(3, 8)
    expert = made.order[1].kind.forward(made.order[1].tensors(), x, None, mb.Context())
    want = expert + made.order[0].kind.change(made.order[0].tensors(), x, expert, mb.Context())
    assert_close(made(x, routing=mb.Routing(index=torch.tensor([[0, 1]] * 3))), want)
    made.aggregator = mb.Sequence()
    y = made.f(x) + made.order[0].kind.change(made.order[0].tensors(), x, made.f(x), mb.Context())
    want = made.order[1].kind.forward(made.order[1].tensors(), y, None, mb.Context())
    assert_close(made(x, routing=mb.Routing(index=torch.tensor([[1, 0]] * 3))), want)


def test_mixture_runs_experts_instead_of_f():
    class Never(nn.Module):
        def forward(self, x):
            raise AssertionError("f ran")

    made, x = layer(mb.FeedForward(4), mb.Mixture()), torch.randn(4, 5, 8)
    each = [p.kind.forward(p.tensors(), x, None, mb.Context()) for p in made.order]
    made.f = Never()
    assert_close(made(x, routing=weighed()), sum(w * e for w, e in zip(ALPHA, each, strict=True)))
    index, weights = torch.randint(3, (4, 5, 2)), torch.rand(4, 5, 2)
    chosen = torch.stack(each, 2).gather(2, index.unsqueeze(-1).expand(4, 5, 2, 8))
    assert_close(made(x, routing=mb.Routing(index=index, weights=weights)), (weights.unsqueeze(-1) * chosen).sum(2))
    assert_close(made(x, routing=mb.Routing(index=torch.full((4, 1), -1))), torch.zeros(4, 5, 8))


def test_fusion_attends_over_what_modules_add():
    made, x = layer(mb.Bottleneck(3), mb.AdapterFusion()), torch.randn(4, 5, 8)
    fusion, y = made.aggregator, made.f(x)
    assert_close(fusion.value.weight, torch.eye(8), rtol=0, atol=1.1e-6)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    z = torch.stack([adapter(made, name, y) for name in "abc"], 2)  # (b, t, n, d)
    scores = torch.einsum("btd,btnd->btn", fusion.query(y), fusion.key(z))
    want = y + torch.einsum("btn,btnd->btd", scores.softmax(-1), z @ fusion.value.weight.mT)
    assert_close(made(x, routing=mb.Routing(weights=torch.ones(3))), want)
    pair = torch.einsum("btn,btnd->btd", scores[..., [0, 2]].softmax(-1), z[:, :, [0, 2]] @ fusion.value.weight.mT)
    index = torch.tensor([[0, 2], [2, 0], [-1, -1], [2, -1]])
    got = made(x, routing=mb.Routing(index=index))
    assert_close(got[:2], (y + pair)[:2])
    assert_close(got[2], y[2])
    assert_close(got[3], (y + z[:, :, 2] @ fusion.value.weight.mT)[3])


def test_fusion_keeps_its_parameters_and_adds_its_loss():
    fusion = mb.AdapterFusion()
    made = layer(mb.Bottleneck(3), fusion)
    before = copy.deepcopy(fusion.state_dict())
    fusion.build(made.site)
    assert all(torch.equal(before[key], tensor) for key, tensor in fusion.state_dict().items())
    c = mb.Context()
    made.train()(torch.randn(2, 3, 8), context=c)
    assert [name.rpartition(".")[2] for name, _ in c.losses] == ["fusion"]
    assert_close(c.losses[0][1], torch.tensor(0.01 * 56 * 1e-12), rtol=0.01, atol=1e-13)
    with pytest.raises(CompositionError, match="8 features"):
        mb.Modular(nn.Linear(8, 6), {"a": mb.LoRA(1)}, mb.Uniform(), fusion)


def test_stack_has_one_entry_a_module_or_a_slot():
    made, x = layer(mb.Bottleneck(3), mb.Stack()), torch.randn(4, 5, 8)
    y = made.f(x)
    each = torch.stack([y + adapter(made, name, y) for name in "abc"])
    assert_close(made(x, routing=mb.Routing(weights=torch.ones(3))), each)
    index = torch.tensor([[0, 2], [1, -1], [-1, -1], [2, 1]])
    got = made(x, routing=mb.Routing(index=index))
    assert got.shape == (2, 4, 5, 8)
    for r, row in enumerate(index.tolist()):
        for slot, i in enumerate(row):
            assert_close(got[slot, r], y[r] if i < 0 else each[i, r])


@pytest.mark.parametrize(
    "aggregator, kind, says",
    [
        (mb.ParameterAverage(), mb.Hyper(mb.LoRA(2), "language", ("en", "de"), size=2), "generates"),
        (mb.ParameterAverage(), nn.Linear(8, 8), "network of your own"),
        (mb.ParameterAverage("deltas"), mb.Bottleneck(2), "no delta"),
        (mb.Sequence(), mb.LoRA(2), "no order"),
        (mb.Sequence(), mb.Prompt(3), "no order"),
        (mb.Mixture(), mb.LoRA(2), "does not run"),
        (mb.AdapterFusion(), mb.Prompt(3), "no output"),
        (mb.Stack(), mb.Prompt(3), "no output"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_what_an_aggregator_can_t_take_raises(aggregator, kind, says):
    with pytest.raises(CompositionError, match=says):
        mb.Modular(nn.Linear(8, 8), {"a": kind}, mb.Uniform(), aggregator)


def test_an_average_of_two_kinds_raises():
    made = mb.Modular(nn.Linear(8, 8), {"a": mb.LoRA(2), "b": mb.LoRA(3)}, mb.Uniform(), mb.ParameterAverage())
    with pytest.raises(CompositionError, match="2 kinds"):
        made(torch.randn(2, 8))


def test_a_stack_inside_a_network_raises_and_leaves_it_as_it_was():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(CompositionError, match="one axis more"):
        mb.attach(net, at="0", modules={"a": mb.LoRA(2)}, aggregator=mb.Stack())
    assert type(net) is nn.Sequential and not mb.bays(net)


def test_wrong_arguments_raise():
    with pytest.raises(CompositionError, match="of='all'"):
        mb.ParameterAverage("all")
    with pytest.raises(CompositionError, match="order='backwards'"):
        mb.Sequence("backwards")
    with pytest.raises(CompositionError, match="'b'"):
        layer(mb.Bottleneck(2), mb.Sequence(["a", "c"]))(torch.randn(2, 8))


@pytest.mark.parametrize("part", AGGREGATORS, ids=ids)
def test_no_module_at_all_is_f(part):
    kind = mb.FeedForward(2) if part.id == "mixture" else mb.Bottleneck(2) if part.id == "sequence" else mb.LoRA(2)
    made, x = layer(kind, part.make()), torch.randn(3, 8)
    want = torch.zeros(3, 8) if part.id == "mixture" else made.f(x)
    assert_close(made(x, routing=mb.Routing(index=torch.tensor([], dtype=torch.long))), want)


def test_one_aggregator_here_another_there():
    """By the site's name, the rest a sum; a set of parameters at each site where a callable makes it."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)), torch.randn(4, 5, 8)
    kinds = dict.fromkeys("ab", mb.Bottleneck(3, std=0.5))
    ways = {"0": mb.WeightedSum, "1": lambda: mb.Again("input"), "2": mb.AdapterFusion}
    make = lambda: mb.PerSite({"1": ways["1"](), "2": ways["2"]()})
    bay = mb.attach(net, at=list(ways), modules=kinds, aggregator=make).use("a", "b")
    found, y = bay.modulars["2"].aggregator.at("2"), x
    assert not list(bay.modulars["0"].aggregator.parameters())
    apart = [nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)]
    for (site, way), f, own in zip(ways.items(), apart, net, strict=True):
        f.load_state_dict({k: v for k, v in own.state_dict().items() if "_bay" not in k})
        one = mb.Modular(f, kinds, mb.Fixed([1.0, 1.0]), way())
        one.parts, one.order = bay.modulars[site].parts, bay.modulars[site].order
        if site == "2":
            one.aggregator.load_state_dict(found.state_dict())
        y = one(y)
    assert_close(net(x), y)
    with pytest.raises(CompositionError, match="patterns of site names"):
        mb.PerSite({"1": mb.Bottleneck(3)})


def test_fusion_within_a_norm():
    """f(x + Σ s_i V Δ_i), with Q reading f(x)."""
    torch.manual_seed(0)
    norm, x = nn.LayerNorm(8), torch.randn(4, 5, 8)
    made = layer(mb.Bottleneck(3), mb.Again("input", mb.AdapterFusion()), norm)
    fusion = made.aggregator.inner
    with torch.no_grad():
        for part in fusion.parameters():
            part.add_(0.3 * torch.randn_like(part))
    y = norm(x)
    changes = torch.stack([adapter(made, name, y) for name in "abc"], -2)
    shares = (fusion.key(changes) @ fusion.query(y).unsqueeze(-1)).squeeze(-1).softmax(-1)
    assert_close(made(x), norm(x + (shares.unsqueeze(-2) @ fusion.value(changes)).squeeze(-2)))
