"""Is a modular architecture enough? Rules are known, so that every router can be held against ground truth.

Mittal, Bengio and Lajoie, "Is a Modular Architecture Enough?", 2022 (arXiv 2206.02713). A number, token or step follows
one of R rules, which the input names; R modules are as wide together as one monolithic network.

    y = A(f, x, {m_1 … m_R}, r(x, c), c)

    f  nothing
    m  FeedForward, or LSTM cells    one a rule, one hopes
    r  the contender                 any router of modbay, or the paper's: by operation, by ground truth
    A  Mixture, or SelfScored        where each module says a score of its own

This is `modbay bench modularity` from Python, with the same options; see its --help. Defaults end in minutes on two
cores; --paper takes the sizes and steps of the paper's code, and days.

    python recipes/modularity_benchmark.py [--rules 8 16] [--way joint ground-truth TopK] [--seeds 5] [--smoke]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from modbay import bench


def main(arguments: Sequence[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="mlp", choices=["mlp", "mha", "rnn"])
    parser.add_argument("--task", default="regression", choices=["regression", "classification"])
    parser.add_argument("--rules", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--way", nargs="+", default=["monolithic", "joint", "operation", "ground-truth", "TopK"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--out", type=Path, help="keep each run here, and go on where it stopped")
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--paper", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args(arguments)
    rules, seeds, steps = ([2], 1, 3) if options.smoke else (options.rules, options.seeds, options.steps)
    settings = bench.grid(rules, options.way, seeds, options.family, options.task, options.paper, steps=steps)
    told = lambda done, run: print(f"{done}/{len(settings)}  {run['rules']:2} {run['way']:28} {run['score']:.4f}")
    rows = bench.standings(bench.modularity(settings, options.out, 1 if options.smoke else options.jobs, told))
    for row in rows:
        closed = "" if row["score_closed"] is None else f"{row['score_closed']:6.2f} of the gap"
        print(f"{row['rules']:2} rules  {row['way']:28} {row['score']:.4f}  × 2: {row['score_ood']:.4f} {closed}")
    return rows


if __name__ == "__main__":
    main()
