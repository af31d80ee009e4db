"""The shared test list: one row a kind, and every law picks it up (tests/test_kinds.py, tests/test_laws.py).

A new kind is one row of KINDS:

    Case("lora", lambda: mb.LoRA(2, alpha=3.0), LINEAR + CONVOLUTION + EMBEDDING, folds=True),

an id, a factory of the kind (equal kinds group), and the names of the SITES it fits. What a kind claims (`neutral`,
`batched`, `enters`, `tokenwise`, `tied`) it says itself. Flags say what a law can't know: `folds`, that its delta can
be materialised at every site of the row but norm and block; `labels`, the keywords that every call of it needs, each
made from the number of rows; `generated`, that its parameters are generated an example; `learns`, that something in it
does; `draws`, that it draws noise in training, so that its numbers are compared in evaluation.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import modbay as mb
from modbay.abstract import Context
from modbay.core import Function, describe, parameters


class Block(nn.Module):
    """x + W₂ gelu(W₁ LN x): a small residual block of several layers, 8 wide."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Mixer(nn.Module):
    """x + softmax(q kᵀ) v, of one head, 8 wide: what a place gives depends on the others."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + self.out(nn.functional.scaled_dot_product_attention(q, k, v))


def _conv1d() -> nn.Module:
    layer = Conv1D(6, 8)
    nn.init.normal_(layer.bias)
    return layer


@dataclass(frozen=True)
class Place:
    """make(): the module at a site; example(rows): x for it."""

    make: Callable[[], nn.Module]
    example: Callable[[int], Tensor]


def _vectors(rows: int) -> Tensor:
    return torch.randn(rows, 3, 8)


SITES: dict[str, Place] = {
    "linear": Place(lambda: nn.Linear(8, 6), _vectors),
    "conv1d": Place(_conv1d, _vectors),  # GPT-2's: weight (in, out)
    "conv2d": Place(lambda: nn.Conv2d(4, 6, 3, padding=1), lambda rows: torch.randn(rows, 4, 5, 5)),
    "embedding": Place(lambda: nn.Embedding(11, 6), lambda rows: torch.randint(11, (rows, 3))),
    "norm": Place(lambda: nn.LayerNorm(8), _vectors),
    "block": Place(Block, _vectors),
    "batchnorm": Place(lambda: nn.BatchNorm2d(4), lambda rows: torch.randn(rows, 4, 5, 5)),
    "batchnorm1d": Place(lambda: nn.BatchNorm1d(4), lambda rows: torch.randn(rows, 4, 5)),
    "mixer": Place(Mixer, _vectors),
}

LINEAR = ("linear", "conv1d")
CONVOLUTION = ("conv2d",)
EMBEDDING = ("embedding",)
NORM = ("norm",)
BLOCK = ("block",)
BATCH = ("batchnorm", "batchnorm1d")
MAPS = ("conv2d", *BATCH)  # whose x has no tokens
MIXER = ("mixer",)


@dataclass(frozen=True)
class Case:
    """One row: a kind, and where it is tested."""

    id: str
    make: Callable[[], mb.Kind]
    sites: tuple[str, ...]
    labels: Mapping[str, Callable[[int], Any]] = field(default_factory=dict)
    folds: bool = False
    generated: bool = False
    learns: bool = True
    draws: bool = False

    @property
    def trains(self) -> bool:
        """Whether what it does in training follows from its rows, each for itself: the mode in which laws compare."""
        return not (self.draws or self.make().tied)

    def __str__(self) -> str:
        return self.id


TYPOLOGY = {"en": (0, 1, 1), "de": (1, 1, 0), "sw": (1, 0, 0.5)}
LANGUAGE = {"language": lambda rows: [("en", "de", None, "sw")[i % 4] for i in range(rows)]}

KINDS: list[Case] = [
    Case("lora", lambda: mb.LoRA(2, alpha=3.0), LINEAR + CONVOLUTION + EMBEDDING, folds=True),
    Case("lora-stable", lambda: mb.LoRA(3, alpha=2.0, stable=True), LINEAR, folds=True),
    Case(
        "lora-started",
        lambda: mb.LoRA(2, alpha=3.0, start="pissa", bias=True),
        LINEAR + CONVOLUTION + EMBEDDING,
        folds=True,
    ),
    Case("dense", lambda: mb.DenseDelta(bias=True), LINEAR + CONVOLUTION + EMBEDDING, folds=True),
    Case("dora", lambda: mb.DoRA(2, alpha=3.0), LINEAR + CONVOLUTION + EMBEDDING, folds=True),
    Case("loha", lambda: mb.LoHa(2, alpha=3.0), LINEAR + CONVOLUTION + EMBEDDING, folds=True),
    Case("lokr", lambda: mb.LoKr(1, both=True), LINEAR + CONVOLUTION + EMBEDDING, folds=True),
    Case("krona", lambda: mb.LoKr(None, alpha=2.0), LINEAR + CONVOLUTION + EMBEDDING, folds=True),
    Case("vera", lambda: mb.VeRA(3), LINEAR, folds=True),
    Case("adalora", lambda: mb.AdaLoRA(3, alpha=2.0), LINEAR + CONVOLUTION + EMBEDDING, folds=True),
    Case("intrinsic", lambda: mb.Intrinsic(5), LINEAR + CONVOLUTION + EMBEDDING, folds=True),
    Case("intrinsic-dense", lambda: mb.Intrinsic(5, "dense", scaled=True), LINEAR, folds=True),
    Case("bottleneck", lambda: mb.Bottleneck(3), LINEAR + CONVOLUTION + EMBEDDING + NORM + BLOCK),
    Case("bottleneck-norm", lambda: mb.Bottleneck(3, norm=True, scale="learned"), LINEAR + CONVOLUTION + BLOCK),
    Case(
        "bottleneck-parallel",
        lambda: mb.Bottleneck(3, placement="parallel", scale=4.0, norm=True, std=0.1, activation="gelu"),
        LINEAR + CONVOLUTION + NORM + BLOCK,
    ),
    Case("compacter", lambda: mb.Compacter(2, size=4, std=0.3), LINEAR + EMBEDDING + NORM + BLOCK),
    Case("compacter-phm", lambda: mb.Compacter(2, rank=None, std=0.3, activation="relu"), LINEAR + BLOCK),
    Case("bottleneck-sum", lambda: mb.Bottleneck(3, placement="sum", norm=True), BLOCK),
    Case("bottleneck-norm-after", lambda: mb.Bottleneck(3, norm="after"), LINEAR + CONVOLUTION + BLOCK),
    Case("ia3", lambda: mb.IA3(), LINEAR + CONVOLUTION + EMBEDDING + NORM + BLOCK, folds=True),
    Case("ia3-input", lambda: mb.IA3("input"), LINEAR + CONVOLUTION, folds=True),
    Case("bitfit", lambda: mb.BitFit(), LINEAR + CONVOLUTION + EMBEDDING + NORM + BLOCK, folds=True),
    Case("norm", lambda: mb.Norm(), LINEAR + CONVOLUTION + EMBEDDING + NORM + BLOCK, folds=True),
    Case("batch-norm", lambda: mb.BatchNorm(), BATCH),
    Case("norm-bias", lambda: mb.Norm(bias=True), LINEAR + NORM, folds=True),
    Case("invertible", lambda: mb.Invertible(activation="gelu"), LINEAR + EMBEDDING + NORM + BLOCK),
    Case("invertible-std", lambda: mb.Invertible(3, std=0.1), LINEAR),
    Case("residual", lambda: mb.ResidualAdapter(), LINEAR + CONVOLUTION, folds=True),
    Case("residual-parallel", lambda: mb.ResidualAdapter("parallel"), LINEAR + CONVOLUTION, folds=True),
    Case("squeeze-excite", lambda: mb.SqueezeExcite(2), LINEAR + CONVOLUTION + EMBEDDING + NORM + BLOCK),
    Case("squeeze-excite-apart", lambda: mb.SqueezeExcite(4, factor=1.0, pool=False), LINEAR + CONVOLUTION),
    Case("sparse", lambda: mb.SparseDelta(density=0.2, seed=3), LINEAR + CONVOLUTION + EMBEDDING, folds=True),
    Case("sparse-bias", lambda: mb.SparseDelta(density=0.2, bias=True), LINEAR + CONVOLUTION, folds=True),
    Case("masked", lambda: mb.Masked("edge-popup", density=0.6), LINEAR + CONVOLUTION + EMBEDDING, folds=True),
    Case(
        "masked-threshold",
        lambda: mb.Masked("threshold", threshold=5e-3, start=1e-2, regularise=0.1),
        LINEAR + CONVOLUTION + EMBEDDING,
        folds=True,
    ),
    Case("masked-gumbel", lambda: mb.Masked("gumbel", start=0.1, noise=False), LINEAR + CONVOLUTION, folds=True),
    Case("sub-network", lambda: mb.SubNetwork(density=0.6), LINEAR + CONVOLUTION + EMBEDDING, folds=True, learns=False),
    Case(
        "diff-pruning",
        lambda: mb.DiffPruning(structured=True, start=1.5, noise=False),
        LINEAR + CONVOLUTION + EMBEDDING,
        folds=True,
    ),
    Case("gates", lambda: mb.Gates(2), LINEAR + CONVOLUTION + EMBEDDING + NORM + BLOCK, folds=True),
    Case(
        "gates-input", lambda: mb.Gates(2, "input", hard=True, start=0.5, noise=False), LINEAR + CONVOLUTION, folds=True
    ),
    Case("feed-forward", lambda: mb.FeedForward(5), LINEAR + NORM + BLOCK),
    Case("feed-forward-gated", lambda: mb.FeedForward(5, "silu", gated=True, bias=False), LINEAR + BLOCK),
    Case("full", lambda: mb.Full(), LINEAR + CONVOLUTION + EMBEDDING + NORM + BLOCK),
    Case("deep-prompt", lambda: mb.DeepPrompt(3, after=1), MIXER),
    Case("head", lambda: mb.Head(("no", "yes", "maybe")), LINEAR + BLOCK),
    Case(
        "hyper-lora",
        lambda: mb.Hyper(mb.LoRA(2), "language", ("en", "de", "sw"), size=4),
        LINEAR + CONVOLUTION + EMBEDDING,
        labels=LANGUAGE,
        generated=True,
    ),
    Case(
        "hyper-bottleneck",
        lambda: mb.Hyper(mb.Bottleneck(3, norm=True), "language", ("en", "de", "sw"), size=4, hidden=6),
        LINEAR + CONVOLUTION + BLOCK,
        labels=LANGUAGE,
        generated=True,
    ),
    Case(
        "hyper-ia3-input",
        lambda: mb.Hyper(mb.IA3("input"), "language", ("en", "de", "sw"), size=4),
        LINEAR,
        labels=LANGUAGE,
        generated=True,
    ),
    Case(
        "hyper-several",
        lambda: mb.Hyper(
            mb.Bottleneck(3, norm="after"),
            ("task", "language"),
            (("x", "y", "z"), ()),
            4,
            6,
            5,
            True,
            ("site", "input"),
            table={"language": TYPOLOGY},
            shared=False,
        ),
        LINEAR + BLOCK,
        labels={"task": lambda rows: [("x", "y", None)[i % 3] for i in range(rows)], **LANGUAGE},
        generated=True,
    ),
    Case(
        "hyper-grouped",
        lambda: mb.Hyper(mb.LoRA(2), "language", table=TYPOLOGY, where=(), rank=3),
        LINEAR + EMBEDDING,
        labels=LANGUAGE,
        generated=True,
    ),
    Case(
        "hyper-full",
        lambda: mb.Hyper(mb.Full(), "language", ("en", "de", "sw"), size=4),
        LINEAR + BLOCK,
        labels=LANGUAGE,
        generated=True,
    ),
    Case(
        "hyper-latent",
        lambda: mb.Hyper(mb.LoRA(2), "language", ("en", "de", "sw"), size=4, kl=0.1),
        LINEAR + EMBEDDING,
        labels=LANGUAGE,
        generated=True,
        draws=True,
    ),
    Case("grid", lambda: mb.Grid(2, 4), LINEAR, folds=True),
    Case("hyper-grid", lambda: mb.Hyper(mb.Grid(3, 2), where=("input",), only=("row",)), LINEAR, generated=True),
    Case("hyper-place", lambda: mb.Hyper(mb.Bottleneck(3), size=4), LINEAR + EMBEDDING, generated=True),
]


def cases(*, site: str | None = None, where: Callable[[Case], bool] = lambda case: True):
    """(case, site name) for every row and site that fits, for pytest.mark.parametrize; with `ids`: see `ids`."""
    return [(case, name) for case in KINDS if where(case) for name in case.sites if site in (None, name)]


def ids(value: object) -> str:
    """How a row shows in a test's name."""
    return str(value)


def site_of(name: str):
    """(module, its site): a fresh, seeded one."""
    module = SITES[name].make()
    return module, describe(name, module)


def fresh(kind: mb.Kind, site) -> dict[str, Tensor]:
    """The parameters of a new module at one site, as they are stored."""
    return parameters(kind, kind.init([site]))[site.name]


def trained(kind: mb.Kind, site, scale: float = 0.3) -> dict[str, Tensor]:
    """Parameters as if something had been learned: every learned tensor moved at random."""
    params = fresh(kind, site)
    return {
        name: nn.Parameter(t.detach() + scale * torch.randn_like(t)) if isinstance(t, nn.Parameter) else t
        for name, t in params.items()
    }


def function(module: nn.Module, x: Tensor) -> Function:
    """f for one call of a site."""
    return Function(module, (x,), {}, module)


def context(case: Case | None = None, rows: int = 1) -> Context:
    """A context with the labels that a row needs, one an example."""
    return Context(labels={} if case is None else {keyword: make(rows) for keyword, make in case.labels.items()})


# Routes: the laws run every kind under each of these, and every aggregator.

B, T, N = 5, 3, 4  # examples, tokens of one (as SITES draw them), and modules


@dataclass(frozen=True)
class Form:
    """One form of routing: make() draws it for B examples of T tokens and N modules."""

    id: str
    make: Callable[[], mb.Routing]
    tokens: bool = False
    one: bool = False  # each row has at most one module, at weight one

    def __str__(self) -> str:
        return self.id


def _weights(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64).add(0.1).requires_grad_()


def _listed(*rows: tuple[int, ...]) -> mb.Routing:
    """What ByLabel makes of a list: the index known on the host."""
    k = max(map(len, rows)) or 1
    return mb.Routing(index=torch.tensor([[*row, *[-1] * (k - len(row))] for row in rows]), host=rows)


ROUTINGS: list[Form] = [
    Form("set-dense", lambda: mb.Routing(weights=_weights(N))),
    Form("set-sparse", lambda: mb.Routing(index=torch.tensor([2, 0]), weights=_weights(2))),
    Form("set-all", lambda: mb.Routing(index=torch.tensor([2, 0, 3, 1]), weights=_weights(4))),
    Form("example-list", lambda: _listed((1,), (), (3,), (1,), (0,)), one=True),
    Form("example-index", lambda: mb.Routing(index=torch.tensor([[2], [0], [-1], [0], [2]])), one=True),
    Form("example-list-several", lambda: _listed((0, 1), (3,), (), (1, 0), (2, 3))),
    Form("example-dense", lambda: mb.Routing(weights=_weights(B, N))),
    Form(
        "example-sparse",
        lambda: mb.Routing(index=torch.tensor([[0, 1], [3, -1], [2, 0], [1, 3], [-1, -1]]), weights=_weights(B, 2)),
    ),
    Form("token-one", lambda: mb.Routing(index=torch.randint(-1, N, (B, T, 1))), tokens=True, one=True),
    Form("token-dense", lambda: mb.Routing(weights=_weights(B, T, N)), tokens=True),
    Form(
        "token-sparse",
        lambda: mb.Routing(index=torch.rand(B, T, N).topk(2).indices, weights=_weights(B, T, 2)),
        tokens=True,
    ),
]


@dataclass(frozen=True)
class Part:
    """A router or an aggregator, and the labels that a call of it needs."""

    id: str
    make: Callable[[], Any]
    labels: Mapping[str, Callable[[int], Any]] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.id


AGGREGATORS: list[Part] = [
    Part("sum", mb.WeightedSum),
    Part("average", mb.ParameterAverage),
    Part("average-deltas", lambda: mb.ParameterAverage("deltas")),
    Part("sequence", mb.Sequence),
    Part("mixture", mb.Mixture),
    Part("fusion", mb.AdapterFusion),
    Part("ensemble", mb.Ensemble),
    Part("per-site", lambda: mb.PerSite({"x*": mb.Sequence()})),
]

TASKS = {"task": lambda rows: [("x", "y", None)[i % 3] for i in range(rows)]}

OWN = {"task": lambda rows: [("a", "b", None)[i % 3] for i in range(rows)]}

TEXTS = {"a": "a cat sat", "b": "the dog sat", "d": "dog and cat"}
QUERIES = {"query": lambda rows: [("a dog", "cat", None, "no match")[i % 4] for i in range(rows)]}

ROUTERS: list[Part] = [
    Part("by-label", lambda: mb.ByLabel("task", {"x": ["a"], "y": ["b", "a"]}), TASKS),
    Part("drop", lambda: mb.Drop("task", {"x": ["a"], "y": ["b", "a"]}), TASKS),
    Part("fixed", lambda: mb.Fixed({"b": 0.7, "a": -0.2})),
    Part("fixed-learned", lambda: mb.Fixed({"a": 0.1, "b": 0.4, "c": 0.0, "d": 1.0}, learned=True, softmax=True)),
    Part("uniform", mb.Uniform),
    Part("top-1", mb.TopK),
    Part("top-2-dense", lambda: mb.TopK(2, dense=True)),
    Part("top-2-example", lambda: mb.TopK(2, by="example")),
    Part("top-all", lambda: mb.TopK(None)),
    Part("top-2-crowded", lambda: mb.TopK(2, noise=1.0, capacity=1.0, priority=True, drop=0.2, renormalise="after")),
    Part("top-2-noisy", lambda: mb.TopK(2, noise=True, second="random", capacity=1.0)),
    Part("top-2-biased", lambda: mb.TopK(2, score="sigmoid", bias=1e-3)),
    Part("balanced", mb.Balanced),
    Part("balanced-sinkhorn", lambda: mb.Balanced("sinkhorn", by="example")),
    Part("expert-choice", mb.ExpertChoice),
    Part("d-select", lambda: mb.DSelect(2, by="token")),
    Part("d-select-all", lambda: mb.DSelect(2, by="all", entropy=0.0)),
    Part("types", lambda: mb.Types(5, threshold=1.1)),
    Part("types-example", lambda: mb.Types(5, by="example", threshold=None, learned=True)),
    Part("bm25", lambda: mb.BM25(TEXTS, k=2), QUERIES),
    Part("gate", mb.Gate),
    Part("gate-norm", lambda: mb.Gate(norm=True)),
    Part(
        "gate-of-a-label",
        lambda: mb.Gate("task"),
        OWN,
    ),
    Part("skills", lambda: mb.Skills("task", ["x", "y"], mode="sigmoid"), TASKS),
    Part("skills-hard", lambda: mb.Skills("task", ["x", "y"], mode="straight-through"), TASKS),
    Part("skills-linear", lambda: mb.Skills("task", ["x", "y"], mode="linear"), TASKS),
    Part("by-weighed-label", lambda: mb.ByLabel("task", {"x": {"a": 0.3, "b": -1.2}, "y": ["b"]}), TASKS),
    Part("soft-gate", mb.SoftGate),
    Part("soft-gate-token", lambda: mb.SoftGate("task", ["x", "y"], of="both", by="token", k=2), TASKS),
    Part("soft-gate-own", lambda: mb.SoftGate("task", ["x", "y"], table={"x": ["a", "b"], "y": ["b"]}), TASKS),
    Part("soft-gate-of-a-label", lambda: mb.SoftGate("task", ["x", "y"], of="label", k=2), TASKS),
    Part("tree", lambda: mb.Tree({"left": ["a", "b"], "right": {"up": ["c"], "down": ["d"]}})),
    Part("arrow", mb.Prototypes),
    Part("phatgoose", lambda: mb.Prototypes("phatgoose")),
    Part("phatgoose-gates", lambda: mb.Prototypes("phatgoose", label="task"), OWN),
    Part("policy", mb.Policy),
    Part("policy-of-tasks", lambda: mb.Policy("example", "task", ["x", "y"], none=True, critic=True), TASKS),
    Part("policy-gumbel", lambda: mb.Policy(mode="gumbel")),
    Part("dispatch", lambda: mb.Dispatch(mb.Policy(), [mb.Policy(), mb.Policy()])),
    Part("switches", lambda: mb.Switches("example")),
    Part("switches-of-tasks", lambda: mb.Switches(label="task", labels=["x", "y"], normalise=True), TASKS),
    Part("scouts", mb.Scouts),
    Part("split", lambda: mb.Split(["a", (), ["b", "d"]], [1, 1])),
    Part("random", mb.Random),
    Part("path", lambda: mb.Path("task", {"x": [["a"]], "y": [["b", "a"]]}), TASKS),
]
