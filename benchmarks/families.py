"""The families of computation functions beside each other, on real tasks: what the survey says of them, measured.

Pfeiffer, Ruder, Vulić and Ponti, 2023 (arXiv 2302.11529), section 3: parameter composition folds, and so costs nothing
at inference; input composition has the fewest parameters, costs most at inference, and is weak in small models;
function composition has the most parameters and does best.

all-MiniLM-L6-v2, frozen; a task is the intents of a voice assistant in one language (the demo's data, parted by
template). Features are the mean of the last states; a head begins as a linear probe and learns with the module, with
every family alike. The rate is chosen by family on development rows, and test rows are told once, by seed.

    python benchmarks/families.py [--languages de fr] [--seeds 0 1] [--steps 120] [--page docs/families.md]
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from _measure import interleaved, machine, table
from torch import Tensor, nn

import modbay as mb
from modbay.demo import Utterance, load, minilm

BATCH, LENGTH = 16, 24
FFN = mb.span(mb.role.ffn_in, mb.role.ffn_out)
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


@dataclass(frozen=True)
class Contender:
    """A kind, or a kind by role; at: where, of a bare kind."""

    family: str
    modules: Any
    at: Any = None


def linears(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and name.startswith("encoder.")


CONTENDERS: dict[str, Contender] = {
    "head alone": Contender("none", None),
    "LoRA, rank 8": Contender("parameter", mb.LoRA(8, alpha=16), [mb.role.query, mb.role.value]),
    "sparse, 1 %": Contender("parameter", mb.SparseDelta(0.01), [mb.role.query, mb.role.value]),
    "BitFit": Contender("parameter", mb.BitFit(), linears),
    "(IA)³": Contender("parameter", {mb.role.key: mb.IA3(), mb.role.value: mb.IA3(), mb.role.ffn_out: mb.IA3("input")}),
    "prompt, 20": Contender("input", mb.Prompt(20)),
    "prefix, 20": Contender("input", mb.Prefix(20), mb.role.attention),
    "bottleneck, serial": Contender("function", mb.Bottleneck(reduction=16), FFN),
    "bottleneck, parallel": Contender("function", mb.Bottleneck(64, placement="parallel", scale=4.0), FFN),
}


@dataclass
class Task:
    """A language: token ids and masks, and intents as numbers, by part; features: the base's, of the training rows."""

    language: str
    parts: dict[str, tuple[dict[str, Tensor], Tensor]]
    classes: int
    features: Tensor


@dataclass
class Result:
    """What one contender came to. accuracies: by language and seed. kept: share of accuracy above the bare head."""

    name: str
    family: str
    parameters: int = 0
    rate: float = 0.0
    accuracies: dict[str, list[float]] = field(default_factory=dict)
    merged: dict[str, list[float]] = field(default_factory=dict)
    step: float = 0.0
    saved: float = 0.0
    forward: float = 0.0
    folded: float | None = None


class Classifier(nn.Module):
    """Standardised mean of the last states, and a linear head."""

    def __init__(self, base: nn.Module, classes: int):
        super().__init__()
        self.base, self.head = base, nn.Linear(384, classes)
        self.register_buffer("mean", torch.zeros(384))
        self.register_buffer("scale", torch.ones(384))

    def features(self, batch: dict[str, Tensor]) -> Tensor:
        states = self.base(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
        return ((states * mask).sum(1) / mask.sum(1) - self.mean) / self.scale

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.head(self.features(batch))


def tasks(languages: Sequence[str], seed: int = 0) -> list[Task]:
    """The languages' intents; those that training has not heard are left out of development and test."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm())
    data = load(seed, sizes=dict.fromkeys(languages, 600), arrivals=(), held_out=300)
    made = []
    for language, split in data.languages.items():
        number = {intent: i for i, intent in enumerate(sorted({u.intent for u in split.train}))}

        def encode(rows: Sequence[Utterance], number: dict[str, int] = number) -> tuple[dict[str, Tensor], Tensor]:
            known = [u for u in rows if u.intent in number]
            said = tokenizer([u.text for u in known], padding="max_length", truncation=True, max_length=LENGTH,
                             return_tensors="pt")  # fmt: skip
            return dict(said), torch.tensor([number[u.intent] for u in known])

        parts = {part: encode(getattr(split, part)) for part in ("train", "dev", "test")}
        made.append(Task(language, parts, len(number), frozen(parts["train"][0])))
    return made


@cache
def pretrained() -> nn.Module:
    """MiniLM, read once, in eval mode: it has dropout, and nobody here wants it."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers.AutoModel.from_pretrained(minilm(), add_pooling_layer=False).requires_grad_(False).eval()


@torch.no_grad()
def frozen(batch: dict[str, Tensor]) -> Tensor:
    """The features of all rows (b, 384), by the base alone."""
    net = Classifier(pretrained(), 1)
    return torch.cat([net.features(rows(batch, some)) for some in torch.arange(len(batch["input_ids"])).split(64)])


def network(contender: Contender, names: Sequence[str], classes: int, seed: int) -> tuple[Classifier, mb.Bay | None]:
    """MiniLM with a module of each name."""
    base = copy.deepcopy(pretrained())
    torch.manual_seed(seed)
    net = Classifier(base, classes)
    if contender.modules is None:
        return net, None
    at = {} if contender.at is None else {"at": contender.at}
    return net, mb.attach(base, modules=dict.fromkeys(names, contender.modules), **at)


def probe(net: Classifier, task: Task) -> None:
    """Standardise the frozen features, and fit the head on them."""
    _, target = task.parts["train"]
    net.mean.copy_(task.features.mean(0))
    net.scale.copy_(task.features.std(0) + 1e-3)
    features = (task.features - net.mean) / net.scale
    nn.init.zeros_(net.head.weight)
    nn.init.zeros_(net.head.bias)
    optimiser = torch.optim.AdamW(net.head.parameters(), 1e-2, weight_decay=1e-2)
    for _ in range(100):
        optimiser.zero_grad()
        F.cross_entropy(net.head(features), target).backward()
        optimiser.step()


def rows(batch: dict[str, Tensor], which: Tensor) -> dict[str, Tensor]:
    """Some rows, cut to the longest of them."""
    some = {name: tensor[which] for name, tensor in batch.items()}
    longest = int(some["attention_mask"].sum(1).max())
    return {name: tensor[:, :longest] for name, tensor in some.items()}


def fit(net: Classifier, bay: mb.Bay | None, task: Task, rate: float, steps: int, seed: int) -> None:
    """AdamW, the head and the module together, the rate falling to nought."""
    batch, target = task.parts["train"]
    modules = [] if bay is None else [p for p in bay.parameters(task.language) if p.requires_grad]
    optimiser = torch.optim.AdamW([{"params": modules, "lr": rate}, {"params": net.head.parameters(), "lr": 1e-3}])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    generator = torch.Generator().manual_seed(seed)
    if bay is not None:
        bay.use(task.language)
    for _ in range(steps):
        which = torch.randint(len(target), (BATCH,), generator=generator)
        optimiser.zero_grad()
        F.cross_entropy(net(rows(batch, which)), target[which]).backward()
        optimiser.step()
        schedule.step()


@torch.no_grad()
def accuracy(net: Classifier, task: Task, part: str) -> float:
    batch, target = task.parts[part]
    said = torch.cat([net(rows(batch, some)).argmax(-1) for some in torch.arange(len(target)).split(64)])
    return (said == target).float().mean().item()


def chosen(contender: Contender, task: Task, steps: int) -> float:
    """The rate that does best on development rows."""
    scores = {}
    for rate in RATES if contender.modules is not None else RATES[:1]:
        net, bay = network(contender, [task.language], task.classes, 0)
        probe(net, task)
        fit(net, bay, task, rate, steps, 0)
        scores[rate] = accuracy(net, task, "dev")
    return max(scores, key=scores.__getitem__)


def judged(result: Result, contender: Contender, several: Sequence[Task], seeds: Sequence[int], steps: int) -> None:
    """Test accuracy of a module a language; and of the mean of all their modules, under each one's own head."""
    names = [task.language for task in several]
    for seed in seeds:
        heads = {}
        net, bay = network(contender, names, 1, seed)
        for task in several:
            net.head = nn.Linear(384, task.classes)
            probe(net, task)
            fit(net, bay, task, result.rate, steps, seed)
            result.accuracies.setdefault(task.language, []).append(accuracy(net, task, "test"))
            heads[task.language] = net.head, net.mean.clone(), net.scale.clone()
        if bay is None:
            continue
        result.parameters = sum(p.numel() for p in bay.parameters(names[0]))
        bay.use({name: 1 / len(names) for name in names})
        for task in several:
            net.head, mean, scale = heads[task.language]
            net.mean.copy_(mean)
            net.scale.copy_(scale)
            result.merged.setdefault(task.language, []).append(accuracy(net, task, "test"))


def saved_bytes(call: Callable[[], object]) -> float:
    """MiB that a forward keeps for its backward, each storage once, parameters left out."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(kept.values()) / 2**20


def timed(results: dict[str, Result], rounds: int) -> None:
    """A training step and a forward of each, in turn, over the bare model's forward."""
    batch = {
        "input_ids": torch.randint(1000, 2000, (BATCH, LENGTH)),
        "attention_mask": torch.ones(BATCH, LENGTH).long(),
    }
    target = torch.zeros(BATCH, dtype=torch.long)
    steps: dict[str, Callable[[], object]] = {}
    forwards: dict[str, Callable[[], object]] = {}
    for name, contender in CONTENDERS.items():
        net, bay = network(contender, ["one"], 10, 0)
        if bay is not None:
            bay.use("one")

        def step(net: Classifier = net) -> None:
            net.zero_grad()
            F.cross_entropy(net(batch), target).backward()

        def forward(net: Classifier = net) -> Tensor:
            with torch.inference_mode():
                return net(batch)

        steps[name], forwards[name] = step, forward
        results[name].saved = saved_bytes(lambda net=net: net(batch))
        if contender.family == "parameter":
            folded, bay = network(contender, ["one"], 10, 0)
            bay.fold("one")  # type: ignore[union-attr]
            forwards[name + " folded"] = lambda net=folded, forward=forward: forward(net)
    spent, taken = interleaved(steps, rounds), interleaved(forwards, rounds)
    bare = statistics.median(taken["head alone"])
    for name, result in results.items():
        result.step = statistics.median(spent[name]) / bare
        result.forward = statistics.median(taken[name]) / bare
        if name + " folded" in taken:
            result.folded = statistics.median(taken[name + " folded"]) / bare


def mean(by: dict[str, list[float]]) -> np.ndarray:
    """(seeds,): the mean over languages."""
    return np.array(list(by.values())).mean(0)


def lines(results: dict[str, Result]) -> list[dict[str, object]]:
    """The table."""
    out: list[dict[str, object]] = []
    for r in results.values():
        own = 100 * mean(r.accuracies)
        out.append({
            "family": r.family, "kind": r.name, "parameters": f"{r.parameters:,}", "rate": f"{r.rate:g}",
            "accuracy, %": f"{own.mean():.1f} ± {own.std(ddof=1) if len(own) > 1 else 0:.1f}",
            "merged, %": f"{100 * mean(r.merged).mean():.1f}" if r.merged else "",
            "step": r.step, "kept, MiB": f"{r.saved:.1f}", "forward": r.forward,
            "folded": "" if r.folded is None else r.folded,
        })  # fmt: skip
    return out


def claims(results: dict[str, Result]) -> list[str]:
    """The survey's five statements on the families, each with the figures that speak for or against it."""
    of = {f: [r for r in results.values() if r.family == f] for f in ("parameter", "input", "function")}
    best = {f: max(100 * mean(r.accuracies).mean() for r in several) for f, several in of.items()}
    typical = lambda f, what: statistics.median(getattr(r, what) for r in of[f])
    folded = statistics.median(r.folded for r in of["parameter"] if r.folded is not None)
    lost = {f: statistics.median(100 * (mean(r.accuracies) - mean(r.merged)).mean() for r in several)
            for f, several in of.items()}  # fmt: skip
    said = lambda holds: "holds" if holds else "does not hold here"
    by = lambda what, form: ", ".join(f"{f} {form.format(what(f))}" for f in of)
    size = lambda f: typical(f, "parameters")
    forward = lambda f: folded if f == "parameter" else typical(f, "forward")
    return [
        f"Parameters, input < parameter < function: {said(size('input') < size('parameter') < size('function'))} "
        f"(median: {by(size, '{:,.0f}')}).",
        f"Training, function composition steps fastest: "
        f"{said(typical('function', 'step') == min(typical(f, 'step') for f in of))} "
        f"(a step over a bare forward: {by(lambda f: typical(f, 'step'), '{:.2f}')}).",
        f"Inference, folded parameters < function < input: "
        f"{said(forward('parameter') < forward('function') < forward('input'))} "
        f"(a forward over the bare model's: {by(forward, '{:.2f}')}).",
        f"Performance, function > parameter > input: "
        f"{said(best['function'] > best['parameter'] > best['input'])} (best of each: {by(best.get, '{:.1f} %')}).",
        f"Composability, averaging costs parameter and function composition less than input composition: "
        f"{said(max(lost['parameter'], lost['function']) < lost['input'])} "
        f"(points lost, median: {by(lost.get, '{:.1f}')}).",
    ]  # fmt: skip


def page(results: dict[str, Result], said: list[str], asked: argparse.Namespace, out: Path) -> None:
    """Markdown, with the plot beside it."""
    rows = lines(results)
    heads = list(rows[0])
    cell = lambda value: f"{value:.2f}" if isinstance(value, float) else str(value)
    text = [
        "# The families of computation functions", "",
        f"Written by `python benchmarks/families.py --page {out}`: {', '.join(asked.languages)}, seeds "
        f"{', '.join(map(str, asked.seeds))}, {asked.steps} steps of {BATCH} rows. "
        + ", ".join(f"{key} {value}" for key, value in machine().items()) + ".", "",
        f"![accuracy by parameters and by cost]({out.with_suffix('.svg').name})", "",
        f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}",
        *[f"| {' | '.join(cell(row[head]) for head in heads)} |" for row in rows], "",
        "accuracy: on test rows, mean over languages, ± one standard deviation over seeds. merged: with the mean of "
        "all languages' modules in place of its own. step, forward, folded: time over a forward of the bare model. "
        "kept: what a step's forward keeps for its backward.", "",
        "## What the survey says of them", "", *[f"{i}. {line}" for i, line in enumerate(said, 1)], "",
    ]  # fmt: skip
    out.write_text("\n".join(text), encoding="utf-8")
    plot(results, out.with_suffix(".svg"))


COLOURS = {"none": "#777777", "parameter": "#1f6fb4", "input": "#c4501b", "function": "#2e8540"}


def plot(results: dict[str, Result], out: Path) -> None:
    """Accuracy over parameters, and over the cost of a forward, as served: an SVG."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise SystemExit("the plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "modbay"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for r in results.values():
        height = 100 * mean(r.accuracies).mean()
        served = r.forward if r.folded is None else r.folded
        for axis, x in zip(axes, (r.parameters, served), strict=True):
            if x:
                axis.scatter(x, height, color=COLOURS[r.family])
                axis.annotate(r.name, (x, height), textcoords="offset points", xytext=(5, 3), fontsize=8)
            else:
                axis.axhline(height, color=COLOURS[r.family], linewidth=1, linestyle=":")
    axes[0].set(xscale="log", xlabel="parameters of a module", ylabel="accuracy on test rows, %")
    axes[1].set(xlabel="a forward as served, over the bare model's")
    figure.savefig(out, metadata={"Date": None})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--languages", nargs="+", default=["de", "fr"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of each contender")
    parser.add_argument("--page", type=Path, help="write the table here, in Markdown, and the plot beside it")
    parser.add_argument("--quick", action="store_true", help="a few steps: only to see that it runs")
    asked = parser.parse_args(argv)
    if asked.quick:
        asked.languages, asked.seeds, asked.steps, asked.rounds = asked.languages[:2], [0], 3, 2
    torch.set_num_threads(1)
    several, results = tasks(asked.languages), {}
    for name, contender in CONTENDERS.items():
        began = time.perf_counter()
        results[name] = result = Result(name, contender.family)
        result.rate = chosen(contender, several[0], asked.steps)
        judged(result, contender, several, asked.seeds, asked.steps)
        print(f"{name}: {100 * mean(result.accuracies).mean():.1f} %, {time.perf_counter() - began:.0f} s", flush=True)
    timed(results, asked.rounds)
    table("The families, all-MiniLM-L6-v2", lines(results))
    said = claims(results)
    print("\n" + "\n".join(said))
    if asked.page is not None:
        page(results, said, asked, asked.page)


if __name__ == "__main__":
    main()
