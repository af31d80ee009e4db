"""Routing over modules that were trained apart: each has a vector at each site, and a token goes where it points.

Arrow: Ostapenko et al., "Towards Modular LLMs by Building and Reusing a Library of LoRAs", 2024 (arXiv 2405.11157).
PHATGOOSE: Muqeeth, Liu, Liu and Raffel, "Learning to Route Among Specialized Experts for Zero-Shot Generalization",
2024 (arXiv 2402.05859).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..abstract import Context, Router, Routing, Site
from ..errors import CompositionError
from ..types import System
from . import _reading
from ._by_label import ByLabel
from ._columns import regrown, renamed

WAYS = {"arrow": 3, "phatgoose": 2}


class Prototypes(Router):
    """α = softmax over the k best of s_i / τ, by token: s_i = |v_i · x| ("arrow"), or v̄_i · x̄ ("phatgoose").

        bay = mb.attach(model, modules=kinds, router=lambda: mb.Prototypes("arrow"))
        methods.arrow(bay)                                # v_i: the top right singular vector of module i's update

        bay = mb.attach(model, modules=kinds, router=lambda: mb.Prototypes("phatgoose", label="task"))
        bay.freeze()                                      # with a label: σ(v_i · x) of that module, by which v_i learns
        model(**batch, task="ner"); model(**batch)        # without one: routed

    v̄ and x̄ are standardised (no mean, variance one), and τ is √d then; for Arrow τ = 1. k: 3, as in peft, and 2. A
    module without a prototype, which is all zeros, scores nought. label: the keyword, for "phatgoose", whose gates v
    start at nought and learn with modules and base frozen; Arrow's do not learn. Pass a callable, for prototypes at
    each site. Arrow's v is exact here, where peft's takes fifteen steps of a power iteration.
    """

    systems = (
        System(
            (),
            'mb.Prototypes("arrow")',
            (
                "tests/test_tasks.py::test_arrow_points_where_a_module_acts_most",
                "tests/test_tasks.py::test_arrow_in_peft",
            ),
            "Arrow",
            "α = softmax(top_k(|v_i · x|)), v_i the top right singular vector of B_i A_i",
        ),
        System(
            (),
            'mb.Prototypes("phatgoose", label="task")',
            ("tests/test_tasks.py::test_phatgoose_gates_learn_and_are_routed_by",),
            "PHATGOOSE",
            "α = softmax(top_k(v̄_i · x̄ / √d)), v_i learned as f(x) + σ(v_i · x) Δ_i",
        ),
    )

    def __init__(
        self, way: str = "arrow", k: int | None = None, temperature: float | None = None, label: str | None = None
    ):
        super().__init__()
        if way not in WAYS or (way == "arrow" and label is not None) or (k is not None and k < 1):
            raise CompositionError(
                f"Prototypes({way!r}, k={k}, label={label!r}): 'arrow', which takes no label, or 'phatgoose'."
            )
        self.way, self.k, self.temperature, self.label = way, k, temperature, label
        self.by = None if label is None else ByLabel(label)
        self.keywords = () if label is None else (label,)
        self.axis = -1
        self.prototypes: Tensor

    def build(self, names: Sequence[str], site: Site) -> None:
        old = getattr(self, "prototypes", None)
        width, self.axis = _reading.width(self, site, old), site.axis
        new = torch.zeros(len(names), width, device=site.device, dtype=torch.float32)
        prototypes = regrown(self, "prototypes", self.names, names, new)
        if old is None:
            prototypes.requires_grad_(self.way == "phatgoose")
        elif prototypes is not old:
            with torch.no_grad():  # a mean of the others' would say nothing of a module that is new
                prototypes[[i for i, name in enumerate(names) if name not in self.names]] = 0.0
        self.prototypes, self.names = prototypes, tuple(names)
        if self.by is not None:
            self.by.build(names, site)

    def rename(self, old: str, new: str) -> None:
        self.names = renamed(self.names, old, new)
        if self.by is not None:
            self.by.rename(old, new)

    def forward(self, x: Tensor, c: Context) -> Routing:
        with torch.autocast(x.device.type, enabled=False):
            seen = _reading.full(_reading.rows(self, x, c, "token", self.axis)[0])
            v = self.prototypes.to(seen.dtype)
            if self.by is not None and c.labels.get(self.label) is not None:  # type: ignore[arg-type]
                return self._gated(seen @ v.mT, c)
            tau = 1.0
            if self.way == "phatgoose":
                width = (v.shape[-1],)
                seen, v, tau = F.layer_norm(seen, width), F.layer_norm(v, width), v.shape[-1] ** 0.5
            scores = seen @ v.mT if self.way == "phatgoose" else (seen @ v.mT).abs()
            tau = tau if self.temperature is None else self.temperature
            index, weights = _reading.top(scores / tau, WAYS[self.way] if self.k is None else self.k)
        return Routing(index=index, weights=weights)

    def _gated(self, logits: Tensor, c: Context) -> Routing:
        """Each row by the module of its label, at σ(v · x)."""
        chosen = self.by(None, c).on(logits.device).index  # type: ignore[union-attr, misc]
        chosen = chosen.expand(len(logits), -1)  # type: ignore[union-attr]
        index = chosen if logits.ndim == 2 else chosen.unsqueeze(1).expand(-1, logits.shape[1], -1)
        return Routing(index=index, weights=torch.sigmoid(logits).gather(-1, index.clamp(min=0)))
