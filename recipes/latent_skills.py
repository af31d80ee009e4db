"""Latent skills: tasks that are averages of a few skills, which nobody names, and which of them a task has is learned.

Ponti, Sordoni, Bengio and Reddy, "Combining Modular Skills in Multitask Learning" (Polytropon), 2022 (arXiv
2202.13914); Caccia et al., "Multi-Head Adapter Routing for Cross-Task Generalization" (MHR), 2023 (arXiv 2211.03831).
Built tasks, on which what was found can be held against what is true: each has one to three of four skills, and

    y_t = (W + Δ_t) x + noise,    Δ_t = 1/|S_t| Σ_{s ∈ S_t} Δ_s

of the whole weight ("one average"), or of each half of the outputs with a set S_t of its own ("two halves").

    f  W                  known, fixed
    m  SparseDelta(1.0)   ΔW of every entry; four of them; private: one a task, shared: one for all
    r  Skills             Z (tasks, skills), or with two heads (tasks, 2, skills); private, shared: ByLabel;
                          mode="linear" for the hypernetwork, whose gates are any numbers
    A  ParameterAverage   of ΔW; with heads, of the halves of ΔW apart

Routers learn ten times as fast as modules, as Polytropon's do. It and MHR find the skills from about half of their
starts, and hang in a local optimum from the others: six are made, and the one is kept that fits the known tasks' own
rows best; the last column has the starts of purity .95 or more. Then the four tasks come that are left, of sets that no
known task has (in that half), with eight rows of 16 features: learned by routing alone, modules frozen (MHR-z); with
the modules, too ("all", Polytropon's own way; shared learns on, private starts from nothing); or from the mean of the
modules ("mean", MHR-μ).

test, routing, all, mean: mean squared error, over that of W alone. purity: the share of (task, skill) that are told
right, a gate counting if it is above half of its task's largest, under the best match of modules to skills (Hungarian).

    of seeds 0–4, one average     test  routing    all   mean  purity  starts
    shared                       0.601           0.330
    private                      0.004           0.617
    hypernetwork                 0.004    0.006  0.103  0.659   0.700
    Polytropon                   0.004    0.008  0.109  0.278   1.000  17 of 30
    MHR                          0.004    0.008  0.110  0.278   1.000  20 of 30

    of seeds 0–4, two halves
    shared                       0.587           0.381
    private                      0.004           0.640
    hypernetwork                 0.126    0.446  0.336  0.832   0.652
    Polytropon                   0.145    0.454  0.318  0.377   0.792  0 of 30
    MHR                          0.004    0.008  0.120  0.305   1.000  17 of 30

Purity is 1.000 of each seed in those rows, and .48 before anything is learned. By routing alone a new task's error is
at most 0.009 there of any seed, where shared has at least 0.266 and private 0.583: eight rows fix four or eight gates,
but not 256 entries. The hypernetwork is as good on new tasks of one average, yet its gates name no skill. The mean of
modules does not win everywhere: from 0.201 to 0.333 of one average, where shared has from 0.266 to 0.373.

Tried before, in a sketch, on other draws: six and eight skills, pairs alone, and LoRAs whose A and B are averaged
apart, of which at best half of the starts found the skills, and mostly fewer; an Indian buffet prior of 1e-2, which
hindered; routers two, five and twenty times as fast. An earlier form had tasks of summed products b aᵀ, which averages
of A and of B cannot be: Polytropon of LoRA had purity .81 there, MHR .69, and averages of products 1.00.

    python recipes/latent_skills.py [--steps 600] [--starts 6] [--few 8] [--seeds 0 1 2 3 4] [--smoke]
"""

import argparse
import copy
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from statistics import fmean

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import modbay as mb
from modbay import methods

WIDE, SKILLS, MOST, KNOWN, NOISE = 16, 4, 3, 10, 0.05
WORLDS = {"one average": 1, "two halves": 2}
WAYS = ("shared", "private", "hypernetwork", "Polytropon", "MHR")
SKILLED, HOW = WAYS[2:], ("routing", "all", "mean")
COLUMNS = ("test", "routing", "all", "mean", "purity")
Batch = tuple[Tensor, Tensor, list[str]]  # x, y and the tasks


class World:
    """The tasks of one seed: known ones, and new ones, of sets of skills that no known task has."""

    def __init__(self, seed: int, parts: int):
        self.draw = torch.Generator().manual_seed(seed)
        normal = lambda *shape: torch.randn(*shape, generator=self.draw) / WIDE**0.5
        self.w, skills = normal(WIDE, WIDE), normal(SKILLS, parts, WIDE // parts, WIDE)
        sets = [one for k in range(1, MOST + 1) for one in itertools.combinations(range(SKILLS), k)]
        z = torch.tensor([[float(s in one) for s in range(SKILLS)] for one in sets])
        orders = [torch.randperm(len(sets), generator=self.draw) for _ in range(parts)]
        self.z = torch.stack([z[order] for order in orders], 1)  # (tasks, parts, skills)
        means = torch.einsum("tps,spoi->tpoi", self.z / self.z.sum(-1, keepdim=True), skills)
        self.delta = means.flatten(1, 2)  # (tasks, outputs, inputs)
        self.known, self.new = range(KNOWN), range(KNOWN, len(sets))

    def rows(self, tasks: Sequence[int], n: int) -> Batch:
        """n rows of each task."""
        x = torch.randn(len(tasks), n, WIDE, generator=self.draw)
        y = x @ (self.w + self.delta[list(tasks)]).mT
        y = y + NOISE * torch.randn(y.shape, generator=self.draw)
        return x.flatten(0, 1), y.flatten(0, 1), [str(task) for task in tasks for _ in range(n)]


def network(world: World, way: str) -> mb.Bay:
    linear = nn.Linear(WIDE, WIDE, bias=False)
    linear.weight.data.copy_(world.w)
    net = nn.Sequential(linear)
    kind, tasks = mb.SparseDelta(density=1.0), [str(task) for task in world.known]
    if way == "private":
        return mb.attach(net, "0", dict.fromkeys(tasks, kind), mb.ByLabel("task"), name="task")
    if way == "shared":
        table = dict.fromkeys(tasks, "shared")
        return mb.attach(net, "0", {"shared": kind}, mb.ByLabel("task", table), name="task")
    mode = "linear" if way == "hypernetwork" else "gumbel"
    router = mb.Skills("task", tasks, mode, heads=2 if way == "MHR" else 1)
    return mb.attach(net, "0", {f"skill{i}": kind for i in range(SKILLS)}, router, mb.ParameterAverage(), name="task")


def call(bay: mb.Bay, x: Tensor, names: list[str]) -> Tensor:
    """By the tasks' names, unless the bay is set to use one module."""
    return bay.model(x, task=names) if bay.state.chosen is None else bay.model(x)


def learn(bay: mb.Bay, batch: Callable[[], Batch], steps: int, lr: float) -> None:
    """Adam, the router ten times as fast as modules, both slowing down to nothing."""
    net = bay.model
    optimiser = torch.optim.Adam(methods.two_speeds(bay, lr, ratio=10))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    net.train()
    for _ in range(steps):
        x, y, names = batch()
        loss = F.mse_loss(call(bay, x, names), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    net.eval()


@torch.no_grad()
def error(bay: mb.Bay, world: World, rows: Batch) -> float:
    """The mean squared error over that of W alone."""
    x, y, names = rows
    return (F.mse_loss(call(bay, x, names), y) / F.mse_loss(x @ world.w.mT, y)).item()


def purity(world: World, bay: mb.Bay) -> float:
    """The share of (task, skill) told right under the best match of modules to skills; the mean of the parts' own."""
    router = bay.state.router
    if not isinstance(router, mb.Skills):
        return float("nan")
    z = router.logits.detach()
    gates = z.abs() if router.mode == "linear" else torch.sigmoid(z)
    gates = gates.view(len(z), -1, SKILLS)
    found, true = torch.broadcast_tensors((gates > gates.amax(-1, keepdim=True) / 2).float(), world.z[:KNOWN])
    agree = (found.unsqueeze(3) == true.unsqueeze(2)).float().mean(0)  # (parts, learned, true)
    return fmean(part[linear_sum_assignment(-part.numpy())].mean().item() for part in agree)


def trained(world: World, way: str, rows: int, steps: int, starts: int) -> tuple[mb.Bay, list[float]]:
    """Of several starts the one with the lowest error on the rows that it learned from, and the purity of each."""
    x, y, names = world.rows(world.known, rows)

    def batch() -> Batch:
        i = torch.randint(rows, (KNOWN, 4), generator=world.draw) + rows * torch.arange(KNOWN).unsqueeze(1)
        return x[i.flatten()], y[i.flatten()], [names[j] for j in i.flatten().tolist()]

    bays = []
    for _ in range(starts if way in ("Polytropon", "MHR") else 1):
        bays.append(network(world, way))
        learn(bays[-1], batch, steps, 2e-2)
    best = min(bays, key=lambda bay: error(bay, world, (x, y, names)))
    return best, [purity(world, bay) for bay in bays]


def new_task(bay: mb.Bay, how: str, world: World, rows: Batch, steps: int) -> mb.Bay:
    """A bay that learned a new task from a few rows, by its routing, all that there is, or the mean of the skills."""
    bay, name = mb.bays(copy.deepcopy(bay.model))["task"], rows[2][0]
    router = bay.state.router
    if how == "mean":
        methods.average(bay.freeze(), name).unfreeze(name).use(name)
    elif isinstance(router, mb.Skills):
        if how == "routing":
            bay.freeze()
        router.extend(name)
        router.mode = "sigmoid" if router.mode == "gumbel" else router.mode  # few rows: nothing is drawn
    elif "shared" in bay.names():
        bay.use("shared")
    else:
        bay.freeze().add(name, mb.SparseDelta(density=1.0)).use(name)
    learn(bay, lambda: rows, steps, 1e-2)
    return bay


def run(world: str, way: str, seed: int, steps: int, starts: int, few: int) -> dict:
    torch.manual_seed(seed)
    made = World(seed, WORLDS[world])
    bay, purities = trained(made, way, 200, steps, starts)
    found = {"world": world, "way": way, "seed": seed, "starts": purities, "purity": purity(made, bay)}
    found["test"] = error(bay, made, made.rows(made.known, 500))
    rows = {task: (made.rows([task], few), made.rows([task], 500)) for task in made.new}
    for how in HOW if way in SKILLED else HOW[1:2]:
        learned = [(new_task(bay, how, made, few, steps // 3), test) for few, test in rows.values()]
        found[how] = fmean(error(bay, made, test) for bay, test in learned)
    return found


def main(argv: Sequence[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--starts", type=int, default=6, help="of which the one that fits its own rows best is kept")
    parser.add_argument("--few", type=int, default=8, help="rows of a new task")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--smoke", action="store_true", help="a few steps of one seed")
    given = parser.parse_args(argv)
    logging.getLogger("modbay").setLevel(logging.ERROR)  # optimisers are made anew where parameters are
    if given.smoke:
        given.steps, given.starts, given.seeds = 12, 2, [0]
    results = []
    for world in WORLDS:
        print(f"{world:14}" + "".join(f"{column:>21}" for column in COLUMNS), flush=True)
        for way in WAYS:
            start = time.time()
            mine = [run(world, way, seed, given.steps, given.starts, given.few) for seed in given.seeds]
            results += mine
            cells = [
                [one[column] for one in mine if column in one and one[column] == one[column]] for column in COLUMNS
            ]
            shown = [f"{fmean(c):.3f} ({min(c):.3f}–{max(c):.3f})" if c else "" for c in cells]
            single = [pure > 0.949 for one in mine for pure in one["starts"]]
            told = f"   {sum(single)} of {len(single)} starts" if len(single) > len(mine) else ""
            print(
                f"{way:14}" + "".join(f"{one:>21}" for one in shown) + f"{told}   {time.time() - start:.0f} s",
                flush=True,
            )
    return results


if __name__ == "__main__":
    main()
