"""Losses and targets for a router that learns from a reward, as a policy does.

REINFORCE: Williams, 1992 (Machine Learning 8). Q-learning, SARSA and advantage actor-critic for routers: Rosenbaum,
Cases, Riemer and Klinger, "Routing Networks and the Challenges of Modular and Compositional Computation", 2019 (arXiv
1904.12774). Weighted policy learner: Abdallah and Lesser, 2006 (AAMAS); in routing networks: Rosenbaum, Klinger and
Riemer, 2018 (arXiv 1711.01239). RELAX: Grathwohl, Choi, Wu, Roeder and Duvenaud, 2018 (arXiv 1711.00123).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import System, systems

TESTS = "tests/test_hard.py::"


@systems(
    System(
        (74,),
        "losses.reinforce(routing.log_prob, reward, baseline)",
        (
            TESTS + "test_the_score_function_is_unbiased_with_and_without_a_baseline",
            TESTS + "test_a_router_learns_from_a_reward",
        ),
        "REINFORCE",
        section="4.2.2",
    )
)
def reinforce(log_prob: Tensor, reward: Tensor, baseline: Tensor | float = 0.0) -> Tensor:
    """−mean((R − b) log π(a)), whose gradient is that of −E[R], whatever b is, so long as it does not depend on a.

    log_prob: (…), of what was drawn. reward: (…), a number a draw, such as −loss; it gets no gradient. baseline: a
    running mean (`methods.RunningMean`), or the value of a critic (…), which gets no gradient here.
    """
    b = baseline.detach() if isinstance(baseline, Tensor) else baseline
    return -((reward.detach() - b) * log_prob).mean()


@systems(
    System(
        (76,),
        "losses.actor_critic(routing.log_prob, routing.value, reward)",
        (TESTS + "test_an_actor_critic_is_reinforce_and_a_regression_of_returns",),
        "Advantage actor-critic router",
        section="4.2.2",
    )
)
def actor_critic(log_prob: Tensor, value: Tensor, returns: Tensor, weight: float = 1.0) -> Tensor:
    """−mean((G − V) log π(a)) + weight · mean((G − V)²): the critic's V is the baseline, and learns the return G.

    All (…): of each decision. returns: the reward that follows a decision, `discounted`; or `target(…)` from the next
    decision's value, which bootstraps. No gradient of the first term reaches the critic.
    """
    returns = returns.detach()
    return reinforce(log_prob, returns, value) + weight * F.mse_loss(value, returns)


def discounted(rewards: Tensor, discount: float = 1.0) -> Tensor:
    """G_t = Σ_{s ≥ t} γ^{s−t} r_s along the first axis, the steps of a path. rewards: (t, …)."""
    total, out = torch.zeros_like(rewards[0]), []
    for reward in rewards.flip(0):
        total = reward + discount * total
        out.append(total)
    return torch.stack(out[::-1])


def target(reward: Tensor, after: Tensor | None = None, discount: float = 1.0) -> Tensor:
    """r + γ v(s'), without gradient; r alone after the last decision. after: (…), what the next state is worth."""
    return reward.detach() if after is None else reward.detach() + discount * after.detach()


@systems(
    System(
        (76,),
        "losses.q_learning(routing.value, routing.index[..., 0], reward, after.value)",
        (
            TESTS + "test_q_learning_finds_the_best_path_and_sarsa_the_value_of_its_policy",
            TESTS + "test_targets_by_hand",
        ),
        "Q-learning router",
        section="4.2.2",
    )
)
def q_learning(q: Tensor, action: Tensor, reward: Tensor, after: Tensor | None = None, discount: float = 1.0) -> Tensor:
    """mean (Q(s, a) − (r + γ max_a' Q(s', a')))², the target without gradient; r alone after the last decision.

    q, after: (…, n), the value of every choice here and at the next decision. action: (…), what was chosen, from 0; −1
    is the last column (a `Policy` that may choose none). The library of the paper's authors subtracts r from what is
    to come, and so counts it as a cost; here a reward adds.
    """
    best = None if after is None else after.max(-1).values
    return F.mse_loss(_of(q, action), target(reward, best, discount))


@systems(
    System(
        (76,),
        "losses.sarsa(routing.value, routing.index[..., 0], reward, after.value, after.index[..., 0])",
        (
            TESTS + "test_q_learning_finds_the_best_path_and_sarsa_the_value_of_its_policy",
            TESTS + "test_targets_by_hand",
        ),
        "SARSA router",
        section="4.2.2",
    )
)
def sarsa(
    q: Tensor,
    action: Tensor,
    reward: Tensor,
    after: Tensor | None = None,
    then: Tensor | None = None,
    discount: float = 1.0,
) -> Tensor:
    """mean (Q(s, a) − (r + γ Q(s', a')))² with a' what was in fact chosen next; shapes as `q_learning`, then: (…)."""
    chosen = None if after is None or then is None else _of(after, then)
    return F.mse_loss(_of(q, action), target(reward, chosen, discount))


def _of(q: Tensor, action: Tensor) -> Tensor:
    """The value of what was chosen; −1 is the last."""
    return q.gather(-1, (action % q.shape[-1]).unsqueeze(-1)).squeeze(-1)


def collaboration(action: Tensor, n: int, ratio: float = 0.3) -> Tensor:
    """ratio · the share of the batch that chose the same, (b,): what an agent gets for each choice that others make.

    action: (b,). Rosenbaum et al., 2018, have ratio 0.3 or 0.
    """
    counts = F.one_hot(action % n, n).to(torch.float32).mean(0)
    return ratio * counts[action % n]


@systems(
    System(
        (75,),
        "methods.WeightedPolicyLearner(policy).step(routings, task, reward)",
        (
            TESTS + "test_a_weighted_policy_moves_as_written_and_stays_on_the_simplex",
            TESTS + "test_agents_learn_which_modules_their_tasks_need",
        ),
        "Weighted policy learner",
        section="4.2.2",
    )
)
def weighted_policy(p: Tensor, action: Tensor, advantage: Tensor, rate: float = 0.01) -> Tensor:
    """A weighted policy learner's next policy: Π(π + η Δ), Δ_a = g (1 − π_a) if g ≥ 0, else g π_a; (n,).

    p: (n,), one agent's policy. action: (b,), what it chose, one after another. advantage: (b,), g = R − R̄. Π is the
    projection on the simplex. These are Abdallah and Lesser's weights, by which a policy slows down near the border
    that it moves to.
    """
    for a, g in zip(action.tolist(), advantage.tolist(), strict=True):
        step = torch.zeros_like(p)
        step[a] = rate * g * ((1 - p[a]) if g >= 0 else p[a])
        p = on_simplex(p + step)
    return p


def on_simplex(v: Tensor) -> Tensor:
    """The nearest point of the simplex, max(v − τ, 0) with Σ = 1. v: (…, n). Duchi et al., 2008 (ICML)."""
    n = torch.arange(1, v.shape[-1] + 1, device=v.device, dtype=v.dtype)
    down = v.sort(-1, descending=True).values
    excess = down.cumsum(-1) - 1
    last = (down > excess / n).sum(-1, keepdim=True) - 1
    return (v - excess.gather(-1, last) / (last + 1)).clamp(min=0)


def conditional(logits: Tensor, action: Tensor) -> Tensor:
    """z̃ ~ p(z | argmax z = a), z = log p + Gumbel noise: Gumbel scores again, given what they chose; (…, n).

    logits: (…, n); action: (…). The maximum is Gumbel, whatever it fell on; the others are Gumbel, cut off at it.
    """
    log_p = torch.log_softmax(logits, -1)
    u = torch.rand_like(log_p).clamp(torch.finfo(log_p.dtype).tiny, 1 - torch.finfo(log_p.dtype).eps)
    v = -torch.log(u)  # exponential
    top = v.gather(-1, action.unsqueeze(-1))
    rest = -torch.log(v / log_p.exp() + top)
    return rest.scatter(-1, action.unsqueeze(-1), -torch.log(top))


@systems(
    System(
        (82,),
        "losses.relax(routing.state['logits'], routing.state['noisy'], reward, control)",
        (
            TESTS + "test_relax_is_unbiased_and_varies_less_than_reinforce",
            TESTS + "test_conditional_scores_are_distributed_as_those_that_chose_the_same",
        ),
        "RELAX",
        section="4.2.2",
    )
)
def relax(logits: Tensor, noisy: Tensor, reward: Tensor, control: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """(a loss whose gradient to the logits is g, the squared size of g): g = −[(R − c(z̃)) ∇ log p(a) + ∇c(z) − ∇c(z̃)].

    logits: (…, n), with a graph. noisy: (…, n), z = log p + Gumbel noise, whose largest was chosen: a = argmax z.
    reward: (…). control: c, (…, n) → (…), guesses the reward from scores, and learns by making the second value small;
    whatever it is, the mean of g is the gradient of −E[R]. Both values are means over rows; the first gives the control
    no gradient, the second the logits none.
    """
    action = noisy.argmax(-1)
    free = logits.detach().requires_grad_()
    with torch.enable_grad():
        log_p = torch.log_softmax(free, -1)
        z = log_p + (noisy - torch.log_softmax(logits, -1)).detach()
        again = conditional(free, action)
        c, c_again = control(z), control(again)
        chosen = log_p.gather(-1, action.unsqueeze(-1)).squeeze(-1)
        (score,) = torch.autograd.grad(chosen.sum(), free, retain_graph=True)
        (pathwise,) = torch.autograd.grad((c - c_again).sum(), free, create_graph=True)
        slope = -((reward.detach() - c_again).unsqueeze(-1) * score + pathwise)
    rows = max(1, slope[..., 0].numel())
    return (slope.detach() * logits).sum() / rows, slope.square().sum(-1).mean()


@systems(
    System(
        (113,),
        "losses.information(logits)",
        (
            TESTS + "test_information_is_full_where_rows_are_sure_and_differ",
            TESTS + "test_a_policy_adds_its_losses_in_training",
        ),
        "Mutual information of a router",
        section="4.2.1",
    )
)
def information(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """I = H(mean p) − mean H(p), from 0 to log n: high where each row is sure, and the rows differ.

    logits: (…, n). mask: (…), 0 for rows that do not count. Its negative is a loss that keeps a router from collapse.
    """
    log_p = torch.log_softmax(logits, -1).reshape(-1, logits.shape[-1])
    count = log_p.new_ones(len(log_p)) if mask is None else mask.reshape(-1).to(log_p.dtype)
    share = (count / count.sum().clamp(min=1)).unsqueeze(-1)
    p = log_p.exp()
    mean = (share * p).sum(0)
    return (share * p * log_p).sum() - torch.special.xlogy(mean, mean).sum()


def consistency(logits: Tensor, other: Tensor) -> Tensor:
    """½ mean [KL(p‖q) + KL(q‖p)] of two passes through different modules. logits, other: (…, classes).

    Zuo et al., "Taming Sparsely Activated Transformer with Stochastic Experts" (THOR), 2022 (arXiv 2110.04260).
    """
    p, q = torch.log_softmax(logits, -1), torch.log_softmax(other, -1)
    return 0.5 * ((p.exp() - q.exp()) * (p - q)).sum(-1).mean()
