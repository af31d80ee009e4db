"""Residual adapters: a 1 × 1 convolution after a convolution, or beside it.

Rebuffi, Bilen and Vedaldi, "Learning Multiple Visual Domains with Residual Adapters", 2017 (arXiv 1705.08045); beside
it: "Efficient Parametrization of Multi-domain Deep Neural Networks", 2018 (arXiv 1803.10082).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from ..abstract import ParameterComposition, Site
from ..deltas import After, Beside
from ..errors import CompositionError
from ..types import Params, System

SERIES = "tests/test_function.py::test_a_residual_adapter_in_series_reads_the_output"
PARALLEL = "tests/test_function.py::test_a_residual_adapter_in_parallel_reads_the_input"
EFFICIENT = "tests/test_function.py::test_residual_adapters_on_efficientnet"


@dataclass(frozen=True)
class ResidualAdapter(ParameterComposition):
    """z + α ∗ z in series, z + α ∗ x in parallel, with z = f(x) and α a 1 × 1 convolution; α (outputs, outputs) or
    (outputs, inputs) starts at zero.

    placement: "series", or "parallel", at the stride of f. Both are linear, so that they fold: α after f as αW and αb,
    α beside f in the middle of its kernel. At a Conv or a Linear.
    Differs: the authors' code normalises z before α in series, which the linear maps around it absorb, and draws α. The
    batch normalisation of each domain is a part of its own, mb.BatchNorm; methods.residual_adapters has both.
    Raises CompositionError elsewhere; in parallel where the padding does not keep the middle (an even kernel, say).
    """

    batched: ClassVar[bool] = True
    systems: ClassVar[tuple[System, ...]] = (
        System((37,), "mb.ResidualAdapter()", (SERIES, EFFICIENT), "residual adapter, series"),
        System((37,), 'mb.ResidualAdapter("parallel")', (PARALLEL, EFFICIENT), "residual adapter, parallel"),
    )
    placement: Literal["series", "parallel"] = "series"

    def __post_init__(self):
        if self.placement not in ("series", "parallel"):
            raise CompositionError(f'ResidualAdapter(placement={self.placement!r}): it is "series" or "parallel".')

    def init(self, sites: Sequence[Site]) -> dict[str, dict[str, Tensor]]:
        return {site.name: {"alpha": self._one(site)} for site in sites}

    def _one(self, site: Site) -> Tensor:
        if site.form not in ("linear", "transposed", "convolution"):
            raise CompositionError(
                f"ResidualAdapter at site {site.name!r} ({type(site.module).__name__}): it goes to a Conv or a Linear. "
                f"Attach at one inside it."
            )
        if self.placement == "parallel" and site.form == "convolution" and not _centred(site.module):
            m: Any = site.module
            raise CompositionError(
                f'ResidualAdapter("parallel") at site {site.name!r}: with kernel {m.kernel_size}, dilation {m.dilation}'
                f" and padding {m.padding!r} its output does not lie where a 1 × 1 convolution's would. Use 'series'."
            )
        return site.zeros(
            site.features("outputs"), site.features("outputs" if self.placement == "series" else "inputs")
        )

    def delta(self, params: Params, site: Site) -> After | Beside:
        return After(params["alpha"]) if self.placement == "series" else Beside(params["alpha"])


def _centred(conv: Any) -> bool:
    """Whether each output lies in the middle of its kernel, as padded."""
    odd = all(k % 2 for k in conv.kernel_size)
    if isinstance(conv.padding, str):
        return odd and (conv.padding == "same" or set(conv.kernel_size) == {1})
    sizes = zip(conv.padding, conv.dilation, conv.kernel_size, strict=True)
    return odd and all(2 * p == d * (k - 1) for p, d, k in sizes)
