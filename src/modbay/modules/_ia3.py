"""(IA)³: features rescaled by a learned vector.

Liu, Tam, Muqeeth, Mohta, Huang, Bansal and Raffel, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
In-Context Learning", 2022 (arXiv 2205.05638).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..abstract import ParameterComposition, Site
from ..deltas import InputScale, Scale
from ..errors import CompositionError
from ..types import Params, System


@dataclass(frozen=True)
class IA3(ParameterComposition):
    """l ⊙ f(x), or with of="input" f(l ⊙ x); l (features,) starts at one.

    The paper scales the output of the key and value projections, and the input of the FFN's last projection:
    `{mb.role.key: mb.IA3(), mb.role.value: mb.IA3(), mb.role.ffn_out: mb.IA3("input")}`. Raises CompositionError at a
    site without a width, and for of="input" where f is not one linear map.
    """

    batched: ClassVar[bool] = True
    systems: ClassVar[tuple[System, ...]] = (
        System(
            (45,),
            '{mb.role.key: mb.IA3(), mb.role.value: mb.IA3(), mb.role.ffn_out: mb.IA3("input")}',
            (
                "tests/test_kinds.py::test_ia3_scales_the_output_bias_included",
                "tests/test_kinds.py::test_ia3_scales_the_input",
                "tests/test_peft.py::test_ia3",
            ),
            "(IA)³",
        ),
    )
    of: Literal["output", "input"] = "output"

    def __post_init__(self):
        if self.of not in ("output", "input"):
            raise CompositionError(f'IA3(of={self.of!r}): it is "output" or "input".')

    @property
    def enters(self) -> bool:  # type: ignore[override]
        return self.of == "input"

    def init(self, sites: Sequence[Site]) -> dict[str, dict[str, Tensor]]:
        for site in sites:
            if self.enters and site.form not in ("linear", "transposed", "convolution"):
                raise CompositionError(
                    f'IA3(of="input") at site {site.name!r} ({type(site.module).__name__}): only the input of one '
                    f"linear map can be scaled. Attach at the Linear, Conv1D or Conv inside it."
                )
        return {site.name: {"l": site.zeros(site.features(f"{self.of}s")) + 1} for site in sites}

    def delta(self, params: Params, site: Site) -> Scale | InputScale:
        gain = params["l"] - 1
        return InputScale(gain) if self.enters else Scale(gain)
