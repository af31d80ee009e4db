"""Bottleneck adapters: a small network after a site, or beside it.

Houlsby, Giurgiu, Jastrzębski, Morrone, de Laroussilhe, Gesmundo, Attariyan and Gelly, 2019 (arXiv 1902.00751). Norm
first: Bapna and Firat, 2019 (arXiv 1909.08478). Reduction 16: Pfeiffer, Kamath, Rücklé, Cho and Gurevych, 2021 (arXiv
2005.00247). Parallel and scaled: He, Zhou, Ma, Berg-Kirkpatrick and Neubig, 2022 (arXiv 2110.04366). At convolutions:
Rebuffi, Bilen and Vedaldi, 2018 (arXiv 1803.10082).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..abstract import Context, Factors, FunctionComposition, Site
from ..errors import CompositionError
from ..ops import align, linear, shared_linear
from ..types import Params, System
from ._common import ACTIVATIONS, drawn, known, positive

SERIAL = "tests/test_kinds.py::test_a_serial_bottleneck_reads_the_output"
PARALLEL = "tests/test_kinds.py::test_a_parallel_bottleneck_reads_the_input"
SAME = "tests/test_adapters.py::test_the_same_weights_give_the_same_hidden_states"
NORM = "tests/test_kinds.py::test_a_bottleneck_may_normalise_first_and_learn_its_scale"


@dataclass(frozen=True)
class Bottleneck(FunctionComposition):
    """y + s · (W_up σ(W_down v + b_down) + b_up), with v = y (serial) or x (parallel), layer-normalised with `norm`; or
    with norm="after" y + s · LayerNorm(W_up σ(W_down v + b_down) + b_up).

        mb.Bottleneck(64, activation="gelu", std=1e-2)             # Houlsby et al.
        mb.Bottleneck(reduction=16)                                # Pfeiffer et al.; the default
        mb.Bottleneck(64, norm=True)                               # Bapna and Firat
        mb.Bottleneck(512, placement="parallel", scale=4.0)        # He et al.
        mb.Bottleneck(reduction=32, norm="after", activation="gelu_tanh")     # HyperFormer's, to be generated

    size: rows of W_down; or reduction: the width of the output divided by it. scale: s, or "learned" (at first 1).
    placement: "serial", "parallel", or "sum", v = x + y, at a part of a block, mb.span(NORM, LAST), whose residual sum
    no module gives.
    std: None draws W_down as a Linear's weight and leaves W_up zero (He et al.), so that the start is the base exactly;
    a number draws both from a normal cut off at two deviations, near the base (Houlsby et al. 1e-2). Biases start at 0.
    With norm="after" W_up is drawn, too, and the norm's gain starts at zero instead, as does the change.
    Differs: the norm of the site's own block is not trained; attach another module to it. No dropout.
    At a convolution the maps are 1 × 1. Raises CompositionError where the site has no width, or for a bad argument.
    """

    batched: ClassVar[bool] = True
    systems: ClassVar[tuple[System, ...]] = (
        System((38,), 'mb.Bottleneck(64, activation="gelu", std=1e-2)', (SERIAL, SAME), "Houlsby adapter"),
        System((39,), "mb.Bottleneck(reduction=16)", (SERIAL, SAME), "Pfeiffer adapter"),
        System((40,), "mb.Bottleneck(64, norm=True)", (NORM,), "Bapna–Firat adapter"),
        System(
            (41,), 'mb.Bottleneck(512, placement="parallel", scale=4.0)', (PARALLEL, SAME), "scaled parallel adapter"
        ),
    )
    size: int | None = None
    reduction: int | float | None = None
    placement: Literal["serial", "parallel", "sum"] = "serial"
    norm: bool | Literal["after"] = False
    activation: str = "relu"
    scale: int | float | Literal["learned"] = 1.0
    std: int | float | None = None

    def __post_init__(self):
        known(self.activation, "Bottleneck")
        positive("Bottleneck", size=self.size, reduction=self.reduction, std=self.std)
        if self.size is not None and self.reduction is not None:
            raise CompositionError(
                f"Bottleneck(size={self.size}, reduction={self.reduction}): both say how wide it is; give one."
            )
        if self.placement not in ("serial", "parallel", "sum"):
            raise CompositionError(f'Bottleneck(placement={self.placement!r}): it is "serial", "parallel" or "sum".')
        if self.norm not in (False, True, "after"):
            raise CompositionError(f'Bottleneck(norm={self.norm!r}): False, True (first), or "after".')
        if isinstance(self.scale, str) and self.scale != "learned":
            raise CompositionError(f'Bottleneck(scale={self.scale!r}): a number, or "learned".')

    @property
    def neutral(self) -> bool:  # type: ignore[override]
        return self.std is None or self.norm == "after"

    def init(self, sites: Sequence[Site]) -> dict[str, dict[str, Tensor]]:
        return {site.name: self._one(site) for site in sites}

    def _one(self, site: Site) -> dict[str, Tensor]:
        outputs = site.features("outputs")
        inputs = outputs if self.placement == "serial" else site.features("inputs")
        if site.axis >= 0 or (site.form == "embedding" and self.placement != "serial"):
            raise CompositionError(
                f"Bottleneck(placement={self.placement!r}) at site {site.name!r} ({type(site.module).__name__}): "
                f"there are no features in a known place for it to read. Attach at a layer beside it, or use 'serial'."
            )
        stride = getattr(site.module, "stride", ())
        if self.placement != "serial" and site.form == "convolution" and any(step != 1 for step in stride):
            raise CompositionError(
                f"Bottleneck(placement={self.placement!r}) at site {site.name!r}: its convolution has stride {stride}, "
                f"so that x and y differ in size. Use 'serial'."
            )
        if self.placement == "sum" and inputs != outputs:
            raise CompositionError(
                f'Bottleneck(placement="sum") at site {site.name!r}: x has {inputs} features and y {outputs}, which '
                f"have no sum. Use 'serial' or 'parallel'."
            )
        size = self.size or max(1, int(outputs / (self.reduction or 16)))
        after = self.norm == "after"
        down, up = drawn(site, size, inputs), drawn(site, outputs, size) if after else site.zeros(outputs, size)
        if self.std is not None:
            for weight in (down, up):
                nn.init.trunc_normal_(weight, std=self.std, a=-2 * self.std, b=2 * self.std)
        ones = [1] * (-1 - site.axis)  # (r, d, 1, 1) at a Conv2d: what tells its maps from those of a Linear
        params = {"down": down.view(size, inputs, *ones), "down_bias": site.zeros(size)}
        params |= {"up": up.view(outputs, size, *ones), "up_bias": site.zeros(outputs)}
        if self.norm:
            gain = site.zeros(outputs) if after else site.zeros(inputs) + 1
            params |= {"norm": gain, "norm_bias": torch.zeros_like(gain)}
        if self.scale == "learned":
            params["scale"] = site.zeros(1) + 1
        return params

    def _read(self, x: Tensor, y: Tensor) -> Tensor:
        if self.placement == "sum":
            return x + y
        return y if self.placement == "serial" else x

    def change(self, params: Params, x: Tensor, y: Tensor, c: Context) -> Tensor:
        v = self._read(x, y)
        several = params["down_bias"].ndim - 1  # leading group axes: 0 or 1
        spatial = params["down"].ndim - 2 - several
        v = v.movedim(-1 - spatial, -1) if spatial else v
        v = _normed(v, params) if self.norm is True else v
        down, up = (params[name].flatten(1 + several) if spatial else params[name] for name in ("down", "up"))
        hidden = ACTIVATIONS[self.activation](linear(v, down, params["down_bias"]))
        out = linear(hidden, up, params["up_bias"])
        out = _normed(out, params) if self.norm == "after" else out
        if self.scale == "learned":
            out = out * align(params["scale"], out)
        elif self.scale != 1.0:
            out = out * self.scale
        return out.movedim(-1, -1 - spatial) if spatial else out

    def factors(self, params: Params, x: Tensor, y: Tensor, c: Context) -> Factors | None:
        down, bias, out, offset = (params[name] for name in ("down", "down_bias", "up", "up_bias"))
        if self.norm == "after" or down.ndim - bias.ndim != 1:  # not linear, or at a convolution
            return None
        v = self._read(x, y)
        if self.norm:  # the norm's gain and bias go into W_down, so that all modules read the same rows
            v = F.layer_norm(v, v.shape[-1:])
            bias = bias + (down @ params["norm_bias"].unsqueeze(-1)).squeeze(-1)
            down = down * params["norm"].unsqueeze(-2)
        if self.scale == "learned":
            out, offset = out * params["scale"].unsqueeze(-1), offset * params["scale"]
        elif self.scale != 1.0:
            out, offset = out * self.scale, offset * self.scale
        return Factors(ACTIVATIONS[self.activation](shared_linear(v, down, bias)), out, offset)


def _normed(v: Tensor, params: Params) -> Tensor:
    v = F.layer_norm(v, v.shape[-1:])
    return v * align(params["norm"], v) + align(params["norm_bias"], v)
