"""All outputs side by side, for what decides among them later: cross-stitch units, competition, ensembles.

Of one input through several adapters at once ("Parallel"): Rücklé, Geigle, Glockner, Beck, Pfeiffer, Reimers and
Gurevych, "AdapterDrop", 2021 (arXiv 2010.11918).
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..abstract import Aggregator, Context, Kind, Routing, Site
from ..errors import CompositionError
from ..types import System


class Stack(Aggregator):
    """(m_1(x), …, m_k(x)), stacked along a new first axis: one entry an active module, or, if examples or tokens are
    routed by index, one a slot of their routing, f(x) where a slot has no module. Weights are not applied.

    For mb.Modular, or the whole of a model (at=""): raises CompositionError at a site inside a network, whose next
    layer would see one axis more.
    """

    systems = (
        System(
            (146,), "mb.Stack()",
            ("tests/test_aggregators.py::test_stack_has_one_entry_a_module_or_a_slot",
             "tests/test_outputs.py::test_parallel_outputs_are_those_of_each_alone"),
            "parallel modules",
        ),
    )  # fmt: skip

    def admit(self, kind: Kind, site: Site) -> None:
        if site.name:
            raise CompositionError(
                f"Stack at site {site.name!r}: its output has one axis more than what the network expects there. Use "
                f"it in mb.Modular, or at the whole model (at='')."
            )
        if kind.place:
            raise CompositionError(f"Stack: {type(kind).__name__} has no output of its own; use Concatenate.")

    def forward(self, f: Callable | None, x: Tensor, modules: Any, routing: Routing, c: Context) -> Tensor:
        return modules.outputs(f, x, routing, c)[0]
