"""Hard routes that are learned: each estimator against its expectation, each router against its equation."""

import copy
import math
from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import modbay as mb
from modbay import losses, methods
from modbay.core import describe
from modbay.errors import BayError, CallError, CompositionError, LabelError

SITE = describe("site", nn.Linear(8, 6))
LOGITS = torch.tensor([0.3, -0.5, 0.9])
REWARDS = torch.tensor([1.0, -2.0, 0.5])


def built(router: mb.Router, *names: str) -> mb.Router:
    router.build(names or ("a", "b", "c"), SITE)
    return router


def context(**labels) -> mb.Context:
    return mb.Context(labels=labels)


def expected_gradient(logits: Tensor, rewards: Tensor) -> Tensor:
    """∂(−E[R])/∂logits, by adding up all choices."""
    free = logits.clone().requires_grad_()
    return torch.autograd.grad(-(free.softmax(-1) * rewards).sum(), free)[0]


def loss_gradients(make, n: int) -> Tensor:
    """The gradient to each of n copies of the logits: draws of an estimator, (n, 3)."""
    free = LOGITS.expand(n, 3).clone().requires_grad_()
    return n * torch.autograd.grad(make(free), free)[0]


def drawn_from(free: Tensor) -> tuple[Tensor, Tensor]:
    noisy = torch.log_softmax(free, -1) - torch.empty_like(free).exponential_().log()
    return noisy, noisy.argmax(-1)


def log_prob_of(free: Tensor, action: Tensor) -> Tensor:
    return torch.log_softmax(free, -1).gather(-1, action.unsqueeze(-1)).squeeze(-1)


# Estimators


@pytest.mark.parametrize("baseline", [0.0, 0.7, torch.tensor(-3.0)], ids=str)
def test_the_score_function_is_unbiased_with_and_without_a_baseline(baseline):
    want = expected_gradient(LOGITS, REWARDS)
    total = torch.zeros(3)
    for a, p in enumerate(LOGITS.softmax(-1)):  # the exact mean: every choice, weighted by how likely it is
        free = LOGITS.clone().requires_grad_()
        loss = losses.reinforce(free.log_softmax(-1)[a : a + 1], REWARDS[a : a + 1], baseline)
        total = total + p * torch.autograd.grad(loss, free)[0]
    assert_close(total, want)


def test_an_actor_critic_is_reinforce_and_a_regression_of_returns():
    log_prob, value = torch.randn(5, requires_grad=True), torch.randn(5, requires_grad=True)
    returns = torch.randn(5)
    loss = losses.actor_critic(log_prob, value, returns, weight=0.5)
    got = torch.autograd.grad(loss, [log_prob, value])
    assert_close(got[0], -(returns - value.detach()) / 5)
    assert_close(got[1], 0.5 * 2 * (value.detach() - returns) / 5)


def test_targets_by_hand():
    assert_close(losses.discounted(torch.tensor([1.0, 2.0, 4.0]), 0.5), torch.tensor([3.0, 4.0, 4.0]))
    q, after = torch.tensor([[1.0, 2.0]], requires_grad=True), torch.tensor([[5.0, 3.0]], requires_grad=True)
    action, reward = torch.tensor([1]), torch.tensor([0.5])
    assert_close(losses.q_learning(q, action, reward, after, 0.9), torch.tensor((2.0 - (0.5 + 0.9 * 5)) ** 2))
    loss = losses.sarsa(q, action, reward, after, torch.tensor([1]), 0.9)
    assert_close(loss, torch.tensor((2.0 - (0.5 + 0.9 * 3)) ** 2))
    loss.backward()
    assert after.grad is None and q.grad[0, 0] == 0
    assert_close(losses.q_learning(q, torch.tensor([-1]), reward), torch.tensor(1.5**2))  # none is the last column


def test_q_learning_finds_the_best_path_and_sarsa_the_value_of_its_policy():
    rewards = torch.tensor([[0.0, 1.0], [3.0, -1.0]])  # of the second choice, after each first
    tables = {name: [torch.zeros(1, 2, requires_grad=True), torch.zeros(2, 2, requires_grad=True)] for name in "qs"}
    for name, (first, second) in tables.items():
        optimiser = torch.optim.SGD([first, second], lr=0.5)
        for _ in range(120):
            a, then = torch.randint(2, (64,)), torch.randint(2, (64,))
            after, nothing = second[a], torch.zeros(64)
            if name == "q":
                loss = losses.q_learning(first.expand(64, 2), a, nothing, after)
            else:
                loss = losses.sarsa(first.expand(64, 2), a, nothing, after, then)
            loss = loss + losses.q_learning(after, then, rewards[a, then])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    assert_close(tables["q"][0].detach()[0], torch.tensor([1.0, 3.0]), atol=0.05, rtol=0)  # the best of what follows
    assert_close(tables["s"][0].detach()[0], torch.tensor([0.5, 1.0]), atol=0.5, rtol=0)  # the mean of it
    assert_close(tables["q"][1], rewards, atol=0.05, rtol=0)


def test_collaboration_is_the_share_of_the_batch():
    assert_close(losses.collaboration(torch.tensor([0, 0, 2, 0]), 3, 0.5), 0.5 * torch.tensor([0.75, 0.75, 0.25, 0.75]))


def test_a_weighted_policy_moves_as_written_and_stays_on_the_simplex():
    p = torch.tensor([0.5, 0.3, 0.2])
    up = losses.weighted_policy(p, torch.tensor([1]), torch.tensor([2.0]), 0.1)
    assert_close(up, losses.on_simplex(p + torch.tensor([0.0, 0.1 * 2 * 0.7, 0.0])))
    down = losses.weighted_policy(p, torch.tensor([1]), torch.tensor([-2.0]), 0.1)
    assert_close(down, losses.on_simplex(p - torch.tensor([0.0, 0.1 * 2 * 0.3, 0.0])))
    v = torch.randn(50, 4) * 3
    on = losses.on_simplex(v)
    assert (on >= 0).all()
    assert_close(on.sum(-1), torch.ones(50))
    grid = torch.rand(2000, 4)
    grid = grid / grid.sum(-1, keepdim=True)
    assert ((v - on).norm(dim=-1) <= torch.cdist(v, grid).min(-1).values + 1e-5).all()  # no point is nearer


def test_conditional_scores_are_distributed_as_those_that_chose_the_same():
    free = LOGITS.expand(200_000, 3)
    noisy, action = drawn_from(free)
    again = losses.conditional(free, action)
    assert torch.equal(again.argmax(-1), action)
    for a in range(3):
        mine, theirs = again[action == a], noisy[action == a]
        assert_close(mine.mean(0), theirs.mean(0), atol=0.03, rtol=0)
        assert_close(mine.std(0), theirs.std(0), atol=0.03, rtol=0)


def test_relax_is_unbiased_and_varies_less_than_reinforce():
    want, n = expected_gradient(LOGITS, REWARDS), 200_000
    worth = REWARDS.clone().requires_grad_()
    control = lambda z: (torch.softmax(z, -1) * worth).sum(-1)

    def relaxed(free):
        noisy, action = drawn_from(free.detach())
        return losses.relax(free, noisy, REWARDS[action], control)[0]

    def plain(free):
        _, action = drawn_from(free.detach())
        return losses.reinforce(log_prob_of(free, action), REWARDS[action])

    relax, reinforce = loss_gradients(relaxed, n), loss_gradients(plain, n)
    assert_close(relax.mean(0), want, atol=0.02, rtol=0)
    assert_close(reinforce.mean(0), want, atol=0.02, rtol=0)
    assert relax.var(0).sum() < 0.8 * reinforce.var(0).sum()
    free = LOGITS.expand(1000, 3)
    noisy, action = drawn_from(free)
    size = losses.relax(free.requires_grad_(False), noisy, REWARDS[action], control)[1]
    assert torch.autograd.grad(size, worth)[0].abs().sum() > 0  # by which the control learns


def test_a_control_learns_to_lower_the_variance():
    worth = torch.zeros(3, requires_grad=True)
    optimiser, sizes = torch.optim.Adam([worth], lr=0.1), []
    for _ in range(150):
        free = LOGITS.expand(256, 3).clone().requires_grad_()
        noisy, action = drawn_from(free.detach())
        rewards = (REWARDS + 3)[action]
        _, size = losses.relax(free, noisy, rewards, lambda z: (torch.softmax(z, -1) * worth).sum(-1))
        optimiser.zero_grad()
        size.backward()
        optimiser.step()
        sizes.append(size.item())
    assert sum(sizes[-20:]) < 0.7 * sum(sizes[:20])


def test_information_is_full_where_rows_are_sure_and_differ():
    sure = 50 * torch.eye(3)
    assert_close(losses.information(sure), torch.tensor(math.log(3)))
    assert_close(losses.information(torch.randn(1, 3).expand(4, 3)), torch.tensor(0.0), atol=1e-6, rtol=0)
    logits, mask = torch.randn(2, 4, 3), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    p = logits[mask.bool()].softmax(-1)
    mean = p.mean(0)
    want = -(mean * mean.log()).sum() + (p * p.log()).sum(-1).mean()
    assert_close(losses.information(logits, mask), want)


def test_consistency_is_the_mean_of_both_divergences():
    a, b = torch.randn(5, 4), torch.randn(5, 4)
    kl = lambda p, q: (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean()
    assert_close(losses.consistency(a, b), 0.5 * (kl(a, b) + kl(b, a)))


# Policy


def test_a_policy_reads_tasks_and_examples():
    router = built(mb.Policy("example", "task", ["x", "y"])).eval()
    nn.init.normal_(router.table)
    nn.init.normal_(router.gate)
    x, mask = torch.randn(3, 5, 8), torch.ones(3, 5)
    mask[0, 2:] = 0
    c = mb.Context(labels={"task": ["y", None, "x"]}, arguments={"attention_mask": mask})
    routing = router(x, c)
    mean = torch.stack([x[0, :2].mean(0), x[1].mean(0), x[2].mean(0)])
    scores = mean @ router.gate[0, 0].mT + router.table[0, 0][torch.tensor([1, 0, 0])]
    assert_close(routing.state["logits"], scores)
    want = scores.argmax(-1)
    want[1] = -1
    assert torch.equal(routing.index[:, 0], want)
    assert routing.log_prob[1] == 0
    assert_close(routing.log_prob[0], scores[0].log_softmax(-1).max())


def test_by_token_by_label_alone_and_for_all():
    token = built(mb.Policy("token", "task", ["x", "y"])).eval()
    nn.init.normal_(token.table)
    x = torch.randn(2, 4, 8)
    routing = token(x, context(task=["x", None]))
    assert routing.index.shape == (2, 4, 1) and (routing.index[1] == -1).all() and (routing.log_prob[1] == 0).all()
    assert_close(routing.state["logits"], x @ token.gate[0, 0].mT + token.table[0, 0, [0, 0]].unsqueeze(1))
    table = built(mb.Policy(None, "task", ["x", "y"])).train()
    assert table(None, context(task=["x", "y", "x"])).index.shape == (3, 1)
    assert table(None, context(task="x")).index.shape == (1,)
    assert not table.reads_x and token.reads_x
    assert built(mb.Policy(None)).eval()(None, context()).index.tolist() == [0]


def test_choices_are_drawn_by_the_policy_and_log_prob_is_of_the_draw():
    router = built(mb.Policy(None, "task", ["x"], temperature=2.0)).train()
    with torch.no_grad():
        router.table[0, 0, 0] = LOGITS
    routing = router(None, context(task=["x"] * 50_000))
    p = (LOGITS / 2).softmax(-1)
    assert_close(torch.bincount(routing.index[:, 0]) / 50_000, p, atol=0.01, rtol=0)
    assert_close(routing.log_prob, p.log()[routing.index[:, 0]])


def test_epsilon_mixes_even_choices_in_and_log_prob_says_so():
    router = built(mb.Policy(None, "task", ["x"], epsilon=0.3)).train()
    with torch.no_grad():
        router.table[0, 0, 0] = LOGITS
    routing = router(None, context(task=["x"] * 50_000))
    p = 0.7 * LOGITS.softmax(-1) + 0.1
    assert_close(torch.bincount(routing.index[:, 0]) / 50_000, p, atol=0.01, rtol=0)
    assert_close(routing.log_prob, p.log()[routing.index[:, 0]])
    greedy = router.eval()(None, context(task=["x"]))
    assert greedy.index.item() == 2
    values = built(mb.Policy(None, "task", ["x"], mode="value", epsilon=0.3)).train()
    with torch.no_grad():
        values.table[0, 0, 0] = LOGITS
    routing = values(None, context(task=["x"] * 50_000))
    assert_close((routing.index == 2).float().mean(), torch.tensor(0.8), atol=0.01, rtol=0)
    assert routing.log_prob is None
    assert_close(routing.value, LOGITS.expand(50_000, 3))


@pytest.mark.parametrize("dense", [True, False])
def test_gumbel_weights_are_one_hot_with_the_gradient_of_the_relaxation(dense):
    router = built(mb.Policy(None, "task", ["x"], mode="gumbel", temperature=0.7, dense=dense)).train()
    with torch.no_grad():
        router.table[0, 0, 0] = LOGITS
    routing = router(None, context(task=["x"] * 20_000))
    hard = routing.dense(3)
    assert ((hard == 0) | (hard == 1)).all() and (hard.sum(-1) == 1).all()  # to the bit
    assert_close(hard.mean(0).detach(), LOGITS.softmax(-1), atol=0.015, rtol=0)
    worth = torch.randn(20_000, 3)
    (got,) = torch.autograd.grad((hard * worth).sum(), router.table)
    noise = (routing.state["noisy"] - LOGITS.log_softmax(-1)).detach()
    free = LOGITS.clone().requires_grad_()
    soft = torch.softmax((free.log_softmax(-1) + noise) / 0.7, -1)
    seen = worth if dense else worth * hard.detach()
    assert_close(got[0, 0, 0], torch.autograd.grad((soft * seen).sum(), free)[0], rtol=1e-3, atol=1e-2)


def test_straight_through_weights_are_one_hot_with_the_gradient_of_the_policy():
    router = built(mb.Policy(None, "task", ["x"], mode="straight-through")).train()
    with torch.no_grad():
        router.table[0, 0, 0] = LOGITS
    weights, worth = router(None, context(task=["x"] * 4)).weights, torch.randn(4, 3)
    assert ((weights == 0) | (weights == 1)).all() and (weights.sum(-1) == 1).all()
    (got,) = torch.autograd.grad((weights * worth).sum(), router.table)
    free = LOGITS.clone().requires_grad_()
    assert_close(got[0, 0, 0], torch.autograd.grad((free.softmax(-1) * worth).sum(), free)[0])


def test_a_colder_relaxation_is_nearer_to_a_choice():
    tops = []
    for temperature in (5.0, 1.0, 0.1):
        router = built(mb.Policy(None, "task", ["x"], mode="gumbel", temperature=temperature)).train()
        noisy = router(None, context(task=["x"] * 500)).state["noisy"]
        tops.append((noisy / temperature).softmax(-1).max(-1).values.mean())
    assert tops[0] < tops[1] < tops[2] and tops[2] > 0.9


def test_a_policy_adds_its_losses_in_training():
    router = built(mb.Policy("token", entropy=0.1, information=0.5)).train()
    nn.init.normal_(router.gate)
    x, mask = torch.randn(2, 4, 8), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    routing = router(x, mb.Context(arguments={"attention_mask": mask}))
    logits = x @ router.gate[0, 0].mT
    assert_close(routing.losses["entropy"], -0.1 * losses.entropy(logits[mask.bool()]))
    assert_close(routing.losses["information"], -0.5 * losses.information(logits, mask))
    assert not router.eval()(x, context()).losses


def test_a_critic_learns_what_a_state_is_worth_and_leaves_x_alone():
    router = built(mb.Policy("example", "task", ["x", "y"], critic=True)).train()
    x = torch.randn(6, 8, requires_grad=True)
    routing = router(x, context(task=["x", "y"] * 3))
    assert routing.value.shape == (6,)
    losses.actor_critic(routing.log_prob, routing.value, torch.randn(6)).backward()
    assert router.worth.grad.abs().sum() > 0 and router.read.grad.abs().sum() > 0
    token = built(mb.Policy("token", critic=True)).train()
    assert token(torch.randn(2, 3, 8), context()).value.shape == (2, 3)
    with pytest.raises(CompositionError, match="critic"):
        mb.Policy(mode="value", critic=True)


def test_given_choices_are_taken_and_scored():
    router = built(mb.Policy("example", none=True)).train()
    x, given = torch.randn(3, 8), torch.tensor([2, -1, 0])
    with router.given(given):
        routing = router(x, context())
    assert torch.equal(routing.index[:, 0], given)
    log_p = routing.state["logits"].log_softmax(-1)
    assert_close(routing.log_prob, torch.stack([log_p[0, 2], log_p[1, 3], log_p[2, 0]]))
    assert router.choices is None


def test_a_path_has_a_policy_for_each_site():
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    router = mb.Policy("example", path=True, critic=True)
    bay = mb.attach(net, [nn.Linear], {"a": mb.LoRA(2), "b": mb.LoRA(2)}, router)
    net.train()(torch.randn(5, 8))
    routing = bay.routing()
    assert routing.index.shape == (2, 5, 1) and routing.log_prob.shape == (5,) and routing.value.shape == (5,)
    log_p = routing.state["logits"].log_softmax(-1)
    assert_close(routing.log_prob, log_p.gather(-1, routing.index).sum((0, 2)))
    assert len(router.table) == 2 and router.gate.shape == (2, 1, 2, 8)


def test_a_router_learns_from_a_reward():
    """Two modules, of which each is right for half of the examples; the reward is −loss."""
    net = nn.Linear(8, 1)
    nn.init.zeros_(net.weight), nn.init.zeros_(net.bias)
    up, down = nn.Linear(8, 1), nn.Linear(8, 1)
    for module, value in ((up, 1.0), (down, -1.0)):
        nn.init.zeros_(module.weight), nn.init.constant_(module.bias, value)
    layer = mb.Modular(None, {"up": up, "down": down}, mb.Policy(entropy=1e-3), mb.Mixture(), features=8)
    optimiser, baseline = torch.optim.Adam(layer.router.parameters(), lr=0.05), methods.RunningMean()
    for _ in range(150):
        x = torch.randn(64, 8)
        with methods.drawn(layer) as routings:
            loss = (layer(x)[:, 0] - x[:, 0].sign()).square()
        step = losses.reinforce(routings.log_prob, -loss, baseline(-loss))
        optimiser.zero_grad()
        step.backward()
        optimiser.step()
    x = torch.randn(500, 8)
    assert (layer.eval()(x)[:, 0] == x[:, 0].sign()).float().mean() > 0.9


def test_draws_are_kept_once_and_only_within_the_block():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    bay = mb.attach(net, [nn.Linear], {"a": mb.LoRA(2), "b": mb.LoRA(2)}, lambda: mb.Policy("token"))
    net.train()
    with methods.drawn(bay) as routings:
        net(torch.randn(3, 5, 8))
    net(torch.randn(3, 5, 8))
    assert len(routings) == 2 and routings.log_prob.shape == (3,)
    assert_close(routings.log_prob, sum(r.log_prob.sum(1) for r in routings))
    with pytest.raises(CallError, match="drawn"):
        assert methods.Drawn().log_prob


def test_a_running_mean_lags_behind():
    mean = methods.RunningMean(0.5)
    assert mean(torch.tensor([1.0, 3.0])) == 2
    assert mean(torch.tensor([4.0])) == 2
    assert mean(torch.tensor([0.0])) == 3


# Recursion, dispatchers, agents


class Plus(nn.Module):
    def __init__(self, n: float):
        super().__init__()
        self.n = n

    def forward(self, x):
        return x + self.n


def blocks(**by_name: float) -> dict[str, nn.Module]:
    return {name: Plus(n) for name, n in by_name.items()}


def test_networks_of_ones_own_that_get_as_many_rows_are_run_apart():
    layer = mb.Modular(None, blocks(one=1.0, ten=10.0), mb.Uniform(), mb.Mixture(), features=1)
    y = layer(torch.zeros(2, 1), routing=mb.Routing(index=torch.tensor([[0], [1]])))
    assert y[:, 0].tolist() == [1.0, 10.0]


class Program(mb.Router):
    """Rows choose by what they are: 1 adds, 2 halts for this step."""

    def forward(self, x, c):
        step = c.state.get("step", 0)
        return mb.Routing(index=torch.tensor([[0], [0 if step != 1 else -1], [-1 if step else 1]]))


def test_recursion_applies_what_the_router_chooses_next():
    layer = mb.Modular(None, blocks(one=1.0, ten=10.0), Program(), mb.Recursion(3), features=2)
    want = torch.tensor([[3.0], [2.0], [10.0]]).expand(3, 2)
    assert_close(layer(torch.zeros(3, 2)), want)
    adapter = mb.Modular(nn.Linear(2, 2), {"one": mb.LoRA(1), "ten": mb.LoRA(1)}, Program(), mb.Recursion(2))
    x = torch.randn(3, 2)
    assert_close(adapter(x)[2], adapter.f(x[2]))  # one step, and then it passes
    assert_close(adapter(x)[0], adapter.f(adapter.f(x[0])))


def test_losses_of_every_step_are_the_bay_s():
    net, modules = nn.Sequential(nn.Linear(4, 4)), {n: mb.LoRA(1) for n in "ab"}
    bay = mb.attach(net, "0", modules, lambda: mb.TopK(1, balance=0.1), mb.Recursion(3), name="deep")
    net.train()(torch.randn(5, 4))
    assert list(bay.losses()) == ["deep.balance"]
    assert [name for name, _ in bay.session.last.losses] == ["deep.balance"] * 3


def test_a_row_that_halts_stays_as_it_is():
    layer = mb.Modular(None, blocks(one=1.0, ten=10.0), Program(), mb.Recursion(3, halt=True), features=2)
    assert_close(layer(torch.zeros(3, 2)), torch.tensor([[3.0], [1.0], [10.0]]).expand(3, 2))


def test_recursion_refuses_what_it_cannot_do():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    mb.attach(net, [nn.Linear], {"a": mb.LoRA(2)}, mb.Policy(), mb.Recursion(2))
    with pytest.raises(CompositionError, match="callable"):
        net(torch.randn(2, 8))
    wide = mb.Modular(None, {"a": nn.Linear(8, 6)}, mb.Policy(), mb.Recursion(2), features=8)
    with pytest.raises(CompositionError, match="can't go in again"):
        wide(torch.randn(2, 8))
    with pytest.raises(CompositionError, match="depth=0"):
        mb.Recursion(0)


def test_an_agent_a_task_routes_by_depth_and_passes_on():
    agents = mb.Policy(None, "task", ["x", "y"], depth=3, none=True)
    layer = mb.Modular(None, blocks(one=1.0, ten=10.0), agents, mb.Recursion(3), features=2).eval()
    with torch.no_grad():
        for task, path in enumerate([(0, 2, 1), (1, 1, 2)]):  # 2 is to pass on
            for step, choice in enumerate(path):
                agents.table[0, step, task, choice] = 1.0
    y = layer(torch.zeros(2, 2), task=["x", "y"])
    assert_close(y, torch.tensor([[11.0], [20.0]]).expand(2, 2))


def test_agents_learn_which_modules_their_tasks_need():
    agents = mb.Policy(None, "task", ["x", "y"], depth=2, none=True)
    layer = mb.Modular(None, blocks(one=1.0, ten=10.0), agents, mb.Recursion(2), features=1).train()
    learner = methods.WeightedPolicyLearner(agents, rate=0.1)
    wanted = {"x": 11.0, "y": 1.0}
    for _ in range(150):
        tasks = ["x", "y"] * 4
        with methods.drawn(layer) as routings:
            y = layer(torch.zeros(8, 1), task=tasks)[:, 0]
        right = (y == torch.tensor([wanted[t] for t in tasks])).float() * 2 - 1
        learner.step(routings, tasks, right)
    layer.eval()
    assert layer(torch.zeros(2, 1), task=["x", "y"])[:, 0].tolist() == [11.0, 1.0]
    with pytest.raises(CompositionError, match="table of tasks"):
        methods.WeightedPolicyLearner(built(mb.Policy("example")))


def test_a_dispatcher_sends_rows_to_agents():
    router = built(mb.Dispatch(mb.Policy("example"), [mb.Policy(None), mb.Policy("example", entropy=0.1)])).train()
    assert router.dispatcher.names == ("agent 0", "agent 1")
    x = torch.randn(6, 8)
    given = ([0, 1, 0, 1, 1, 0], [2], [0, 1, 2, 0, 1, 2])
    parts = (router.dispatcher, *router.agents)
    with ExitStack() as stack:
        for part, choices in zip(parts, given, strict=True):
            stack.enter_context(part.given(torch.tensor(choices)))
        routing = router(x, context())
        first, plain, second = (part(x, context()) for part in parts)
    assert routing.index[:, 0].tolist() == [2, 1, 2, 0, 1, 2]
    agent = torch.where(routing.state["agent"] == 0, plain.log_prob, second.log_prob)
    assert_close(routing.log_prob, first.log_prob + agent)
    assert list(routing.losses) == ["agent 1.entropy"]
    router.rename("a", "z")
    assert router.agents[1].names == ("z", "b", "c")
    with pytest.raises(CompositionError, match="one choice a row"):
        built(mb.Dispatch(mb.Uniform(), [mb.Policy()]))(x, context())


# Switches


def test_switches_are_on_above_one_half():
    router = built(mb.Switches("example")).eval()
    nn.init.normal_(router.gate)
    x = torch.randn(5, 8)
    z = x @ router.gate[0].mT + router.table[0, 0]
    assert torch.equal(router(x, context()).dense(3), (torch.sigmoid(z) > 0.5).float())
    layer = mb.Modular(nn.Linear(8, 8), {n: nn.Linear(8, 8) for n in "abc"}, router, mb.WeightedSum()).eval()
    y = layer(x)
    on, fx = router(x, context()).dense(3), layer.f(x)
    want = fx + sum(on[:, i : i + 1] * (p.network(x) - fx) for i, p in enumerate(layer.order))
    assert_close(y, want)


def test_switches_are_drawn_with_their_probability():
    router = built(mb.Switches(label="task", labels=["x"], mode="sample", start=0.8)).train()
    with torch.no_grad():
        router.table[0, 0] = LOGITS
    routing = router(None, context(task=["x"] * 20_000))
    on = routing.dense(3)
    assert_close(on.mean(0), LOGITS.sigmoid(), atol=0.015, rtol=0)
    p = LOGITS.sigmoid()
    want = (on * p.log() + (1 - on) * (1 - p).log()).sum(-1)
    assert_close(routing.log_prob, want)
    fresh = built(mb.Switches(start=0.8))
    assert_close(fresh.table.sigmoid(), torch.full((1, 1, 3), 0.8), atol=1e-3, rtol=0)


@pytest.mark.parametrize("mode", ["gumbel", "soft", "straight-through"])
def test_switches_have_the_gradient_of_their_relaxation(mode):
    router = built(mb.Switches(label="task", labels=["x"], mode=mode, temperature=0.5)).train()
    with torch.no_grad():
        router.table[0, 0] = LOGITS
    state = torch.get_rng_state()
    weights, worth = router(None, context(task=["x"] * 4)).weights, torch.randn(4, 3)
    torch.set_rng_state(state)
    u = torch.rand(1, 4, 3).clamp(1e-6, 1 - 1e-6)[0]
    free = LOGITS.clone().requires_grad_()
    soft = (
        torch.sigmoid((free + torch.logit(u)) / 0.5) if mode != "straight-through" else torch.sigmoid(free).expand(4, 3)
    )
    if mode == "soft":
        assert_close(weights, soft)
    else:
        assert torch.equal(weights, (soft > 0.5).float())
    (got,) = torch.autograd.grad((weights * worth).sum(), router.table)
    assert_close(got[0, 0], torch.autograd.grad((soft * worth).sum(), free)[0])


def test_a_matrix_of_tasks_by_modules_is_the_mean_of_those_on():
    router = mb.Switches(label="task", labels=["x", "y"], normalise=True)
    layer = mb.Modular(None, {n: nn.Linear(8, 6) for n in "abc"}, router, mb.Mixture(), features=8).eval()
    with torch.no_grad():
        router.table[0] = torch.tensor([[1.0, -1.0, 2.0], [-1.0, -1.0, 1.0]])
    x = torch.randn(3, 8)
    a, _, c = (part.network(x) for part in layer.order)
    want = torch.stack([(a[0] + c[0]) / 2, c[1], torch.zeros(6)])
    assert_close(layer(x, task=["x", "y", None]), want)


def residual(layers: int) -> nn.Module:
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(layers)])

        def forward(self, x):
            for layer in self.layers:
                x = x + layer(x)
            return x

    return Net()


def test_ada_share_skips_layers_by_task_and_adds_its_losses():
    net, x = residual(3), torch.randn(2, 8)
    router = mb.Switches(
        label="task", labels=["s", "d"], mode="soft", temperature=5.0, path=True, sparsity=0.1, sharing=0.2
    )
    bay = mb.attach(net, "layers.*", {"layer": mb.Full()}, router, mb.Mixture(), name="policy")
    with torch.no_grad():
        router.table[..., 0] = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [2.0, -1.0]])
    h = x.clone()
    for i, layer in enumerate(net.layers):
        out = F.linear(h, layer.weight, layer.bias)  # which the copy starts as
        h = h + torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0]])[i].unsqueeze(-1) * out
    assert_close(net.eval()(x, task=["s", "d"]), h)
    net.train()(x, task=["s", "d"])
    z = router.table[..., 0]
    said = bay.losses()
    assert_close(said["policy.sparsity"], -0.1 * torch.log(1 - z.sigmoid()).mean(0).sum())
    far = (z.sigmoid()[:, 0] - z.sigmoid()[:, 1]).abs()
    assert_close(said["policy.sharing"], 0.2 * (far * torch.tensor([1.0, 2 / 3, 1 / 3])).sum())


def test_ada_share_opens_its_layers_from_the_last():
    net = residual(3)
    router = mb.Switches(label="task", labels=["s", "d"], mode="soft", path=True, last=1, sparsity=1.0)
    bay = mb.attach(net, "layers.*", {"layer": mb.Full()}, router, mb.Mixture(), name="policy")
    net.train()(torch.randn(2, 8), task=["s", "d"])
    weights = bay.routing().weights
    assert (weights[:2] == 1).all() and (weights[2] < 1).all()
    assert_close(bay.losses()["policy.sparsity"], F.softplus(router.table[2:, :, 0]).sum())
    methods.Anneal(bay, 3, last=(1, 3)).step()
    assert router.last == 2


def test_spot_tune_runs_a_block_as_it_was_or_tuned_by_example():
    net, x = residual(2), torch.randn(6, 8)
    router = mb.Switches("example", temperature=5.0, path=True)
    bay = mb.attach(net, "layers.*", {"tuned": mb.Full()}, router, name="spot")
    for p in bay.parameters("tuned"):
        nn.init.normal_(p, std=0.3)
    nn.init.normal_(router.gate)
    on = bay.state.router.eval()(x, context()).dense(1)  # (2, 6, 1)
    h = x
    for i, layer in enumerate(net.layers):
        tuned = bay.modulars[f"layers.{i}"].parts._modules["tuned"].tensors()
        frozen = F.linear(h, layer.weight, layer.bias)
        h = h + torch.where(on[i] > 0, F.linear(h, tuned["weight"], tuned["bias"]), frozen)
    assert_close(net.eval()(x), h)
    assert 0 < on.mean() < 1
    net.train()(x).square().sum().backward()
    assert router.gate.grad.abs().sum() > 0


# Random


def test_random_experts_are_drawn_evenly_and_averaged_outside_training():
    router = built(mb.Random()).train()
    drawn = torch.tensor([router(None, context()).index.item() for _ in range(3000)])
    assert_close(torch.bincount(drawn) / 3000, torch.full((3,), 1 / 3), atol=0.03, rtol=0)
    assert router(None, context()).host is not None  # one runs
    assert_close(router.eval()(None, context()).weights, torch.full((3,), 1 / 3))
    x = torch.randn(4, 5, 8)
    assert built(mb.Random("example", evaluate="random")).eval()(x, context()).index.shape == (4, 1)
    assert built(mb.Random("token")).train()(x, context()).index.shape == (4, 5, 1)


def test_module_dropout_has_the_mean_of_all_modules():
    router = built(mb.Random("example", drop=0.25)).train()
    weights = router(torch.randn(40_000, 8), context()).weights
    assert_close(weights.mean(0), torch.full((3,), 1 / 3), atol=0.01, rtol=0)
    kept = 1 / 3 / 0.75
    assert ((weights == 0) | ((weights - kept).abs() < 1e-6)).all()


def test_random_experts_come_to_agree():
    experts = {n: nn.Linear(8, 4) for n in "abc"}
    layer = mb.Modular(None, experts, mb.Random("example"), mb.Mixture(), features=8).train()
    optimiser, x = torch.optim.Adam(layer.parameters(), lr=0.03), torch.randn(64, 8)
    y, far = torch.randint(4, (64,)), []
    for _ in range(100):
        one, other = layer(x), layer(x)
        apart = losses.consistency(one, other)
        loss = F.cross_entropy(one, y) + F.cross_entropy(other, y) + 5.0 * apart
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        far.append(apart.item())
    assert sum(far[-10:]) < 0.2 * sum(far[:10])


# Paths, and their evolution


def path_bay(names="abcd", **options):
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    return net, mb.attach(net, [nn.Linear], {n: mb.FeedForward(4) for n in names}, mb.Path("task"), mb.Mixture())


def test_a_path_has_modules_of_its_own_at_each_site():
    net, bay = path_bay()
    router = bay.state.router
    router.set("x", [["a", "c", "a"], ["d"]])
    router.set("y", [["b"], ["a", "b", "d"]])
    x = torch.randn(3, 8)
    first, last = bay.modulars.values()

    def run(modular, x, *names):
        parts = [modular.parts._modules[name] for name in names]
        return sum(part.kind.forward(part.tensors(), x, None, context()) for part in parts)

    h = torch.stack([run(first, x[i : i + 1], *names)[0] for i, names in enumerate(("ac", "b"))])
    want = torch.stack([run(last, h[i : i + 1].relu(), *names)[0] for i, names in enumerate(("d", "abd"))])
    assert_close(net(x[:2], task=["x", "y"]), want)
    assert router.paths["x"] == [["a", "c"], ["d"]] and router.arguments() == {"label": "task", "paths": router.paths}
    bay.rename("a", "z").remove("d")
    assert router.paths == {"x": [["z", "c"], []], "y": [["b"], ["z", "b"]]}
    with pytest.raises(CompositionError, match="'nobody'"):
        router.set("w", [["nobody"], []])
    with pytest.raises(CompositionError, match="1 sites, and there are 2"):
        router.set("w", [["b"]])
    with pytest.raises(LabelError, match="'v'"):
        net(x, task="v")


def test_a_tournament_replaces_the_worse_by_a_mutation_of_the_better():
    _, bay = path_bay()
    net = methods.PathNet(bay, active=2, population=2, mutation=0.0).start("x")
    before, scores = net.paths.clone(), iter([0.3, 0.8])
    assert net.tournament(lambda: next(scores)) == 0.8
    assert torch.equal(net.paths[0], net.paths[1]) and net.generation == 1
    assert any(torch.equal(net.paths[0], path) for path in before)
    wide = methods.PathNet(bay, active=2, population=4)
    assert wide.mutation == 1 / 4
    wide.mutation = 1.0
    moved = (wide.mutated(torch.zeros(5000, 2, dtype=torch.long)) + 2) % 4 - 2  # −2 … 1, modulo 4
    share = torch.bincount(moved.flatten() + 2, minlength=4) / moved.numel()
    assert_close(share, torch.tensor([0.4, 0.2, 0.2, 0.2]), atol=0.02, rtol=0)  # −2 and 2 are one module


def test_path_net_freezes_the_winner_and_draws_the_rest_anew():
    model, bay = path_bay()
    net = methods.PathNet(bay, active=2, population=4).start("x")
    net.tournament(lambda: float(torch.rand(())))
    x = torch.randn(3, 8)
    y = model(x, task="x")
    state = {k: v.clone() for k, v in bay.modulars["0"].parts.state_dict().items()}
    path = net.finish()
    assert torch.equal(model(x, task="x"), y)
    for site, names in zip(("0", "2"), path, strict=True):
        for name, part in bay.modulars[site].parts.named_children():
            assert all(p.requires_grad == (name not in names) for p in part.parameters())
    after = bay.modulars["0"].parts.state_dict()
    for name in "abcd":
        key = (
            f"{name}.W_in"
            if f"{name}.W_in" in after
            else next(k for k in after if k.startswith(f"{name}.") and after[k].ndim == 2)
        )
        assert torch.equal(after[key], state[key]) == (name in path[0])
    net.start("y").tournament(lambda: 0.0)
    assert torch.equal(model(x, task="x"), y)
    with pytest.raises(BayError, match="start"):
        methods.PathNet(bay).tournament(lambda: 0.0)
    with pytest.raises(BayError, match="Policy"):
        other = nn.Sequential(nn.Linear(8, 8))
        methods.PathNet(mb.attach(other, "0", {"a": mb.LoRA(2)}, mb.Policy()))


# Expectation maximisation


def test_em_keeps_the_best_choice_of_each_example():
    layer = mb.Modular(None, blocks(one=1.0, ten=10.0), mb.Policy("example"), mb.Mixture(), features=1).train()
    em = methods.ModularNetwork(layer, size=40, samples=10)
    x = torch.zeros(40, 1)
    wanted = torch.where(torch.arange(40) % 2 == 0, 1.0, 10.0)
    rows = torch.randperm(40)
    log_likelihood = lambda: -(layer(x[rows])[:, 0] - wanted[rows]).square()
    score = em.expect(rows, log_likelihood)
    assert torch.equal(em.best[0], torch.arange(40) % 2)
    assert_close(score, torch.full((40,), math.log(0.5)), atol=1e-4, rtol=0)
    loss = em.loss(rows, log_likelihood)
    assert_close(loss, -score.mean())
    loss.backward()
    assert layer.router.table.grad is not None
    with pytest.raises(CompositionError, match=r"mb\.Policy"):
        methods.ModularNetwork(nn.Linear(2, 2), 3)


def test_em_keeps_the_choices_of_several_sites_together():
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    bay = mb.attach(net, [nn.Linear], {"a": mb.LoRA(2), "b": mb.LoRA(2)}, lambda: mb.Policy("example"))
    for p in bay.parameters():
        nn.init.normal_(p)
    em, x = methods.ModularNetwork(bay, size=16, samples=30), torch.randn(16, 8)
    target = net.eval()(x).detach()
    each = []
    for a in (0, 1):
        for b in (0, 1):
            first, second = (r.given(torch.full((16,), i)) for r, i in zip(em.routers, (a, b), strict=True))
            with first, second, methods.drawn(bay) as routings:
                fit = -(net(x) - target).square().sum(-1)
            each.append(fit + routings.log_prob)
    net.train()
    score = em.expect(torch.arange(16), lambda: -(net(x) - target).square().sum(-1))
    assert_close(score, torch.stack(each).max(0).values)


# Competition


def test_the_winner_takes_the_row_and_alone_learns():
    networks = {n: nn.Linear(4, 4) for n in "abc"}
    score = lambda outputs: -outputs.square().mean(-1)
    layer = mb.Modular(None, networks, mb.Uniform(), mb.Competition(score), features=4)
    x, c = torch.randn(6, 4), mb.Context()
    outputs = torch.stack([networks[n](x) for n in "abc"])
    winner = score(outputs).argmax(0)
    y = layer(x, context=c)
    assert_close(y, outputs[winner, torch.arange(6)])
    assert torch.equal(c.state["winner"], winner)
    y.sum().backward()
    for i, n in enumerate("abc"):
        assert_close(networks[n].bias.grad, torch.full((4,), float((winner == i).sum())))
    two = layer(x, routing=mb.Routing(index=torch.tensor([[0, 1]] * 6)))
    assert_close(two, outputs[score(outputs[:2]).argmax(0), torch.arange(6)])
    with pytest.raises(CompositionError, match="one a module and example"):
        mb.Modular(None, networks, mb.Uniform(), mb.Competition(lambda o: o.mean()), features=4)(x)


def test_competing_experts_take_a_mechanism_each():
    """Two shifts of the same data: the expert that undoes one best gets it, and gets better at it."""
    networks = {n: Shift() for n in "ab"}
    layer = mb.Modular(None, networks, mb.Uniform(), mb.Competition(lambda o: -o.square().mean(-1)), features=4)
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.05)
    shift = torch.tensor([3.0, -3.0])
    for _ in range(200):
        which = torch.randint(2, (64,))
        x = 0.1 * torch.randn(64, 4) + shift[which].unsqueeze(-1)
        loss = layer(x).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    got = sorted(network.by.mean().item() for network in networks.values())
    assert abs(got[0] + 3) < 0.2 and abs(got[1] - 3) < 0.2


class Shift(nn.Module):
    def __init__(self):
        super().__init__()
        self.by = nn.Parameter(0.5 * torch.randn(4))

    def forward(self, x):
        return x - self.by


# Schedules and rates


def test_annealing_goes_from_first_to_last():
    assert [methods.annealed(t, 10, 1.0, 0.0) for t in (0, 5, 10, 20)] == [1.0, 0.5, 0.0, 0.0]
    assert methods.annealed(5, 10, 4.0, 1.0, "exponential") == pytest.approx(2.0)
    assert methods.annealed(5, 10, 1.0, 0.0, "cosine") == pytest.approx(0.5)
    with pytest.raises(CompositionError, match="exponential"):
        methods.annealed(1, 2, 1.0, 0.0, "exponential")
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    bay = mb.attach(net, [nn.Linear], {"a": mb.LoRA(2)}, lambda: mb.Policy(epsilon=0.9))
    warm = methods.Anneal(bay, 4, temperature=(5.0, 1.0), epsilon=(0.4, 0.0))
    for _ in range(2):
        warm.step()
    for modular in bay.modulars.values():
        assert modular.router.temperature == 3.0 and modular.router.epsilon == 0.2
    with pytest.raises(CompositionError, match="'heat'"):
        methods.Anneal(bay, 4, heat=(1.0, 0.0))


def test_routers_learn_at_a_rate_of_their_own():
    net = nn.Sequential(nn.Linear(8, 8))
    bay = mb.attach(net, "0", {"a": mb.LoRA(2)}, mb.Policy())
    groups = {group["name"]: group for group in methods.two_speeds(bay, 1e-3, 10.0)}
    assert groups["modules.router"]["lr"] == pytest.approx(1e-2) and groups["modules.modules"]["lr"] == 1e-3
    assert set(map(id, groups["modules.router"]["params"])) == set(map(id, bay.state.router.parameters()))


# What must hold of all


LEARNED = {
    "sample": lambda: mb.Policy("example", entropy=0.1),
    "gumbel": lambda: mb.Policy("example", mode="gumbel"),
    "switches": lambda: mb.Switches("example"),
}


@pytest.mark.parametrize("make", LEARNED.values(), ids=LEARNED)
@pytest.mark.parametrize("training", [True, False])
def test_hard_routers_compile_and_run_in_bf16(make, training):
    modules = {n: mb.LoRA(2) for n in "abc"}
    layer = mb.Modular(nn.Linear(8, 8), modules, make(), mb.WeightedSum()).train(training)
    for p in layer.parts.parameters():
        nn.init.normal_(p)
    x = torch.randn(4, 8)
    if not training:
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert_close(compiled(x), layer(x))
    y = layer.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert y.dtype == torch.bfloat16 and y.isfinite().all()


@pytest.mark.parametrize("make", LEARNED.values(), ids=LEARNED)
def test_hard_routers_compile_in_training(make):
    layer = mb.Modular(nn.Linear(8, 8), {n: mb.LoRA(2) for n in "abc"}, make(), mb.WeightedSum()).train()
    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(torch.randn(4, 8))
    y.sum().backward()


def test_wrong_arguments_say_what_is_wrong():
    for make, says in [
        (lambda: mb.Policy(by="batch"), "by='batch'"),
        (lambda: mb.Policy(mode="hard"), "mode='hard'"),
        (lambda: mb.Policy(epsilon=2.0), "epsilon=2.0"),
        (lambda: mb.Switches(mode="hard"), "mode='hard'"),
        (lambda: mb.Switches(start=1.0), "start=1.0"),
        (lambda: mb.Switches(sparsity=1.0), "path=True"),
        (lambda: mb.Random(by="batch"), "by='batch'"),
        (lambda: mb.Random(drop=1.0), "drop=1.0"),
        (lambda: mb.Dispatch(mb.Policy(), []), "agents"),
    ]:
        with pytest.raises(CompositionError, match=says):
            make()
    with pytest.raises(LabelError, match="different"):
        mb.Policy(label="task")
    for make in (mb.Policy, lambda: mb.Switches("example")):
        with pytest.raises(CompositionError, match="token ids"):
            make().build(("a",), describe("ids", nn.Embedding(9, 6)))
        with pytest.raises(CompositionError, match="has 9"):
            built(make()).build(("a",), describe("wide", nn.Linear(9, 6)))


SAVED = {
    "policy": lambda: mb.Policy("example", "task", ["x", "y"], temperature=2.0, none=True, critic=True),
    "switches": lambda: mb.Switches("example", "task", ["x", "y"], start=0.7),
    "path": lambda: mb.Path("task", {"x": [["a"]], "y": [["b", "a"]]}),
    "dispatch": lambda: mb.Dispatch(mb.Policy(), [mb.Policy(None, "task", ["x", "y"]), mb.Policy(None)]),
}


@pytest.mark.parametrize("make", SAVED.values(), ids=SAVED)
def test_hard_routers_are_saved_and_copied(make, tmp_path):
    net = nn.Sequential(nn.Linear(8, 6))
    base = copy.deepcopy(net)
    bay = mb.attach(net, "0", {"a": mb.LoRA(2), "b": mb.LoRA(2)}, make(), name="bay")
    for p in [*bay.parameters(), *bay.state.router.parameters()]:
        nn.init.normal_(p)
    x, task = torch.randn(4, 8), ["x", "y", None, "x"]
    want = net.eval()(x, task=task)
    assert_close(copy.deepcopy(net)(x, task=task), want)
    bay.save(tmp_path)
    mb.load(base, tmp_path)
    assert_close(base.eval()(x, task=task), want)
