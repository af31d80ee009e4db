"""Prompts: tokens in front of the input, learned or written by hand.

Lester, Al-Rfou and Constant, "The Power of Scale for Parameter-Efficient Prompt Tuning", 2021 (arXiv 2104.08691);
written by hand, or demonstrations: Brown et al., "Language Models are Few-Shot Learners", 2020 (arXiv 2005.14165);
inserted in a vision transformer: Jia et al., "Visual Prompt Tuning", 2022 (arXiv 2203.12119, its shallow form).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..abstract import Context, InputComposition, Site
from ..errors import CompositionError
from ..types import Params, System
from ._embedding import embedded, embedding, xavier

HERE = "tests/test_input.py::"


@dataclass(frozen=True)
class Prompt(InputComposition):
    """f([P, E(x)]), P (n, d): n virtual tokens in front of the embedded input E(x) (b, t, d), learned unless said.

        mb.Prompt(100, common=5000)                                      # Lester et al.: rows of the vocabulary
        mb.Prompt.of(["negative", "positive"], tokenizer, 100, fill="vocabulary")     # their best: class labels
        mb.Prompt.of("Is this a good review?", tokenizer, learn=False)   # a prompt by hand, or demonstrations

    length: n. start: "vocabulary", the embeddings of tokens drawn at random, none twice; "uniform", U(−½, ½); or a
    place each, ids of tokens, or tuples of ids, whose embeddings are averaged. common: draw from the first so many rows
    of the vocabulary, which must be in the order of frequency (T5's is). fill: of places beyond the last of `start`:
    "repeat" from the first, as peft does, or "vocabulary", as the paper does. learn: False keeps P as it starts.
    after: how many of the input's own positions stay in front: 1 keeps a [CLS] where a pooler looks for it.
    At the model itself (at="", the default), the call is rewritten: mask, positions, labels and cache are seen to, and
    the virtual positions are cut from the output. At another module, whose output is a sequence (the embeddings of a
    vision transformer), P is inserted there, and outputs stay longer; P is then drawn as by Jia et al., U(−v, v) with
    v = √(6 / (k + d)), k the inputs of the patches' projection. Raises CompositionError where neither can be.
    """

    batched: ClassVar[bool] = True
    place: ClassVar[str] = "input"
    systems: ClassVar[tuple[System, ...]] = (
        System(
            (25,), "mb.Prompt(4, (2003, 2023, 2204, 1029), learn=False)",
            (f"{HERE}test_a_prompt_by_hand_is_text_in_front", f"{HERE}test_demonstrations_are_concatenated"),
            "manual prompts, in-context demonstrations", source="Brown et al., 2020 (arXiv 2005.14165)",
        ),
        System(
            (26,), "mb.Prompt(100, common=5000)",
            ("tests/test_prompt.py::test_equals_peft", f"{HERE}test_how_a_prompt_starts"), "prompt tuning",
        ),
        System(
            (30,), "mb.Prompt(50, after=1)", (f"{HERE}test_vpt_shallow",), "VPT, shallow",
            source="Jia et al., 2022 (arXiv 2203.12119)",
        ),
    )  # fmt: skip
    length: int = 100
    start: str | tuple[int | tuple[int, ...], ...] = "vocabulary"
    after: int = 0
    common: int | None = None
    fill: Literal["repeat", "vocabulary"] = "repeat"
    learn: bool = True

    def __post_init__(self):
        if self.length < 1:
            raise CompositionError(f"Prompt(length={self.length}): a prompt has at least one token.")
        if isinstance(self.start, str) and self.start not in ("vocabulary", "uniform"):
            raise CompositionError(
                f"Prompt(start={self.start!r}): 'vocabulary', 'uniform', or ids; a text: mb.Prompt.of(text, tokenizer)."
            )
        if self.fill not in ("repeat", "vocabulary"):
            raise CompositionError(f"Prompt(fill={self.fill!r}): it is 'repeat' or 'vocabulary'.")
        if self.common is not None and self.common < 1:
            raise CompositionError(f"Prompt(common={self.common}): there is at least one token to draw from.")
        if not isinstance(self.start, str):  # lists, as from JSON, can't be hashed
            ids = tuple(i if isinstance(i, int) else tuple(i) for i in self.start)
            object.__setattr__(self, "start", ids)
            if not ids or () in ids:
                raise CompositionError(f"Prompt(start={ids}): a place without any token has nothing to start from.")

    @classmethod
    def of(cls, text: str | Sequence[str], tokenizer: Any, length: int | None = None, **more: Any) -> "Prompt":
        """A prompt that starts from a text, a place each token; or from words, a place each, their tokens averaged.

        tokenizer: as of transformers; its special tokens are left out. length: the text's own if None. more: fields.
        """
        ids = lambda t: tuple(tokenizer(t, add_special_tokens=False)["input_ids"])
        start = ids(text) if isinstance(text, str) else tuple(ids(word) for word in text)
        return cls(len(start) if length is None else length, start, **more)

    @property
    def constants(self) -> tuple[str, ...]:  # type: ignore[override]
        return () if self.learn else ("prompt",)

    def init(self, sites: Sequence[Site]) -> dict[str, dict[str, Tensor]]:
        return {site.name: {"prompt": self._one(site)} for site in sites}

    def _one(self, site: Site) -> Tensor:
        table, width = embedding(site)
        if table is None and not isinstance(self.start, str):
            raise CompositionError(f"Prompt(start={self.start}) at {site.name!r}: there are no token embeddings here.")
        if table is None or self.start == "uniform":
            bound = 0.5 if self.start == "uniform" else xavier(site.module, width)
            return site.empty(self.length, width).uniform_(-bound, bound)
        given = () if isinstance(self.start, str) else self.start
        if given and self.fill == "repeat":
            given = given * -(-self.length // len(given))
        places = [*given, *self._drawn(table, self.length - len(given))][: self.length]
        return torch.stack([embedded(table, ids).mean(0) for ids in places]).to(site.dtype)

    def _drawn(self, table: nn.Module, n: int) -> list[int]:
        """n ids of the vocabulary, none twice where there are enough."""
        size = len(table.weight)  # type: ignore[arg-type]
        size = size if self.common is None else min(size, self.common)
        return [] if n < 1 else torch.randperm(size)[:n].tolist() if n <= size else torch.randint(size, (n,)).tolist()

    def extend(self, params: Params, c: Context) -> Tensor:
        return params["prompt"]
