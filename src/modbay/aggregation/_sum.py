"""The weighted sum: what each active module adds, on top of f (survey section 4.2).

Jacobs, Jordan, Nowlan and Hinton, "Adaptive Mixtures of Local Experts", Neural Computation 3, 1991; weights that read
the output, as the gate of a serial adapter does: Mao et al., "UniPELT", 2022 (arXiv 2110.07577).
"""

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from ..abstract import Aggregator, Context, Kind, Routing, Site
from ..core import extension
from ..errors import CompositionError
from ..types import System


class WeightedSum(Aggregator):
    """y = f(x) + Σ_i α_i Δ_i, with Δ_i what module i alone adds to f (survey section 4.2).

    A module that stands instead of f counts as Δ_i = m_i(x) − f(x). Only the modules with α_i ≠ 0 run.
    reads: what the site's own router reads, its "input" x; or its "output", so that α = r(f(x), c):

        mb.attach(model, "*.layer.*", kinds, router=lambda: mb.Gate("task"), aggregator=mb.WeightedSum("output"))

    for which the router is asked a second time; weights that `use` sets, or one router of all sites made, stay as they
    are. Raises CompositionError for another `reads`; with "output", for a module that acts before f or instead of it,
    where widths differ, and for a router with losses, which would count twice.
    """

    systems = (
        System(
            (133,), "mb.WeightedSum()",
            ("tests/test_outputs.py::test_a_weighted_sum_is_written_out",
             "tests/test_laws.py::test_2_a_mixed_batch_is_a_loop"),
        ),
    )  # fmt: skip

    def __init__(self, reads: Literal["input", "output"] = "input"):
        super().__init__()
        if reads not in ("input", "output"):
            raise CompositionError(f'WeightedSum(reads={reads!r}): a router reads the "input" or the "output".')
        self.reads = reads

    def arguments(self) -> dict[str, Any]:
        return {} if self.reads == "input" else {"reads": self.reads}  # as in files from before there was a choice

    def admit(self, kind: Kind, site: Site) -> None:
        early = kind.place or kind.enters or kind.replaces
        if self.reads == "output" and (early or site.form == "embedding" or site.inputs != site.outputs):
            raise CompositionError(
                f'WeightedSum("output") at site {site.name!r} with {type(kind).__name__}: the router reads f(x) as it '
                f"would x, and the module adds to it. Take what acts on the output, where widths are equal."
            )

    def forward(self, f: Callable | None, x: Tensor, modules: Any, routing: Routing, c: Context) -> Tensor:
        if self.reads == "input":
            return modules.add(f, x, routing, c)
        if f is None:
            raise CompositionError('WeightedSum("output"): there is no f here whose output the router could read.')
        y = f(x)
        if modules.asked:
            if routing.losses:
                raise CompositionError(
                    f'WeightedSum("output") at site {modules.site.name!r}: the router is asked twice, and would count '
                    f"its losses {list(routing.losses)} twice. Take a router without."
                )
            routing = modules.route(y, c)
        return y + modules.changes(f, x, y, routing, c)

    def extend(self, modules: Any, routing: Routing, x: Tensor, c: Context) -> tuple[Tensor, Tensor | None] | None:
        """Σ_i α_i P_i in front of the input: prompts and prefixes of one length."""
        return extension(modules, routing, x, c)
