"""Soft gates: a softmax over the modules, of the input, of the task, or of both.

One gate a task: Ma, Zhao, Yi, Chen, Hong and Chi, "Modeling Task Relationships in Multi-task Learning with Multi-gate
Mixture-of-Experts", 2018 (KDD). Own and shared experts: Tang, Liu, Zhao and Gong, "Progressive Layered Extraction
(PLE)", 2020 (RecSys). By task: Kudugunta et al., "Beyond Distillation: Task-level Mixture-of-Experts for Efficient
Inference", 2021 (arXiv 2110.03742); Ye, Zha and Ren, "Eliciting and Understanding Cross-Task Skills with Task-Level
Mixture-of-Experts", 2022 (arXiv 2205.12701). Merged: Muqeeth, Liu and Raffel, "SMEAR", 2023 (arXiv 2306.03745).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..abstract import Context, Router, Routing, Site
from ..errors import CompositionError, LabelError, listed
from ..losses import load_balance
from ..types import System
from . import _reading
from ._columns import log, regrown, renamed
from ._tasks import distinct
from ._tasks import tasks as numbers

READS = ("x", "label", "both")


class SoftGate(Router):
    """α = softmax(W u): a soft gate of the input, u = x, of the task, u = e_label, or of both, u = [x, e_label].

        mb.SoftGate()                                           # W x, of the mean of x: with ParameterAverage, SMEAR
        mb.SoftGate("task", ("ner", "pos"))                     # W_task x: a gate of its own for each task (MMoE)
        mb.SoftGate("task", ("ner", "pos"), of="label", k=2)    # W e_task, the two best: Task-MoE
        mb.SoftGate("task", ("ner", "pos"), table={"ner": ["a", "s"], "pos": ["b", "s"]})   # own and shared (CGC)

    label, labels: the keyword of a call that says the task, and the tasks; None as a label is no module. Of "label" and
    "both" it may be floats (b, size) as well, features of tasks in the place of the learned embeddings e (tasks, size).
    of: what the gate reads. by: "example", x averaged over its positions without padding, or "token". k: only the k
    best modules count, their weights renormalised; all by default. table: the modules that each task may use.
    balance: the coefficient of the load balance over the rows, added in training.
    The gate runs in float32. W over x is drawn with variance 0.1/width, as the Switch Transformer's; e is N(0, 1), and
    W over it has variance 1/size. Raises LabelError for a label that is no task.
    """

    systems = (
        System(
            (100,),
            'mb.SoftGate("task", ("ner", "pos"))',
            ("tests/test_tasks.py::test_mmoe_has_a_gate_a_task",),
            "MMoE",
            "y_t = Σ_i softmax(W_t x)_i f_i(x)",
        ),
        System(
            (100,),
            'mb.SoftGate("task", ("ner", "pos"), table={"ner": ["a", "shared"], "pos": ["b", "shared"]})',
            ("tests/test_tasks.py::test_cgc_chooses_among_own_and_shared",),
            "CGC",
            "y_t = Σ_i softmax(W_t x)_i f_i(x), over the task's own experts and the shared",
        ),
        System(
            (105,),
            'mb.SoftGate("task", ("en-de", "en-fr"), of="label", k=2, balance=1e-2)',
            ("tests/test_tasks.py::test_a_task_is_routed_by_its_embedding",
             "tests/test_tasks.py::test_the_network_of_a_task_is_taken_out"),
            "Task-MoE",
            "α = softmax(top_k(W e_task))",
        ),
        System(
            (106,),
            'mb.SoftGate("task", ("nli", "qa"), of="label")',
            ("tests/test_tasks.py::test_a_task_is_routed_by_its_embedding",
             "tests/test_tasks.py::test_features_of_a_task_stand_for_its_embedding"),
            "task-level mixture of experts",
            "α = softmax(W e_task)",
        ),
        System(
            (107,),
            "router=mb.SoftGate, aggregator=mb.ParameterAverage()",
            ("tests/test_tasks.py::test_smear_merges_by_the_mean_of_the_input",),
            "SMEAR",
            "y = f_φ̄(x), φ̄ = Σ_i softmax(W mean_t x)_i φ_i",
        ),
    )  # fmt: skip

    def __init__(
        self,
        label: str | None = None,
        labels: Sequence[str] = (),
        of: str = "x",
        by: str = "example",
        size: int = 32,
        k: int | None = None,
        table: Mapping[str, Sequence[str]] | None = None,
        balance: float = 0.0,
    ):
        super().__init__()
        if of not in READS or (of != "x" and label is None):
            raise CompositionError(
                f"SoftGate(label={label!r}, of={of!r}): it reads 'x', or with a label 'label', 'both'."
            )
        if (k is not None and k < 1) or size < 1:
            raise CompositionError(f"SoftGate(k={k}, size={size}): one at least.")
        self.label, self.keywords = label, () if label is None else (label,)
        self.labels = distinct("SoftGate", label or "", labels)
        if (label is not None and not self.labels and of == "x") or (table is not None and set(table) != set(labels)):
            raise LabelError(f"SoftGate({label!r}, labels={labels!r}, table=…): each task is named, in a table, too.")
        self.of, self.by, self.size, self.k, self.balance = of, _reading.by("SoftGate", by), size, k, balance
        self.table = None if table is None else {task: list(several) for task, several in table.items()}
        self.axis = -1
        self.gate: Tensor
        self.told: Tensor
        self.allowed: Tensor | None
        codes = torch.randn(len(self.labels), size) if of != "x" and self.labels else None
        self.codes = None if codes is None else nn.Parameter(codes)

    @property
    def reads_x(self) -> bool:  # type: ignore[override]
        return self.of != "label"

    def build(self, names: Sequence[str], site: Site) -> None:
        fresh = lambda *shape: torch.empty(*shape, device=site.device, dtype=torch.float32)
        if self.reads_x:
            old = getattr(self, "gate", None)
            width, self.axis = _reading.width(self, site, old), site.axis
            own = (len(self.labels),) if self.of == "x" and self.labels else ()
            new = fresh(*own, len(names), width).normal_(std=math.sqrt(0.1 / width))
            self.gate = regrown(self, "gate", self.names, names, new, axis=-2)
        if self.of != "x":
            new = fresh(len(names), self.size).normal_(std=self.size**-0.5)
            self.told = regrown(self, "told", self.names, names, new)
        if self.codes is not None and self.codes.device != site.device:
            self.codes = nn.Parameter(self.codes.detach().to(site.device), requires_grad=self.codes.requires_grad)
        self._allow(names, site.device)
        self.names = tuple(names)

    def _allow(self, names: Sequence[str], device: torch.device) -> None:
        """The table as a mask (tasks, n), without modules that have left."""
        mask = None
        if self.table is not None:
            gone = set(self.names).difference(names)
            self.table = {task: [name for name in several if name not in gone] for task, several in self.table.items()}
            unknown = {name for several in self.table.values() for name in several}.difference(names)
            if unknown:
                raise LabelError(
                    f"SoftGate({self.label!r}, table=…) names modules that the bay lacks: {listed(unknown)}."
                )
            mask = torch.tensor([[name in self.table[task] for name in names] for task in self.labels], device=device)
        self.register_buffer("allowed", mask, persistent=False)

    def rename(self, old: str, new: str) -> None:
        self.names = renamed(self.names, old, new)
        if self.table is not None:
            self.table = {task: list(renamed(several, old, new)) for task, several in self.table.items()}

    def extend(self, *labels: str) -> None:
        """Add tasks, each with an embedding or a gate of its own that starts at the others' mean."""
        known = [label for label in labels if label in self.labels]
        if known or self.label is None or self.table is not None:
            raise LabelError(f"SoftGate({self.label!r}).extend{labels!r}: of new tasks, of a label, without a table.")
        for key in ("codes",) if self.of != "x" else ("gate",):
            old = getattr(self, key)
            more = old.detach().mean(0, keepdim=True).expand(len(labels), *old.shape[1:])
            setattr(self, key, nn.Parameter(torch.cat([old.detach(), more]), requires_grad=old.requires_grad))
            log.warning(
                "SoftGate.%s was made anew for the tasks %s; an optimiser must be given it.", key, listed(labels)
            )
        self.labels.extend(labels)

    def chosen(self, label: str) -> dict[str, float]:
        """The modules of a task and their weights, where the task alone decides: what `bay.use` takes."""
        if self.of != "label":
            raise CompositionError(
                f"SoftGate(of={self.of!r}).chosen({label!r}): the input decides as well as the task."
            )
        with torch.no_grad():
            weights = self(None, Context(labels={self.label: label})).dense(len(self.names))  # type: ignore[dict-item]
        return {name: w for name, w in zip(self.names, weights.tolist(), strict=True) if w}

    def forward(self, x: Tensor | None, c: Context) -> Routing:
        given = None if self.label is None else c.label(self.label)
        features = isinstance(given, Tensor) and given.is_floating_point() and self.of != "x"
        device = (self.told if self.of != "x" else self.gate).device
        at = None if features or self.label is None else numbers(given, self.labels, self.label, device)
        device_type = device.type
        with torch.autocast(device_type, enabled=False):
            logits = self._logits(x, c, at, given if features else None)
            there = None if at is None else self._there(at, logits)
            index, weights = _reading.top(logits, self.k, there)
            losses = self._losses(logits, c) if self.training and self.balance else {}
        return Routing(index=index, weights=weights, losses=losses)

    def _logits(self, x: Any, c: Context, at: Tensor | None, features: Any) -> Tensor:
        logits: Any = 0.0
        if self.of != "x":
            code = self._features(features) if at is None else self.codes[at.clamp(min=0)].float()  # type: ignore[index]
            logits = F.linear(code, self.told.float())
        if self.reads_x:
            seen = _reading.full(_reading.rows(self, x, c, self.by, self.axis)[0])  # (b, d) or (b, t, d)
            if seen.ndim == 3 and self.of == "both" and logits.ndim == 2:
                logits = logits.unsqueeze(1)
            gate = self.gate.to(seen.dtype)
            if self.of == "x" and at is not None:
                gate = gate[at.clamp(min=0)]  # (n, d) or (b, n, d)
            logits = logits + (
                seen @ gate.mT if gate.ndim == 2 or seen.ndim == 3 else (gate @ seen.unsqueeze(-1))[..., 0]
            )
        return logits

    def _features(self, given: Tensor) -> Tensor:
        if given.ndim != 2 or given.shape[1] != self.size:
            raise LabelError(f"{self.label}=floats {tuple(given.shape)}: features of tasks are (b, {self.size}).")
        return given.to(self.told.device, torch.float32)

    def _there(self, at: Tensor, like: Tensor) -> Tensor:
        """Which modules a row may use (…, n)."""
        there = (at >= 0).unsqueeze(-1).expand(*at.shape, like.shape[-1])
        if self.allowed is not None:
            there = there & self.allowed[at.clamp(min=0)]
        return (there if there.ndim in (1, like.ndim) else there.unsqueeze(1)).expand(like.shape)

    def _losses(self, logits: Tensor, c: Context) -> dict[str, Tensor]:
        p = torch.softmax(logits, -1)
        mask = c.mask if logits.ndim == 3 else None
        mask = None if mask is None else mask[:, -logits.shape[1] :]  # tokens that are padding do not count
        index = p.topk(min(self.k or 1, p.shape[-1]), -1).indices
        return {"balance": self.balance * load_balance(p.reshape(-1, p.shape[-1]), index.flatten(0, -2), mask)}
