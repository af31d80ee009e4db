"""Sparse modules: masks, what they are learned by, the criteria that choose weights, and what it costs to keep them."""

import copy
import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import modbay as mb
import test_laws
from helpers import ROUTINGS, Case, fresh, ids, site_of, trained
from modbay import losses, ops, sparsity
from modbay.methods import infer_task, signed_constant
from modbay.ops.masks import top_share_reference
from test_kinds import close, parts

PLACES = ("linear", "conv1d", "conv2d", "embedding")


def output(place: str, module: nn.Module, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The site with another weight."""
    return torch.func.functional_call(module, {"weight": weight}, (x,))


def two() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))


# The toolbox


def test_the_top_share_is_exact_with_ties_and_by_group():
    scores = torch.randint(4, (5, 13)).float()
    share = torch.tensor([0.01, 0.3, 0.5, 0.9, 1.0])
    for mine, s, p in zip(ops.top_share(scores, share), scores, share, strict=True):
        assert torch.equal(mine, top_share_reference(s, p))


def test_straight_through_has_the_hard_value_and_the_soft_gradient():
    s = torch.randn(50, requires_grad=True)
    m = ops.straight_through(s > 0.3, torch.sigmoid(s))
    assert set(m.tolist()) == {0.0, 1.0}
    weight = torch.randn(50)
    (mine,) = torch.autograd.grad((m * weight).sum(), s)
    (soft,) = torch.autograd.grad((torch.sigmoid(s) * weight).sum(), s)
    assert_close(mine, soft)


def test_a_hard_concrete_gate_is_often_shut_and_as_often_as_it_says():
    logits, low, high, beta = torch.full((200_000,), -0.4), -0.1, 1.1, 2 / 3
    u = torch.rand(200_000).clamp(1e-6, 1 - 1e-6)
    plain = (torch.sigmoid((torch.log(u) - torch.log(1 - u) + logits) / beta) * (high - low) + low).clamp(0, 1)
    assert_close(ops.hard_concrete(logits, torch.logit(u)), plain)
    drawn = ops.hard_concrete(logits, ops.logistic(logits))
    assert abs((drawn > 0).float().mean() - ops.open_probability(logits)[0]) < 5e-3
    assert (drawn == 0).float().mean() > 0.1 and (drawn == 1).float().mean() > 0.01
    assert_close(ops.hard_concrete(torch.tensor([-9.0, 0.0, 9.0])), torch.tensor([0.0, 0.5, 1.0]))


def test_the_cubic_schedule_waits_falls_and_stays():
    values = [ops.cubic(step, 100, 0.1, begin=10, end=20) for step in range(101)]
    assert values[:11] == [1.0] * 11 and values[80:] == [0.1] * 21
    assert math.isclose(values[45], 0.1 + 0.9 * 0.5**3)
    assert all(a >= b for a, b in itertools.pairwise(values))


@pytest.mark.parametrize("n", [1, 7, 8, 21])
def test_bits_come_back(n: int):
    masks = torch.rand(3, n) < 0.5
    packed = torch.stack([ops.pack_bits(mask) for mask in masks])
    assert packed.dtype == torch.uint8 and packed.shape == (3, -(-n // 8))
    assert torch.equal(ops.unpack_bits(packed, n), masks)


# Learned masks

MASKS = {
    "edge-popup": (mb.Masked("edge-popup", density=0.3), lambda s: ops.top_share(s.abs().flatten(), torch.tensor(0.3))),
    "movement": (mb.Masked("movement", density=0.3), lambda s: ops.top_share(s.flatten(), torch.tensor(0.3))),
    "threshold": (mb.Masked("threshold", threshold=0.05, start=0.1), lambda s: s > 0.05),
    "bernoulli": (mb.Masked("bernoulli", start=0, noise=False), lambda s: s > 0),
    "gumbel": (mb.Masked("gumbel", start=0, temperature=0.5, noise=False), lambda s: s > 0),
}
SOFT = {
    "edge-popup": torch.abs,
    "bernoulli": torch.sigmoid,
    "gumbel": lambda s: torch.sigmoid(s / 0.5),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("mode", MASKS)
def test_a_learned_mask_is_its_formula(place: str, mode: str):
    kind, rule = MASKS[mode]
    out, _, x, p, module = parts(kind, place)
    mask = rule(p["scores"].detach()).view(p["scores"].shape).float()
    assert 0 < mask.mean() < 1
    close(out, output(place, module, module.weight * mask, x))
    direction = torch.randn_like(out)
    (mine,) = torch.autograd.grad((out * direction).sum(), p["scores"])
    weight = (module.weight * mask).detach().requires_grad_()
    (through,) = torch.autograd.grad((output(place, module, weight, x) * direction).sum(), weight)
    soft = SOFT.get(mode, lambda s: s)(p["scores"])
    (theirs,) = torch.autograd.grad(soft, p["scores"], through * module.weight.detach())
    assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_movement_scores_are_those_of_movement_pruning():
    net = nn.Linear(8, 6)
    bay = mb.attach(net, "", {"m": mb.Masked("movement", density=0.5)}, freeze=False).use("m")
    (scores,) = bay.parameters("m")
    before, w = scores.detach().clone(), net.weight.detach().clone()
    mask = ops.top_share(before.flatten(), torch.tensor(0.5)).view(6, 8)
    effective = (w * mask).requires_grad_()
    x, target = torch.randn(5, 8), torch.randn(5, 6)
    (slope,) = torch.autograd.grad(F.mse_loss(F.linear(x, effective, net.bias.detach()), target), effective)
    F.mse_loss(net(x), target).backward()
    torch.optim.SGD([scores], 0.1).step()
    assert_close(scores.detach(), before - 0.1 * slope * w)
    assert_close(scores.detach() - before, 0.1 * sparsity.movement({"": w}, {"": slope})[""])
    assert_close(net.weight.grad, slope * mask)  # only the weights that are kept learn
    sparsity.set_density(bay, "m", 0.25)
    assert sparsity.harden(bay, "m", "kept") is bay
    assert sum(sparsity_of(bay, "kept")) == 12


def sparsity_of(bay: mb.Bay, name: str) -> list[int]:
    """How many weights a SubNetwork keeps, at each site."""
    found = [(modular.parts._modules[name], modular.site) for modular in bay.modulars.values()]
    return [int(part.kind.delta(part.tensors(), site).mask.sum()) for part, site in found]


def test_penalties_are_their_formulas():
    s, t = torch.randn(6, 8), torch.randn(1)
    assert_close(mb.Masked("threshold", regularise=2.0).penalty({"scores": s}), 2 * torch.sigmoid(s).mean())
    assert_close(mb.Masked("gumbel", regularise=2.0).penalty({"scores": s}), 2 * s.sum())
    assert mb.Masked().penalty({"scores": s}) is None
    opened, group = torch.sigmoid(s - math.log(0.5)), torch.sigmoid(t - math.log(0.5)).squeeze()
    kind = mb.DiffPruning(regularise=0.5, low=-1, high=2)
    assert_close(kind.penalty({"alpha": s}), 0.5 * opened.sum())
    kind = mb.DiffPruning(structured=True, regularise=0.5, low=-1, high=2)
    assert_close(kind.penalty({"alpha": s, "group": t}), 0.5 * (opened * group).sum())
    gates = mb.Gates(8, hard=True, regularise=0.1)
    assert_close(gates.penalty({"gates": s[0]}), 0.1 * ops.open_probability(s[0]).sum())
    net = two()
    bay = mb.attach(net, nn.Linear, {"m": mb.Masked("threshold", start=0.1, regularise=2.0)}).use("m")
    net(torch.randn(2, 8))
    assert_close(bay.losses()["modules.m.Masked"], 2 * 2 * torch.sigmoid(torch.tensor(0.1)))
    net.eval()(torch.randn(2, 8))
    assert not bay.losses()


DRAWN = [
    mb.Masked("bernoulli", start=0),
    mb.Masked("gumbel", start=0),
    mb.DiffPruning(start=0.5),
    mb.Gates(2, hard=True, start=0.5),
]


@pytest.mark.parametrize("kind", DRAWN, ids=lambda kind: f"{type(kind).__name__}-{getattr(kind, 'mode', '')}")
def test_noise_is_drawn_in_training_and_nowhere_else(kind: mb.Kind):
    net, x = nn.Linear(8, 6), torch.randn(3, 8)
    bay = mb.attach(net, "", {"m": kind}).use("m")
    for p in bay.parameters():
        nn.init.normal_(p)
    assert not torch.equal(net(x), net(x))
    with torch.no_grad():
        assert torch.equal(net(x), net(x))
    want = net.eval()(x)
    assert torch.equal(net(x), want)
    bay.freeze()
    assert torch.equal(net.train()(x), want)
    bay.unfreeze().fold("m")
    assert_close(net(x), want)


@pytest.mark.parametrize("kind", DRAWN, ids=lambda kind: f"{type(kind).__name__}-{getattr(kind, 'mode', '')}")
def test_noise_is_the_same_in_a_checkpoint(kind: mb.Kind):
    net, x = two(), torch.randn(3, 8)
    bay = mb.attach(net, nn.Linear, {"a": kind, "b": kind}, name="which")
    for p in bay.parameters():
        nn.init.normal_(p)
    outer = nn.Sequential(nn.Linear(8, 8), net)

    def step(run) -> list[torch.Tensor]:
        torch.manual_seed(7)
        out = run(torch.ones(3, 8)).square().sum() - run(x).sin().sum()  # two forwards, then one backward
        return torch.autograd.grad(out, bay.parameters("a"))

    bay.use("a")
    want = step(outer)
    for mine, theirs in zip(step(lambda v: checkpoint(outer, v, use_reentrant=False)), want, strict=True):
        assert_close(mine, theirs)


def test_drawn_masks_are_bernoulli():
    net = nn.Linear(200, 200, bias=False)
    bay = mb.attach(net, "", {"m": mb.Masked("bernoulli", start=1.0)}).use("m")
    part = bay.modulars[""].parts._modules["m"]
    mask = part.kind.delta(part.tensors(), bay.modulars[""].site).mask
    assert abs(mask.mean().item() - 1 / (1 + math.exp(-1))) < 0.01


# DiffPruning


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("structured", [False, True])
def test_diff_pruning_is_its_formula(place: str, structured: bool):
    out, _, x, p, module = parts(mb.DiffPruning(structured, start=0.4, noise=False), place)
    z = (torch.sigmoid(p["alpha"]) * 3 - 1.5).clamp(0, 1)
    if structured:
        z = z * (torch.sigmoid(p["group"]) * 3 - 1.5).clamp(0, 1)
    close(out, output(place, module, module.weight + z * p["w"], x))
    _, site = site_of(place)
    new = fresh(mb.DiffPruning(structured), site)
    assert (new["alpha"] == 5).all() and not new["w"].any() and ("group" in new) == structured


def test_what_diff_pruning_leaves_is_a_sparse_delta():
    net, x = two(), torch.randn(3, 8)
    bay = mb.attach(net, nn.Linear, {"all": mb.DiffPruning(structured=True)}).use("all")
    for p in bay.parameters():
        nn.init.normal_(p, 1.0)
    net.eval()
    sparsity.project(bay, "all", "whole", 1.0)
    assert_close(net(x), bay.use("whole").model(x))
    sparsity.project(bay, "all", "some", 0.25)
    values = torch.cat(bay.parameters("some"))
    everything = torch.cat(bay.parameters("whole"))
    assert len(values) == 18  # of 48 + 24
    assert_close(values.abs().sort().values, everything.abs().sort().values[-18:])


# Gates


@pytest.mark.parametrize("place", ["linear", "conv1d", "conv2d", "embedding", "norm", "block"])
def test_gates_are_their_formula(place: str):
    out, y, _, p, _ = parts(mb.Gates(2), place)
    axis = 1 if place == "conv2d" else -1
    first, second = y.chunk(2, axis)
    close(out, torch.cat([p["gates"][0] * first, p["gates"][1] * second], axis))


@pytest.mark.parametrize("hard", [False, True])
def test_gates_on_the_input_are_gates_on_heads(hard: bool):
    out, _, x, p, module = parts(mb.Gates(4, "input", hard=hard, start=0.3, noise=False), "linear")
    xi = (torch.sigmoid(p["gates"]) * 1.2 - 0.1).clamp(0, 1) if hard else p["gates"]
    close(out, module((x.unflatten(-1, (4, 2)) * xi.unsqueeze(-1)).flatten(-2)))


def test_the_importance_of_heads_finds_those_that_matter():
    net = nn.Linear(8, 3, bias=False)
    with torch.no_grad():
        net.weight[:, 2:6] = 0  # heads 1 and 2 of 4 are not read
    bay = mb.attach(net, "", {"heads": mb.Gates(4, "input")}).use("heads")
    gates = {"": bay.parameters()[0]}
    xs, ys = torch.randn(20, 8), torch.randint(3, (20,))
    found = sparsity.fisher((F.cross_entropy(net(x), y) for x, y in zip(xs, ys, strict=True)), gates, power=1)[""]
    want = torch.zeros(4)
    for x, y in zip(xs, ys, strict=True):  # |Σ_h x_h ∂L/∂x_h|, example by example
        v = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(v @ net.weight.T, y), v)
        want += (slope * v).unflatten(-1, (4, 2)).sum(-1).abs() / 20
    assert_close(found, want.detach())
    assert sparsity.top({"": found}, 0.5)[""].tolist() == [True, False, False, True]
    x, before = torch.randn(5, 8), net(torch.ones(8))
    with torch.no_grad():
        gates[""].mul_(sparsity.top({"": found}, 0.5)[""])
    assert_close(net(torch.ones(8)), before)
    want = net(x)
    bay.fold("heads")
    assert_close(net(x), want)


# A mask that is given: its laws, and what it costs

GIVEN = Case("subnetwork", lambda: mb.SubNetwork(0.6), PLACES, folds=True)


@pytest.mark.parametrize("place", PLACES)
def test_a_subnetwork_is_the_base_without_some_weights(place: str):
    module, site = site_of(place)
    mask = torch.rand_like(module.weight) < 0.4
    kind = mb.SubNetwork(mask={site.name: mask})
    out, _, x, p, module = parts(mb.SubNetwork(0.4), place)
    kept = kind.delta(fresh(kind, site), site).mask
    assert torch.equal(kept, mask)
    random = ops.unpack_bits(p["bits"], mask.numel()).view(mask.shape)
    assert random.sum() == round(0.4 * mask.numel())
    close(out, output(place, module, module.weight * random, x))
    assert all(torch.equal(a, b) for a, b in zip(trained(kind, site).values(), fresh(kind, site).values(), strict=True))


@pytest.mark.parametrize("form", ROUTINGS, ids=ids)
@pytest.mark.parametrize("place", ["linear", "conv2d"])
def test_a_subnetwork_keeps_the_laws_of_routes(place: str, form):
    if form.tokens and place == "conv2d":
        return
    layer, x, routing = masked_layer(place), test_laws.example(place), form.make()
    want = test_laws.looped(layer, x, routing, {})
    assert_close(layer.train()(x, routing=routing), want, **test_laws.EXACT)
    assert_close(layer.eval()(x, routing=routing), want, **test_laws.EXACT)


def masked_layer(place: str) -> mb.Modular:
    """Four modules, each with a mask of its own."""
    module, _ = site_of(place)
    masks = [{"": torch.rand_like(module.weight) < 0.5} for _ in test_laws.NAMES]
    kinds = {name: mb.SubNetwork(mask=mask) for name, mask in zip(test_laws.NAMES, masks, strict=True)}
    return mb.Modular(module, kinds, mb.Uniform(), mb.WeightedSum()).double()


def test_a_subnetwork_keeps_the_laws_of_attaching():
    test_laws.test_9_removing_an_inactive_module_changes_nothing(GIVEN, "linear")
    test_laws.test_4_a_new_module_changes_nothing_and_detaching_restores_every_bit(GIVEN, "linear")
    net, bay = test_laws.attached(GIVEN, "linear")
    x = test_laws.example("linear")
    twin = copy.deepcopy(net)
    assert torch.equal(twin(x, which="a"), net(x, which="a"))
    want = net(x, which="b")
    bay.pack()
    assert_close(net(x, which="b"), want)
    bay.unpack().fold("b")
    assert_close(net(x), want)
    bay.unfold()
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    which = torch.tensor([1, 0, 3, 1, -1])
    want = net(x, which=which)
    assert_close(compiled(x, which=which), want)


def test_what_masks_and_sparse_updates_cost_on_disk(tmp_path):
    net = nn.Sequential(nn.Linear(256, 128))
    n, few = 256 * 128, {"0": torch.rand(128, 256) < 0.01}
    bay = mb.attach(net, nn.Linear, {"scores": mb.Masked("threshold"), "sparse": mb.SparseDelta(mask=few)})
    for p in bay.parameters():
        nn.init.normal_(p)
    sparsity.harden(bay, "scores", "bits")
    path = bay.save(tmp_path)
    size = {name: (path / name / "module.safetensors").stat().st_size for name in bay.names()}
    k = int(few["0"].sum())
    assert 4 * n <= size["scores"] < 4 * n + 300
    assert n // 8 <= size["bits"] < n // 8 + 300  # a bit a weight
    assert 12 * k <= size["sparse"] < 12 * k + 300  # an index of eight bytes and a value of four for each entry
    x = torch.randn(3, 256)
    again = copy.deepcopy(net)
    for b in mb.bays(again).values():
        b.detach()
    loaded = mb.load(again, tmp_path)["modules"]
    for name in bay.names():
        bay.use(name), loaded.use(name)
        assert torch.equal(net.eval()(x), again.eval()(x))


# Criteria


def test_criteria_are_their_formulas():
    net, x, y = two(), torch.randn(5, 8), torch.randint(4, (5,))
    w = sparsity.weights(net, nn.Linear)
    assert list(w) == ["0", "2"] and w["0"] is net[0].weight
    F.cross_entropy(net(x), y).backward()
    g = sparsity.gradients(F.cross_entropy(net(x), y), w)
    before = {name: torch.randn_like(t) for name, t in w.items()}
    for name, i in (("0", 0), ("2", 2)):
        weight, slope = net[i].weight.detach(), net[i].weight.grad
        assert_close(g[name], slope)
        assert_close(sparsity.magnitude(w)[name], weight.abs())
        assert_close(sparsity.saliency(w, g)[name], (weight * slope).abs())
        assert_close(sparsity.movement(w, g)[name], -weight * slope)
        assert_close(sparsity.change(w, before)[name], (weight - before[name]).abs())
    each = (F.cross_entropy(net(x[i]), y[i]) for i in range(5))
    f = sparsity.fisher(each, w)
    one = [sparsity.gradients(F.cross_entropy(net(x[i]), y[i]), w)["0"].square() for i in range(5)]
    assert_close(f["0"], torch.stack(one).mean(0))


def test_the_fisher_information_of_a_softmax_is_known():
    net = nn.Linear(3, 4, bias=False)
    xs = torch.randn(3000, 3)
    f = sparsity.fisher(
        (F.cross_entropy(z := net(x), sparsity.sampled(z)) for x in xs), sparsity.weights(net, nn.Linear)
    )
    p = net(xs).softmax(-1).detach()
    want = (p * (1 - p)).T @ xs.square() / len(xs)  # E x_j² p_i (1 − p_i)
    assert_close(f[""], want, atol=0.02, rtol=0.15)


def test_the_top_of_all_and_of_each_tensor():
    scores = {"a": torch.tensor([[9.0, 8.0], [7.0, 1.0]]), "b": torch.tensor([6.0, 5.0, 4.0, 0.0])}
    said = {name: m.tolist() for name, m in sparsity.top(scores, 0.5).items()}
    assert said == {"a": [[True, True], [True, False]], "b": [True, False, False, False]}
    said = sparsity.top(scores, 0.5, by="tensor")
    assert [int(m.sum()) for m in said.values()] == [2, 2]
    said = sparsity.top(scores, {"a": 0.25, "b": 0.75}, by="tensor")
    assert said["b"].tolist() == [True, True, True, False] and said["a"].tolist() == [[True, False], [False, False]]
    among = {"a": scores["a"] < 9, "b": torch.ones(4, dtype=torch.bool)}
    said = sparsity.top(scores, 2 / 7, among=among)
    assert said["a"].tolist() == [[False, True], [True, False]] and not said["b"].any()


def test_child_tuning_masks_gradients():
    net = two()
    net(torch.randn(5, 8)).square().sum().backward()
    w = sparsity.weights(net, nn.Linear)
    before = {name: t.grad.clone() for name, t in w.items()}
    sparsity.child_tuning(net.parameters(), 0.25, torch.Generator().manual_seed(3))
    ratio = torch.cat([(w[name].grad / before[name]).flatten() for name in w])
    assert set(ratio.round(decimals=4).tolist()) == {0.0, 4.0} and 0.1 < (ratio > 0).float().mean() < 0.4
    masks = sparsity.top(before, 0.3)
    sparsity.mask_gradients(w, masks)
    assert all(not w[name].grad[~masks[name]].any() for name in w)


def test_sparse_fine_tunings_are_composed_by_adding():
    net, x = two(), torch.randn(3, 8)
    before = {name: w.detach().clone() for name, w in sparsity.weights(net, nn.Linear).items()}
    masks = {}
    for name in ("language", "task"):  # the first phase of each: all weights move
        after = {site: w + torch.randn_like(w) for site, w in before.items()}
        masks[name] = sparsity.top(sparsity.change(after, before), 0.2)
    bay = mb.attach(net, nn.Linear, {name: mb.SparseDelta(mask=mask) for name, mask in masks.items()})
    for p in bay.parameters():
        nn.init.normal_(p)
    bay.use("language", "task")
    weights = {
        f"{site}.weight": before[site] + sum(m[site].float().masked_scatter(m[site], bay_values(bay, name, site))
                                             for name, m in masks.items()) for site in before
    }  # fmt: skip
    plain = two()
    plain.load_state_dict({**{k: v for k, v in net.state_dict().items() if "bias" in k}, **weights})
    close(net(x), plain(x))


def bay_values(bay: mb.Bay, name: str, site: str) -> torch.Tensor:
    return bay.modulars[site].parts._modules[name].tensors()["values"].detach()


# SupSup


def superposed() -> tuple[nn.Module, mb.Bay, list[torch.Tensor]]:
    net = nn.Linear(8, 12, bias=False)
    signed_constant(net.weight)
    bay = mb.attach(net, "", {f"task{i}": mb.Masked("threshold") for i in range(5)})
    return net, bay, [(scores > 0).float() for scores in bay.parameters()]


@pytest.mark.parametrize("objective", [losses.entropy, lambda z: losses.superfluous(z, 3)])
def test_the_task_is_inferred_from_a_superposition(objective):
    net, bay, masks = superposed()
    w = net.weight.detach().clone()

    def slopes(x: torch.Tensor, left: list[int]) -> list[float]:
        alpha = torch.full((len(left),), 1 / len(left), requires_grad=True)
        mixed = sum(a * masks[i] for a, i in zip(alpha, left, strict=True))
        return torch.autograd.grad(objective(F.linear(x, w * mixed)), alpha)[0].tolist()

    for x in torch.randn(5, 4, 8):
        bay.use("task3")
        run = functools.partial(lambda x: objective(net(x)), x)
        first = slopes(x, [0, 1, 2, 3, 4])
        assert infer_task(bay, run) == f"task{first.index(min(first))}"
        left = [0, 1, 2, 3, 4]
        while len(left) > 1:
            found = slopes(x, left)
            left = [i for _, i in sorted(zip(found, left, strict=True))[: (len(left) + 1) // 2]]
        with torch.no_grad():
            assert infer_task(bay, run, search="binary") == f"task{left[0]}"
        assert torch.equal(bay.state.chosen.index, torch.tensor([3]))


def test_objectives_and_the_signed_constant_are_their_formulas():
    z = torch.randn(4, 7, requires_grad=True)
    p = z.softmax(-1)
    assert_close(losses.entropy(z), -(p * p.log()).sum(-1).mean())
    g = losses.superfluous(z, 3)
    assert_close(g, z.logsumexp(-1).mean())
    (slope,) = torch.autograd.grad(g, z)
    assert not slope[:, :3].any()
    assert_close(slope[:, 3:] * 4, p[:, 3:].detach())
    w = torch.randn(6, 8)
    assert_close(signed_constant(w.clone()), w.sign() * math.sqrt(2 / 8))


# What is refused


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: mb.Masked("topk"), "mode='topk'.*'edge-popup'"),
        (lambda: mb.Masked(density=0), "density=0"),
        (lambda: mb.Masked("gumbel", temperature=0), "temperature=0"),
        (lambda: mb.DiffPruning(low=0.1), "low=0.1"),
        (lambda: mb.Gates(0), "groups=0"),
        (lambda: mb.Gates(of="middle"), "of='middle'"),
        (lambda: mb.Gates(regularise=0.1), "hard=True"),
        (lambda: mb.SubNetwork(0.0), "density=0.0"),
        (lambda: sparsity.top({"a": torch.ones(3)}, 0.0), "share=0.0"),
        (lambda: sparsity.top({"a": torch.ones(3)}, {"a": 0.5}), "tensor"),
        (lambda: sparsity.top({"a": torch.ones(3)}, 0.5, by="row"), "by='row'"),
        (lambda: sparsity.fisher([], {"a": torch.ones(3)}), "there is none"),
        (lambda: infer_task(superposed()[1], lambda: None, "exhaustive"), "search='exhaustive'"),
        (lambda: sparsity.set_density(superposed()[1], "task1", 2.0), "share=2.0"),
    ],
)
def test_a_bad_argument_is_named(make, message: str):
    with pytest.raises(mb.errors.CompositionError, match=message):
        make()


@pytest.mark.parametrize(
    "kind, module, message",
    [
        (mb.Masked(), nn.LayerNorm(8), "no weight"),
        (mb.DiffPruning(), nn.LayerNorm(8), "no weight"),
        (mb.SubNetwork(), nn.Tanh(), "no weight"),
        (mb.SubNetwork(None), nn.Linear(8, 8), "no mask"),
        (mb.SubNetwork(mask={"": torch.ones(8, 8)}), nn.Linear(8, 8), "no boolean"),
        (mb.Gates(3), nn.Linear(8, 8), "no multiple"),
        (mb.Gates(2, "input"), nn.LayerNorm(8), "linear map"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_site_that_does_not_fit_is_named(kind: mb.Kind, module: nn.Module, message: str):
    with pytest.raises(mb.errors.CompositionError, match=f"{type(kind).__name__}.*{message}"):
        kind.init([mb.Modular(module).site])


def test_modules_that_can_t_become_sparse_are_named():
    net = two()
    bay = mb.attach(net, nn.Linear, {"b": mb.Bottleneck(2), "l": mb.LoRA(2), "f": mb.BitFit()})
    for run, message in (
        (lambda: sparsity.project(bay, "f", "s", 0.1), "biases"),
        (lambda: sparsity.set_density(bay, "l", 0.1), "no density"),
        (lambda: sparsity.project(bay, "b", "s", 0.1), "Bottleneck"),
        (lambda: sparsity.harden(bay, "l", "s"), "no mask"),
        (lambda: sparsity.project(bay, "x", "s", 0.1), "'b', 'l', 'f'"),
    ):
        with pytest.raises(mb.errors.BayError, match=message):
            run()
    assert bay.names() == ["b", "l", "f"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", [*(kind for kind, _ in MASKS.values()), *DRAWN, mb.SubNetwork(0.4)], ids=repr)
def test_a_base_in_bfloat16(kind: mb.Kind, dtype: torch.dtype):
    net, x = nn.Linear(8, 6).bfloat16(), torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True)
    bay = mb.attach(net, "", {"m": kind}).use("m")
    for p in bay.parameters():
        p.data = p.data.to(dtype)
    out = net(x)
    out.float().square().sum().backward()
    assert out.dtype == x.grad.dtype == torch.bfloat16 and all(p.grad.dtype == dtype for p in bay.parameters())
    want = net.eval()(x)
    bay.fold("m")
    assert_close(net(x), want, atol=0.02, rtol=0.02)
