"""Invertible adapters: the embeddings of a language made another's, and undone before the output layer.

Pfeiffer, Vulić, Gurevych and Ruder, "MAD-X", 2020 (arXiv 2005.00052); the coupling: Dinh, Krueger and Bengio, "NICE",
2015 (arXiv 1410.8516).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..abstract import Context, FunctionComposition, Site
from ..errors import CompositionError, listed
from ..ops import linear
from ..types import Params, System
from ._common import ACTIVATIONS, drawn, known, positive

FORMULA = "tests/test_function.py::test_an_invertible_adapter_is_the_nice_coupling_and_its_inverse"
SAME = "tests/test_adapters.py::test_the_same_weights_give_the_same_hidden_states"
WORDS = "tests/test_invertible.py::test_language_adapters_are_the_formula_and_learn_from_both_uses"
TIED = "tests/test_function.py::test_the_inverse_of_an_invertible_adapter_shares_its_tensors"


@dataclass(frozen=True)
class Invertible(FunctionComposition):
    """[o₁ ; o₂] with o₁ = F(e₂) + e₁, o₂ = G(o₁) + e₂, e = [e₁ ; e₂] = f(x); at the second site the inverse,
    e₂ = o₂ − G(o₁), e₁ = o₁ − F(e₂), by the same F and G, W_up σ(W_down v + b_down) + b_up.

        ends = ("bert.embeddings.LayerNorm", mb.before(mb.role.head))
        language = {ends: mb.Invertible(), mb.role.ffn_out: mb.Bottleneck(reduction=2)}
        mb.attach(BertForMaskedLM(…), modules={"de": language, "sw": language}, name="language")

    These are language adapters as MAD-X trains them, on masked words. Sites in the model's order: the embeddings, and
    what goes into the output layer, or what gives it its input; or the embeddings alone, for a task without that layer.
    Both are d wide, on the last axis. F and G learn from both uses, and are saved once; onto a model without that layer
    (a classifier, for MAD-X's second step) they are loaded at the embeddings alone. reduction: of the half d/2 to the
    rows of W_down.
    std: None draws W_down as a Linear's weight and leaves W_up zero, so that the start is the base exactly; a number
    draws both from a normal (the authors' code: 0.02). Biases start at zero.
    Raises CompositionError for more than two sites, of different widths, or with their features elsewhere.
    """

    batched: ClassVar[bool] = True
    systems: ClassVar[tuple[System, ...]] = (
        System((44,), "mb.Invertible()", (FORMULA, TIED, WORDS, SAME), "invertible adapter"),
    )
    inverse: ClassVar[str] = "inverse/"  # how names begin at the second site, whose tensors are the first one's
    reduction: int | float = 2
    activation: str = "relu"
    std: int | float | None = None

    def __post_init__(self):
        known(self.activation, "Invertible")
        positive("Invertible", reduction=self.reduction, std=self.std)

    @property
    def neutral(self) -> bool:  # type: ignore[override]
        return self.std is None

    def init(self, sites: Sequence[Site]) -> dict[str, dict[str, Tensor]]:
        first, *rest = sites
        d = first.features("outputs")
        if len(rest) > 1 or any(site.features("outputs") != d or site.axis != -1 for site in sites) or d < 2:
            widths = [f"{site.name}: {site.outputs}" for site in sites]
            raise CompositionError(
                f"Invertible at {listed(widths)} ({type(first.module).__name__}): it goes to the embeddings, and its "
                f"inverse to what goes into the output layer; both as wide as each other, on the last axis. Give "
                f"at=[EMBEDDINGS, mb.before(mb.role.head)]."
            )
        half = d // 2
        own = self._net(first, "F", d - half, half) | self._net(first, "G", half, d - half)
        return {first.name: own} | {site.name: {self.inverse + name: t for name, t in own.items()} for site in rest}

    def _net(self, site: Site, name: str, inputs: int, outputs: int) -> dict[str, Tensor]:
        size = max(1, int(inputs / self.reduction))
        down, up = drawn(site, size, inputs), site.zeros(outputs, size)
        if self.std is not None:
            for weight in (down, up):
                nn.init.normal_(weight, std=self.std)
        return {
            f"{name}_down": down,
            f"{name}_down_bias": site.zeros(size),
            f"{name}_up": up,
            f"{name}_up_bias": site.zeros(outputs),
        }

    def change(self, params: Params, x: Tensor, y: Tensor, c: Context) -> Tensor:
        half = y.shape[-1] // 2
        first, second = y[..., :half], y[..., half:]
        if f"{self.inverse}F_up" in params:
            more = -self._run(params, f"{self.inverse}G", first)
            return torch.cat([-self._run(params, f"{self.inverse}F", second + more), more], -1)
        more = self._run(params, "F", second)
        return torch.cat([more, self._run(params, "G", first + more)], -1)

    def _run(self, params: Params, name: str, v: Tensor) -> Tensor:
        hidden = ACTIVATIONS[self.activation](linear(v, params[f"{name}_down"], params[f"{name}_down_bias"]))
        return linear(hidden, params[f"{name}_up"], params[f"{name}_up_bias"])
