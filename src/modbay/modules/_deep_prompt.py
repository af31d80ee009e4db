"""Deep prompts: learned tokens of its own in front of the input of every layer.

Jia, Tang, Chen, Cardie, Belongie, Hariharan and Lim, "Visual Prompt Tuning", 2022 (arXiv 2203.12119, its deep form).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..abstract import Context, Replacement, Site
from ..errors import CompositionError
from ..types import Params, System
from ._common import features_last, positive
from ._embedding import xavier


@dataclass(frozen=True)
class DeepPrompt(Replacement):
    """f([P, x]) without its outputs at P, where f is a block: x and y (b, t, d), P (n, d) learned, one at each block.

        mb.attach(vit, mb.role.block, {"flowers": mb.DeepPrompt(50, after=1)}, name="task")

    length: n. after: how many positions of x stay in front of P, [CLS] (there are 1). P is drawn from U(−v, v), with
    v = √(3 / d), which is the paper's √(6 / (3p² + d)) for patches of 3 p² = d numbers (ViT-B/16).
    What the paper does in place, each layer's prompts written over those of the layer before, is the same here, since
    the outputs at P are dropped. Rows with other prompts, or none, go into a run of f of their own if their lengths
    differ. For blocks of x alone, as a vision transformer's: raises CompositionError where f takes a mask or positions,
    which were made for t places (a Prefix has the like for language models), or has not its features last.
    """

    batched: ClassVar[bool] = True
    tokenwise: ClassVar[bool] = False
    systems: ClassVar[tuple[System, ...]] = (
        System(
            (30,), "mb.DeepPrompt(50, after=1)", ("tests/test_input.py::test_vpt_deep",), "VPT, deep",
            section="3.2",
        ),
    )  # fmt: skip
    length: int = 50
    after: int = 0

    def __post_init__(self):
        positive("DeepPrompt", length=self.length)
        if self.after < 0:
            raise CompositionError(f"DeepPrompt(after={self.after}): it counts positions of the input.")

    def init(self, sites: Sequence[Site]) -> dict[str, dict[str, Tensor]]:
        return {site.name: {"prompt": self._one(site)} for site in sites}

    def _one(self, site: Site) -> Tensor:
        features_last(site, "DeepPrompt")
        d = site.features("inputs")
        bound = xavier(None, d)
        return site.empty(self.length, d).uniform_(-bound, bound)

    def forward(self, params: Params, x: Tensor, f: Callable | None, c: Context) -> Tensor:
        if f is None:
            raise CompositionError("DeepPrompt stands in front of the input of f, but there is no f here.")
        others = [*_tensors(getattr(f, "args", ())), *_tensors(getattr(f, "kwargs", {}).values())]
        if len(others) > 1:
            shapes = ", ".join(str(tuple(other.shape)) for other in others if other is not f.x)  # type: ignore[attr-defined]
            raise CompositionError(
                f"DeepPrompt before {type(f.module).__name__}: it is called with more than x, {shapes}, made for x "  # type: ignore[attr-defined]
                f"without a prompt. Use mb.Prefix at its attention, or leave out the mask."
            )
        prompt, first = params["prompt"], self.after
        front = prompt.unsqueeze(-3).expand(*x.shape[:-2], *prompt.shape[-2:])
        longer = torch.cat([x[..., :first, :], front, x[..., first:, :]], -2)
        several = longer.ndim - 3  # leading group axes: 0 or 1
        ours = longer.flatten(0, several).to(f.x.dtype)  # type: ignore[attr-defined]  (of a base in bfloat16)
        y = f(ours).unflatten(0, longer.shape[: several + 1])
        return torch.cat([y[..., :first, :], y[..., first + self.length :, :]], -2)


def _tensors(arguments: Iterable[Any]) -> list[Tensor]:
    """The tensors among a call's arguments, and in its tuples (rotary positions)."""
    found: list[Tensor] = []
    for argument in arguments:
        found += [argument] if isinstance(argument, Tensor) else []
        found += _tensors(argument) if isinstance(argument, (tuple, list)) else []
    return found
