"""Latent skills: tasks that are sums of a few skills, which nobody names, and which of them a task has is learned.

Ponti, Sordoni, Bengio and Reddy, "Combining Modular Skills in Multitask Learning" (Polytropon), 2022 (arXiv
2202.13914); Caccia et al., "Multi-Head Adapter Routing for Cross-Task Generalization" (MHR), 2023 (arXiv 2211.03831).
Built tasks, on which what was found can be held against what is true:

    y_t = (W + 1/k Σ_{s ∈ S_t} b_s a_sᵀ) x + noise,    S_t two of six skills

    f  W               known, fixed
    m  LoRA(1)         six of them; private: one a task of rank two, shared: one of rank six
    r  Skills          Z (tasks, skills), or with heads (tasks, heads, skills); private: ByLabel, shared: Fixed
    A  ParameterAverage, of A and B apart, as Polytropon's; or of="deltas", of the products that tasks are made of

Then new tasks come, of pairs that no task had, with few rows: Polytropon learns their row of Z alone, modules frozen
(MHR-z); a shared module is learned on, and a private one from nothing.

test, new: mean squared error, over that of W alone. purity: the share of (task, skill) that are told right, a gate
counting if it is above half of its task's largest, under the best match of learned skills to true ones (Hungarian).

    of seeds 0–2             test     new  purity
    shared                  0.688   0.277
    private                 0.006   0.579
    Polytropon              0.319   0.502   0.808
    MHR, 4 heads            0.326   0.550   0.687
    Polytropon, of products 0.005   0.010   1.000

Averages of A and of B have cross terms b_i a_j that no task has: they are not the world that made these tasks, and show
it. Averaged as products, the skills are found exactly, and eight rows are enough for a new pair of them.

    python recipes/latent_skills.py [--steps 1000] [--seeds 0 1 2] [--smoke]
"""

import argparse
import copy
import itertools
import logging
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import modbay as mb

WIDE, SKILLS, EACH, NOISE = 16, 6, 2, 0.05


class World:
    """The tasks of one seed: known ones, and new ones, of other pairs of skills."""

    def __init__(self, seed: int):
        draw = torch.Generator().manual_seed(seed)
        normal = lambda *shape: torch.randn(*shape, generator=draw)
        self.draw, self.w = draw, normal(WIDE, WIDE) / WIDE**0.5
        self.a, self.b = normal(SKILLS, WIDE), normal(SKILLS, WIDE) / WIDE**0.5
        pairs = list(itertools.combinations(range(SKILLS), EACH))
        order = torch.randperm(len(pairs), generator=draw).tolist()
        self.pairs = [pairs[i] for i in order]
        self.known, self.new = range(11), range(11, len(pairs))

    def name(self, task: int) -> str:
        return f"t{task}"

    def rows(self, task: int, n: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(n, WIDE, generator=self.draw)
        skills = list(self.pairs[task])
        delta = torch.einsum("so,si->oi", self.b[skills], self.a[skills]) / EACH
        y = x @ (self.w + delta).mT
        return x, y + NOISE * torch.randn(y.shape, generator=self.draw)

    def allocation(self) -> Tensor:
        z = torch.zeros(len(self.known), SKILLS)
        for row, task in zip(z, self.known, strict=True):
            row[list(self.pairs[task])] = 1.0
        return z


def network(world: World, way: str) -> tuple[nn.Module, mb.Bay]:
    net = nn.Sequential(nn.Linear(WIDE, WIDE, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(world.w)
    labels = [world.name(task) for task in world.known]
    modules, router, aggregator = {f"skill{i}": mb.LoRA(1) for i in range(SKILLS)}, None, None
    if way == "private":
        modules, router = dict.fromkeys(labels, mb.LoRA(EACH)), mb.ByLabel("task")
    elif way == "shared":
        modules, router = {"shared": mb.LoRA(SKILLS)}, mb.Fixed({"shared": 1.0})
    else:
        router = mb.Skills("task", labels, heads=4 if way == "MHR" else 1)
        aggregator = mb.ParameterAverage("deltas" if "products" in way else "parameters")
    return net, mb.attach(net, at="0", modules=modules, router=router, aggregator=aggregator, name="task")


def call(net: nn.Module, way: str, x: Tensor, names: Sequence[str]) -> Tensor:
    return net(x) if way == "shared" else net(x, task=list(names))


def learn(net: nn.Module, bay: mb.Bay, way: str, batch, steps: int, lr: float = 1e-2) -> None:
    optimiser = torch.optim.Adam(bay.parameter_groups(lr, router_lr=5 * lr))
    net.train()
    for _ in range(steps):
        x, y, names = batch()
        loss = F.mse_loss(call(net, way, x, names), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    net.eval()


def error(net: nn.Module, way: str, world: World, task: int, as_name: str | None = None) -> float:
    """The mean squared error over that of W alone."""
    x, y = world.rows(task, 500)
    with torch.no_grad():
        got = call(net, way, x, [as_name or world.name(task)] * len(x))
    return (F.mse_loss(got, y) / F.mse_loss(x @ world.w.mT, y)).item()


def purity(world: World, bay: mb.Bay) -> float:
    gates = torch.sigmoid(bay.state.router.logits.detach())
    gates = gates.mean(1) if gates.ndim == 3 else gates
    found, true = (gates > gates.amax(-1, keepdim=True) / 2).float(), world.allocation()
    agree = (found.unsqueeze(2) == true.unsqueeze(1)).float().mean(0)  # (learned, true)
    rows, columns = linear_sum_assignment(-agree.numpy())
    return agree[rows, columns].mean().item()


def new_task(net: nn.Module, bay: mb.Bay, way: str, world: World, task: int, rows: int, steps: int) -> float:
    """The error on a task that comes with a few rows, after learning from these."""
    net = copy.deepcopy(net)
    bay, name = mb.bays(net)["task"], world.name(task)
    x, y = world.rows(task, rows)
    if way == "private":
        bay.freeze().add(name, mb.LoRA(EACH))
    elif way != "shared":
        bay.freeze()
        bay.state.router.extend(name)
        bay.state.router.mode = "sigmoid"  # few rows: nothing is drawn
    learn(net, bay, way, lambda: (x, y, [name] * rows), steps)
    return error(net, way, world, task)


WAYS = ("shared", "private", "Polytropon", "MHR", "Polytropon, of products")


def run(way: str, seed: int, steps: int, rows: int, few: int) -> dict:
    torch.manual_seed(seed)
    world = World(seed)
    net, bay = network(world, way)
    data = {task: world.rows(task, rows) for task in world.known}

    def batch():
        picked = torch.randint(rows, (len(data), 8), generator=world.draw)
        x = torch.cat([data[task][0][i] for task, i in zip(data, picked, strict=True)])
        y = torch.cat([data[task][1][i] for task, i in zip(data, picked, strict=True)])
        return x, y, [world.name(task) for task in data for _ in range(8)]

    learn(net, bay, way, batch, steps)
    test = sum(error(net, way, world, task) for task in world.known) / len(world.known)
    new = [new_task(net, bay, way, world, task, few, max(1, steps // 5)) for task in world.new]
    skilled = way not in ("shared", "private")
    return {"way": way, "seed": seed, "test": test, "new": sum(new) / len(new),
            "purity": purity(world, bay) if skilled else float("nan")}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=200, help="of each task to learn from")
    parser.add_argument("--few", type=int, default=8, help="rows of a new task")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--smoke", action="store_true", help="a few steps of one seed")
    given = parser.parse_args(argv)
    logging.getLogger("modbay").setLevel(logging.ERROR)  # optimisers are made anew where parameters are
    if given.smoke:
        given.steps, given.seeds = 10, [0]
    print(f"{'':26}{'test':>8}{'new':>8}{'purity':>8}   of {len(given.seeds)} seeds")
    results = []
    for way in WAYS:
        start = time.time()
        mine = [run(way, seed, given.steps, given.rows, given.few) for seed in given.seeds]
        results += mine
        test, new, pure = (sum(one[key] for one in mine) / len(mine) for key in ("test", "new", "purity"))
        print(f"{way:26}{test:8.3f}{new:8.3f}{pure:8.3f}   {time.time() - start:.0f} s", flush=True)
    return results


if __name__ == "__main__":
    main()
