"""Prefix tuning: learned keys and values in front of those of an attention.

Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", 2021 (arXiv 2101.00190); without the
reparametrisation, in encoders that classify: Liu et al., "P-Tuning v2", 2022 (arXiv 2110.07602); as a gated addition:
He, Zhou, Ma, Berg-Kirkpatrick and Neubig, 2022 (arXiv 2110.04366).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..abstract import Context, InputComposition, Site
from ..errors import CompositionError
from ..types import Params, System

HEADS = ("num_heads", "n_heads", "num_attention_heads", "n_head")
WIDTH = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")

PEFT = "tests/test_input.py::test_prefixes_equal_peft"
BY_HAND = "tests/test_prefix.py::test_equals_attention_by_hand"
ADDITIONS = (
    "tests/test_unify.py::test_a_prefix_is_a_gated_addition",
    "tests/test_unify.py::test_every_module_is_an_addition",
    "tests/test_unify.py::test_a_change_of_parameters_is_an_addition",
)


@dataclass(frozen=True)
class Prefix(InputComposition):
    """softmax(q [P_k; K]ᵀ) [P_v; V] with P_k, P_v (heads, n, d) learned, in each attention module.

        mb.Prefix(200, bottleneck=512)     # Li and Liang, for text as long
        mb.Prefix(20)                      # P-tuning v2

    length: n. bottleneck: None, P itself is learned; or the width m of the paper's reparametrisation
    P = W_up tanh(W_down P' + b) + b', where P' (n, input width), W_down (m, input width) are shared by all sites (the
    official code: m = 512; 800 for little data). Here P itself is the default, as in peft, since the reparametrisation
    only serves to train. heads, head_dim: of the keys, read from the module unless given.
    group: of a module's prefixes those with the same word share P' and W_down. The official code of an encoder-decoder
    has them apart for its three attentions: {"encoder.*SelfAttention": mb.Prefix(…, group="encoder"), …}.
    relative: where the attention has a bias by relative position (T5's), it is 0 at a prefix. "front": the prefix has
    the positions right before the text's, −n … −1, as in peft, and so under a sliding window is out of sight of what
    is further on, where else all of the text sees it. "keys": keys are counted from the prefix on, so that the
    text's begin at n, and queries from 0 as before, as the library adapters has it.
    The text's positions start at 0; in peft they start at n: under rotary positions a prefix that was trained there has
    its keys turned back by n steps, which is the same; where positions are learned, `Shift(n)` at their table is. A
    module that runs several times in a pass (ALBERT's) has one prefix for all of them. A prefix has no position, so
    that under rotary positions the text's own must not depend on padding: with padding on the left, pass position_ids,
    as generate does. Attention weights that are asked for have n more columns. Raises CompositionError where a module
    has no heads to be read, and of relative= where there is no such bias.
    """

    batched: ClassVar[bool] = True
    place: ClassVar[str] = "attention"
    systems: ClassVar[tuple[System, ...]] = (
        System((27,), "mb.Prefix(200, bottleneck=512)", (BY_HAND, PEFT), "prefix tuning"),
        System((28,), "mb.Prefix(20)", (BY_HAND, PEFT), "P-tuning v2", source="Liu et al., 2022 (arXiv 2110.07602)"),
        System(
            (51,), "mb.Prefix(30)", ADDITIONS, "unified view: a prefix, as any module, is an addition",
            "f(x) + λ(x) (softmax(q P_kᵀ) P_v − f(x)), λ(x) = Σ exp(q P_kᵀ) / (Σ exp(q P_kᵀ) + Σ exp(q Kᵀ))",
            "He et al., 2022 (arXiv 2110.04366)", "3.5",
        ),
    )  # fmt: skip
    length: int = 30
    bottleneck: int | None = None
    heads: int | None = None
    head_dim: int | None = None
    relative: str | None = None
    group: str = ""

    def __post_init__(self):
        if self.length < 1:
            raise CompositionError(f"Prefix(length={self.length}): a prefix has at least one place.")
        if self.relative not in (None, "front", "keys"):
            raise CompositionError(f"Prefix(relative={self.relative!r}): 'front', 'keys' or None.")

    def init(self, sites: Sequence[Site]) -> dict[str, dict[str, Tensor]]:
        if self.bottleneck is None:
            return {site.name: {"prefix": self._drawn(site, 2, *self._shape(site))} for site in sites}
        first, m = sites[0], self.bottleneck
        d = first.features("inputs")
        shared = {"tokens": first.empty(self.length, d).normal_(), **_linear(first, m, d, "down")}
        made = {}
        for site in sites:
            heads, _, width = self._shape(site)
            up = _linear(site, 2 * heads * width, m, "up")
            made[site.name] = {**shared, **{k: v.unflatten(0, (2, heads, width)) for k, v in up.items()}}
        return made

    def _drawn(self, site: Site, *shape: int) -> Tensor:
        return site.empty(*shape).normal_()

    def _shape(self, site: Site) -> tuple[int, int, int]:
        """(heads, n, d) of the keys."""
        heads = self.heads or _read(site.module, ("num_key_value_heads",)) or _read(site.module, HEADS)
        width = self.head_dim or _read(site.module, WIDTH)
        if heads is None or width is None:
            raise CompositionError(
                f"Prefix at site {site.name!r} ({type(site.module).__name__}): it does not say how many key heads it "
                f"has, or how wide they are. Attach at an attention, or say them: mb.Prefix(…, heads=…, head_dim=…)."
            )
        return heads, self.length, width

    def extend(self, params: Params, c: Context) -> Tensor:
        if self.bottleneck is None:
            return params["prefix"]
        hidden = torch.tanh(params["tokens"] @ params["down"].mT + params["down_bias"].unsqueeze(-2))
        out = torch.einsum("...nm,...khdm->...khnd", hidden, params["up"])
        return out + params["up_bias"].unsqueeze(-2)


def _linear(site: Site, outputs: int, inputs: int, name: str) -> dict[str, Tensor]:
    bound = inputs**-0.5
    weight, bias = site.empty(outputs, inputs), site.empty(outputs)
    return {name: weight.uniform_(-bound, bound), f"{name}_bias": bias.uniform_(-bound, bound)}


def _read(module: nn.Module | None, names: Sequence[str]) -> int | None:
    """The first of these attributes that the module has, or else its config."""
    config = getattr(module, "config", None)
    for source in (module, config):
        for name in names:
            value = getattr(source, name, None)
            if isinstance(value, int):
                return value
    return None
