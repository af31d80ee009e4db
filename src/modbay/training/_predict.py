"""What a network says of rows, and how right it is."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..data import Row
from ..metrics import Record
from ._build import Network
from ._encode import Batch, Example
from ._loss import logits_of, row_losses
from ._progress import Progress, Silent

TEXT = ("causal", "masked", "seq2seq")  # kinds that tell a text, piece by piece


def batches(examples: Sequence[Example], size: int) -> list[list[int]]:
    """Places of the examples, shortest first, so that little is padding: always the same batches for the same rows."""
    places = sorted(range(len(examples)), key=lambda i: len(examples[i]))
    return [places[start : start + size] for start in range(0, len(places), size)]


def moved(batch: Batch, device: torch.device) -> Batch:
    """Its tensors on a device."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


@torch.no_grad()
def predict(
    network: Network, rows: Sequence[Row], *, size: int = 64, progress: Progress | None = None, what: str = "Predict",
    routes: Sequence[dict[str, str | None]] | None = None, before: Callable[[list[Row]], object] | None = None,
) -> list[Record]:  # fmt: skip
    """One record a row, in order; rows of all tasks and labels share their batches.

    routes: the labels of each row's call, if not those that the network's routes give. before: is told each batch.
    """
    found = [network.routes.of(row, network.keywords) for row in rows] if routes is None else routes
    examples = network.encoder.encode(rows, found)
    records: list[Record | None] = [None] * len(rows)
    training = network.model.training
    network.model.eval()
    done = 0
    with (progress or Silent()).stage(what, len(rows)) as bar:
        for places in batches(examples, size):
            batch = moved(network.encoder.collate([examples[i] for i in places], places[0]), network.device)
            labels, measured = batch.pop("labels"), batch.pop("measured", None)
            if before is not None:
                before([rows[i] for i in places])
            logits = logits_of(network.model(**batch))
            sums, counts = row_losses(logits, labels, measured, network.encoder.kind)
            told = _told(network, logits, [rows[i] for i in places], labels)
            for i, said, total, count in zip(places, told, sums.tolist(), counts.tolist(), strict=True):
                records[i] = _record(network, rows[i], said, total, count)
            done += len(places)
            bar.step(done)
    network.model.train(training)
    return records  # type: ignore[return-value]


def _told(network: Network, logits: Tensor, rows: Sequence[Row], labels: Tensor) -> list[tuple[Any, float | None]]:
    """(prediction, confidence) of each row: a class, a number or a list of tags; nothing of a language model."""
    encoder = network.encoder
    if encoder.kind in TEXT:
        return [(None, None)] * len(rows)
    logits = logits.float()
    best, sure = logits.argmax(-1).tolist(), logits.softmax(-1).amax(-1).tolist()
    if encoder.kind == "tagging":
        return [_tags(network, row, best[i], sure[i]) for i, row in enumerate(rows)]
    numbers = logits[:, 0].tolist()
    return [
        (numbers[i], None) if row.task in encoder.measured else (encoder.classes[row.task][best[i]], sure[i])
        for i, row in enumerate(rows)
    ]


def _tags(network: Network, row: Row, best: list[int], sure: list[float]) -> tuple[list[str], float]:
    """A tag for each word, from its first piece; words beyond the longest input get the first class that means none."""
    encoder, names = network.encoder, network.encoder.classes[row.task]
    words = encoder.tokenizer(
        list(row.text), is_split_into_words=True, truncation=True, max_length=encoder.max_length
    ).word_ids()
    first = {word: place for place, word in reversed(list(enumerate(words))) if word is not None}
    none = "O" if "O" in names else names[0]
    tags = [names[best[first[i]]] if i in first else none for i in range(len(row.text))]
    return tags, min((sure[place] for place in first.values()), default=0.0)


def _record(network: Network, row: Row, said: tuple[Any, float | None], total: float, count: int) -> Record:
    target: Any = list(row.target) if isinstance(row.target, tuple) else row.target
    prediction, confidence = said
    told = count or network.encoder.kind in TEXT  # of a text, what is told may be nothing: none of its pieces is hidden
    return Record(row.where, row.task, dict(row.labels), target, prediction, confidence, total if told else None, count)


@torch.no_grad()
def all_logits(network: Network, rows: Sequence[Row], *, size: int = 64) -> list[Tensor]:
    """The logits of each row, whatever their shape, in batches that depend on the rows alone: bits can be compared."""
    examples = network.encoder.encode(rows, [network.routes.of(row, network.keywords) for row in rows])
    out: list[Tensor] = [torch.empty(0)] * len(rows)
    network.model.eval()
    for places in batches(examples, size):
        batch = moved(network.encoder.collate([examples[i] for i in places], places[0]), network.device)
        for key in ("labels", "measured"):
            batch.pop(key, None)
        for i, said in zip(places, logits_of(network.model(**batch)).cpu(), strict=True):
            out[i] = said
    return out


def changed(before: Sequence[Tensor], after: Sequence[Tensor]) -> int:
    """How many rows differ in any bit; heads of more classes elsewhere only add columns of −inf."""
    return sum(not _same(one, other) for one, other in zip(before, after, strict=True))


def _same(one: Tensor, other: Tensor) -> bool:
    width = max(one.shape[-1], other.shape[-1])
    fill = lambda x: torch.nn.functional.pad(x, (0, width - x.shape[-1]), value=float("-inf"))
    one, other = fill(one), fill(other)
    return one.shape == other.shape and torch.equal(one.view(torch.uint8), other.view(torch.uint8))
