"""Mixtures of experts: each paper's equations written out, who is dropped and who is not, what padding leaves alone."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import modbay as mb
from modbay import losses, ops
from modbay.core import describe
from modbay.errors import CallError, CompositionError
from modbay.ops.queues import places_reference

SITE = describe("site", nn.Linear(8, 6))
NAMES = ("a", "b", "c", "d")


def built(router: mb.Router, names=NAMES, std: float | None = None) -> mb.Router:
    """A router for some modules; with std, its weights drawn anew."""
    router.build(names, SITE)
    if std is not None:
        with torch.no_grad():
            for parameter in router.parameters():
                parameter.normal_(std=std)
    return router


def context(mask: torch.Tensor | None = None) -> mb.Context:
    return mb.Context(arguments={} if mask is None else {"attention_mask": mask})


def seeded(router: mb.Router, x: torch.Tensor, seed: int = 0, mask=None) -> mb.Routing:
    torch.manual_seed(seed)
    return router(x, context(mask))


def phi(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


# All experts, and how they compete


def test_all_experts_weigh_by_the_softmax():
    router, x = built(mb.TopK(None)), torch.randn(2, 5, 8)
    assert_close(router.eval()(x, context()).weights, (x @ router.gate.mT).softmax(-1))
    assert router.train()(x, context()).losses == {}
    experts = {name: nn.Linear(8, 8) for name in NAMES}
    layer = mb.Modular(None, experts, router, mb.Mixture(), features=8)
    g = (x @ router.gate.mT).softmax(-1)
    assert_close(layer(x), sum(g[..., i, None] * expert(x) for i, expert in enumerate(experts.values())))


def test_competition_is_the_likelihood_written_out():
    outputs, gates, target = torch.randn(3, 5, 2), torch.randn(5, 3).softmax(-1), torch.randn(5, 2)
    want = 0.0
    for row in range(5):
        terms = [gates[row, i] * math.exp(-((target[row] - outputs[i, row]) ** 2).sum() / 2) for i in range(3)]
        want -= math.log(sum(terms)) / 5
    assert_close(losses.competition(outputs, gates, target).item(), want)
    # Its gradient is the posterior's share of the distance: the nearest expert learns most (equation 1.4).
    outputs = outputs.double().requires_grad_()
    losses.competition(outputs, gates.double(), target.double()).backward()
    distance = (target - outputs.detach()).square().sum(-1)
    posterior = gates.mT * torch.exp(-distance / 2)
    posterior = posterior / posterior.sum(0)
    assert_close(outputs.grad, posterior.unsqueeze(-1) * (outputs.detach() - target) / 5)
    assert losses.competition(torch.zeros(2, 1, 1), torch.tensor([[1.0, 0.0]]), torch.zeros(1, 1)).isfinite()


def test_experts_that_compete_part_a_task_of_two_rules():
    x = torch.cat([torch.randn(64, 2) + 3, torch.randn(64, 2) - 3])
    target = torch.cat([x[:64] @ torch.tensor([[2.0], [1.0]]), x[64:] @ torch.tensor([[-1.0], [3.0]])])
    experts = {name: nn.Linear(2, 1) for name in "ab"}
    layer = mb.Modular(None, experts, mb.TopK(None), mb.Stack(), features=2)
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.05)
    for _ in range(150):
        optimiser.zero_grad()
        gates = layer.router(x, context()).weights
        loss = losses.competition(layer(x), gates, target)
        loss.backward()
        optimiser.step()
    gates = layer.router(x, context()).weights
    assert (gates[:64].argmax(-1) == gates[0].argmax()).all() and (gates[64:].argmax(-1) != gates[0].argmax()).all()
    assert gates.amax(-1).min() > 0.8


# Noisy top-k


def kth_excluding(values: list[float], k: int, i: int) -> float:
    return sorted((v for j, v in enumerate(values) if j != i), reverse=True)[k - 1]


def test_importance_and_load_are_the_paper_s_formulas_written_out():
    clean, eps, spread = torch.randn(6, 4), torch.randn(6, 4), torch.rand(6, 4) + 0.2
    noisy, k = clean + eps * spread, 2
    totals = [0.0] * 4
    for row, i in itertools.product(range(6), range(4)):
        threshold = kth_excluding(noisy[row].tolist(), k, i)
        totals[i] += phi(float(clean[row, i] - threshold) / float(spread[row, i]))
    mean = sum(totals) / 4
    want = sum((t - mean) ** 2 for t in totals) / 4 / mean**2
    assert_close(losses.load(losses.in_top_k(clean, noisy, spread, k)).item(), want, rtol=1e-4, atol=1e-6)
    weights = torch.rand(6, 4)
    totals = weights.sum(0).tolist()
    mean = sum(totals) / 4
    want = sum((t - mean) ** 2 for t in totals) / 4 / mean**2
    assert_close(losses.importance(weights).item(), want, rtol=1e-4, atol=1e-6)
    mask = torch.tensor([1, 1, 0, 1, 0, 1])
    assert_close(losses.importance(weights, mask), losses.importance(weights[mask.bool()]))
    assert_close(losses.load(weights, mask), losses.load(weights[mask.bool()]))
    assert losses.importance(torch.ones(5, 4)) == 0 == losses.load(losses.in_top_k(clean, noisy, spread, 4))


def test_the_chance_to_be_in_the_top_k_is_what_new_noise_gives():
    clean, noisy = torch.tensor([0.5, 0.2, -0.3]), torch.tensor([0.4, 0.6, -0.1])
    spread = torch.tensor([0.3, 0.7, 1.0])
    got = losses.in_top_k(clean, noisy, spread, 1)
    for i in range(3):
        others = noisy[[j for j in range(3) if j != i]].max()
        drawn = clean[i] + spread[i] * torch.randn(100_000)
        assert_close(got[i], (drawn > others).float().mean(), rtol=0, atol=0.01)
    assert_close(
        losses.in_top_k(clean, noisy, spread, 1, excluding=False)[1], torch.special.ndtr((clean - 0.6) / 0.7)[1]
    )


def test_noisy_top_k_is_the_paper_s_equations():
    router, x = built(mb.TopK(2, noise=True), std=0.5).train(), torch.randn(6, 8)
    routing = seeded(router, x)
    torch.manual_seed(0)
    clean, spread = x @ router.gate.mT, nn.functional.softplus(x @ router.spread.mT) + 1e-2
    h = clean + torch.randn_like(clean) * spread
    kept = torch.full_like(h, -math.inf).scatter(-1, h.topk(2).indices, h.topk(2).values)
    assert_close(routing.dense(4), kept.softmax(-1))
    assert_close(routing.losses["importance"], 1e-2 * losses.importance(kept.softmax(-1)))
    assert_close(routing.losses["load"], 1e-2 * losses.load(losses.in_top_k(clean, h, spread, 2)))
    router.eval()
    assert_close(router(x, context()).dense(4).sum(-1), torch.ones(6))


def test_noise_brings_its_losses():
    assert set(seeded(built(mb.TopK(2, noise=True)).train(), torch.randn(6, 8)).losses) == {"importance", "load"}
    assert not built(mb.TopK(2, noise=True)).gate.any()  # the paper's start: no signal, and some noise
    router = built(mb.TopK(2, noise=True, load=0.1, importance=0.0, balance=0.2), std=0.5).train()
    routing = seeded(router, torch.randn(6, 8))
    assert set(routing.losses) == {"load", "balance"}
    routing.losses["load"].backward()
    assert router.gate.grad.abs().sum() > 0 < router.spread.grad.abs().sum()
    assert set(built(mb.TopK(2)).train()(torch.randn(6, 8), context()).losses) == {"balance"}


def test_v_moe_s_noise_and_losses():
    router, x = built(mb.TopK(2, renormalise=False, noise=1.0), std=0.5).train(), torch.randn(6, 8)
    routing = seeded(router, x)
    torch.manual_seed(0)
    clean = x @ router.gate.mT
    noisy = clean + torch.randn_like(clean) / 4
    assert_close(routing.weights, noisy.softmax(-1).topk(2).values)
    assert_close(routing.losses["importance"], 5e-3 * losses.importance(clean.softmax(-1)))
    chances = torch.special.ndtr((clean - noisy.topk(2).values[:, 1:]) * 4)
    assert_close(routing.losses["load"], 5e-3 * losses.load(chances))


# Capacity


def choices(router: mb.Router, x: torch.Tensor, index: torch.Tensor) -> None:
    """Make a router choose these modules (rows, k), the first by more: x must be the rows of an identity."""
    n = len(router.names)
    with torch.no_grad():
        for row, chosen in enumerate(index.tolist()):
            for slot, i in enumerate(chosen):
                router.gate[i, row] = 4.0 - slot
    assert torch.equal(router.eval()(x, context()).index, index) and n > index.max()


def test_switch_s_capacity_drops_the_rows_beyond_it_in_order():
    router, x = built(mb.TopK(1, capacity=1.25), std=0.0), torch.eye(8)
    wanted = torch.tensor([0, 1, 0, 0, 2, 0, 1, 0])
    choices(router, x, wanted.unsqueeze(-1))
    routing = router.train()(x, context())  # ⌈1.25 · 8 / 4⌉ = 3
    assert routing.index.flatten().tolist() == [0, 1, 0, 0, 2, -1, 1, -1]
    p = (x @ router.gate.mT).softmax(-1)
    assert_close(routing.weights, p.amax(-1, keepdim=True))
    assert_close(routing.losses["balance"], 1e-2 * losses.load_balance(p, wanted.unsqueeze(-1)))
    f = nn.Linear(8, 6)
    layer = mb.Modular(
        f, {name: mb.Bottleneck(3, std=1.0, activation="gelu") for name in NAMES}, router, mb.WeightedSum()
    ).train()
    dropped = (layer(x) == f(x)).all(-1)
    assert dropped.tolist() == [i < 0 for i in routing.index.flatten().tolist()]


def test_a_capacity_drops_first_the_second_choices_and_then_the_latest_rows():
    router, x = built(mb.TopK(2, capacity=1.0), std=0.0), torch.eye(8)
    wanted = torch.tensor([[0, 1], [1, 0], [0, 2], [0, 1], [1, 0], [2, 0], [0, 3], [0, 1]])
    choices(router, x, wanted)
    routing = router.train()(x, context())  # 2 · 8 / 4 = 4
    want = [[0, 1], [1, -1], [0, 2], [0, 1], [1, -1], [2, -1], [0, 3], [-1, -1]]
    assert routing.index.tolist() == want
    assert_close(routing.weights.sum(-1), torch.ones(8))  # made to sum to one before anything is dropped


@pytest.mark.parametrize("sorted_by", [False, True])
def test_places_are_those_of_a_loop(sorted_by):
    index = torch.randint(-1, 3, (20, 2))
    priority = torch.rand(20) if sorted_by else None
    got, want = ops.places(index, 3, priority), places_reference(index, 3, priority)
    assert torch.equal(got, want)


def test_capacities_are_rounded_up_and_no_further():
    assert [ops.capacity(1.1, 10, 1), ops.capacity(1.25, 8, 4), ops.capacity(1.0, 9, 4), ops.capacity(0.1, 2, 4)] == [
        11, 3, 3, 1,
    ]  # fmt: skip
    assert ops.capacity(1.1, torch.tensor(10), 1) == 11


def test_priority_keeps_the_surest_rows():
    router, x = built(mb.TopK(1, capacity=1.0, priority=True), std=0.0), torch.eye(8)
    with torch.no_grad():
        router.gate[0] = torch.tensor([1.0, 5.0, 2.0, 4.0, 3.0, 0.5, 7.0, 6.0])
    routing = router.train()(x, context())  # all want the first, which takes 8 / 4
    assert [row for row, i in enumerate(routing.index.flatten().tolist()) if i == 0] == [6, 7]


def test_padding_takes_no_place():
    x, mask = torch.eye(8).view(2, 4, 8), torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    router = built(mb.TopK(1, capacity=1.0), std=0.0).train()
    with torch.no_grad():
        router.gate[0] = 1.0
    routing = router(x, context(mask))  # five rows that count, all for the first: ⌈5 / 4⌉ = 2
    assert routing.index[..., 0].tolist() == [[-1, -1, 0, 0], [-1, -1, -1, -1]]
    alone = router(x.flatten(0, 1)[mask.flatten().bool()], context())
    for name, value in alone.losses.items():
        assert_close(routing.losses[name], value)
    assert (router.eval()(x, context(mask)).index == 0).all()  # evaluation drops nothing


def test_losses_leave_padding_out():
    x, mask = torch.randn(2, 4, 8), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    router = built(mb.TopK(2, noise=1.0, balance=0.1, z=0.1), std=0.5).train()
    want = seeded(router, x, mask=mask).losses
    x[mask == 0] = 100.0
    for name, value in seeded(router, x, mask=mask).losses.items():
        assert_close(value, want[name])


# The second choice, and what is left out


def test_the_second_module_is_kept_in_proportion_to_its_weight():
    router = built(mb.TopK(2, second="random"), std=0.5).train()
    x = torch.randn(1, 8).repeat(20_000, 1)
    routing = router(x, context())
    p = (x[0] @ router.gate.mT).softmax(-1)
    first, second = p.topk(2).values
    assert (routing.index[:, 0] == p.argmax()).all()
    kept = (routing.index[:, 1] >= 0).float().mean()
    assert_close(kept, 2 * (second / (first + second)).detach(), rtol=0, atol=0.02)
    want = losses.load_balance(p.expand(20_000, -1), routing.index[:, :1])
    assert_close(routing.losses["balance"], 1e-2 * want)  # GShard counts first choices
    assert (router.eval()(x[:3], context()).index >= 0).all()


def test_the_second_module_is_drawn_from_the_others():
    router = built(mb.TopK(2, second="sampling"), std=0.5).train()
    x = torch.randn(1, 8).repeat(20_000, 1)
    index = router(x, context()).index
    p = (x[0] @ router.gate.mT).softmax(-1).detach()
    best = p.argmax()
    assert (index[:, 0] == best).all()
    for i in range(4):
        want = p[i] / (1 - p[best]) if i != best else torch.tensor(0.0)
        assert_close((index[:, 1] == i).float().mean(), want, rtol=0, atol=0.02)


def test_masked_outputs_keep_their_expectation():
    router, x = built(mb.TopK(2, drop=0.2), std=0.5).train(), torch.randn(1, 8).repeat(20_000, 1)
    routing = router(x, context())
    assert_close((routing.index < 0).float().mean(0), torch.full((2,), 0.2), rtol=0, atol=0.02)
    assert_close(routing.dense(4).mean(0), router.eval()(x[:1], context()).dense(4)[0], rtol=0, atol=0.02)


def test_weights_sum_to_one_over_what_is_kept():
    router, x = built(mb.TopK(2, capacity=0.6, renormalise="after"), std=0.5).train(), torch.randn(40, 8)
    routing = router(x, context())
    total, some = routing.dense(4).sum(-1), (routing.index >= 0).any(-1)
    assert_close(total, some.float()) and not some.all()
    p = (x @ router.gate.mT).softmax(-1)
    want = p.gather(-1, routing.index.clamp(min=0)) * (routing.index >= 0)
    assert_close(routing.weights[some], (want / want.sum(-1, keepdim=True))[some])


def test_jitter_scales_what_the_gate_reads():
    router, x = built(mb.TopK(1, jitter=0.1), std=0.5).train(), torch.randn(6, 8)
    routing = seeded(router, x)
    torch.manual_seed(0)
    shaken = x * torch.empty_like(x).uniform_(0.9, 1.1)
    assert_close(routing.weights, (shaken @ router.gate.mT).softmax(-1).amax(-1, keepdim=True))


def test_mixtral_s_block_is_top_2_of_a_mixture():
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=8, intermediate_size=5, num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    block, x = MixtralSparseMoeBlock(config).eval(), torch.randn(2, 5, 8)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.5)
    kind = mb.FeedForward(5, "silu", gated=True, bias=False)
    layer = mb.Modular(None, dict.fromkeys(NAMES, kind), mb.TopK(2), mb.Mixture(), features=8).eval()
    with torch.no_grad():
        layer.router.gate.copy_(block.gate.weight)
        for part, both, down in zip(layer.order, block.experts.gate_up_proj, block.experts.down_proj, strict=True):
            tensors = part.tensors()
            tensors["gate"].copy_(both[:5]), tensors["up"].copy_(both[5:]), tensors["down"].copy_(down)
    assert_close(layer(x), block(x))


# Losses of TopK


def test_the_z_loss_is_the_paper_s_and_pulls_logits_to_nought():
    router, x = built(mb.TopK(2, z=1e-3, balance=0.0), std=2.0).train(), torch.randn(6, 8)
    loss = router(x, context()).losses["z"]
    rows = [math.log(sum(math.exp(z) for z in row)) ** 2 for row in (x @ router.gate.mT).tolist()]
    assert_close(loss.item(), 1e-3 * sum(rows) / 6)
    before = losses.z_loss(x @ router.gate.mT)
    optimiser = torch.optim.SGD(router.parameters(), lr=100.0)
    for _ in range(20):
        optimiser.zero_grad()
        router(x, context()).losses["z"].backward()
        optimiser.step()
    assert losses.z_loss(x @ router.gate.mT) < before / 2


def test_the_bias_moves_to_who_has_less_and_weighs_nothing():
    index, mask = torch.tensor([[0, 1], [0, 2], [0, 1], [3, 3]]), torch.tensor([1, 1, 1, 0])
    got = losses.balancing_bias(torch.tensor([0.1, 0.0, 0.0, 0.0]), index, 0.01, mask)  # counts 3, 2, 1, 0; mean 1.5
    assert_close(got, torch.tensor([0.09, -0.01, 0.01, 0.01]))

    router = built(mb.TopK(1, score="sigmoid", bias=0.01), std=0.5).train()
    x = torch.randn(64, 8) + 2 * router.gate[0].detach()
    first = router(x, context())
    p = (x @ router.gate.mT).sigmoid()
    assert_close(first.weights, p.amax(-1, keepdim=True)) and first.losses == {}
    assert_close(router.bias * router.steps, losses.balancing_bias(torch.zeros(4), first.index, 0.01))
    for _ in range(200):
        routing = router(x, context())
    shares = routing.index.flatten().bincount(minlength=4) / 64
    assert (shares - 0.25).abs().max() < 0.1 < (first.index.flatten().bincount(minlength=4) / 64 - 0.25).abs().max()
    assert_close(routing.weights, p.gather(-1, routing.index))  # by p alone
    steps = router.steps.clone()
    router.eval()(x, context())
    router.requires_grad_(False).train()(x, context())  # frozen is frozen
    assert torch.equal(router.steps, steps)
    router.build(("d", "new", "a"), SITE)
    assert router.steps.tolist() == [steps[3], round(float(steps.float().mean())), steps[0]]


def test_a_recomputed_call_sees_the_bias_of_its_first_time():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return checkpoint(self.layer, x, use_reentrant=False) if self.training and self.again else self.layer(x)

    x, gradients = torch.randn(2, 3, 8), []
    for again in (False, True):
        torch.manual_seed(0)
        net = Net()
        net.again = again
        modules = {name: mb.Bottleneck(3, std=0.5) for name in NAMES}
        mb.attach(net, at="layer", modules=modules, router=lambda: mb.TopK(1, bias=0.5), name="m").unfreeze()
        net.train()
        first, second = net(x), net(x)  # two calls, and then one backward pass
        (first.square().sum() + second.sum()).backward()
        router = next(m for m in net.modules() if isinstance(m, mb.TopK))
        gradients.append([p.grad for p in net.parameters()] + [router.steps.float()])
    for plain, again in zip(*gradients, strict=True):
        assert_close(plain, again)

    layer = mb.Modular(nn.Linear(8, 8), dict.fromkeys(NAMES, mb.LoRA(2)), mb.TopK(1, bias=0.5), mb.WeightedSum())
    with pytest.raises(CallError, match="checkpointing"):
        checkpoint(layer.train(), x.requires_grad_(), use_reentrant=False).sum().backward()


# Balanced assignment


def best(scores: torch.Tensor, sizes: list[int]) -> float:
    """The highest total, by trying all assignments."""
    rows = [i for i, size in enumerate(sizes) for _ in range(size)]
    return max(sum(float(scores[t, i]) for t, i in enumerate(way)) for way in set(itertools.permutations(rows)))


@pytest.mark.parametrize("sizes", [[2, 2, 2, 2], [3, 2, 2], [1, 0, 6], [7]], ids=str)
def test_balanced_assignment_is_balanced_and_near_the_best(sizes):
    n, rows = len(sizes), sum(sizes)
    for seed in range(5):
        torch.manual_seed(seed)
        scores = torch.randn(rows, n)
        at = ops.assignment(scores, sizes, step=1e-3)
        assert at.bincount(minlength=n).tolist() == sizes
        got = float(scores.gather(-1, at.unsqueeze(-1)).sum())
        assert got >= best(scores, sizes) - rows * 1e-3 * float(scores.max() - scores.min()) - 1e-5


def test_balanced_assignment_of_many_is_as_good_as_the_hungarian_method_s():
    optimise = pytest.importorskip("scipy.optimize")
    scores = torch.randn(240, 6) + torch.tensor([2.0, 0, 0, 0, 0, -1])
    at = ops.assignment(scores, [40] * 6)
    assert at.bincount(minlength=6).tolist() == [40] * 6
    slots = scores.repeat_interleave(40, 1).numpy()
    want = slots[optimise.linear_sum_assignment(slots, maximize=True)].sum()
    got = float(scores.gather(-1, at.unsqueeze(-1)).sum())
    assert want - 240 * 1e-2 * float(scores.max() - scores.min()) <= got <= want + 1e-3


def test_scores_that_say_nothing_are_assigned_too():
    assert ops.assignment(torch.zeros(9, 3), [3, 3, 3]).bincount().tolist() == [3, 3, 3]
    scores = torch.randn(9, 3)
    scores[0, 0], scores[4, 1] = math.nan, -math.inf
    assert ops.assignment(scores, [3, 3, 3]).bincount().tolist() == [3, 3, 3]
    assert ops.assignment(torch.full((4, 2), math.nan), [2, 2]).bincount().tolist() == [2, 2]
    assert ops.assignment(torch.zeros(0, 3), [0, 0, 0]).shape == (0,)
    assert ops.shares(torch.tensor([2, 2, 2, 1, 0, 2, 2, 1]), 3) == [2, 3, 3]


def test_base_assigns_in_training_and_takes_the_best_outside():
    router, x = built(mb.Balanced()), torch.randn(2, 9, 8)
    scores = x @ router.centroids.mT
    routing = router.eval()(x, context())
    assert torch.equal(routing.index[..., 0], scores.argmax(-1))
    assert_close(routing.weights, scores.amax(-1, keepdim=True).sigmoid())
    routing = router.train()(x, context())
    assert sorted(routing.index.flatten().bincount(minlength=4).tolist()) == [4, 4, 5, 5]
    assert_close(routing.weights, scores.gather(-1, routing.index).sigmoid())
    assert_close(router.centroids @ router.centroids.mT, 0.01 * torch.eye(4))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
    padded = router(x, context(mask)).index[..., 0]
    assert (padded[mask == 0] == -1).all() and padded[mask == 1].bincount(minlength=4).tolist() == [4, 4, 4, 4]
    assert torch.equal(padded[mask == 1], router(x[mask == 1], context()).index[:, 0])


def test_sinkhorn_s_marginals_are_exact():
    scores = torch.randn(12, 4, dtype=torch.float64) * 2
    plan = ops.sinkhorn(scores, iterations=500)
    assert_close(plan.sum(-1), torch.ones(12, dtype=torch.float64), rtol=0, atol=1e-12)
    assert_close(plan.sum(0), torch.full((4,), 3.0, dtype=torch.float64), rtol=0, atol=1e-9)
    logs = plan.log() - scores  # log u_t + log v_i: what is left has rank one in exponents
    assert_close(logs - logs[:1] - logs[:, :1] + logs[:1, :1], torch.zeros_like(logs), rtol=0, atol=1e-9)
    mask = torch.arange(12) % 3 > 0
    some = ops.sinkhorn(scores, mask, 500)
    assert_close(some[mask], ops.sinkhorn(scores[mask], iterations=500)) and not some[~mask].any()


def test_s_base_takes_the_largest_entry_of_the_plan():
    router, x = built(mb.Balanced("sinkhorn", temperature=0.5), std=1.0).train(), torch.randn(40, 8)
    with torch.no_grad():
        router.centroids[0] += x.mean(0)
    scores = x @ router.centroids.mT
    routing = router(x, context())
    assert torch.equal(routing.index[:, 0], ops.sinkhorn(scores.detach() / 0.5).argmax(-1))
    assert_close(routing.weights, scores.softmax(-1).gather(-1, routing.index))
    spread = lambda index: index.flatten().bincount(minlength=4).float().std()
    assert spread(routing.index) < spread(router.eval()(x, context()).index)
    mask = torch.ones(1, 40).long()
    mask[:, :7] = 0
    padded = router.train()(x.unsqueeze(0), context(mask)).index[0, :, 0]
    assert (padded[:7] == -1).all() and torch.equal(padded[7:], router(x[7:], context()).index[:, 0])


# Expert choice


def test_experts_choose_as_many_tokens_each_and_the_best():
    router, x = built(mb.ExpertChoice(2.0), std=0.5).train(), torch.randn(3, 4, 8)
    routing, s = router(x, context()), (x @ router.gate.mT).softmax(-1)
    dense = routing.dense(4)
    assert ((dense > 0).flatten(0, 1).sum(0) == 6).all()  # 2 · 12 / 4
    for i in range(4):
        top = s[..., i].flatten().topk(6).indices
        assert_close(dense[..., i].flatten()[top], s[..., i].flatten()[top])
    apart = built(mb.ExpertChoice(2.0, over="example"))
    apart.load_state_dict(router.state_dict())
    assert ((apart.train()(x, context()).dense(4) > 0).sum(1) == 2).all()
    assert_close(router.eval()(x, context()).dense(4), apart(x, context()).dense(4))


def test_an_expert_s_choice_leaves_padding_out():
    router, x = built(mb.ExpertChoice(2.0), std=0.5), torch.randn(2, 6, 8)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    dense = router.train()(x, context(mask)).dense(4)
    assert not dense[mask == 0].any() and ((dense > 0).flatten(0, 1).sum(0) == 5).all()  # 2 · 10 / 4
    alone = router(x[mask == 1].unsqueeze(0), context()).dense(4)[0]
    assert_close(dense[mask == 1], alone)
    dense = router.eval()(x, context(mask)).dense(4)
    assert ((dense > 0).sum(1) == torch.tensor([[2], [3]])).all()
    assert_close(dense[:1, 2:], router(x[:1, 2:], context()).dense(4))
    with pytest.raises(CompositionError, match="tokens"):
        router(x[:, 0], context())


# DSelect-k


def plainly(z: list[list[float]], w: list[float], n: int, gamma: float) -> list[float]:
    """DSelect-k's weights, one factor at a time."""

    def step(t: float) -> float:
        if t <= -gamma / 2:
            return 0.0
        return 1.0 if t >= gamma / 2 else -2 / gamma**3 * t**3 + 3 / (2 * gamma) * t + 0.5

    total, out = sum(map(math.exp, w)), [0.0] * n
    for zs, v in zip(z, w, strict=True):
        for i in range(n):
            product = math.prod(step(t) if i >> b & 1 else 1 - step(t) for b, t in enumerate(zs))
            out[i] += math.exp(v) / total * product
    return out


@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_d_select_is_the_paper_s_formula_and_sums_to_one(n):
    names, x = "abcdefgh"[:n], torch.randn(5, 8)
    router = built(mb.DSelect(2, by="all", gamma=1.5), names, std=0.6)
    weights = router(x, context()).weights
    assert_close(weights, torch.tensor(plainly(router.z.tolist(), router.w.tolist(), n, 1.5)))
    rows = built(mb.DSelect(3, by="token"), names, std=0.3).train()
    routing = rows(x, context())
    z = torch.einsum("kbd,rd->rkb", rows.z_of_x, x) + rows.z
    w = x @ rows.w_of_x.mT + rows.w
    want = [plainly(zs, ws, n, 1.0) for zs, ws in zip(z.tolist(), w.tolist(), strict=True)]
    assert_close(routing.weights, torch.tensor(want))
    if n & (n - 1):
        assert set(routing.losses) == {"entropy", "reach"} and (routing.weights.sum(-1) <= 1 + 1e-6).all()
    else:
        assert set(routing.losses) == {"entropy"}
        assert_close(weights.sum(), torch.tensor(1.0))
        assert_close(routing.weights.sum(-1), torch.ones(5))


def test_d_select_s_losses_are_sums_over_rows_without_padding():
    router, x = built(mb.DSelect(2, by="token", entropy=0.1), "abc", std=0.1).train(), torch.randn(2, 3, 8)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    got = router(x, context(mask)).losses
    each = [router(x[i, t][None, None], context()).losses for i, t in mask.nonzero().tolist()]
    for name in ("entropy", "reach"):
        assert_close(got[name], sum(one[name] for one in each))
    s = torch.tensor([plainly([zs], [0.0], 3, 1.0) for zs in router.z.tolist()])
    alone = built(mb.DSelect(2, by="all", entropy=0.1), "abc").train()
    with torch.no_grad():
        alone.z.copy_(router.z)
    assert_close(alone(x, context()).losses["entropy"], -0.1 * (s * (s + 1e-6).log()).sum())
    assert_close(alone(x, context()).losses["reach"], (1 / s.sum(-1)).sum())


def test_d_select_becomes_sparse():
    x = torch.randn(64, 8)
    maps = torch.randn(4, 8, 8)
    target = (x @ maps[1] + x @ maps[2]) / 2
    experts = {name: nn.Linear(8, 8, bias=False) for name in NAMES}
    for expert, weight in zip(experts.values(), maps, strict=True):
        expert.weight = nn.Parameter(weight.mT.contiguous(), requires_grad=False)
    layer = mb.Modular(None, experts, mb.DSelect(2, by="all"), mb.Mixture(), features=8)
    optimiser = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.05)
    for _ in range(150):
        optimiser.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimiser.step()
    assert_close(layer.router(x, context()).weights, torch.tensor([0.0, 0.5, 0.5, 0.0]), rtol=0, atol=1e-2)
    assert (layer.router(x, context()).weights == 0).sum() == 2  # exactly


def test_d_select_s_codes_stay_with_their_modules():
    router = built(mb.DSelect(2, by="example"), std=0.2)
    x = torch.randn(3, 8)
    before = router(x, context()).weights
    router.build(("d", "b", "a", "c"), SITE)
    assert_close(router(x, context()).weights, before[:, [3, 1, 0, 2]])
    router.build(("d", "b", "a", "c", "e"), SITE)  # a fifth needs a bit more
    assert router.codes == {"d": 3, "b": 1, "a": 0, "c": 2, "e": 4} and router.z.shape == (2, 3)
    low = 0.5 - 0.375 + 2 / 64
    assert_close(router(x, context()).weights[:, :4], (1 - low) * before[:, [3, 1, 0, 2]])
    assert_close(router(x, context()).weights[:, 4], low * before[:, 0])  # its other bits are those of code 0
    router.rename("e", "f")
    router.build(("f", "d"), SITE)
    again = mb.DSelect(**router.arguments())
    again.build(("f", "d"), SITE)
    again.load_state_dict(router.state_dict())
    assert again.codes == {"f": 4, "d": 3}
    assert_close(again(x, context()).weights, router(x, context()).weights)
    router.build(("d", "g"), SITE)
    assert router.codes == {"d": 3, "g": 0} and router.z.shape == (2, 2)


# Gradients, precision, copies

EXACT = {
    "all": lambda: mb.TopK(None),
    "top 2": lambda: mb.TopK(2, balance=0.3, z=0.1),
    "noisy": lambda: mb.TopK(2, noise=True, importance=0.5, load=0.5),
    "v-moe": lambda: mb.TopK(2, noise=1.0, renormalise=False, importance=0.5, load=0.5),
    "capacity": lambda: mb.TopK(2, capacity=0.7, renormalise="after"),
    "sigmoid": lambda: mb.TopK(2, score="sigmoid", balance=0.3),
    "base": lambda: mb.Balanced(),
    "s-base": lambda: mb.Balanced("sinkhorn", iterations=3),
    "expert choice": lambda: mb.ExpertChoice(),
    "d-select": lambda: mb.DSelect(2, by="token", entropy=0.1),
}


@pytest.mark.parametrize("make", EXACT.values(), ids=EXACT)
def test_gradients_are_those_of_finite_differences(make):
    router = built(make(), std=0.3).double().train()
    x = torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True)

    def run(x, *parameters):
        torch.manual_seed(0)  # the same noise, and so the same choice
        given = dict(zip(dict(router.named_parameters()), parameters, strict=True))
        routing = torch.func.functional_call(router, given, (x, context()))
        return routing.dense(4), *routing.losses.values()

    assert torch.autograd.gradcheck(run, (x, *router.parameters()))


@pytest.mark.parametrize("make", EXACT.values(), ids=EXACT)
def test_routers_of_experts_run_in_bf16_and_are_copied(make):
    kind = mb.FeedForward(5)
    layer = mb.Modular(None, dict.fromkeys(NAMES, kind), make(), mb.Mixture(), features=8)
    half, x = copy.deepcopy(layer).bfloat16().train(), torch.randn(2, 4, 8)
    out = half(x.bfloat16())
    out.sum().backward()
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
    same = copy.deepcopy(layer)
    assert_close(same.eval()(x), layer.eval()(x), rtol=0, atol=0)
    fresh = type(layer.router)(**layer.router.arguments())
    fresh.build(NAMES, layer.site)
    fresh.load_state_dict(layer.router.state_dict())
    assert_close(fresh.eval()(x, context()).dense(4), layer.router(x, context()).dense(4), rtol=0, atol=0)


COMPILED = {
    "capacity": EXACT["capacity"],
    "bias": lambda: mb.TopK(2, score="sigmoid", bias=1e-3),
    "s-base": EXACT["s-base"],
    "expert choice": EXACT["expert choice"],
    "d-select": EXACT["d-select"],
}


# A graph takes seconds to trace: two every time, and all of them in `make test-all`.
QUICK = ("capacity", "bias")
TRACED = [pytest.param(m, id=n, marks=[] if n in QUICK else pytest.mark.slow) for n, m in COMPILED.items()]


@pytest.mark.parametrize("make", TRACED)
def test_routers_of_experts_compile_whole(make):
    torch._dynamo.reset()
    layer = mb.Modular(nn.Linear(8, 8), dict.fromkeys(NAMES, mb.LoRA(2)), make(), mb.WeightedSum()).train()
    for parameter in layer.parts.parameters():
        nn.init.normal_(parameter)
    x, twin = torch.randn(2, 4, 8), copy.deepcopy(layer)
    assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), twin(x))
    for mine, theirs in zip(layer.buffers(), twin.buffers(), strict=True):
        assert torch.equal(mine, theirs)


def test_load_after_save_is_identity(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 6)

        def forward(self, x):
            return self.layer(x)

    plain, x = Net(), torch.randn(2, 4, 8)
    for i, make in enumerate([*EXACT.values(), lambda: mb.TopK(1, bias=0.1)]):
        net = copy.deepcopy(plain)
        modules = {name: mb.Bottleneck(3, std=0.5) for name in NAMES}
        bay = mb.attach(net, at="layer", modules=modules, router=make, name="m")
        bay.add("e", mb.Bottleneck(3, std=0.5)).remove("b")
        net.train()(x)
        want = net.eval()(x)
        bay.save(tmp_path / str(i))
        again = copy.deepcopy(plain)
        mb.load(again, tmp_path / str(i))
        assert_close(again.eval()(x), want, rtol=0, atol=0)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: mb.TopK(2, second="third"), "second='third'"),
        (lambda: mb.TopK(2, score="cosine"), "score='cosine'"),
        (lambda: mb.TopK(2, renormalise="before"), "renormalise='before'"),
        (lambda: mb.TopK(2, capacity=0.0), "capacity=0.0"),
        (lambda: mb.TopK(2, drop=1.0), "drop=1.0"),
        (lambda: mb.TopK(None, capacity=1.0), "k=None"),
        (lambda: mb.TopK(2, load=0.1), "load=0.1"),
        (lambda: mb.TopK(2, sample=True, second="random"), "sample=True"),
        (lambda: mb.TopK(2, sample=True, bias=0.1), "bias=0.1"),
        (lambda: mb.TopK(2, second="sampling", bias=0.1), "bias=0.1"),
        (lambda: mb.Balanced("luck"), "way='luck'"),
        (lambda: mb.Balanced(gate="tanh"), "gate='tanh'"),
        (lambda: mb.Balanced(temperature=0.0), "temperature=0.0"),
        (lambda: mb.ExpertChoice(0.0), "capacity=0.0"),
        (lambda: mb.ExpertChoice(over="epoch"), "over='epoch'"),
        (lambda: mb.DSelect(0), "k=0"),
        (lambda: mb.DSelect(by="task"), "by='task'"),
        (lambda: mb.DSelect(codes={"a": 1, "b": 1}), "a number of its own"),
    ],
)
def test_wrong_arguments_raise(make, says):
    with pytest.raises(CompositionError, match=says):
        make()
