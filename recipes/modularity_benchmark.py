"""Is a modular architecture enough? Rules are known, so that every router can be held against ground truth.

Mittal, Bengio and Lajoie, "Is a Modular Architecture Enough?", 2022 (arXiv 2206.02713). A number, token or step follows
one of R rules, which the input names; R modules are as wide together as one monolithic network.

    y = A(f, x, {m_1 … m_R}, r(x, c), c)

    f  nothing
    m  FeedForward, or LSTM cells    one a rule, one hopes
    r  the contender                 any router of modbay, Scouts for one, or the paper's: by operation, ground truth
    A  Mixture, or SelfScored        where each module says a score of its own

Can a learned router come near to one that is told the rules? Of numbers, seeds 0 to 4, the table is docs/modularity.md:
mb.Scouts, linear experts that compete for the rows, close 1.02, 0.99, 1.00 and 0.91 of the gap between joint scores and
ground truth at 2, 4, 8 and 16 rules, and 0.96, 1.09, 1.20 and 0.88 of it on rows of twice the scale; each of the 20
runs has one module a rule. The rules are linear, as scouts are, and so this is their home; the idea was found on seeds
0 to 4, in smaller trials, and when scouts move and how fast they learn was chosen on seeds 10 to 19. Where the answer
is a class, they do not help (8 rules, seeds 0 and 1, {Scouts: {loss: binary}}: error rate 0.0026 and 0.0026, two
modules or more unused, where ground truth has 0.0007 and 0.0008, and joint scores 0.0013 and 0.0014). The families mha
and rnn were not run to an end.

This is `modbay bench modularity` from Python, with the same options; see its --help. Defaults end in minutes on two
cores; --paper takes the sizes and steps of the paper's code, and days.

    python recipes/modularity_benchmark.py [--rules 8 16] [--way joint ground-truth Scouts] [--seeds 5] [--smoke]
"""

import argparse
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from modbay import bench

WAYS = ["monolithic", "modular", "joint", "operation", "ground-truth", "TopK", "Scouts"]
HEADS = ("rules", "way", "error", "of the gap", "error × 2", "of the gap", "collapse", "worst", "MI", "misaligned", "s")
PAGE = """# Is a modular architecture enough?

Written by `python recipes/modularity_benchmark.py --page docs/modularity.md`: {s.family}, {s.task}, {seeds} seeds,
each of other rules and weights; {s.steps} steps of {s.batch} rows at a rate of {s.lr} that falls to nought; {s.dim}
units of all modules together. machine {machine}, one thread a run, torch {torch}, modbay {modbay}.

Mittal, Bengio and Lajoie, 2022 (arXiv 2206.02713): the rules of the data are known, so that a router can be held
against them. The paper's own are `joint` and `modular` (which see all of x), `operation` (a router that sees the
rule's name alone), `ground-truth` (which is given the rule) and `monolithic` (one network, as large as all modules);
the others are modbay's, and see all of x. error: {measure} on new rows, and on rows of twice the scale. of the gap:
what a way closes of the gap between joint scores (0) and ground truth (1). collapse, worst: how far the modules' use
is from even, on average and of the least used, from 0 to 1. MI: mutual information of rules and modules, 1 is all.
misaligned: how far the best match of modules to rules is from one module a rule; 0 is that. ±: one standard deviation
over seeds. s: seconds of training.
"""


def main(arguments: Sequence[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="mlp", choices=["mlp", "mha", "rnn"])
    parser.add_argument("--task", default="regression", choices=["regression", "classification"])
    parser.add_argument("--rules", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--way", nargs="+", default=WAYS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--out", type=Path, help="keep each run here, and go on where it stopped")
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--page", type=Path, help="write the table here, in Markdown")
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
    if options.page:
        options.page.write_text(page(rows, settings[0], seeds), encoding="utf-8")
    return rows


def page(rows: Sequence[dict], setting: bench.Setting, seeds: int) -> str:
    """The table as a page: means over seeds, with their deviations."""
    measure = "mean absolute error" if setting.task == "regression" else "error rate"
    versions = {"torch": torch.__version__, "modbay": version("modbay")}
    given = PAGE.format(s=setting, seeds=seeds, measure=measure, machine=platform.machine(), **versions)
    return "\n".join([given, line(HEADS), line(["---"] * len(HEADS)), *(line(cells(row)) for row in rows)]) + "\n"


def cells(row: dict) -> list[str]:
    share = lambda key: "" if row[key] is None else f"{row[key]:.2f}"
    mean = lambda key, digits: f"{row[key]:.{digits}f} ± {row[f'{key}_sd'] or 0:.{digits}f}"
    spread = lambda key, digits: "" if row[key] is None else mean(key, digits)
    scores = [cell for key in ("score", "score_ood") for cell in (spread(key, 4), share(f"{key}_closed"))]
    judged = [spread(key, 2) for key in ("collapse", "worst", "information", "alignment")]
    return [str(row["rules"]), row["way"], *scores, *judged, f"{row['seconds']:.0f}"]


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
