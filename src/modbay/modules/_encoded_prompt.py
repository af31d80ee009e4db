"""Prompts written by a small recurrent network, which ties their places together while they learn.

Liu, Zheng, Du, Ding, Qian, Yang and Tang, "GPT Understands, Too" (P-tuning), 2021 (arXiv 2103.10385).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..abstract import Context, InputComposition, Site
from ..errors import CompositionError
from ..ops import linear
from ..types import Params, System
from ._common import drawn, drawn_bias, positive
from ._embedding import embedding

TESTS = ("tests/test_input.py::test_encoded_prompts_equal_peft", "tests/test_input.py::test_an_encoded_prompt_by_torch")


@dataclass(frozen=True)
class EncodedPrompt(InputComposition):
    """f([P, E(x)]), P = W₂ relu(W₁ BiLSTM(T) + b₁) + b₂ (n, d), with T (n, d) learned, and the encoder with it.

    length: n. encoder: "lstm", of two layers and both directions; or "mlp", three linear maps with relu between, of T.
    hidden: rows of the LSTM's state, d/2 if None, W₁ (2h, 2h), W₂ (d, 2h), as the official code; of the MLP's maps, d
    if None. layers: of the LSTM. T is drawn from N(0, 1), the rest as torch draws its own. No dropout.
    Differs: the two biases of a torch.nn.LSTM are one here, their sum; the paper also puts tokens of P between and
    behind the words, here they stand in front, as in peft. after, and where it can be attached: as for Prompt.
    Raises CompositionError for a bad argument.
    """

    batched: ClassVar[bool] = True
    place: ClassVar[str] = "input"
    systems: ClassVar[tuple[System, ...]] = (System((28,), "mb.EncodedPrompt(20)", TESTS, "P-tuning"),)
    length: int = 20
    encoder: Literal["lstm", "mlp"] = "lstm"
    hidden: int | None = None
    layers: int = 2
    after: int = 0

    def __post_init__(self):
        positive("EncodedPrompt", length=self.length, hidden=self.hidden, layers=self.layers)
        if self.encoder not in ("lstm", "mlp"):
            raise CompositionError(f'EncodedPrompt(encoder={self.encoder!r}): it is "lstm" or "mlp".')

    def init(self, sites: Sequence[Site]) -> dict[str, dict[str, Tensor]]:
        return {site.name: self._one(site) for site in sites}

    def _one(self, site: Site) -> dict[str, Tensor]:
        d = embedding(site)[1]
        params = {"tokens": nn.init.normal_(site.empty(self.length, d))}
        if self.encoder == "mlp":
            h = self.hidden or d
            return params | _maps(site, (d, h, h, d))
        h = self.hidden or max(1, d // 2)
        for layer in range(self.layers):
            inputs, bound = 2 * h if layer else d, h**-0.5
            shapes = {"input": (2, 4 * h, inputs), "state": (2, 4 * h, h), "bias": (2, 2, 4 * h)}
            made = {name: site.empty(*shape).uniform_(-bound, bound) for name, shape in shapes.items()}
            made["bias"] = made["bias"].sum(0)
            params |= {f"{name}{layer}": tensor for name, tensor in made.items()}
        return params | _maps(site, (2 * h, 2 * h, d))

    def extend(self, params: Params, c: Context) -> Tensor:
        out = params["tokens"]
        for layer in range(self.layers if self.encoder == "lstm" else 0):
            out = _recurrent(out, {name: params[f"{name}{layer}"] for name in ("input", "state", "bias")})
        maps = 3 if self.encoder == "mlp" else 2
        for i in range(maps):
            out = linear(out if i == 0 else torch.relu(out), params[f"map{i}"], params[f"map{i}_bias"])
        return out


def _maps(site: Site, widths: Sequence[int]) -> dict[str, Tensor]:
    made = {}
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        made |= {f"map{i}": drawn(site, outputs, inputs), f"map{i}_bias": drawn_bias(site, outputs, inputs)}
    return made


def _recurrent(x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
    """One layer of an LSTM in both directions, of x (…, n, i), as (…, n, 2h); there are few places, and any group."""
    both = torch.stack([x, x.flip(-2)], -3)  # (…, 2, n, i)
    given = both @ params["input"].mT + params["bias"].unsqueeze(-2)  # (…, 2, n, 4h)
    state = cell = given.new_zeros(*given.shape[:-2], 1, params["state"].shape[-1])
    states = []
    for place in given.split(1, -2):
        enter, forget, new, out = (place + state @ params["state"].mT).chunk(4, -1)
        cell = torch.sigmoid(forget) * cell + torch.sigmoid(enter) * torch.tanh(new)
        state = torch.sigmoid(out) * torch.tanh(cell)
        states.append(state)
    there, back = torch.cat(states, -2).unbind(-3)  # (…, n, h)
    return torch.cat([there, back.flip(-2)], -1)
