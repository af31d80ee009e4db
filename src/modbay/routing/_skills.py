"""Skills: each task has a gate on every module, learned with them.

Ponti, Sordoni, Bengio and Reddy, "Combining Modular Skills in Multitask Learning" (Polytropon), 2022 (arXiv
2202.13914). Heads: Caccia, Ponti, Su, Pereira, Le Roux and Sordoni, "Multi-Head Adapter Routing for Cross-Task
Generalization", 2023 (arXiv 2211.03831).
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..abstract import Context, Router, Routing, Site
from ..errors import CompositionError, LabelError, listed
from ..losses import indian_buffet
from ..types import System
from ._columns import log, regrown, renamed
from ._tasks import distinct
from ._tasks import tasks as numbers

MODES = ("gumbel", "sigmoid", "straight-through", "linear")
EPS = 1e-12


class Skills(Router):
    """α_t = ẑ_t / Σ_j ẑ_tj, with ẑ_t the gates of task t from learned logits Z (tasks, n), at first U(−1e-3, 1e-3).

    label: the keyword that says the task; None as a label is no module. labels: the tasks.
    mode: in training "gumbel" draws ẑ from a Gumbel-sigmoid at the temperature, as in the paper; "sigmoid" is
    σ(Z/temperature), "straight-through" that rounded, with the gradient of what it was rounded from. Outside training
    nothing is drawn: "gumbel" is "sigmoid". "linear" is α_t = Z_t itself, at first N(0, 1/n), so that the average of
    parameters is a linear hypernetwork of the task, φ_t = Φ α_t.
    heads: h equal parts of the modules' parameters, routed each by Z (tasks, h, n) of its own: MHR, for
    mb.ParameterAverage. Few-shot, its router alone learns a new task (`bay.freeze()`, `extend`): MHR-z.
    prior: the coefficient of −log p(Z) under an Indian buffet process of concentration `alpha`, added in training; it
    counts σ(Z), where the authors' code took the logits themselves.
    Weights: (n,) for one label for all, (b, n) for one an example. Raises LabelError for a label that is no task.
    """

    reads_x: ClassVar[bool] = False
    systems = (
        System(
            (89,),
            'router=mb.Skills("task", ("nli", "qa"), prior=0.1), aggregator=mb.ParameterAverage()',
            (
                "tests/test_routers.py::test_skills_are_normalised_gates_by_task",
                "tests/test_routers.py::test_skills_are_drawn_in_training_as_a_relaxed_bernoulli",
                "tests/test_tasks.py::test_polytropon_and_multi_head_routing_in_peft",
                "tests/test_recipes.py::test_latent_skills_are_found",
            ),
            "Polytropon",
            "θ_t = θ + Σ_j (ẑ_tj / Σ ẑ_t) φ_j",
        ),
        System(
            (92,),
            'router=mb.Skills("task", ("nli", "qa"), heads=8), aggregator=mb.ParameterAverage()',
            (
                "tests/test_tasks.py::test_heads_route_parts_of_the_parameters",
                "tests/test_tasks.py::test_a_new_task_is_learned_by_routing_alone",
                "tests/test_tasks.py::test_polytropon_and_multi_head_routing_in_peft",
                "tests/test_recipes.py::test_latent_skills_are_found",
            ),
            "MHR",
            "φ_t = [Σ_j α_thj φ_j^h]_h, the parts h of the parameters routed apart",
        ),
        System(
            (111,),
            'router=mb.Skills("task", ("nli", "qa"), mode="linear"), aggregator=mb.ParameterAverage()',
            ("tests/test_tasks.py::test_a_linear_hypernetwork_is_a_router",),
            "hypernetwork as router",
            "φ_t = Φ α_t, with unnormalised α_t learned",
        ),
    )

    def __init__(
        self,
        label: str,
        labels: Sequence[str],
        mode: str = "gumbel",
        temperature: float = 1.0,
        prior: float = 0.0,
        alpha: float = 3.0,
        heads: int = 1,
    ):
        super().__init__()
        if mode not in MODES:
            raise CompositionError(f"Skills(mode={mode!r}): the gates are one of {listed(MODES)}.")
        self.label, self.keywords, self.labels = label, (label,), distinct("Skills", label, labels)
        if heads < 1 or (mode == "linear" and prior):
            raise CompositionError(f"Skills(heads={heads}, mode={mode!r}, prior={prior}): one head at least; of gates.")
        self.heads = heads
        self.mode, self.temperature, self.prior, self.alpha = mode, temperature, prior, alpha
        self.logits: Tensor

    def build(self, names: Sequence[str], site: Site) -> None:
        shape = (len(names),) if self.heads == 1 else (self.heads, len(names))
        fresh = self._fresh(len(self.labels), shape, site.device)
        self.logits = regrown(self, "logits", self.names, names, fresh, axis=-1)
        self.names = tuple(names)

    def _fresh(self, tasks: int, shape: Sequence[int], device: torch.device) -> Tensor:
        new = torch.empty(tasks, *shape, device=device, dtype=torch.float32)
        return new.normal_(std=max(1, shape[-1]) ** -0.5) if self.mode == "linear" else new.uniform_(-1e-3, 1e-3)

    def rename(self, old: str, new: str) -> None:
        self.names = renamed(self.names, old, new)

    def extend(self, *labels: str) -> None:
        """Add tasks with new rows of logits; the others' are kept. What replaces the parameter is logged."""
        known = [label for label in labels if label in self.labels]
        if known:
            raise LabelError(f"Skills({self.label!r}).extend: {listed(known)} are tasks already.")
        self.labels.extend(labels)
        old = self.logits
        fresh = self._fresh(len(labels), old.shape[1:], old.device).to(old.dtype)
        self.logits = nn.Parameter(torch.cat([old.detach(), fresh]), requires_grad=old.requires_grad)
        log.warning("Skills.logits was made anew for the tasks %s; an optimiser must be given it.", listed(self.labels))

    def forward(self, x: Tensor | None, c: Context) -> Routing:
        tasks = numbers(c.label(self.label), self.labels, self.label, self.logits.device)
        gates = self._gates(self.logits[tasks.clamp(min=0)])
        weights = gates if self.mode == "linear" else gates / (gates.sum(-1, keepdim=True) + EPS)
        weights = weights * (tasks >= 0).view(*tasks.shape, *[1] * (weights.ndim - tasks.ndim))
        losses = {}
        if self.prior and self.training:
            losses["prior"] = self.prior * indian_buffet(torch.sigmoid(self.logits).flatten(1), self.alpha)
        if self.heads > 1:
            return Routing(weights=weights.mean(-2), heads=weights, losses=losses)
        return Routing(weights=weights, losses=losses)

    def _gates(self, z: Tensor) -> Tensor:
        if self.mode == "linear":
            return z
        if self.mode == "gumbel" and self.training:
            uniform = torch.rand_like(z).clamp(EPS, 1 - torch.finfo(z.dtype).eps)
            z = z + torch.log(uniform) - torch.log1p(-uniform)
        soft = torch.sigmoid(z / self.temperature)
        return soft if self.mode != "straight-through" else torch.round(soft) - soft.detach() + soft
