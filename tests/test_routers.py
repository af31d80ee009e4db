"""Each router's equation, its losses, what it keeps when modules come and go, and what it refuses."""

import logging

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import modbay as mb
from helpers import ROUTERS, ids
from modbay.core import describe
from modbay.errors import CompositionError, LabelError, SiteError
from modbay.losses import indian_buffet, load_balance, z_loss

SITE = describe("site", nn.Linear(8, 6))


def built(router: mb.Router, *names: str) -> mb.Router:
    router.build(names or ("a", "b", "c"), SITE)
    return router


def context(**labels) -> mb.Context:
    return mb.Context(labels=labels)


# Losses


def test_load_balance_is_one_if_balanced_and_n_if_collapsed():
    even = torch.full((8, 4), 0.25)
    assert_close(load_balance(even, torch.arange(8).view(8, 1) % 4), torch.tensor(1.0))
    assert_close(load_balance(even, torch.arange(8).view(4, 2).repeat(2, 1) % 4), torch.tensor(1.0))
    one = torch.eye(4)[:1].repeat(8, 1)
    assert_close(load_balance(one, torch.zeros(8, 1, dtype=torch.long)), torch.tensor(4.0))


def test_load_balance_is_switch_s_and_leaves_padding_out():
    p, index = torch.rand(2, 5, 3).softmax(-1), torch.randint(3, (2, 5, 1))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    kept, chosen = p[mask.bool()], index[mask.bool()][:, 0]
    want = 3 * sum((chosen == i).float().mean() * kept[:, i].mean() for i in range(3))
    assert_close(load_balance(p, index, mask), want)
    assert_close(z_loss(p, mask), kept.logsumexp(-1).square().mean())


def test_indian_buffet_prior_of_whole_gates():
    gates = torch.tensor([[1.0, 1, 1], [1, 0, 1], [0, 0, 1]])  # m = 2, 1, 3 of T = 3
    terms = sum(torch.lgamma(torch.tensor(4.0 - m)) + torch.lgamma(torch.tensor(float(m))) for m in (2, 1, 3))
    want = 3 * torch.log(torch.tensor(2.0)) - 2 * (1 + 1 / 2 + 1 / 3) + terms - 3 * torch.lgamma(torch.tensor(4.0))
    assert_close(indian_buffet(gates, 2.0), -want)


# Fixed, Uniform


def test_fixed_weights_by_name_or_in_order():
    assert_close(built(mb.Fixed({"c": 0.3, "a": 0.7}))(None, context()).dense(3), torch.tensor([0.7, 0.0, 0.3]))
    routing = built(mb.Fixed([0.0, 2.0, 0.5]))(None, context())
    assert_close(routing.dense(3), torch.tensor([0.0, 2.0, 0.5]))
    assert routing.host == ((1, 2),)  # so that the first does not run
    learned = built(mb.Fixed([0.0, 1.0, 2.0], learned=True, softmax=True))
    assert_close(learned(None, context()).dense(3), torch.tensor([0.0, 1.0, 2.0]).softmax(0))
    assert [name for name, _ in learned.named_parameters()] == ["w"]


def test_uniform_weights():
    assert_close(built(mb.Uniform())(None, context()).dense(3), torch.full((3,), 1 / 3))


# TopK


def test_top_1_weighs_by_its_probability_and_top_2_renormalises():
    x = torch.randn(4, 5, 8)
    for k in (1, 2):
        router = built(mb.TopK(k)).eval()
        p = (x @ router.gate.mT).softmax(-1)
        best, index = p.topk(k)
        routing = router(x, context())
        assert torch.equal(routing.index, index) and not routing.losses
        assert_close(routing.weights, best if k == 1 else best / best.sum(-1, keepdim=True))
        dense = mb.TopK(k, dense=True)
        built(dense).load_state_dict(router.state_dict())
        assert_close(dense.eval()(x, context()).weights, routing.dense(3))


def test_top_k_by_example_reads_the_mean_without_padding():
    x, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    router, c = built(mb.TopK(1, by="example")), mb.Context(arguments={"attention_mask": mask})
    mean = torch.stack([x[0, :2].mean(0), x[1].mean(0)])
    assert_close(router(x, c).weights, (mean @ router.gate.mT).softmax(-1).max(-1, keepdim=True).values)
    assert router(x, c).index.shape == (2, 1)
    newest = mb.Context(arguments={"attention_mask": torch.ones(2, 9)})  # a step of a cached generation
    assert_close(router(x, newest).weights, router(x, context()).weights)
    with pytest.raises(SiteError, match="5 positions, the attention mask 3"):
        router(x, mb.Context(arguments={"attention_mask": torch.ones(2, 3)}))


def test_top_k_s_losses_in_training():
    x, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    router = built(mb.TopK(2, balance=0.5, z=0.1)).train()
    routing = router(x, mb.Context(arguments={"attention_mask": mask}))
    logits = x @ router.gate.mT
    assert_close(routing.losses["balance"], 0.5 * load_balance(logits.softmax(-1), routing.index, mask))
    assert_close(routing.losses["z"], 0.1 * z_loss(logits, mask))
    routing.losses["balance"].backward()
    assert router.gate.grad.abs().sum() > 0
    assert mb.Routing(weights=torch.ones(1)).losses == {} == built(mb.TopK(balance=0.0))(x, context()).losses


def test_top_k_computes_in_float32():
    router, x = built(mb.TopK(1)), torch.randn(3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = router(x, context()).weights
    assert inside.dtype == torch.float32
    assert_close(inside, router(x, context()).weights, rtol=0, atol=0)


def test_noise_is_drawn_in_training_only_and_its_scale_learns():
    router, x = built(mb.TopK(1, noise=True, jitter=0.1, balance=0.0)), torch.randn(50, 8)
    assert not torch.equal(router.train()(x, context()).weights, router(x, context()).weights)
    router(x, context()).weights.sum().backward()
    assert router.spread.grad.abs().sum() > 0
    router.eval()
    assert torch.equal(router(x, context()).weights, router(x, context()).weights)


def test_sampled_routes_come_with_the_log_probability_of_the_draw():
    router = built(mb.TopK(2, sample=True)).train()
    with torch.no_grad():
        router.gate.normal_()
    x = torch.randn(1, 8).repeat(20000, 1)
    routing = router(x, context())
    p = (x[0] @ router.gate.mT).softmax(-1)
    counts = torch.zeros(3, 3)
    for first, second in routing.index.tolist():
        counts[first, second] += 1 / 20000
    for i in range(3):
        for j in range(3):
            want = p[i] * p[j] / (1 - p[i]) if i != j else torch.tensor(0.0)
            assert_close(counts[i, j], want.detach(), rtol=0, atol=0.02)
            drawn = (routing.index == torch.tensor([i, j])).all(-1)
            if drawn.any():
                assert_close(routing.log_prob[drawn][0], want.log())
    assert router.eval()(x, context()).log_prob is None


# Skills


def test_skills_are_normalised_gates_by_task():
    router = built(mb.Skills("task", ["x", "y"])).eval()
    with torch.no_grad():
        router.logits.normal_()
    gates = router.logits.sigmoid()
    rows = gates / gates.sum(-1, keepdim=True)
    assert_close(router(None, context(task="y")).weights, rows[1])
    want = torch.stack([rows[1], torch.zeros(3), rows[0]])
    assert_close(router(None, context(task=["y", None, "x"])).weights, want)
    assert_close(router(None, context(task=torch.tensor([1, -1, 0]))).weights, want)


def test_skills_are_drawn_in_training_as_a_relaxed_bernoulli():
    router = built(mb.Skills("task", ["x"])).train()
    with torch.no_grad():
        router.logits.copy_(torch.tensor([[-1.0, 0.0, 2.0]]))
    gates = router._gates(router.logits.expand(20000, 3))
    assert_close((gates > 0.5).float().mean(0), router.logits[0].sigmoid().detach(), rtol=0, atol=0.02)
    weights = router(None, context(task=["x"] * 4)).weights
    assert not torch.equal(weights[0], weights[1])
    assert_close(weights.sum(-1), torch.ones(4))
    assert router.logits.abs().max() <= 2.0


def test_straight_through_gates_are_whole_and_have_the_gradient_of_sigmoid():
    router = built(mb.Skills("task", ["x"], mode="straight-through")).train()
    with torch.no_grad():
        router.logits.copy_(torch.tensor([[-1.0, 0.5, 2.0]]))
    assert_close(router(None, context(task="x")).weights, torch.tensor([0.0, 0.5, 0.5]))
    gates = router._gates(router.logits)
    gates.sum().backward()
    soft = router.logits.detach().sigmoid()
    assert_close(router.logits.grad, soft * (1 - soft))


def test_skills_start_near_nought_learn_a_prior_and_take_new_tasks(caplog):
    router = built(mb.Skills("task", ["x", "y"], prior=0.1)).train()
    assert router.logits.abs().max() <= 1e-3
    loss = router(None, context(task="x")).losses["prior"]
    assert_close(loss, 0.1 * indian_buffet(router.logits.sigmoid(), 3.0))
    before = router.logits.detach().clone()
    with caplog.at_level(logging.WARNING, "modbay"):
        router.extend("z")
    assert "z" in caplog.text and torch.equal(router.logits[:2], before) and router.logits.shape == (3, 3)
    assert router(None, context(task="z")).weights.shape == (3,)


# Modules come and go

LEARNED = {
    "fixed": (lambda: mb.Fixed([0.1, 0.2, 0.3], learned=True), "w", 0),
    "top-k": (lambda: mb.TopK(1, noise=True), "gate", 0),
    "noise": (lambda: mb.TopK(1, noise=True), "spread", 0),
    "balanced": (mb.Balanced, "centroids", 0),
    "expert-choice": (mb.ExpertChoice, "gate", 0),
    "scouts": (mb.Scouts, "scouts", 0),
    "scouts-gate": (mb.Scouts, "gate", 0),
    "scouts-bias": (mb.Scouts, "bias", 0),
    "skills": (lambda: mb.Skills("task", ["x", "y"]), "logits", 1),
    "policy-table": (mb.Policy, "table", 3),
    "policy-gate": (mb.Policy, "gate", 2),
    "switches-table": (mb.Switches, "table", 2),
    "switches-gate": (lambda: mb.Switches("example"), "gate", 1),
}


@pytest.mark.parametrize("make, key, axis", LEARNED.values(), ids=LEARNED)
def test_what_is_learned_is_kept_by_name(make, key, axis, caplog):
    router = built(make())
    first = getattr(router, key)
    nn.init.normal_(first)
    learned = {name: first.select(axis, i).detach().clone() for i, name in enumerate("abc")}
    with caplog.at_level(logging.WARNING, "modbay"):
        built(router)
        assert getattr(router, key) is first and not caplog.text  # building again changes nothing
        router.build(("c", "new", "a", "b"), SITE)
        assert "new" in caplog.text and "optimiser" in caplog.text
    now = getattr(router, key)
    mean = torch.stack(list(learned.values())).mean(0)
    for i, name in enumerate(("c", "new", "a", "b")):
        assert_close(now.select(axis, i), learned.get(name, mean))
    router.rename("a", "z")
    router.build(("c", "new", "z", "b"), SITE)
    assert getattr(router, key) is now
    router.build(("z", "b"), SITE)
    assert_close(getattr(router, key).select(axis, 0), learned["a"])
    assert isinstance(getattr(router, key), nn.Parameter)


@pytest.mark.parametrize("part", ROUTERS, ids=ids)
def test_a_bay_adds_renames_and_removes_under_every_router(part):
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU())
    bay = mb.attach(net, at="0", modules={n: mb.LoRA(2) for n in "abcd"}, router=part.make(), name="bay")
    x, given = torch.randn(4, 3, 8), {keyword: make(4) for keyword, make in part.labels.items()}
    before = net.eval()(x, **given)
    bay.rename("d", "e").add("f", mb.LoRA(2)).remove("c")
    assert_close(net(x, **given), before)  # all modules are new, and so add nothing


def test_fixed_follows_its_modules():
    router = built(mb.Fixed({"a": 0.5, "c": 0.25}))
    router.rename("c", "z")
    router.build(("z", "new", "a"), SITE)
    assert_close(router(None, context()).dense(3), torch.tensor([0.25, 0.0, 0.5]))
    router.build(("new", "a"), SITE)
    assert_close(router(None, context()).dense(2), torch.tensor([0.0, 0.5]))
    again = built(mb.Fixed(**router.arguments()), "new", "a")
    assert_close(again(None, context()).dense(2), torch.tensor([0.0, 0.5]))


# What is refused


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: built(mb.Fixed({"nobody": 1.0})), "'nobody'"),
        (lambda: built(mb.Fixed([1.0, 2.0])), "2 weights for 3 modules"),
        (lambda: mb.TopK(0), "k=0"),
        (lambda: mb.TopK(1, by="batch"), "by='batch'"),
        (lambda: built(mb.TopK(4))(torch.randn(2, 8), context()), "k=4"),
        (lambda: built(mb.TopK(1))(torch.randn(2, 3, 4, 8), context()), "by='example'"),
        (lambda: built(mb.TopK(1)).build(("a",), describe("wide", nn.Linear(9, 6))), "9"),
        (lambda: built(mb.TopK(1)).build(("a",), describe("ids", nn.Embedding(9, 6))), "token ids"),
        (lambda: mb.Skills("task", ["x"], mode="hard"), "mode='hard'"),
    ],
)
def test_wrong_arguments_raise(make, says):
    with pytest.raises(CompositionError, match=says):
        make()


@pytest.mark.parametrize(
    "given, says",
    [
        (["x", "nothing"], "'nothing'"),
        ("nothing", "'nothing'"),
        (torch.tensor([0, 2]), "from 0 to 2"),
        (torch.tensor([-2]), "from -2"),
        (torch.tensor([0.5]), "integers"),
    ],
    ids=str,
)
def test_labels_that_are_no_task_raise(given, says):
    with pytest.raises(LabelError, match=says):
        built(mb.Skills("task", ["x", "y"]))(None, context(task=given))


def test_tasks_are_different_names():
    for labels in ("xyz", ["x", "x"]):
        with pytest.raises(LabelError, match="different names"):
            mb.Skills("task", labels)


# The level of routing


def test_a_router_is_global_or_of_a_layer():
    """One object is one route for all sites, by the call's input; a callable is a gate at each, by the site's own."""
    torch.manual_seed(0)
    x = torch.randn(6, 8)
    modules = {name: mb.LoRA(2) for name in "abc"}
    for router, gates in ((mb.TopK(1), 1), (lambda: mb.TopK(1), 3)):
        net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
        bay = mb.attach(net, at=["0", "1", "2"], modules=modules, router=router, name="level")
        with bay.record() as recording:
            net(x)
        assert sum(isinstance(m, mb.TopK) for m in net.modules()) == gates
        assert len({tuple(row["weights"][0]) for row in recording.rows()}) <= gates
        bay.detach()


def test_a_path_has_a_policy_for_each_site_on_the_same_input():
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    router = mb.Policy(path=True)
    bay = mb.attach(net, at=["0", "1", "2"], modules={name: mb.LoRA(2) for name in "abc"}, router=router, name="level")
    assert router.gate.shape[0] == 3
    net.eval()(torch.randn(6, 8))
    assert [route.index.shape for route in (bay.routing().at(site) for site in ("0", "1", "2"))] == [(6, 1)] * 3


def test_fixed_at_weight_one_has_nothing_to_weigh():
    routing = built(mb.Fixed({"c": 1.0, "a": 1.0}))(None, context())
    assert routing.weights is None
    assert_close(routing.dense(3), torch.tensor([1.0, 0.0, 1.0]))
    assert built(mb.Fixed({"a": 1.0}, learned=True))(None, context()).weights is not None


# Types


def test_types_match_signatures_by_their_angle():
    torch.manual_seed(0)
    router, x = built(mb.Types(5, threshold=1.1, bandwidth=0.5)), torch.randn(4, 3, 8)
    weights = router(x, context()).weights
    hidden = nn.functional.gelu(x @ router.infer[0].weight.mT + router.infer[0].bias)
    types = hidden @ router.infer[2].weight.mT + router.infer[2].bias
    for row in [(0, 0), (1, 2), (3, 1)]:
        t = types[row]
        apart = [1 - (s @ t) / (s.norm() * t.norm()) for s in router.signatures]
        near = torch.stack([(-d / 0.5).exp() if d < 1.1 else torch.zeros(()) for d in apart])
        assert_close(weights[row], near / (near.sum() + 1e-6))
    assert not router.signatures.requires_grad
    weights.sum().backward()
    assert router.infer[0].weight.grad is not None
    assert router.log_sigma.grad is not None


def test_a_type_that_nobody_takes_passes():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8))
    x = torch.randn(4, 3, 8)
    want = net(x)
    bay = mb.attach(net, at="0", modules={name: mb.LoRA(2) for name in "ab"}, router=mb.Types(5, threshold=1e-4))
    for parameter in bay.parameters():
        nn.init.normal_(parameter)
    assert_close(net(x), want)


def test_a_new_signature_leaves_the_others_where_they_were():
    router = built(mb.Types(5))
    before = router.signatures.detach().clone()
    router.build(("a", "b", "c", "d"), SITE)
    assert torch.equal(router.signatures[:3], before)
    assert not router.signatures.requires_grad
    assert (router.signatures[3] - before.mean(0)).abs().max() > 0.1


def test_types_refuse_what_is_not_above_nought():
    with pytest.raises(CompositionError, match="threshold"):
        mb.Types(threshold=0.0)
