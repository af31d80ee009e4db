"""The weighted sum: what each active module adds, on top of f (survey section 4.2).

Jacobs, Jordan, Nowlan and Hinton, "Adaptive Mixtures of Local Experts", Neural Computation 3, 1991.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..abstract import Aggregator, Context, Routing
from ..core import extension
from ..types import System


class WeightedSum(Aggregator):
    """y = f(x) + Σ_i α_i Δ_i, with Δ_i what module i alone adds to f (survey section 4.2).

    A module that stands instead of f counts as Δ_i = m_i(x) − f(x). Only the modules with α_i ≠ 0 run.
    """

    systems = (
        System(
            (133,), "mb.WeightedSum()",
            ("tests/test_outputs.py::test_a_weighted_sum_is_written_out",
             "tests/test_laws.py::test_2_a_mixed_batch_is_a_loop"),
        ),
    )  # fmt: skip

    def forward(self, f: Callable | None, x: Tensor, modules: Any, routing: Routing, c: Context) -> Tensor:
        return modules.add(f, x, routing, c)

    def extend(self, modules: Any, routing: Routing, x: Tensor, c: Context) -> tuple[Tensor, Tensor | None] | None:
        """Σ_i α_i P_i in front of the input: prompts and prefixes of one length."""
        return extension(modules, routing, x, c)
