"""Routing by position: the first tokens go to one module, the next to another.

Poth, Sterz, Paul, Purkayastha, Engländer, Imhof, Vulić, Ruder, Gurevych and Pfeiffer, "Adapters: A Unified Library for
Parameter-Efficient and Modular Transfer Learning", 2023 (arXiv 2311.11077), its block Split.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..abstract import Context, Router, Routing, Site
from ..errors import CallError, CompositionError, LabelError, SiteError, listed
from ..types import System

TESTS = "tests/test_split.py::"


class Split(Router):
    """α_t = 1 for the modules of the span that position t is in: the first n_1 tokens, the next n_2, …, the rest.

        mb.attach(model, mb.role.ffn_out, {"question": mb.Bottleneck(48), "passage": mb.Bottleneck(48)},
                  mb.Split(["question", "passage"], [64]))

    spans: a module each, or several in the order in which mb.Sequence("routed") runs them; () is f alone. lengths: n_i
    of all spans but the last, which is the rest. Positions are counted over the text of a row, its padding left out (it
    has no module): padding on the left moves nothing, and neither does a cache, whose mask holds what came before. A
    module that leaves the bay leaves its span to f. Of an encoder–decoder the decoder has positions of its own: give it
    a router a site, router=lambda: mb.Split(…), and a decoder_attention_mask where it has a cache. Differs: AdapterHub
    also asks that the lengths add up to the input's, and counts padding.
    Raises CompositionError for bad lengths, LabelError for a module that is not there, SiteError where x has no
    positions or others than the mask, CallError for a cache without a mask: it does not say how much came before.
    """

    systems = (
        System(
            (146,), 'mb.Split(["question", "passage"], [64])',
            (TESTS + "test_each_span_has_its_module", TESTS + "test_padding_and_a_cache_move_nothing"),
            "a sequence that is split", "y_t = f(x_t) + Δ_i(t): the first tokens to one module, the rest to another",
            section="5.4",
        ),
    )  # fmt: skip

    def __init__(self, spans: Sequence[str | Sequence[str]], lengths: Sequence[int]):
        super().__init__()
        if isinstance(spans, str) or len(spans) != len(lengths) + 1 or any(n < 1 for n in lengths):
            raise CompositionError(
                f"Split({spans!r}, lengths={lengths!r}): spans, and a positive length of each but the last."
            )
        self.spans = [[span] if isinstance(span, str) else list(span) for span in spans]
        self.lengths = list(lengths)

    def build(self, names: Sequence[str], site: Site) -> None:
        gone = set(self.names).difference(names)
        self.spans = [[name for name in span if name not in gone] for span in self.spans]
        unknown = [name for span in self.spans for name in span if name not in names]
        if unknown:
            raise LabelError(f"Split: the bay lacks {listed(unknown)}; there are {listed(names)}.")
        self.names = tuple(names)

    def rename(self, old: str, new: str) -> None:
        self.names = tuple(new if name == old else name for name in self.names)
        self.spans = [[new if name == old else name for name in span] for span in self.spans]

    def forward(self, x: Tensor, c: Context) -> Routing:
        """x: (b, t, d), or ids (b, t); the routing is (b, t, k)."""
        if x.ndim != 3 and (x.ndim != 2 or x.is_floating_point()):
            raise SiteError(f"Split: an input {tuple(x.shape)} has no positions; attach where x is (b, t, d).")
        slots = max(1, *map(len, self.spans))
        table = [[*map(self.names.index, span), *[-1] * (slots - len(span))] for span in self.spans]
        starts = [sum(self.lengths[: i + 1]) for i in range(len(self.lengths))]
        position, text = self._positions(x, c)
        at = sum((position >= start).long() for start in starts) if starts else torch.zeros_like(position)
        index = torch.tensor(table, device=x.device)[at]
        return Routing(index=index if text is None else torch.where(text.unsqueeze(-1), index, -1))

    def _positions(self, x: Tensor, c: Context) -> tuple[Tensor, Tensor | None]:
        """(the place of each position in the text of its row (b, t), which positions are text)."""
        b, t = x.shape[:2]
        mask = c.mask
        if mask is None:
            past = c.arguments.get("past_key_values")
            if past is not None and _length(past):
                raise CallError(
                    "Split: this call has a cache and no mask, so that nothing says how many tokens came before these. "
                    "Pass attention_mask (of a decoder, decoder_attention_mask), (batch, all tokens so far)."
                )
            return torch.arange(t, device=x.device).expand(b, t), None
        if len(mask) != b or mask.shape[1] < t:
            raise SiteError(
                f"Split: the input has {b} rows of {t} positions, the attention mask is {tuple(mask.shape)}: they are "
                f"not the same positions. Attach where they are, or give the router a site of its own."
            )
        text = mask.to(x.device) != 0
        return (text.long().cumsum(1) - 1)[:, -t:], text[:, -t:]


def _length(past: object) -> int:
    """How many positions a cache holds; of one that can't tell, one at least."""
    length = getattr(past, "get_seq_length", None)
    return 1 if length is None else int(length())
