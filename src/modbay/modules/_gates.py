"""Gates on groups of features: heads, neurons, or a whole layer or block, weighed and taken out.

Michel, Levy and Neubig, "Are Sixteen Heads Really Better than One?", 2019 (arXiv 1905.10650). Learned to close: Voita,
Talbot, Moiseev, Sennrich and Titov, 2019 (arXiv 1905.09418), by the hard concrete of Louizos, Welling and Kingma, 2018
(arXiv 1712.01312).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..abstract import ParameterComposition, Site
from ..deltas import InputScale, Scale
from ..errors import CompositionError
from ..ops import hard_concrete, logistic, open_probability
from ..types import Params, System
from ._common import drawing, positive


@dataclass(frozen=True)
class Gates(ParameterComposition):
    """ξ ⊙ f(x), or with of="input" f(ξ ⊙ x), with a gate ξ for each of `groups` equal blocks of features, one at first.

        mb.Gates(12, of="input")              # at an attention's last projection: its heads
        mb.Gates(1)                           # at the last layer of a residual branch: the whole branch
        mb.Gates(12, of="input", hard=True, regularise=0.01)

    ξ itself learns, or only tells by its gradient what a group is worth: `sparsity.fisher(losses, gates, power=1)`.
    hard: ξ is hard concrete of learned logits (groups,), at first `start`, open; regularise: λ of λ Σ P(ξ > 0).
    Logistic noise is drawn in training mode, with gradients on, while the logits learn; with noise=False never.
    Raises CompositionError where features are no multiple of `groups`, and for of="input" where f is no linear map.
    """

    batched: ClassVar[bool] = True
    systems: ClassVar[tuple[System, ...]] = (
        System(
            (12,),
            'mb.Gates(12, of="input")',
            (
                "tests/test_sparse.py::test_gates_are_their_formula",
                "tests/test_sparse.py::test_the_importance_of_heads_finds_those_that_matter",
            ),
            "structured pruning of heads, layers and blocks",
        ),
    )
    groups: int = 1
    of: Literal["output", "input"] = "output"
    hard: bool = False
    start: int | float = 5.0
    regularise: int | float = 0.0
    noise: bool = True

    def __post_init__(self):
        positive("Gates", groups=self.groups)
        if self.of not in ("output", "input"):
            raise CompositionError(f'Gates(of={self.of!r}): it is "output" or "input".')
        if self.regularise and not self.hard:
            raise CompositionError(
                f"Gates(regularise={self.regularise!r}, hard=False): a gate that is a plain number is open whatever "
                f"its value; say hard=True."
            )

    @property
    def enters(self) -> bool:  # type: ignore[override]
        return self.of == "input"

    @property
    def neutral(self) -> bool:  # type: ignore[override]
        return not self.hard

    def init(self, sites: Sequence[Site]) -> dict[str, dict[str, Tensor]]:
        made = {}
        for site in sites:
            if self.enters and site.form not in ("linear", "transposed", "convolution"):
                raise CompositionError(
                    f'Gates(of="input") at site {site.name!r} ({type(site.module).__name__}): only the input of one '
                    f"linear map can be scaled. Attach at the Linear, Conv1D or Conv inside it."
                )
            features = site.features(f"{self.of}s")
            if features % self.groups:
                raise CompositionError(
                    f"Gates(groups={self.groups}) at site {site.name!r}: its {features} {self.of} features are no "
                    f"multiple of that."
                )
            made[site.name] = {"gates": site.zeros(self.groups) + (self.start if self.hard else 1)}
        return made

    def penalty(self, params: Params) -> Tensor | None:
        return self.regularise * open_probability(params["gates"]).sum() if self.regularise else None

    def delta(self, params: Params, site: Site) -> Scale | InputScale:
        gates = params["gates"]
        if self.hard:
            gates = hard_concrete(gates, logistic(gates) if self.noise and drawing(site, gates) else None)
        gain = (gates - 1).repeat_interleave(site.features(f"{self.of}s") // self.groups, -1)
        return InputScale(gain) if self.enters else Scale(gain)
