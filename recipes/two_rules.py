"""Two rules in one data set: which example follows which is found by expectation maximisation.

Kirsch, Kunze and Barber, "Modular Networks: Learning to Decompose Neural Computation", 2018 (arXiv 1811.05249), the toy
regression: x is drawn from one of two Gaussians, and y is R x or S x by which of them it was. A controller that is
linear in x chooses between two linear modules; nobody says which rule an example follows.

    y = A(f, x, {m_1, m_2}, r(x, c), c)

    m  linear maps   without biases
    r  Policy        the controller, π(a | x), linear in x; TopK for the mixture
    A  Mixture       the module that was chosen

Beside EM (methods.ModularNetwork): REINFORCE (losses.reinforce, the reward log p(y | x, a) above a running mean, or
above nothing, modules learning at what was drawn) and noisy top-k (mb.TopK, k = 1, with its balancing loss). All have
the same data, modules, batches, steps and rates. A run has found the rules if its error on new examples, each by its
likeliest module, is below one hundredth of what a single linear map has.

Of seeds 0 to 2: EM finds the rules in 3 of 3 (error 0.044, where one linear map has 16.8), but here the others do, too,
where the paper has them stuck: REINFORCE 0.044 (0.039 without a mean), noisy top-k 0.048, 3 of 3 each. With six rules
(--rules 6 --sigma 0.1 --steps 400 --seeds 0) EM tells 53 % of the examples apart, REINFORCE 67 % and noisy top-k 78 %.
Where the two Gaussians overlap (--features 2 --apart 1.5 --steps 400, seed 0) it hangs on σ, the deviation of y that
its likelihood supposes: at 0.1 EM tells 94 %, as REINFORCE does; at 1 it puts all examples to one module (with
--lr 0.03 --every 3 --steps 600), and REINFORCE does not. Of seed 1 at 0.1 EM tells 91 %, REINFORCE and top-k 93 %.
The defaults are a setting in which EM works, chosen after some others: the first, overlapping Gaussians drawn at random
(σ = 1, 2,000 steps, three seeds), had each way find the rules once, at mean errors of 0.204 by EM, 0.068 by REINFORCE
and 0.092 by noisy top-k.

    python recipes/two_rules.py [--steps 600] [--seeds 0 1 2] [--smoke]
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import modbay as mb
from modbay import losses, methods

METHODS = ("EM", "REINFORCE", "REINFORCE, b = 0", "noisy top-k")


@dataclass
class Data:
    x: Tensor
    y: Tensor
    rule: Tensor


def draw(means: Tensor, rules: Tensor, n: int) -> Data:
    """n examples: x ~ N(μ_s, I), y = R_s x, each s as likely."""
    s = torch.randint(len(rules), (n,))
    x = means[s] + torch.randn(n, means.shape[1])
    return Data(x, torch.einsum("nij,nj->ni", rules[s], x), s)


def layer(method: str, d: int, n: int) -> mb.Modular:
    if method == "noisy top-k":
        router: mb.Router = mb.TopK(1, noise=True, balance=0.1)
    else:
        router = mb.Policy("example")
    return mb.Modular(None, {f"m{i}": nn.Linear(d, d, bias=False) for i in range(n)}, router, mb.Mixture(), features=d)


def log_likelihood(net: nn.Module, x: Tensor, y: Tensor, sigma: float, c: mb.Context | None = None) -> Tensor:
    """log N(y; ŷ, σ² I) up to a constant, (b,)."""
    return -0.5 * (net(x, context=c) - y).square().sum(-1) / sigma**2


def train(method: str, data: Data, args: argparse.Namespace) -> mb.Modular:
    net = layer(method, data.x.shape[1], args.rules).train()
    optimiser = torch.optim.Adam(net.parameters(), lr=args.lr)
    em = methods.ModularNetwork(net, len(data.x), args.samples) if method == "EM" else None
    baseline = methods.RunningMean()
    for step in range(args.steps):
        rows = torch.randint(len(data.x), (args.batch,))
        run = lambda rows=rows: log_likelihood(net, data.x[rows], data.y[rows], args.sigma)
        if em is not None:
            if step % args.every == 0:
                em.expect(rows, run)
                continue
            loss = em.loss(rows, run)
        elif method.startswith("REINFORCE"):
            with methods.drawn(net) as routings:
                fit = run()
            loss = losses.reinforce(routings.log_prob, fit, 0.0 if "b = 0" in method else baseline(fit)) - fit.mean()
        else:
            c = mb.Context()
            fit = log_likelihood(net, data.x[rows], data.y[rows], args.sigma, c)
            loss = sum((value for _, value in c.losses), start=-fit.mean())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return net.eval()


@torch.no_grad()
def judged(net: mb.Modular, data: Data) -> dict[str, float]:
    """The mean squared error by the likeliest module, and the share of examples that the best matching of modules to
    rules gets right."""
    n = len(net.inventory.names)
    index = net.router(data.x, mb.Context()).index[:, 0]
    counts = torch.bincount(index * n + data.rule, minlength=n * n).view(n, n)
    rows, columns = linear_sum_assignment(-counts.numpy())
    told = counts[torch.tensor(rows), torch.tensor(columns)].sum().item() / len(index)
    return {"error": F.mse_loss(net(data.x), data.y).item(), "told": told}


def run(seed: int, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    torch.manual_seed(seed)
    ways = F.normalize(torch.randn(args.rules, args.features), dim=-1)
    ways = torch.stack([ways[0], -ways[0]]) if args.rules == 2 else ways
    means, rules = args.apart * ways, torch.randn(args.rules, args.features, args.features)
    seen, new = draw(means, rules, args.size), draw(means, rules, 1000)
    one = torch.linalg.lstsq(seen.x, seen.y).solution
    rows = {"one linear map": {"error": F.mse_loss(new.x @ one, new.y).item(), "told": 1 / args.rules}}
    for method in METHODS:
        torch.manual_seed(seed)
        rows[method] = judged(train(method, seen, args), new)
    for name, row in rows.items():
        row["found"] = float(row["error"] < 0.01 * rows["one linear map"]["error"])
        print(f"seed {seed}  {name:16}  error {row['error']:8.4f}   rules told {row['told']:.3f}", flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> list[dict[str, dict[str, float]]]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rules", type=int, default=2, help="and modules")
    parser.add_argument("--features", type=int, default=10, help="of x and y")
    parser.add_argument("--apart", type=float, default=4.0, help="of the means from nought")
    parser.add_argument("--sigma", type=float, default=1.0, help="the deviation of y that a likelihood supposes")
    parser.add_argument("--size", type=int, default=1000, help="examples to learn from")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--samples", type=int, default=10, help="candidates of an E-step")
    parser.add_argument("--every", type=int, default=10, help="steps to an E-step")
    parser.add_argument("--smoke", action="store_true", help="a few small steps, to see that it runs")
    args = parser.parse_args(argv)
    if args.smoke:
        args.steps, args.seeds, args.size = 300, [0], 200
    torch.set_num_threads(1)
    begun = time.time()
    rows = [run(seed, args) for seed in args.seeds]
    print(f"\nmeans of {len(rows)} seeds: error, rules told, runs that found the rules")
    for name in rows[0]:
        mean = {key: sum(row[name][key] for row in rows) / len(rows) for key in ("error", "told")}
        found = sum(row[name]["found"] for row in rows)
        print(f"{name:16}  {mean['error']:8.4f}   {mean['told']:.3f}   {found:.0f} of {len(rows)}")
    print(f"{time.time() - begun:.0f} s")
    return rows


if __name__ == "__main__":
    main()
