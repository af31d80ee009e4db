"""Skills: each task has a gate on every module, learned with them.

Ponti, Sordoni, Bengio and Reddy, "Combining Modular Skills in Multitask Learning" (Polytropon), 2022 (arXiv
2202.13914).
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..abstract import Context, Router, Routing, Site
from ..errors import CompositionError, LabelError, listed
from ..losses import indian_buffet
from ..types import Labels
from ._columns import log, regrown, renamed

MODES = ("gumbel", "sigmoid", "straight-through")
EPS = 1e-12


class Skills(Router):
    """α_t = ẑ_t / Σ_j ẑ_tj, with ẑ_t the gates of task t from learned logits Z (tasks, n), at first U(−1e-3, 1e-3).

    label: the keyword that says the task; None as a label is no module. labels: the tasks.
    mode: in training "gumbel" draws ẑ from a Gumbel-sigmoid at the temperature, as in the paper; "sigmoid" is
    σ(Z/temperature), "straight-through" that rounded, with the gradient of what it was rounded from. Outside training
    nothing is drawn: "gumbel" is "sigmoid".
    prior: the coefficient of −log p(Z) under an Indian buffet process of concentration `alpha`, added in training; it
    counts σ(Z), where the authors' code took the logits themselves.
    Weights: (n,) for one label for all, (b, n) for one an example. Raises LabelError for a label that is no task.
    """

    reads_x: ClassVar[bool] = False

    def __init__(
        self,
        label: str,
        labels: Sequence[str],
        mode: str = "gumbel",
        temperature: float = 1.0,
        prior: float = 0.0,
        alpha: float = 3.0,
    ):
        super().__init__()
        if mode not in MODES:
            raise CompositionError(f"Skills(mode={mode!r}): the gates are one of {listed(MODES)}.")
        self.label, self.keywords, self.labels = label, (label,), list(labels)
        if isinstance(labels, str) or len(set(self.labels)) != len(self.labels):
            raise LabelError(f"Skills({label!r}, labels={labels!r}): the tasks are a list of different names.")
        self.mode, self.temperature, self.prior, self.alpha = mode, temperature, prior, alpha
        self.logits: Tensor

    def build(self, names: Sequence[str], site: Site) -> None:
        fresh = self._fresh(len(self.labels), len(names), site.device)
        self.logits = regrown(self, "logits", self.names, names, fresh, axis=1)
        self.names = tuple(names)

    def _fresh(self, tasks: int, n: int, device: torch.device) -> Tensor:
        return torch.empty(tasks, n, device=device, dtype=torch.float32).uniform_(-1e-3, 1e-3)

    def rename(self, old: str, new: str) -> None:
        self.names = renamed(self.names, old, new)

    def extend(self, *labels: str) -> None:
        """Add tasks with new rows of logits; the others' are kept. What replaces the parameter is logged."""
        known = [label for label in labels if label in self.labels]
        if known:
            raise LabelError(f"Skills({self.label!r}).extend: {listed(known)} are tasks already.")
        self.labels.extend(labels)
        old = self.logits
        fresh = self._fresh(len(labels), old.shape[1], old.device).to(old.dtype)
        self.logits = nn.Parameter(torch.cat([old.detach(), fresh]), requires_grad=old.requires_grad)
        log.warning("Skills.logits was made anew for the tasks %s; an optimiser must be given it.", listed(self.labels))

    def forward(self, x: Tensor | None, c: Context) -> Routing:
        tasks = self._tasks(c.label(self.label))
        gates = self._gates(self.logits[tasks.clamp(min=0)])
        weights = gates / (gates.sum(-1, keepdim=True) + EPS)
        weights = weights * (tasks >= 0).unsqueeze(-1)
        losses = {}
        if self.prior and self.training:
            losses["prior"] = self.prior * indian_buffet(torch.sigmoid(self.logits), self.alpha)
        return Routing(weights=weights, losses=losses)

    def _gates(self, z: Tensor) -> Tensor:
        if self.mode == "gumbel" and self.training:
            uniform = torch.rand_like(z).clamp(EPS, 1 - torch.finfo(z.dtype).eps)
            z = z + torch.log(uniform) - torch.log1p(-uniform)
        soft = torch.sigmoid(z / self.temperature)
        return soft if self.mode != "straight-through" else torch.round(soft) - soft.detach() + soft

    def _tasks(self, given: Labels) -> Tensor:
        """The tasks as indices, () or (b,), −1 for none."""
        if isinstance(given, Tensor):
            return self._checked(given).to(self.logits.device)
        if given is None or isinstance(given, str):
            return torch.tensor(self._number(given), device=self.logits.device)
        return torch.tensor([self._number(label) for label in given], dtype=torch.long, device=self.logits.device)

    def _number(self, label: str | None) -> int:
        if label is None:
            return -1
        if label not in self.labels:
            raise LabelError(
                f"{self.label}={label!r}: no such task. Known: {listed(self.labels)}; None runs the base alone. "
                f"extend({label!r}) adds a task."
            )
        return self.labels.index(label)

    def _checked(self, given: Tensor) -> Tensor:
        if given.is_floating_point() or given.dtype == torch.bool or given.ndim > 1:
            raise LabelError(
                f"{self.label}={tuple(given.shape)} {given.dtype}: labels as a tensor are integers (b,), indices into "
                f"{listed(self.labels)}, −1 for the base alone."
            )
        if given.device.type == "cpu" and not torch.compiler.is_compiling() and given.numel():
            low, high = given.min().item(), given.max().item()
            if low < -1 or high >= len(self.labels):
                raise LabelError(f"{self.label} has indices from {low} to {high}; there are {len(self.labels)} tasks.")
        return given
