"""The networks of the benchmark: an encoder, modules under a router and an aggregator, a decoder.

Mittal, Bengio and Lajoie, 2022 (arXiv 2206.02713), appendix, and its code: all R modules together are as wide as the
one of a monolithic network, which is the same network with R = 1.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..abstract import Aggregator, Context, Kind, Replacement, Router, Routing, Site
from ..core import Modular
from ..modules import FeedForward
from ..ops import linear
from ..types import Params
from ._rules import one_hot

SCORED = "scored"  # where a self-scoring aggregator leaves the weights that it used


class Said(NamedTuple):
    """y: the prediction (b,) or (b, t); weights: (…, n), how much each module counted; losses by name."""

    y: Tensor
    weights: Tensor
    losses: Mapping[str, Tensor]


class SelfScored(Aggregator):
    """y = Σ_i softmax_i(s_i) m_i(x): each module says a score beside its output, or a scorer reads its output and x.

    scorer: None, the last feature of a module's output is s_i; or its hidden size: s = v · relu(V [m_i(x), x] + b),
    the same for all modules. Any routing is taken as a choice of who takes part.
    """

    def __init__(self, scorer: int | None = None):
        super().__init__()
        self.scorer = scorer
        self.score: nn.Module | None = None

    def build(self, site: Site) -> None:
        if self.scorer is not None:
            read = site.features("inputs") + site.features("outputs")
            self.score = nn.Sequential(nn.Linear(read, self.scorer), nn.ReLU(), nn.Linear(self.scorer, 1))

    def forward(self, f: Callable | None, x: Tensor, modules: Any, routing: Routing, c: Context) -> Tensor:
        outs, _ = modules.outputs(f, x, routing, c)  # (n, …, d)
        if self.score is None:
            outs, scores = outs[..., :-1], outs[..., -1]
        else:
            scores = self.score(torch.cat([outs, x.expand(len(outs), *x.shape)], -1)).squeeze(-1)
        weights = torch.softmax(scores, 0)
        c.routes[SCORED] = Routing(weights=weights.movedim(0, -1))
        return (outs * weights.unsqueeze(-1)).sum(0)


@dataclass(frozen=True)
class Own(FeedForward):
    """A feed-forward expert that reads its own part of x: features number · width … of the R parts."""

    number: int = 0
    parts: int = 1

    def _one(self, site: Site) -> dict[str, Tensor]:
        narrow = Site(site.name, inputs=site.features("inputs") // self.parts, outputs=site.outputs, device=site.device)
        return super()._one(narrow)

    def forward(self, params: Params, x: Tensor, f: Callable | None, c: Context) -> Tensor:
        return super().forward(params, x.unflatten(-1, (self.parts, -1))[..., self.number, :], f, c)


@dataclass(frozen=True)
class Cell(Replacement):
    """One LSTM cell of (input, h, c) → (h, c), without biases; `scored`, and a score from its gates before they act.

    x (…, input + 2 size). The score is v · relu([W x, U h]) + b.
    """

    batched: ClassVar[bool] = True
    size: int
    scored: bool = False

    def init(self, sites):
        made = {}
        for site in sites:
            inputs, bound = site.features("inputs") - 2 * self.size, 1 / math.sqrt(self.size)
            shapes = {"input": (4 * self.size, inputs), "hidden": (4 * self.size, self.size)}
            shapes |= {"score": (1, 8 * self.size), "score_bias": (1,)} if self.scored else {}
            made[site.name] = {name: site.empty(*shape).uniform_(-bound, bound) for name, shape in shapes.items()}
        return made

    def forward(self, params: Params, x: Tensor, f: Callable | None, c: Context) -> Tensor:
        x, h, state = x.split([x.shape[-1] - 2 * self.size, self.size, self.size], -1)
        given, kept = linear(x, params["input"]), linear(h, params["hidden"])
        enter, forget, leave, new = (given + kept).chunk(4, -1)
        state = state * forget.sigmoid() + enter.sigmoid() * new.tanh()
        out = torch.cat([leave.sigmoid() * state.tanh(), state], -1)
        if not self.scored:
            return out
        gates = torch.cat([given, kept], -1).relu()
        return torch.cat([out, linear(gates, params["score"], params["score_bias"])], -1)


class Core(nn.Module):
    """R modules, between which a router chooses that sees x itself, or the operation alone."""

    def __init__(
        self,
        kinds: Mapping[str, Kind],
        inputs: int,
        outputs: int,
        router: Router,
        aggregator: Aggregator,
        seen: int | None = None,
    ):
        super().__init__()
        self.modular = Modular(None, kinds, None, aggregator, site=Site("core", inputs=inputs, outputs=outputs))
        self.sees_operation, self.router = seen is not None, router
        router.build(list(kinds), Site("core", inputs=seen or inputs, outputs=outputs))

    def forward(
        self, x: Tensor, operation: Tensor, rule: Tensor, target: Tensor | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(y, weights (…, n), losses). Routers may read the rule, and the target, which they have in training alone."""
        c = Context(labels={"rule": rule} if target is None else {"rule": rule, "target": target})
        routing = self.router(operation if self.sees_operation else x, c)
        y = self.modular(x, routing=routing, context=c)
        used = c.routes.get(SCORED) or routing
        weights = used.dense(len(self.modular.order)).expand(*rule.shape, -1)
        return y, weights, routing.losses | dict(c.losses)


class Way(NamedTuple):
    """How modules are chosen and put together: a router (and whether it sees the operation alone), an aggregator."""

    router: Callable[[], Router]
    aggregator: Callable[[], Aggregator]
    operation: bool = False
    scored: bool = False  # modules say a score of their own
    single: bool = False  # one module as large as all


def mlp(*sizes: int) -> nn.Sequential:
    """Linear maps with ReLUs between them."""
    layers: list[nn.Module] = []
    for i, o in pairwise(sizes):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class MLPNet(nn.Module):
    """Numbers and the operation encoded; feed-forward modules of dim/R units; one number out."""

    def __init__(self, rules: int, way: Way, encoder: int = 32, dim: int = 128):
        super().__init__()
        self.rules, n = rules, 1 if way.single else rules
        self.number, self.operation = mlp(1, encoder, encoder), mlp(rules, encoder, encoder)
        kinds = {f"m{i}": FeedForward(dim // n, "relu") for i in range(n)}
        self.core = Core(
            kinds, 3 * encoder, dim + way.scored, way.router(), way.aggregator(), encoder if way.operation else None
        )
        self.decoder = mlp(dim, encoder, 1)

    def forward(self, x: Tensor, rule: Tensor, target: Tensor | None = None) -> Said:
        """x (b, 2), rule and target (b,)."""
        operation = self.operation(one_hot(rule, self.rules))
        read = torch.cat([self.number(x[:, :1]), self.number(x[:, 1:]), operation], -1)
        y, weights, losses = self.core(read, operation, rule, target)
        return Said(self.decoder(y).squeeze(-1), weights, losses)


class MHANet(nn.Module):
    """Every module's own heads look at all tokens; what they and a linear map of x give goes through its expert."""

    def __init__(self, rules: int, way: Way, encoder: int = 128, dim: int = 512, heads: int = 2):
        super().__init__()
        n = 1 if way.single else rules
        self.rules, self.heads, self.size, self.n = rules, heads, dim // (heads * n), n
        self.encoder = mlp(4 * rules + rules, encoder, encoder)
        self.query, self.key, self.value = (nn.Linear(encoder, n * heads * self.size) for _ in range(3))
        self.own = nn.Linear(encoder, n * self.size)
        # the code's formula for as many parameters as the monolithic network has; a tenth fewer at four rules
        hidden = 2 * encoder * (n * heads * (dim + encoder) + dim) // (n * (dim * (heads + 1) + n * heads * encoder))
        kinds = {f"m{i}": Own(hidden, "relu", number=i, parts=n) for i in range(n)}
        read = n * (heads + 1) * self.size
        self.core = Core(
            kinds, read, encoder + way.scored, way.router(), way.aggregator(), rules if way.operation else None
        )
        self.decoder = mlp(encoder, encoder, 1)

    def forward(self, x: Tensor, rule: Tensor, target: Tensor | None = None) -> Said:
        """x (b, t, 4R), rule and target (b, t)."""
        operation = one_hot(rule, self.rules)
        x = self.encoder(torch.cat([x, operation], -1))
        q, k, v = (
            m(x).unflatten(-1, (self.n * self.heads, -1)).transpose(1, 2) for m in (self.query, self.key, self.value)
        )
        others = ~torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=others)  # (b, n · heads, t, size)
        out = out.transpose(1, 2).flatten(2).unflatten(-1, (self.n, -1))
        read = torch.cat([out, self.own(x).unflatten(-1, (self.n, -1))], -1).flatten(2)
        y, weights, losses = self.core(read, operation, rule, target)
        return Said(self.decoder(y).squeeze(-1), weights, losses)


class RNNNet(nn.Module):
    """LSTM cells that share h and c, which are the weighted means of what the cells make of them at each step."""

    def __init__(self, rules: int, way: Way, encoder: int = 128, dim: int = 128):
        super().__init__()
        n = 1 if way.single else rules
        self.rules, self.size = rules, dim if way.single else _cell_size(rules, encoder, dim)
        self.encoder = mlp(1 + rules, encoder, encoder)
        kinds = {f"m{i}": Cell(self.size, way.scored) for i in range(n)}
        read, out = encoder + 2 * self.size, 2 * self.size + way.scored
        self.core = Core(kinds, read, out, way.router(), way.aggregator(), rules if way.operation else None)
        self.decoder = mlp(self.size, self.size, 1)

    def forward(self, x: Tensor, rule: Tensor, target: Tensor | None = None) -> Said:
        """x (b, t, 1), rule and target (b, t)."""
        operation = one_hot(rule, self.rules)
        x = self.encoder(torch.cat([x, operation], -1))
        state, outs, weights, losses = x.new_zeros(len(x), 2 * self.size), [], [], {}
        for t in range(x.shape[1]):
            now = None if target is None else target[:, t]
            state, w, step = self.core(torch.cat([x[:, t], state], -1), operation[:, t], rule[:, t], now)
            outs.append(state[:, : self.size])
            weights.append(w)
            losses = {name: losses.get(name, 0.0) + value / x.shape[1] for name, value in step.items()}
        return Said(self.decoder(torch.stack(outs, 1)).squeeze(-1), torch.stack(weights, 1), losses)


def _cell_size(n: int, encoder: int, dim: int) -> int:
    """The units of each of n cells, with which the network has as many parameters as one with a cell of dim units."""
    b = 4 * n * encoder + 1
    root = math.sqrt(b**2 + 4 * (4 * n + 1) * (5 * dim**2 + dim * (4 * encoder + 1)))
    return int((root - b) / (2 * (4 * n + 1)))


NETWORKS: dict[str, Callable[..., nn.Module]] = {"mlp": MLPNet, "mha": MHANet, "rnn": RNNNet}
