"""Top-k routing by a learned linear gate: mixtures of experts.

All: Jacobs et al., 1991. Noisy top-k: Shazeer et al., 2017 (arXiv 1701.06538). Two: Lepikhin et al., "GShard", 2020
(2006.16668). One: Fedus, Zoph and Shazeer, "Switch Transformers", 2021 (2101.03961). z-loss: Zoph et al., "ST-MoE",
2022 (2202.08906). Priority: Riquelme et al., "V-MoE", 2021 (2106.05974). Masked outputs: NLLB Team, 2022 (2207.04672).
Bias: Wang et al., 2024 (2408.15664).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..abstract import Context, Router, Routing, Site
from ..core import recomputing
from ..errors import CallError, CompositionError, listed
from ..losses import balancing_bias, importance, in_top_k, load, load_balance, z_loss
from ..ops import capacity, places
from . import _reading
from ._columns import rearranged, regrown, renamed
from ._top_k_systems import SYSTEMS

SECOND, SCORES = ("all", "random", "sampling"), ("softmax", "sigmoid")


class TopK(Router):
    """p = softmax(W x); the k likeliest modules count, at p_i for k = 1 (Switch) and at p_i / Σ_{top k} p_j otherwise.

    k: modules a row; None: all of them, each at p_i (Jacobs). by: "token", x (b, t, d) or (b, d), or "example": x
    averaged over its positions, without padding. dense: weights (…, n), zero outside the top k, instead of index and
    weights (…, k).

    renormalise: whether the weights sum to one, by default if k > 1; "after": over what training has not dropped.
    score: p by "softmax", or by "sigmoid", each module for itself.

    What only training does, each by itself, in this order:
    jitter: x ⊙ U(1 − jitter, 1 + jitter), the gate's x (Switch: 1e-2). noise: True adds ε (softplus(W_n x) + 1e-2),
    ε ~ N(0, 1), with W_n learned (Shazeer); a number s adds ε s/n (V-MoE: 1). sample: the k modules are drawn by p,
    none twice, and log_prob is of the draw. second: all but the first module are the next likeliest ("all"); kept with
    probability min(1, 2 w_i) ("random", GShard); or drawn by p ("sampling", NLLB).
    capacity: a module takes at most ⌈capacity · k · rows / n⌉ rows; the others drop it, which leaves f(x), or nothing
    of a Mixture. First choices go before second ones, rows in order, or by `priority` the surest first. drop: the share
    of choices that are left out, at random, the others weighing 1/(1 − drop) (NLLB's expert output masking: 0.2).
    bias: the rate at which b in "the k highest of p_i + b_i count" follows the load, up where it is below the mean and
    down where it is above, once a call, by the rows of its process; b has no gradient and weighs nothing (Wang et al.:
    1e-3).

    Losses that training adds, by their coefficients. balance: n Σ f_i P_i, f of all choices, or of the first alone
    unless second is "all"; by default 1e-2, or none under noise, a bias or k=None. importance, load: CV² of the weights
    and of the chances to be chosen; by default 1e-2 under noise=True, as in the authors' code (their paper: 0.1), and
    5e-3 under a number, else none. z: of the logits (ST-MoE: 1e-3).

    The gate runs in fp32; its weights (n, d) start as Switch's, normal with variance 0.1/d, cut at two deviations, or,
    under noise=True, at zero. Differs from the papers: one group of rows, the whole call; evaluation draws nothing and
    knows no capacity, so that a row does not depend on its batch. Padding counts in no loss and takes no place: under a
    capacity, it has no module. Raises CompositionError for a k above the number of modules, and for arguments at odds.
    """

    systems = SYSTEMS

    def __init__(
        self,
        k: int | None = 1,
        by: str = "token",
        dense: bool = False,
        renormalise: bool | str | None = None,
        noise: bool | float = False,
        jitter: float = 0.0,
        sample: bool = False,
        balance: float | None = None,
        z: float = 0.0,
        second: str = "all",
        capacity: float | None = None,
        priority: bool = False,
        drop: float = 0.0,
        score: str = "softmax",
        importance: float | None = None,
        load: float | None = None,
        bias: float = 0.0,
    ):
        super().__init__()
        learned, plain = noise is True, noise is False or noise == 0
        cv = 0.0 if plain else 1e-2 if learned else 5e-3
        self.k, self.by, self.dense, self.sample = k, _reading.by("TopK", by), dense, sample
        self.renormalise = (k or 1) > 1 if renormalise is None else renormalise
        self.noise, self.jitter, self.z = noise, jitter, z
        self.balance = (1e-2 if plain and not bias and k else 0.0) if balance is None else balance
        self.importance, self.load = cv if importance is None else importance, cv if load is None else load
        self.second, self.capacity, self.priority, self.drop = second, capacity, priority, drop
        self.score, self.bias = score, bias
        self.axis = -1
        self.gate: Tensor
        self.spread: Tensor
        self.steps: Tensor
        self._check(plain)

    def _check(self, plain: bool) -> None:
        said = [
            (self.k is not None and self.k < 1, f"k={self.k}", "at least one module is chosen, or all (None)."),
            (self.second not in SECOND, f"second={self.second!r}", f"it is one of {listed(SECOND)}."),
            (self.score not in SCORES, f"score={self.score!r}", f"it is one of {listed(SCORES)}."),
            (
                self.renormalise not in (True, False, "after"),
                f"renormalise={self.renormalise!r}",
                "or True, or 'after'.",
            ),
            (self.capacity is not None and not self.capacity > 0, f"capacity={self.capacity}", "above 0, or None."),
            (not 0 <= self.drop < 1, f"drop={self.drop}", "a share, from 0 and below 1."),
            (self.k is None and self.capacity, f"k=None, capacity={self.capacity}", "what all rows take drops none."),
            (self.load and plain, f"load={self.load}", "without noise no chance can be told; give noise, or load=0."),
            (self.sample and self.second != "all", f"sample=True, second={self.second!r}", "choose one way to draw."),
            (self.sample and self.bias, f"sample=True, bias={self.bias}", "a draw is of p alone; leave one out."),
            (self.bias and self.second == "sampling", f"second='sampling', bias={self.bias}", "leave one out."),
        ]
        for wrong, given, why in said:
            if wrong:
                raise CompositionError(f"TopK({given}): {why}")

    def build(self, names: Sequence[str], site: Site) -> None:
        width = _reading.width(self, site, getattr(self, "gate", None))
        self.axis = site.axis
        std = math.sqrt(0.1 / width)
        new = torch.zeros(len(names), width, device=site.device, dtype=torch.float32)
        if not hasattr(self, "gate") and self.noise is not True:
            nn.init.trunc_normal_(new, std=std, a=-2 * std, b=2 * std)
        self.gate = regrown(self, "gate", self.names, names, new)
        if self.noise is True:
            self.spread = regrown(self, "spread", self.names, names, torch.zeros_like(new))
        if self.bias:
            steps = torch.zeros(
                len(names), device=site.device, dtype=torch.long
            )  # a whole number, which no cast rounds
            if hasattr(self, "steps"):
                steps = rearranged(self.steps.double(), self.names, names, steps.double()).round().long()
            self.register_buffer("steps", steps)
        self.names = tuple(names)

    def rename(self, old: str, new: str) -> None:
        self.names = renamed(self.names, old, new)

    def forward(self, x: Tensor, c: Context) -> Routing:
        n = len(self.names)
        k = n if self.k is None else self.k
        if k > n:
            raise CompositionError(f"TopK(k={k}) chooses among {n} modules: lower k, or add modules.")
        rows, mask = _reading.rows(self, x, c, self.by, self.axis)
        with torch.autocast(x.device.type, enabled=False):
            clean, logits, spread = self._logits(_reading.full(rows))
            p = torch.sigmoid(logits) if self.score == "sigmoid" else torch.softmax(logits, -1)
            index = self._choice(logits, p, k, mask, c)
            log_prob = _log_prob(logits, index) if self.sample and self.training else None
            weights = p.gather(-1, index)
            weights = weights / weights.sum(-1, keepdim=True) if self.renormalise is True else weights
            losses = self._losses(clean, logits, spread, p, index, weights, mask) if self.training else {}
            index = self._kept(index, weights, p, mask) if self.training else index
            if self.renormalise == "after":
                weights = weights * (index >= 0)
                weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).eps)
            if self.training and self.drop:
                index = torch.where(torch.rand_like(weights) < self.drop, -1, index)
                weights = weights / (1 - self.drop)
        routing = Routing(index=index, weights=weights, log_prob=log_prob, losses=losses)
        if not self.dense and self.k is not None:
            return routing
        return Routing(weights=routing.dense(n), log_prob=log_prob, losses=losses)

    def _logits(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(W x, W x with noise, the deviation of the noise), each (…, n)."""
        if self.training and self.jitter:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        clean = _reading.linear(x, self.gate)
        if not self.training or not self.noise:
            return clean, clean, None
        if self.noise is True:
            spread = F.softplus(_reading.linear(x, self.spread)) + 1e-2  # as the authors' code, so that some is left
        else:
            spread = torch.full_like(clean, self.noise / len(self.names))
        return clean, clean + torch.randn_like(clean) * spread, spread

    def _choice(self, logits: Tensor, p: Tensor, k: int, mask: Tensor | None, c: Context) -> Tensor:
        """The modules of each row (…, k), the likeliest first, unless they are drawn."""
        if self.bias:
            return self._biased(p, k, mask, c)
        if not self.training or (self.second != "sampling" and not self.sample):
            return logits.topk(k, -1).indices
        drawn = logits - torch.empty_like(logits).exponential_().log()  # plus Gumbel noise: the highest k are drawn
        if self.sample:
            return drawn.topk(k, -1).indices
        first = logits.argmax(-1, keepdim=True)
        return torch.cat([first, drawn.scatter(-1, first, -math.inf).topk(k - 1, -1).indices], -1)

    def _biased(self, p: Tensor, k: int, mask: Tensor | None, c: Context) -> Tensor:
        """The k highest of p + b; a call that is recomputed for its gradient sees the b of its first time."""
        again, steps = recomputing(), self.steps
        if self.training and not torch.compiler.is_compiling():
            key = f"steps of {id(self)}"
            if again and key not in c.state:
                raise CallError(
                    "TopK(bias=…) is recomputed for its gradient outside of mb.attach, and its bias has moved since: "
                    "the route would be another. Use mb.attach, or no gradient checkpointing, or bias=0."
                )
            steps = c.state.setdefault(key, steps.clone())
        index = (p.detach() + self.bias * steps.to(p.dtype)).topk(k, -1).indices
        if self.training and not again and self.gate.requires_grad:  # what is frozen stays
            move = balancing_bias(p.new_zeros(p.shape[-1]), index, 1.0, mask)
            self.steps.add_(move.long())
        return index

    def _kept(self, index: Tensor, weights: Tensor, p: Tensor, mask: Tensor | None) -> Tensor:
        """index with −1 where chance or a full module drops a choice."""
        if self.second == "random":
            stays = torch.rand_like(weights) < 2 * weights
            stays[..., 0] = True
            index = torch.where(stays, index, -1)
        if self.capacity is None:
            return index
        n, k = p.shape[-1], index.shape[-1]
        index = index if mask is None else torch.where(mask.bool().unsqueeze(-1), index, -1)
        rows = index[..., 0].numel() if mask is None else mask.bool().sum()
        surest = p.amax(-1).flatten() if self.priority else None
        place = places(index.reshape(-1, k), n, surest).view(index.shape)
        return torch.where(place < capacity(self.capacity * k, rows, n), index, -1)

    def _losses(
        self,
        clean: Tensor,
        logits: Tensor,
        spread: Tensor | None,
        p: Tensor,
        index: Tensor,
        weights: Tensor,
        mask: Tensor | None,
    ) -> dict[str, Tensor]:
        losses = {}
        if self.balance:
            shares = p / p.sum(-1, keepdim=True) if self.score == "sigmoid" else p
            counted = index if self.second == "all" else index[..., :1]
            losses["balance"] = self.balance * load_balance(shares, counted, mask)
        if self.importance:
            soft = self.noise is not True and spread is not None  # V-MoE's counts all modules, and no noise
            used = clean.softmax(-1) if soft else torch.zeros_like(p).scatter(-1, index, weights)
            losses["importance"] = self.importance * importance(used, mask)
        if self.load and spread is not None:
            chances = in_top_k(clean, logits, spread, index.shape[-1], excluding=self.noise is True)
            losses["load"] = self.load * load(chances, mask)
        return losses | ({"z": self.z * z_loss(logits, mask)} if self.z else {})


def _log_prob(logits: Tensor, index: Tensor) -> Tensor:
    """log p (…) of drawing these modules in turn, none twice (Plackett and Luce). logits: (…, n); index: (…, k)."""
    chosen = logits.gather(-1, index)
    total, left = chosen.new_zeros(chosen.shape[:-1]), logits
    for j in range(index.shape[-1]):
        total = total + chosen[..., j] - torch.logsumexp(left, -1)
        left = left.scatter(-1, index[..., j : j + 1], float("-inf"))
    return total
