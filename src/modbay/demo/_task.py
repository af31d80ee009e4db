"""What every way starts from: the data as rows, and the frozen base under a linear probe's head."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ._data import Data, Utterance
from ._encode import Assistant, Row, encoder, rows, sample, tokenizer
from ._score import Scores, score
from ._train import by_language, logits, probe


@dataclass(frozen=True)
class Task:
    """The data, the base, and the twelve's rows. The base's head is the probe's; everything else is MiniLM's."""

    data: Data
    pieces: PreTrainedTokenizerBase
    base: Assistant
    train: list[Row]
    test: list[Row]
    truth: list[Utterance]

    @property
    def languages(self) -> list[str]:
        """The languages that learn together."""
        return list(self.data.languages)

    @property
    def smallest(self) -> list[str]:
        """The four of them that have least to learn from."""
        sizes = {language: len(split.train) for language, split in self.data.languages.items()}
        return sorted(sizes, key=lambda language: sizes[language])[:4]

    def rows(self, utterances: Sequence[Utterance]) -> list[Row]:
        """Utterances as the model reads them."""
        return rows(utterances, self.data.intents, self.pieces)

    def intents(self, said: Tensor) -> list[str]:
        """The likeliest intent of each row of logits."""
        return [self.data.intents[i] for i in said.argmax(dim=-1).tolist()]

    def score(self, said: Tensor) -> Scores:
        """How right logits on the twelve's test rows are."""
        return score(self.intents(said), self.truth)

    def accuracy(self, model: Assistant, utterances: Sequence[Utterance]) -> float:
        """Mean accuracy of a model, routed by language, over the languages of `utterances`."""
        return score(self.intents(logits(model, self.rows(utterances), call=by_language)), utterances).mean()


def prepare(data: Data, probe_steps: int, seed: int, *, looks: int = 16, part: str = "test") -> Task:
    """The base of all ways: MiniLM's first layers, standardised on training utterances, with a probe's head.

    **Arguments:** `looks`: batches by which features are standardised; `part`: what the twelve are scored on, "dev"
    while settings are chosen, "test" to report.
    """
    torch.manual_seed(seed)
    pieces, base = tokenizer(), Assistant(encoder(), len(data.intents)).eval()
    train, truth = rows(data.joint("train"), data.intents, pieces), data.joint(part)
    base.standardise(list(sample(train, looks, seed=seed)))
    probe(base, train, probe_steps, seed=seed)
    return Task(data, pieces, base, train, rows(truth, data.intents, pieces), truth)
