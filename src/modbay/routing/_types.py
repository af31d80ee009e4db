"""Type matching: what x is, against what each module takes, as neural interpreters route.

Rahaman, Gondal, Joshi, Gehler, Bengio, Locatello and Schölkopf, "Dynamic Inference with Neural Interpreters", 2021
(arXiv 2110.06399).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..abstract import Context, Router, Routing, Site
from ..errors import CompositionError
from ..types import System
from . import _reading
from ._columns import regrown, renamed

EPS = 1e-6
TEST = "tests/test_routers.py::test_"


class Types(Router):
    """α_i ∝ exp(−d_i/σ) if d_i < threshold, else 0; d_i = 1 − cos(s_i, t), with the type t = W₂ gelu(W₁ x + b₁) + b₂.

        mb.attach(model, router=lambda: mb.Types(24), …)        # each token's type, against each module's signature

    size: of types t and signatures s (n, size), drawn from N(0, 1). by: "token", or "example", x averaged over its
    positions without padding. threshold: how far a type may be from a signature, at most 2; None for any. learned:
    whether signatures are learned; the authors' configuration keeps them as they are drawn, so that a module that is
    added later comes between none of the others. bandwidth: where the learned σ starts.
    Weights (…, n) sum to one, or to zero where no module takes the type, so that the row passes as it is. Computes in
    fp32. The authors' threshold is passed straight through, which has no gradient either: exp(−∞) is flat.
    Raises CompositionError for a threshold, size or bandwidth that isn't above zero.
    """

    systems = (
        System(
            (96,),
            "mb.Types()",
            (TEST + "types_match_signatures_by_their_angle", TEST + "a_type_that_nobody_takes_passes"),
            "Neural interpreters: type matching",
            section="4.2.3",
        ),
    )

    def __init__(
        self,
        size: int = 24,
        by: str = "token",
        threshold: float | None = 1.4,
        learned: bool = False,
        bandwidth: float = 1.0,
    ):
        super().__init__()
        if size < 1 or bandwidth <= 0 or (threshold is not None and threshold <= 0):
            raise CompositionError(
                f"Types(size={size}, threshold={threshold}, bandwidth={bandwidth}): each is above 0; a threshold of "
                f"None takes every type."
            )
        self.size, self.by, self.threshold = size, _reading.by("Types", by), threshold
        self.learned, self.bandwidth = learned, bandwidth
        self.axis = -1
        self.infer: nn.Sequential | None = None
        self.signatures: nn.Parameter
        self.log_sigma = nn.Parameter(torch.tensor(float(bandwidth)).log())

    def build(self, names: Sequence[str], site: Site) -> None:
        known = None if self.infer is None else self.infer[0].weight
        width = _reading.width(self, site, known)  # type: ignore[arg-type]
        self.axis = site.axis
        if self.infer is None:
            layers = nn.Linear(width, width), nn.GELU(), nn.Linear(width, self.size)
            self.infer = nn.Sequential(*layers).to(site.device)
            self.log_sigma.data = self.log_sigma.data.to(site.device)
        fresh = torch.randn(len(names), self.size, device=site.device)
        before = self.names
        self.signatures = regrown(self, "signatures", before, names, fresh)
        if before:  # a mean of the others' would stand between them
            with torch.no_grad():
                new = [i for i, name in enumerate(names) if name not in before]
                self.signatures[new] = fresh[new].to(self.signatures)
        else:
            self.signatures.requires_grad_(self.learned)
        self.names = tuple(names)

    def rename(self, old: str, new: str) -> None:
        self.names = renamed(self.names, old, new)

    def forward(self, x: Tensor, c: Context) -> Routing:
        with torch.autocast(x.device.type, enabled=False):
            rows = _reading.full(_reading.rows(self, x, c, self.by, self.axis)[0])
            layers: Any = self.infer
            first, last = layers[0], layers[2]
            types = _reading.linear(F.gelu(_reading.linear(rows, first.weight, first.bias)), last.weight, last.bias)
            signatures = F.normalize(self.signatures.to(types.dtype), dim=-1)
            apart = 1 - F.normalize(types, dim=-1) @ signatures.mT
            near = torch.exp(-apart / self.log_sigma.exp().to(apart.dtype))
            if self.threshold is not None:
                near = near * (apart < self.threshold)
            return Routing(weights=near / (near.sum(-1, keepdim=True) + EPS))
