"""Feed-forward experts: whole small networks that stand instead of a site.

Shazeer, Mirhoseini, Maziarz, Davis, Le, Hinton and Dean, "Outrageously Large Neural Networks: The Sparsely-Gated
Mixture-of-Experts Layer", 2017 (arXiv 1701.06538); gated: Shazeer, "GLU Variants Improve Transformer", 2020 (arXiv
2002.05202).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..abstract import Context, Replacement, Site
from ..ops import linear
from ..types import Params
from ._common import ACTIVATIONS, drawn, drawn_bias, features_last, known, positive


@dataclass(frozen=True)
class FeedForward(Replacement):
    """W₂ σ(W₁ x + b₁) + b₂ instead of f; with `gated`, W₂ (σ(W_g x + b_g) ⊙ (W₁ x + b₁)) + b₂.

        mb.FeedForward(2048)                                # an expert of a mixture
        mb.FeedForward(1376, "silu", gated=True)            # SwiGLU, as Mixtral's

    size: rows of W₁ (size, inputs); W₂ (outputs, size). Drawn as nn.Linear draws. bias: without, the maps have none.
    x (…, inputs), the features last. Raises CompositionError at a site without a width, or with its features elsewhere.
    """

    batched: ClassVar[bool] = True
    size: int
    activation: str = "gelu"
    gated: bool = False
    bias: bool = True

    def __post_init__(self):
        known(self.activation, "FeedForward")
        positive("FeedForward", size=self.size)

    def init(self, sites: Sequence[Site]) -> dict[str, dict[str, Tensor]]:
        return {site.name: self._one(site) for site in sites}

    def _one(self, site: Site) -> dict[str, Tensor]:
        features_last(site, "FeedForward")
        inputs, outputs = site.features("inputs"), site.features("outputs")
        shapes = {"up": (self.size, inputs), "down": (outputs, self.size)}
        shapes |= {"gate": (self.size, inputs)} if self.gated else {}
        params = {name: drawn(site, *shape) for name, shape in shapes.items()}
        if self.bias:
            params |= {f"{name}_bias": drawn_bias(site, *shape) for name, shape in shapes.items()}
        return params

    def forward(self, params: Params, x: Tensor, f: Callable | None, c: Context) -> Tensor:
        hidden = linear(x, params["up"], params.get("up_bias"))
        if self.gated:
            hidden = ACTIVATIONS[self.activation](linear(x, params["gate"], params.get("gate_bias"))) * hidden
        else:
            hidden = ACTIVATIONS[self.activation](hidden)
        return linear(hidden, params["down"], params.get("down_bias"))
