"""Gates: how much each module counts for an example, whatever the others do.

Mao, Mathias, Hou, Almahairi, Ma, Han, Yih and Khabsa, "UniPELT", 2022 (arXiv 2110.07577).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..abstract import Context, Router, Routing, Site
from ..errors import CompositionError
from . import _reading
from ._by_label import ByLabel
from ._columns import regrown, renamed


class Gate(Router):
    """α_i = mean_t σ(w_i · x_t + b_i) of the site's input x (b, t, d), padding left out: each module from 0 to 1.

        mb.attach(model, modules={"ner": kinds, "pos": kinds}, router=lambda: mb.Gate("task"), name="task")

    norm: at a LayerNorm x is read as that normalises it, without its gain and bias (UniPELT's adapter behind a norm).
    label: None, all modules count; or the keyword of a call that names those that do, as for ByLabel. Pass the callable
    for a gate at each site. w (n, d) is drawn from N(0, 0.02²), and b (n,) is zero, so that a new gate is half open.
    Modules set by bay.use(…) count in full. The gate runs in fp32. Differs from the official code, whose mean counts
    padding. Raises CompositionError at a site whose features are not last.
    """

    def __init__(self, label: str | None = None, norm: bool = False):
        super().__init__()
        self.label, self.norm = label, norm
        self.eps: float | None = None  # of the norm that the site is
        self.by = None if label is None else ByLabel(label)
        self.keywords = () if label is None else (label,)
        self.weight: Tensor
        self.bias: Tensor

    def build(self, names: Sequence[str], site: Site) -> None:
        width, old = site.features("inputs"), getattr(self, "weight", None)
        if site.axis != -1 or site.form == "embedding":
            raise CompositionError(f"Gate at site {site.name!r}: its input has no features on the last axis to read.")
        if old is not None and old.shape[1] != width:
            raise CompositionError(
                f"Gate reads {old.shape[1]} features, but site {site.name!r} has {width}: one object is one gate. Pass "
                f"the class, router=mb.Gate, for a gate at each site."
            )
        self.eps = getattr(site.module, "eps", None) if self.norm and isinstance(site.module, nn.LayerNorm) else None
        new = torch.empty(len(names), width, device=site.device, dtype=torch.float32)
        if old is None:
            nn.init.normal_(new, std=0.02)
        self.weight = regrown(self, "weight", self.names, names, new)
        self.bias = regrown(self, "bias", self.names, names, new.new_zeros(len(names)))
        self.names = tuple(names)
        if self.by is not None:
            self.by.build(names, site)

    def rename(self, old: str, new: str) -> None:
        self.names = renamed(self.names, old, new)
        if self.by is not None:
            self.by.rename(old, new)

    def forward(self, x: Tensor, c: Context) -> Routing:
        gates, _ = _reading.rows(self, torch.sigmoid(self._logits(x)), c, "example", -1)  # (b, n)
        if self.by is None:
            return Routing(weights=gates)
        chosen = self.by(x, c).on(x.device)
        index = chosen.index.expand(len(x), -1)  # type: ignore[union-attr]
        host = chosen.host if chosen.host is None or chosen.axes else chosen.host * len(x)
        return Routing(index=index, weights=gates.gather(1, index.clamp(min=0)), host=host)

    def _logits(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = x if self.eps is None else F.layer_norm(x.float(), x.shape[-1:], eps=self.eps)
            return F.linear(x.float(), self.weight.float(), self.bias.float())
