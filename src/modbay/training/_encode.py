"""Rows as numbers: encoded once, padded in batches, with the labels that route them.

Masking: Devlin, Chang, Lee and Toutanova, "BERT", 2018 (arXiv 1810.04805): 15 % of the pieces are to be told, of which
80 % are hidden, 10 % replaced and 10 % left.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data import Row

IGNORED = -100  # a target that counts for nothing
MASKED = 0.15
Batch = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Example:
    """One row: its pieces, its target as a number or numbers, and the labels that route it."""

    pieces: dict[str, list[int]]
    target: Any
    routes: dict[str, str | None]
    measured: bool = False  # whether the target is a number to be met, not a class
    cut: bool = False

    def __len__(self) -> int:
        return len(self.pieces["input_ids"])


@dataclass(frozen=True)
class Encoder:
    """Makes examples of rows and batches of examples, for one kind of task.

    classes: each task's, in the order of its head's logits. routes: {label: {value: the modules' label}}.
    """

    tokenizer: Any
    kind: str
    classes: Mapping[str, Sequence[str]]
    measured: frozenset[str]
    max_length: int
    decoder_inputs: Any = None

    def encode(self, rows: Sequence[Row], routes: Sequence[dict[str, str | None]]) -> list[Example]:
        """Rows in order; a text longer than max_length is cut at its end."""
        one = {"tagging": self._tags, "seq2seq": self._pair}.get(self.kind)
        if one is not None:
            return [one(row, route) for row, route in zip(rows, routes, strict=True)]
        if not rows:
            return []
        pairs = [row.pair or "" for row in rows] if any(row.pair is not None for row in rows) else None
        said = self.tokenizer([row.text for row in rows], pairs, truncation=True, max_length=self.max_length)
        keys = [key for key in ("input_ids", "attention_mask", "token_type_ids") if key in said]
        index = {task: {name: i for i, name in enumerate(names)} for task, names in self.classes.items()}
        out = []
        for i, (row, route) in enumerate(zip(rows, routes, strict=True)):
            pieces = {key: said[key][i] for key in keys}
            full = len(pieces["input_ids"]) >= self.max_length
            measured = row.task in self.measured
            if self.kind in ("causal", "masked"):
                target: Any = pieces["input_ids"]
            elif row.target is None:
                target = 0.0 if measured else IGNORED
            else:
                target = float(row.target) if measured else index[row.task].get(row.target, IGNORED)  # type: ignore[arg-type]
            out.append(Example(pieces, target, route, measured, full))
        return out

    def _tags(self, row: Row, route: dict[str, str | None]) -> Example:
        """The tag of a word stands at its first piece."""
        said = self.tokenizer(list(row.text), is_split_into_words=True, truncation=True, max_length=self.max_length)
        index = {name: i for i, name in enumerate(self.classes[row.task])}
        target, seen = [], set()
        for word in said.word_ids():
            first = word is not None and word not in seen
            seen.add(word)
            known = row.target[word] if first and row.target is not None else None  # type: ignore[index]
            target.append(index.get(known, IGNORED) if known is not None else IGNORED)
        pieces = {key: said[key] for key in ("input_ids", "attention_mask", "token_type_ids") if key in said}
        return Example(pieces, target, route, False, len(seen - {None}) < len(row.text))

    def _pair(self, row: Row, route: dict[str, str | None]) -> Example:
        said = self.tokenizer(row.text, truncation=True, max_length=self.max_length)
        told = (
            []
            if row.target is None
            else self.tokenizer(text_target=row.target, truncation=True, max_length=self.max_length)["input_ids"]
        )
        pieces = {key: said[key] for key in ("input_ids", "attention_mask")}
        return Example(pieces, told, route, False, len(pieces["input_ids"]) >= self.max_length)

    @property
    def _left(self) -> bool:
        return self.tokenizer.padding_side == "left"

    def pieces(self, examples: Sequence[Example]) -> Batch:
        """The tokenizer's tensors of a batch, padded."""
        fill = {"input_ids": self.tokenizer.pad_token_id or 0, "attention_mask": 0, "token_type_ids": 0}
        names = examples[0].pieces
        return {key: padded([e.pieces[key] for e in examples], fill[key], self._left) for key in names}

    def collate(self, examples: Sequence[Example], seed: int | None = None) -> Batch:
        """One padded batch: the tokenizer's tensors, `labels`, `measured` and a list a routing label.

        seed: of what is hidden from a masked language model, so that a batch is the same whenever it is made.
        """
        left = self._left
        batch = self.pieces(examples)
        if self.kind in ("classification", "regression"):
            measured = torch.tensor([e.measured for e in examples])
            batch["labels"] = torch.tensor([float(e.target) for e in examples])
            if measured.any():
                batch["measured"] = measured
        elif self.kind == "seq2seq":
            batch["labels"] = padded([e.target for e in examples], IGNORED, False)
            batch["decoder_input_ids"] = self.decoder_inputs(labels=batch["labels"])
        else:
            batch["labels"] = padded([e.target for e in examples], IGNORED, left)
        if self.kind == "masked":
            hide(batch, self.tokenizer, torch.Generator().manual_seed(0 if seed is None else seed))
        for label in examples[0].routes:
            batch[label] = [e.routes[label] for e in examples]
        return batch


def padded(several: Sequence[Sequence[int]], fill: int, left: bool) -> Tensor:
    """Lists as one tensor (b, longest)."""
    longest = max(len(one) for one in several)
    gaps = ([fill] * (longest - len(one)) for one in several)
    rows = [[*gap, *one] if left else [*one, *gap] for one, gap in zip(several, gaps, strict=True)]
    return torch.tensor(rows, dtype=torch.long)


def hide(batch: Batch, tokenizer: Any, generator: torch.Generator) -> None:
    """Hide pieces of a batch in place, and leave only them to be told."""
    ids = batch["input_ids"]
    special = torch.tensor(
        [tokenizer.get_special_tokens_mask(row, already_has_special_tokens=True) for row in ids.tolist()]
    )
    draw = torch.rand(ids.shape, generator=generator).masked_fill(special.bool(), 1.0)
    chosen, how = draw < MASKED, torch.rand(ids.shape, generator=generator)
    other = torch.randint(len(tokenizer), ids.shape, generator=generator)
    batch["labels"] = ids.masked_fill(~chosen, IGNORED)
    hidden = torch.where(how < 0.8, tokenizer.mask_token_id, torch.where(how < 0.9, other, ids))
    batch["input_ids"] = torch.where(chosen, hidden, ids)
