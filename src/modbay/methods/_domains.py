"""A visual domain's module: adapters at convolutions, and batch normalisation of its own.

Rebuffi, Bilen and Vedaldi, 2017 (arXiv 1705.08045) and 2018 (arXiv 1803.10082).
"""

from typing import Any, Literal

from torch import nn

from ..abstract import Kind
from ..modules import BatchNorm, ResidualAdapter
from ..types import System, systems

EFFICIENT = "tests/test_function.py::test_residual_adapters_on_efficientnet"


@systems(System((37,), "methods.residual_adapter()", (EFFICIENT,), "residual adapters with BN by domain"))
def residual_adapter(
    placement: Literal["series", "parallel"] = "series", convolutions: Any = nn.Conv2d, norms: Any = nn.BatchNorm2d
) -> dict[Any, Kind]:
    """z + α ∗ z, or z + α ∗ x, at convolutions z = f(x), and γ ⊙ (z − μ) / √(σ² + ε) + β at norms, as one module.

        birds, flowers = methods.residual_adapter(), methods.residual_adapter()
        mb.attach(model, modules={"birds": birds, "flowers": flowers}, name="domain")

    convolutions, norms: where, as `mb.attach` takes it; the paper has all 3 × 3 convolutions, each before a norm.
    """
    return {convolutions: ResidualAdapter(placement), norms: BatchNorm()}
