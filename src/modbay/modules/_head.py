"""Task heads: one set of classes a task, on a trunk that all tasks share.

Caruana, "Multitask Learning", Machine Learning 28, 1997.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..abstract import Context, Replacement, Site
from ..errors import CompositionError
from ..ops import linear
from ..types import Params, System
from ._common import drawn, drawn_bias, features_last


@dataclass(frozen=True)
class Head(Replacement):
    """W x + b instead of f: the logits of one task; W (classes, inputs), b (classes,), drawn as nn.Linear draws.

        mb.attach(model, at="classifier", modules={"ner": mb.Head(("O", "PER")), "pos": mb.Head(17)}, name="task")

    labels: the names of the classes, or how many there are. x (…, inputs). In a batch of several tasks the logits of
    the smaller ones are filled up with −inf, so that softmax and argmax are theirs.
    Raises CompositionError for names that are none or not distinct, and at a site without a width.
    """

    batched: ClassVar[bool] = True
    systems: ClassVar[tuple[System, ...]] = (
        System(
            (32,),
            '{"ner": mb.Head(9), "pos": mb.Head(17)}',
            (
                "tests/test_kinds.py::test_heads_of_several_sizes_share_a_batch",
                "tests/test_networks.py::test_hard_sharing_trains_the_trunk_by_all_tasks",
            ),
            "hard parameter sharing",
        ),
    )
    labels: tuple[str, ...] | list[str] | int

    def __post_init__(self):
        if isinstance(self.labels, list):  # from JSON
            object.__setattr__(self, "labels", tuple(self.labels))
        if self.classes < 1 or (isinstance(self.labels, tuple) and len(set(self.labels)) < self.classes):
            raise CompositionError(f"Head(labels={self.labels!r}): distinct names, or a number, of one class or more.")

    @property
    def classes(self) -> int:
        return self.labels if isinstance(self.labels, int) else len(self.labels)

    def init(self, sites: Sequence[Site]) -> dict[str, dict[str, Tensor]]:
        return {site.name: self._one(site) for site in sites}

    def _one(self, site: Site) -> dict[str, Tensor]:
        features_last(site, "Head")
        inputs = site.features("inputs")
        return {"weight": drawn(site, self.classes, inputs), "bias": drawn_bias(site, self.classes, inputs)}

    def forward(self, params: Params, x: Tensor, f: Callable | None, c: Context) -> Tensor:
        return linear(x, params["weight"], params["bias"])
