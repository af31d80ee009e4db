"""Top-k routing by a learned linear gate: mixtures of experts.

Noisy top-k: Shazeer et al., 2017 (arXiv 1701.06538); one expert: Fedus, Zoph and Shazeer, "Switch Transformers", 2021
(arXiv 2101.03961); two: Lepikhin et al., "GShard", 2020 (arXiv 2006.16668); z-loss: Zoph et al., "ST-MoE", 2022
(2202.08906).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..abstract import Context, Router, Routing, Site
from ..errors import CompositionError, SiteError
from ..losses import load_balance, z_loss
from ._columns import regrown, renamed


class TopK(Router):
    """p = softmax(W x); the k likeliest modules count, at p_i for k = 1 (Switch) and at p_i / Σ_{top k} p_j otherwise.

    k: modules a row. by: "token", x (b, t, d) or (b, d), or "example": x averaged over its positions, without padding.
    dense: weights (…, n), zero outside the top k, instead of index and weights (…, k).
    renormalise: whether the weights sum to one; by default if k > 1.
    noise: Shazeer's, W x + ε softplus(W_n x) in training, with W_n learned. jitter: Switch's, x ⊙ U(1 − jitter,
    1 + jitter) in training. sample: in training the k modules are drawn by p, none twice, and log_prob is of the draw.
    balance, z: coefficients of the losses that training adds.
    The gate runs in fp32; its weights (n, d) start as Switch's, normal with variance 0.1/d, cut at two deviations. No
    module has a capacity, so that none drops a token. Raises CompositionError for a k above the number of modules.
    """

    def __init__(
        self,
        k: int = 1,
        by: str = "token",
        dense: bool = False,
        renormalise: bool | None = None,
        noise: bool = False,
        jitter: float = 0.0,
        sample: bool = False,
        balance: float = 1e-2,
        z: float = 0.0,
    ):
        super().__init__()
        if by not in ("token", "example"):
            raise CompositionError(f"TopK(by={by!r}): a route is chosen by 'token' or by 'example'.")
        if k < 1:
            raise CompositionError(f"TopK(k={k}): at least one module is chosen.")
        self.k, self.by, self.dense, self.sample = k, by, dense, sample
        self.renormalise = k > 1 if renormalise is None else renormalise
        self.noise, self.jitter, self.balance, self.z = noise, jitter, balance, z
        self.axis = -1
        self.gate: Tensor
        self.spread: Tensor

    def build(self, names: Sequence[str], site: Site) -> None:
        width, old = site.features("inputs"), getattr(self, "gate", None)
        if site.form == "embedding":
            raise CompositionError(
                f"TopK at site {site.name!r}: its input is token ids, which no linear gate can read."
            )
        if old is not None and old.shape[1] != width:
            raise CompositionError(
                f"TopK reads {old.shape[1]} features, but site {site.name!r} has {width}: one router object is one "
                f"gate. Pass a callable, router=lambda: mb.TopK({self.k}), for a gate at each site."
            )
        self.axis = site.axis
        std = math.sqrt(0.1 / width)
        new = torch.empty(len(names), width, device=site.device, dtype=torch.float32)
        if old is None:
            nn.init.trunc_normal_(new, std=std, a=-2 * std, b=2 * std)
        self.gate = regrown(self, "gate", self.names, names, new)
        if self.noise:
            self.spread = regrown(self, "spread", self.names, names, torch.zeros_like(new))
        self.names = tuple(names)

    def rename(self, old: str, new: str) -> None:
        self.names = renamed(self.names, old, new)

    def forward(self, x: Tensor, c: Context) -> Routing:
        n = len(self.names)
        if self.k > n:
            raise CompositionError(f"TopK(k={self.k}) chooses among {n} modules: lower k, or add modules.")
        rows, mask = self._rows(x, c)
        with torch.autocast(x.device.type, enabled=False):
            logits = self._logits(rows.float())
            p = torch.softmax(logits, -1)
            scores = logits - torch.empty_like(logits).exponential_().log() if self._draws() else logits
            index = scores.topk(self.k, dim=-1).indices
            log_prob = _log_prob(logits, index) if self._draws() else None
            weights = p.gather(-1, index)
            weights = weights / weights.sum(-1, keepdim=True) if self.renormalise else weights
            losses = self._losses(logits, p, index, mask) if self.training else {}
        if self.dense:
            full = torch.zeros_like(p).scatter(-1, index, weights)
            return Routing(weights=full, log_prob=log_prob, losses=losses)
        return Routing(index=index, weights=weights, log_prob=log_prob, losses=losses)

    def _draws(self) -> bool:
        return self.sample and self.training

    def _rows(self, x: Tensor, c: Context) -> tuple[Tensor, Tensor | None]:
        """(x with one vector a routed row, which rows are not padding): (b, d), or (b, t, d) with the mask (b, t)."""
        x = x if self.axis == -1 or x.ndim == 2 else x.movedim(self.axis, -1)
        if x.ndim == 2:
            return x, None
        if self.by == "token" and x.ndim > 3:
            raise CompositionError(
                f"TopK(by='token') at an input {tuple(x.shape)}: tokens are the rows of (batch, time, features). Use "
                f"by='example'."
            )
        mask = c.mask if x.ndim == 3 else None
        if mask is not None:
            if mask.shape[1] < x.shape[1]:
                raise SiteError(
                    f"TopK: the input has {x.shape[1]} positions, the attention mask {mask.shape[1]}: they are not the "
                    f"same positions. Give the router a site of its own, or the call no attention mask."
                )
            mask = mask[:, -x.shape[1] :]  # of a cached generation, the newest positions
        if self.by == "token":
            return x, mask
        if mask is None:
            return x.flatten(1, -2).mean(1), None
        count = mask.to(x.dtype).unsqueeze(-1)
        return (x * count).sum(1) / count.sum(1).clamp(min=1), None

    def _logits(self, x: Tensor) -> Tensor:
        if self.training and self.jitter:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        logits = F.linear(x, self.gate.float())
        if self.training and self.noise:
            logits = logits + torch.randn_like(logits) * F.softplus(F.linear(x, self.spread.float()))
        return logits

    def _losses(self, logits: Tensor, p: Tensor, index: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        losses = {"balance": self.balance * load_balance(p, index, mask)} if self.balance else {}
        return losses | ({"z": self.z * z_loss(logits, mask)} if self.z else {})


def _log_prob(logits: Tensor, index: Tensor) -> Tensor:
    """log p (…) of drawing these modules in turn, none twice (Plackett and Luce). logits: (…, n); index: (…, k)."""
    chosen = logits.gather(-1, index)
    total, left = chosen.new_zeros(chosen.shape[:-1]), logits
    for j in range(index.shape[-1]):
        total = total + chosen[..., j] - torch.logsumexp(left, -1)
        left = left.scatter(-1, index[..., j : j + 1], float("-inf"))
    return total
