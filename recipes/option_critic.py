"""Option-critic in the four rooms: options that learn beside the policy that chooses among them, and a goal that moves.

Bacon, Harb and Precup, "The Option-Critic Architecture", 2017 (arXiv 1609.05140), algorithm 1, tabular, in the world of
the authors' code. After 1000 episodes the goal moves from the east doorway into the lower right room: which learner is
the first to find it again? Beside SARSA and an actor-critic, which have no options.

    y = A(f, x, {m_1 … m_n}, r(x, c), c), once a step

    x  (b,)               where each learner is: learners are rows of one batch, each with rooms and tables of its own
    m  Option             π_ω: the preferences of four actions
    r  PolicyOverOptions  ω ~ softmax(Q_Ω(x, ·)/τ) where the option in force hands control back, with β_ω(x); learned
                          from reward. The option in force is its state: in by c.state, out by Routing.state
    A  WeightedSum        of one option at weight one: call and return. An option acts until it hands control back
    f  none

Where it differs: the authors' code improves π and β where the agent arrives, with the option that is chosen there; this
file follows the paper's algorithm. As in the code, gradients of log π leave out the factor 1/τ. The rates are those of
the command that the authors give for the paper's figure, not the programme's defaults (0.01, 0.001 and 0.001).

    python recipes/option_critic.py [--learners 20] [--episodes 2000] [--smoke]
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import modbay as mb

LAYOUT = [
    "wwwwwwwwwwwww",
    "w     w     w",
    "w     w     w",
    "w           w",
    "w     w     w",
    "w     w     w",
    "ww wwww     w",
    "w     www www",
    "w     w     w",
    "w     w     w",
    "w           w",
    "w     w     w",
    "wwwwwwwwwwwww",
]
CELLS = [(i, j) for i in range(13) for j in range(13) if LAYOUT[i][j] == " "]  # 104
AROUND = [[CELLS.index(n) if (n := (i + di, j + dj)) in CELLS else CELLS.index((i, j))
           for di, dj in ((-1, 0), (1, 0), (0, -1), (0, 1))] for i, j in CELLS]  # fmt: skip
NEXT = np.array(AROUND)  # (104, 4): up, down, left, right; a wall leaves one where one is
FREE = [[n for n in row if n != cell] for cell, row in enumerate(AROUND)]
WAYS, FREE = np.array([len(row) for row in FREE]), np.array([(row * 4)[:4] for row in FREE])
DOORWAY = 62
LOWER_RIGHT = [68, 69, 70, 71, 72, 78, 79, 80, 81, 82, 88, 89, 90, 91, 92, 93, 99, 100, 101, 102, 103]


class Rooms:
    """The rooms of b learners in lockstep. A row whose episode is over spends one call on starting again (`fresh`)."""

    def __init__(self, args: argparse.Namespace, seed: int):
        self.random, self.args, learners = np.random.default_rng(seed), args, args.learners
        self.goal = np.full(learners, DOORWAY)
        self.episode, self.time = np.zeros((2, learners), dtype=int)
        self.steps = np.full((learners, args.episodes), np.nan)  # the result: steps to the goal by episode
        self.cell = self.start(learners)
        self.over = np.zeros(learners, dtype=bool)

    def start(self, n: int) -> np.ndarray:
        cell = self.random.integers(0, len(CELLS) - 1, n)
        return cell + (cell >= DOORWAY)  # anywhere but in the doorway

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(cell, whether it is the goal, for reward 1, whether the row is fresh and its action was not heeded)."""
        fresh, cell = self.over, NEXT[self.cell, action]
        slips = (cell != self.cell) & (self.random.random(len(cell)) < 1 / 3)
        cell = np.where(slips, FREE[cell, (self.random.random(len(cell)) * WAYS[cell]).astype(int)], cell)
        cell = np.where(fresh, self.start(len(cell)), cell) if fresh.any() else cell
        self.cell, done = cell, (cell == self.goal) & ~fresh
        self.time = np.where(fresh, 0, self.time + 1)
        self.over = done | (self.time >= self.args.cap)
        for row in np.flatnonzero(self.over):
            if self.episode[row] < self.args.episodes:
                self.steps[row, self.episode[row]] = self.time[row]
            self.episode[row] += 1
            if self.episode[row] == self.args.moves:
                self.goal[row] = self.random.choice(LOWER_RIGHT)
        return cell, done, fresh


@dataclass(frozen=True)
class Option(mb.Replacement):
    """π_ω: x (m,) places to the preferences (m, 4) of the actions; all alike when new."""

    batched: ClassVar[bool] = True
    places: int

    def init(self, sites: Sequence[mb.Site]) -> dict[str, dict[str, Tensor]]:
        return {site.name: {"preferences": site.zeros(self.places, 4)} for site in sites}

    def forward(self, params, x: Tensor, f, c: mb.Context) -> Tensor:
        table = params["preferences"]
        if table.ndim == 3:  # a group of options (g, places, 4), and x (g, m)
            x, table = x + self.places * torch.arange(len(table)).unsqueeze(-1), table.flatten(0, 1)
        return F.embedding(x, table)


class PolicyOverOptions(mb.Router):
    """The option in force stays with 1 − β_ω(x); otherwise ω ~ softmax(Q_Ω(x, ·)/τ).

    In: c.state["option"] (b,), −1 where none is. Out: the routing's value is Q_Ω(x, ω), its log-probability that of ω
    if there was a choice, its state the option in force; and of the one that was, β(x) ("returns") and the worth of
    staying with it, beside that of the best.
    """

    def __init__(self, places: int, temperature: float):
        super().__init__()
        self.places, self.temperature = places, temperature

    def build(self, names: Sequence[str], site: mb.Site) -> None:
        self.names = tuple(names)
        self.q = torch.nn.Parameter(torch.zeros(self.places, len(names)))
        self.returning = torch.nn.Parameter(torch.zeros(self.places * len(names)))

    def forward(self, x: Tensor, c: mb.Context) -> mb.Routing:
        was, q = c.state["option"], F.embedding(x, self.q)
        known = was.clamp(min=0)
        returns = self.returning[x * len(self.names) + known].sigmoid()
        log_p = (q.detach() / self.temperature).log_softmax(-1)
        option = torch.where((torch.rand_like(returns) < returns) | (was < 0), draw(log_p), was).unsqueeze(-1)
        state = {"option": option[:, 0], "returns": returns, "stay": q.detach().gather(-1, known.unsqueeze(-1))[:, 0],
                 "best": q.detach().amax(-1)}  # fmt: skip
        host = tuple((i,) for i in option[:, 0].tolist())
        value, log_prob = q.gather(-1, option)[:, 0], log_p.gather(-1, option)[:, 0]
        return mb.Routing(index=option, host=host, value=value, log_prob=log_prob, state=state)


def draw(log_p: Tensor) -> Tensor:
    """A sample (b,) of each row's distribution, by the Gumbel trick."""
    return (log_p - torch.empty_like(log_p).exponential_().log_()).argmax(-1)


def option_critic(args: argparse.Namespace, seed: int) -> tuple[np.ndarray, mb.Modular]:
    b, rooms = args.learners, Rooms(args, seed)
    places, first = b * len(CELLS), len(CELLS) * torch.arange(b)
    options = {f"option{i}": Option(places) for i in range(args.options)}
    agent = mb.Modular(None, options, PolicyOverOptions(places, args.temperature), mb.WeightedSum())
    critic = torch.zeros(places * args.options, 4)  # Q_U(x, ω, a)
    parameters = list(agent.parameters())
    x, option, last = first + torch.from_numpy(rooms.cell), torch.full((b,), -1), None
    while (rooms.episode < args.episodes).any():
        c = mb.Context(state={"option": option})
        routing = agent.router(x, c)
        preferences = agent.run(None, x, c, routing)
        now = routing.state
        if last is not None:  # learn from the step that led here
            at, log_pi, value, done, learns = last
            with torch.no_grad():
                u = now["stay"] + now["returns"] * (now["best"] - now["stay"])  # U(ω, x)
                target = done + args.discount * (1 - done) * u
                advantage = critic[at] - value if args.baseline else critic[at]
                critic[at] += args.lr_critic * learns * (target - critic[at])
            factors = (  # of the gradients of Q_Ω, log π_ω and β_ω: each has its rate, so descent has rate one
                args.lr_critic * learns * (value.detach() - target),
                -args.lr_intra * args.temperature * learns * advantage,
                args.lr_term * learns * (1 - done) * (now["stay"] - now["best"]),
            )
            torch.autograd.backward((value, log_pi, now["returns"]), factors)
            for p in parameters:
                if p.grad is not None:  # an option that no learner follows has none
                    p.data, p.grad = p.data.sub_(p.grad), None
        log_p = (preferences / args.temperature).log_softmax(-1)
        action = draw(log_p.detach())
        cell, done, fresh = (torch.from_numpy(a) for a in rooms.step(action.numpy()))
        at = (x * args.options + now["option"], action)
        last = at, log_p.gather(-1, action.unsqueeze(-1))[:, 0], routing.value, done.float(), (~fresh).float()
        x, option = first + cell, torch.where(fresh, -1, now["option"])
    return rooms.steps, agent


def flat(args: argparse.Namespace, seed: int, algorithm: str) -> np.ndarray:
    """SARSA, or an actor-critic with the value of a place as its baseline: softmax policies, the rates of the above."""
    b, rooms, random = args.learners, Rooms(args, seed), np.random.default_rng(seed + 1)
    row = np.arange(b)
    preferences, value = np.zeros((b, len(CELLS), 4)), np.zeros((b, len(CELLS)))
    sample = lambda p: (p / args.temperature + random.gumbel(size=p.shape)).argmax(-1)
    cell = rooms.cell
    action = sample(preferences[row, cell])
    while (rooms.episode < args.episodes).any():
        came, acted = cell, action
        cell, done, fresh = rooms.step(acted)
        action = sample(preferences[row, cell])
        if algorithm == "SARSA":
            later = preferences[row, cell, action]
            error = done + args.discount * ~done * later - preferences[row, came, acted]
            preferences[row, came, acted] += args.lr_critic * ~fresh * error
        else:
            error = (done + args.discount * ~done * value[row, cell] - value[row, came]) * ~fresh
            value[row, came] += args.lr_critic * error
            p = preferences[row, came] / args.temperature
            p = np.exp(p - p.max(-1, keepdims=True))
            preferences[row, came] -= args.lr_intra * (error / p.sum(-1))[:, None] * p
            preferences[row, came, acted] += args.lr_intra * error
    return rooms.steps


def main(argv: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--learners", type=int, default=20, help="independent runs, in lockstep")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--episodes", type=int, default=2000)
    parser.add_argument("--moves", type=int, default=1000, help="the episode before which the goal moves")
    parser.add_argument("--cap", type=int, default=1000, help="steps in an episode")
    parser.add_argument("--options", type=int, default=4)
    parser.add_argument("--discount", type=float, default=0.99)
    parser.add_argument("--temperature", type=float, default=1e-2)
    parser.add_argument("--lr-critic", type=float, default=0.5)
    parser.add_argument("--lr-intra", type=float, default=0.25)
    parser.add_argument("--lr-term", type=float, default=0.25)
    parser.add_argument("--baseline", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--only", choices=["option-critic", "SARSA", "actor-critic"])
    parser.add_argument("--smoke", action="store_true", help="a few episodes, to see that it runs")
    args = parser.parse_args(argv)
    if args.smoke:
        args.learners, args.episodes, args.moves, args.cap = 4, 6, 3, 50
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    print(f"mean steps to the goal ± error of the mean; {args.learners} learners, seed {args.seed}")
    m = args.moves
    windows = {"first 100": (0, 100), "before": (max(0, m - 100), m), "after: 50": (m, m + 50), "100": (m, m + 100)}
    windows |= {"to 300": (m + 100, m + 300)} if args.episodes > m + 100 else {}
    print(f"{'':14}" + "".join(f"{name:>15}" for name in windows))
    results = {}
    for name in [args.only] if args.only else ["option-critic", "SARSA", "actor-critic"]:
        begun = time.time()
        steps = option_critic(args, args.seed)[0] if name == "option-critic" else flat(args, args.seed, name)
        means = [steps[:, start:stop].mean(-1) for start, stop in windows.values()]
        line = "".join(f"{each.mean():8.1f} ± {each.std() / np.sqrt(len(each)):4.1f}" for each in means)
        print(f"{name:14}{line}  {time.time() - begun:.0f} s", flush=True)
        results[name] = steps
    return results


if __name__ == "__main__":
    main()
