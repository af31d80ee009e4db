"""The site's own function once more, after its modules: a norm that is used again behind an adapter.

Pfeiffer, Vulić, Gurevych and Ruder, "MAD-X", 2020 (arXiv 2005.00052); Pfeiffer, Goyal, Lin, Li, Cross, Riedel and
Artetxe, "Lifting the Curse of Multilinguality by Pre-training Modular Transformers" (X-MOD), 2022 (arXiv 2205.06266).
"""

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from ..abstract import Aggregator, Context, InputComposition, Kind, Routing, Site
from ..errors import CompositionError
from ..types import System
from ._sequence import Sequence

SAME = "tests/test_adapters.py::test_the_same_weights_give_the_same_hidden_states"


class Again(Aggregator):
    """y = f(f(x) + Σ_i α_i Δ_i): what the modules made of f(x) goes through f itself once more. Or f(x + Σ_i α_i Δ_i).

    inner: what another aggregator A' adds, A'(f, x, …) − f(x), instead of the sum (AdapterFusion within the norm); with
    start="input" and a Sequence, each module in turn, x_i = x_{i−1} + α_i Δ_i(f(x_{i−1})), and y = f(x_n).

        mb.attach(model, "*.output.LayerNorm", {"ner": mb.Bottleneck(reduction=16)}, aggregator=mb.Again("input"))
        aggregator=lambda: mb.Again("input", mb.AdapterFusion())

    start: "output", f(x), or "input", x, to which Δ_i(f(x)) is added: where f is the norm behind a residual sum x, that
    is the Pfeiffer adapter as the library adapters has it ("seq_bn"), the sum before the norm being its residual.
    For a site whose output can be its input, a norm. With "output" a row without any module gives f(f(x)), so that the
    base alone is another function than without the bay. Raises CompositionError for an input composition, where f
    changes widths, or with "input" for what acts on the input of f itself.
    """

    systems = (
        System((39,), 'mb.Again("input")', (SAME,), "Pfeiffer adapter, within the norm", "f(x + A(f(x))), f the norm"),
    )

    def __init__(self, start: Literal["output", "input"] = "output", inner: Aggregator | None = None):
        super().__init__()
        if start not in ("output", "input"):
            raise CompositionError(f'Again(start={start!r}): it is "output" or "input".')
        self.start, self.inner = start, inner

    def build(self, site: Site) -> None:
        if self.inner is not None:
            self.inner.build(site)

    def admit(self, kind: Kind, site: Site) -> None:
        lost = isinstance(kind, InputComposition) or (kind.enters and self.start == "input")
        if lost or site.inputs != site.outputs or site.form == "embedding":
            raise CompositionError(
                f"Again at site {site.name!r} with {type(kind).__name__}: what modules make of the output must be an "
                f"input of the site. Attach at a norm, or use WeightedSum."
            )
        if self.inner is not None:
            self.inner.admit(kind, site)

    def forward(self, f: Callable | None, x: Tensor, modules: Any, routing: Routing, c: Context) -> Tensor:
        if f is None:
            raise CompositionError("Again runs f once more, and there is no f here. Use WeightedSum.")
        if self.start == "input" and isinstance(self.inner, Sequence):
            for step in self.inner.steps(modules, routing):
                x = x + modules.changes(f, x, f(x), step, c)
            return f(x)
        if self.inner is not None:
            y = self.inner(f, x, modules, routing, c)
            return f(x + (y - f(x))) if self.start == "input" else f(y)
        if self.start == "input":
            return f(x + modules.changes(f, x, f(x), routing, c))
        return f(modules.add(f, x, routing, c))
