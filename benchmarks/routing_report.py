"""A mixture of experts that collapses, and one that does not: what the instruments say of each.

Top-1 of six LoRAs a token, trained on four tasks over token sequences: each task maps the same tokens to classes by a
table of its own, and says which it is in the first token. The router without a balance loss begins with one expert a
little ahead, as after a start that went wrong, and its experts learn fast: rich get richer. Beside it the same with the
Switch Transformer's balance loss (Fedus, Zoph and Shazeer, 2021, arXiv 2101.03961).

    python benchmarks/routing_report.py [--steps 300] [--page docs/routing.md]
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modbay as mb
from modbay import report
from modbay.metrics import Recording

TASKS = ("news", "law", "chat", "code")
WORDS, CLASSES, LENGTH, WIDTH = 40, 8, 12, 32
AHEAD = 1.5  # half the logits by which the first expert leads at the start
PARTS = 8

INTRODUCTION = """# Is the routing healthy?

Written by `python benchmarks/routing_report.py --page docs/routing.md`: four tasks, six LoRAs, the likeliest for each
token, {steps} steps; seed 0. Both runs begin with one expert ahead by {ahead:g} logits, as after a start that went
wrong; nothing else differs but the balance loss.

A router that learns can fail without a word: the loss falls while one module does all the work, as in the first run
here, which answers as well as the second. `bay.record()` keeps what routers chose, in training and in serving, and says
what looks wrong:

```python
with bay.record() as recording:
    for batch, task in batches:
        recording.label(task=task)          # beside the labels that the model is called with
        model(**batch)
print(*recording.alarms(), sep="\\n")        # in words: site, module, figure, what to try
recording.table(label="task").shares        # P(task, module), (v, n)
recording.metrics()                         # every figure, by site and label
modbay.report.routing(recording, "routing.html")
```

Nothing is read back from the device during a forward; `benchmarks/recording.py` measures what it costs. Runs of
`modbay train` with a router that learns have all of it in their `report.html`.
"""

FIGURES = """
collapse average and worst: 0 if modules are used alike, 1 if one alone is, or one never (Mittal, Bengio and
Lajoie, 2022, arXiv 2206.02713). mutual information: what a module tells of the task, in nats, at most log 4 =
1.39. alignment: 0 if each task has a module of its own, and uses it alone. H a, H b: the entropy of one route
and of all, at most log 6 = 1.79; routes to one module are sure, so that H a is nought by construction.
utilisation: the part of the modules that have a tenth of an equal share.
"""


class Reader(nn.Module):
    """Tokens (b, t) to a class for each (b, t, CLASSES): embeddings that know their task, and a hidden layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(WORDS + len(TASKS), WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        x = x + x[:, :1]  # the first token says the task
        return self.head(torch.relu(self.hidden(x)))


@dataclass
class Run:
    """One router's: what training and testing recorded, and how right it is."""

    name: str
    training: Recording
    test: Recording
    accuracy: float


def batch(tables: Tensor, generator: torch.Generator, rows: int = 32) -> tuple[Tensor, Tensor, list[str]]:
    """(ids (b, t), classes (b, t), tasks)."""
    task = torch.randint(len(TASKS), (rows,), generator=generator)
    words = torch.randint(WORDS, (rows, LENGTH), generator=generator)
    ids = torch.cat([WORDS + task[:, None], words], 1)
    target = torch.cat([torch.full((rows, 1), -100), tables[task[:, None], words]], 1)
    return ids, target, [TASKS[i] for i in task.tolist()]


def train(name: str, balance: float, steps: int, seed: int = 0) -> Run:
    """A run of a router from the same start."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    tables = torch.randint(CLASSES, (len(TASKS), WORDS), generator=generator)
    model = Reader()
    experts = {f"expert {i}": mb.LoRA(8) for i in range(6)}
    bay = mb.attach(model, "hidden", experts, lambda: mb.TopK(1, balance=balance), name="experts", freeze=False)
    router: Any = bay.modulars["hidden"].router
    with torch.no_grad():  # everything that comes is a little like the first expert's row of the gate
        model.embed.weight += 1.0
        router.gate[0] += AHEAD / WIDTH
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with bay.record(when="training") as training:
        for _ in range(steps):
            ids, target, tasks = batch(tables, generator)
            training.label(task=tasks)
            loss = F.cross_entropy(model.train()(ids).flatten(0, 1), target.flatten(), ignore_index=-100)
            (loss + sum(bay.losses().values())).backward()
            optimiser.step()
            optimiser.zero_grad()
    right = total = 0
    with bay.record(when="evaluation", tokens=4096) as test, torch.no_grad():
        for _ in range(30):
            ids, target, tasks = batch(tables, generator)
            test.label(task=tasks)
            said = model.eval()(ids).argmax(-1)
            right += int((said == target).sum())
            total += int((target != -100).sum())
    return Run(name, training, test, right / total)


def draw(run: Run, path: Path) -> None:
    """The heat map of tasks by experts, the experts over time, and the alarm below, as an SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "modbay", "svg.fonttype": "none", "font.family": "sans-serif"}
    import matplotlib.pyplot as plt

    table, windows = run.test.table(label="task"), run.training.over_time()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), width_ratios=(1, 1.25), layout="constrained")
    rows = table.counts / table.counts.sum(1, keepdims=True)
    _map(left, rows, table.values, [name.split()[-1] for name in table.modules])
    left.set_xlabel("expert")
    left.set_title("share of each task's tokens, test", fontsize=9)
    shown = windows[:: max(1, len(windows) // PARTS)]
    over = torch.tensor([w.use.tolist() for *_, w in shown]).T.numpy()
    _map(right, over, [name.split()[-1] for name in table.modules], [str(last) for _, last, _ in shown])
    right.set_xlabel("training step")
    right.set_ylabel("expert")
    right.set_title("share of all tokens, training", fontsize=9)
    said = run.test.alarms()
    figure.suptitle(f"{run.name}: {'; '.join(_short(one) for one in said) or 'no alarm'}", fontsize=9)
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    plt.close(figure)


def _short(said: str) -> str:
    """The alarm without its advice."""
    return said.split("). ")[0].split(" (")[0].split(": ", 1)[1]


def _map(axes: Any, values: Any, names: list[str], columns: list[str]) -> None:
    axes.imshow(values, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    axes.spines[:].set_visible(False)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xticks(range(len(columns)), columns, fontsize=8)
    axes.tick_params(length=0)
    for i, line in enumerate(values):
        for j, x in enumerate(line):
            axes.text(j, i, f"{x:.2f}", ha="center", va="center", fontsize=7, color="white" if x > 0.6 else "black")


def page(runs: list[Run], options: argparse.Namespace) -> str:
    """docs/routing.md."""
    lines = [INTRODUCTION.format(steps=options.steps, ahead=2 * AHEAD)]
    for run, kind in zip(runs, ("collapsed", "healthy"), strict=True):
        said = run.test.alarms()
        picture = f"![{run.name}: tasks by expert, and experts over time](routing_{kind}.svg)"
        lines += [f"## {run.name}", "", picture, ""]
        lines += [f"> {one}" for one in said] if said else ["No alarm."]
        lines += [""]
    lines += ["## In figures", "", "On test rows, by task; accuracy is over tokens.", ""]
    keys = ("collapse_average", "collapse_worst", "mutual_information", "alignment", "H_a", "H_b", "gini",
            "utilisation")  # fmt: skip
    lines += [f"| run | accuracy, % | {' | '.join(key.replace('_', ' ', 1) for key in keys)} |"]
    lines += ["|---" * (len(keys) + 2) + "|"]
    for run in runs:
        told = run.test.table(label="task").metrics()
        lines += [f"| {run.name} | {100 * run.accuracy:.1f} | {' | '.join(f'{told[key]:.2f}' for key in keys)} |"]
    lines += [FIGURES]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--page", type=Path, help="write the page here, and the pictures beside it")
    parser.add_argument("--html", type=Path, help="a folder for the reports of both runs")
    parser.add_argument("--quick", action="store_true", help="a few steps: only to see that it runs")
    options = parser.parse_args()
    options.steps = 20 if options.quick else options.steps
    torch.set_num_threads(1)
    runs = [
        train("Without a balance loss", 0.0, options.steps),
        train("With a balance loss", 1e-1, options.steps),
    ]
    for run, kind in zip(runs, ("collapsed", "healthy"), strict=True):
        print(f"\n{run.name}: accuracy {100 * run.accuracy:.1f} %")
        print(*(run.test.alarms() or ["no alarm"]), sep="\n")
        print({k: round(v, 3) for k, v in run.test.table(label="task").metrics().items() if isinstance(v, float)})
        if options.page:
            draw(run, options.page.with_name(f"{options.page.stem}_{kind}.svg"))
        if options.html:
            words = [f"word {i}" for i in range(WORDS)] + [f"<{task}>" for task in TASKS]
            report.routing(run.test, options.html / f"{kind}.html", decode=words.__getitem__, title=run.name)
    if options.page:
        options.page.write_text(page(runs, options), encoding="utf-8")


if __name__ == "__main__":
    main()
