"""SimAdapter: fusion over whole outputs, at a temperature, guided to the module of the language that is learned."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import modbay as mb
from modbay.errors import CompositionError

TABLE = {"ab": ["a", "b"], "bc": ["b", "c"], "c": ["c"]}


def layer(fusion: mb.AdapterFusion) -> mb.Modular:
    made = mb.Modular(nn.Linear(8, 8), dict.fromkeys("abc", mb.Bottleneck(3)), mb.Uniform(), fusion)
    with torch.no_grad():
        for parameter in [*made.parts.parameters(), *fusion.parameters()]:
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def outputs(made: mb.Modular, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(f(x), m_i(x) (b, t, n, d)), by the kinds alone."""
    y = made.f(x)
    parts = [made.parts._modules[name] for name in made.parts._modules]
    return y, torch.stack([y + part.kind.change(part.tensors(), y, y, mb.Context()) for part in parts], 2)


def shares(fusion: mb.AdapterFusion, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return (torch.einsum("btd,btnd->btn", fusion.query(y), fusion.key(z)) / fusion.temperature).softmax(-1)


def test_outputs_are_attended_at_a_temperature():
    made, x = layer(mb.AdapterFusion(over="outputs", temperature=3.0)), torch.randn(4, 5, 8)
    fusion = made.aggregator
    y, z = outputs(made, x)
    want = torch.einsum("btn,btnd->btd", shares(fusion, y, z), z @ fusion.value.weight.mT)
    assert_close(made(x, routing=mb.Routing(weights=torch.ones(3))), want)
    one = made(x, routing=mb.Routing(index=torch.tensor([[1], [-1], [0], [2]])))
    assert_close(one[1], y[1])  # of no module
    assert_close(one[[0, 2, 3]], (z @ fusion.value.weight.mT)[[0, 2, 3], :, [1, 0, 2]])


def test_the_guide_is_as_in_the_authors_code():
    made, x = layer(mb.AdapterFusion(over="outputs", guide=0.1, toward="b")), torch.randn(4, 5, 8)
    y, z = outputs(made, x)
    logits = shares(made.aggregator, y, z).mean((0, 1))
    want = 0.1 * nn.functional.cross_entropy(logits.exp()[None], torch.tensor([1]))
    c = mb.Context()
    made.train()(x, context=c, routing=mb.Routing(weights=torch.ones(3)))
    assert [name.rpartition(".")[2] for name, _ in c.losses] == ["fusion", "guide"]
    assert_close(c.losses[1][1], want)
    quiet = mb.Context()
    made.eval()(x, context=quiet)
    assert not quiet.losses


def test_a_guide_of_several_routes():
    """Only positions where the module takes part count; a batch without it adds nothing."""
    made, x = layer(mb.AdapterFusion(guide=1.0, toward="b")), torch.randn(4, 5, 8)
    y, z = outputs(made, x)
    scores = torch.einsum("btd,btnd->btn", made.aggregator.query(y), made.aggregator.key(z - y.unsqueeze(2)))
    index = torch.tensor([[0, 1], [2, 0], [1, -1], [-1, -1]])
    mean = torch.zeros(3)
    mean[:2] = torch.cat([scores[0, :, :2].softmax(-1), torch.tensor([[0.0, 1.0]] * 5)]).mean(0)
    want = -mean.exp().log_softmax(0)[1]
    for routing in (mb.Routing(index=index), mb.Routing(index=index.flip(-1), weights=torch.rand(4, 2) + 0.1)):
        c = mb.Context()
        made.train()(x, context=c, routing=routing)
        assert_close(c.losses[1][1], want)
    dense = torch.tensor([[1.0, 2.0, 0.0], [1.0, 0.0, 1.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.0]])
    c = mb.Context()
    made(x, context=c, routing=mb.Routing(weights=dense))
    assert_close(c.losses[1][1], want)
    c = mb.Context()
    made(x, context=c, routing=mb.Routing(weights=torch.tensor([1.0, 0.0, 1.0])))
    assert c.losses[1][1] == 0


def test_the_guide_learns_the_language():
    made, x = layer(mb.AdapterFusion(over="outputs", guide=1.0, toward="c")), torch.randn(16, 5, 8)
    learner = torch.optim.Adam([*made.aggregator.query.parameters(), *made.aggregator.key.parameters()], 0.02)
    before = shares(made.aggregator, *outputs(made, x)).mean((0, 1))[2]
    for _ in range(60):
        c = mb.Context()
        made.train()(x, context=c)
        learner.zero_grad()
        c.losses[1][1].backward()
        learner.step()
    after = shares(made.aggregator, *outputs(made, x)).mean((0, 1))[2]
    assert after > 0.9 > before


def test_bad_guides_raise():
    for bad in ({"over": "all"}, {"temperature": 0.0}, {"guide": 0.1}, {"toward": "b"}, {"guide": -1.0, "toward": "b"}):
        with pytest.raises(CompositionError, match="AdapterFusion"):
            mb.AdapterFusion(**bad)
    made = layer(mb.AdapterFusion(guide=0.1, toward="e"))
    with pytest.raises(CompositionError, match="there are 'a', 'b', 'c'"):
        made.train()(torch.randn(2, 3, 8))


def test_guided_fusion_keeps_the_laws(tmp_path):
    """A mixed batch is a loop; in bfloat16, compiled, and from files it is the same."""
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    fusion = mb.AdapterFusion(over="outputs", temperature=2.0, guide=0.1, toward="b")
    bay = mb.attach(net, "0", dict.fromkeys("abc", mb.Bottleneck(3)), mb.ByLabel("task", TABLE), fusion, name="task")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x, tasks = torch.randn(4, 5, 8), ["ab", "bc", "c", None]
    mixed = net(x, task=tasks)
    for i, task in enumerate(tasks):
        assert_close(mixed[i], net(x[i : i + 1], task=[task])[0])
    bay.use({"a": 1.0, "b": 1.0})
    want = net(x)
    assert_close(torch.compile(net, backend="aot_eager")(x), want)
    bay.save(tmp_path)
    bay.detach()
    loaded = mb.load(net, tmp_path)["task"]
    loaded.use({"a": 1.0, "b": 1.0})
    assert_close(net(x), want)
    again = loaded.state.aggregator
    assert (again.over, again.temperature, again.guide, again.toward) == ("outputs", 2.0, 0.1, "b")
    half = net.to(torch.bfloat16).train()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert_close(half.float(), want, atol=0.1, rtol=0.1)
