"""Where rows lie in the space of the base: what a library compares to find modules that learned from alike examples.

Masked mean pooling: Reimers and Gurevych, "Sentence-BERT", 2019 (arXiv 1908.10084).
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from ..attach import bays
from ..data import Row
from ._base import TextModel, pooled
from ._build import Network
from ._predict import batches, moved

MOST = 64  # rows of a mean
FEWEST = 8  # of fewer rows, a mean would tell too much of each


def embedding(network: Network, rows: Sequence[Row]) -> list[float]:
    """e = (1/n) Σ_i (1/t_i) Σ_t h_it (width), h_it the last hidden states of row i by the base without its modules.

        lib.search(near=training.embedding(run.network(), rows))      # who learned from rows like these?

    All rows count. Of an encoder–decoder, h is of the encoder. Comparable between runs on one base alone.
    """
    return _written(_embedded(network, rows).mean(0))


def embeddings(
    network: Network, rows: Sequence[Row], places: Mapping[Any, Sequence[int]], seed: int
) -> dict[Any, list[float]]:
    """The same of several subsets of the rows, by name, each of at most 64 rows. These are drawn alike for all, so that
    a row of several subsets is embedded once. A subset of fewer than 8 has no embedding, nor has one that overflows."""
    rank = Random(f"embedding-{seed}").sample(range(len(rows)), len(rows))
    chosen = {key: sorted(mine, key=rank.__getitem__)[:MOST] for key, mine in places.items() if len(mine) >= FEWEST}
    every = sorted({place for mine in chosen.values() for place in mine})
    if not every:
        return {}
    vectors, at = _embedded(network, [rows[place] for place in every]), {place: i for i, place in enumerate(every)}
    means = {key: vectors[[at[place] for place in mine]].mean(0) for key, mine in chosen.items()}
    return {key: _written(mean) for key, mean in means.items() if mean.isfinite().all()}


@torch.no_grad()
def _embedded(network: Network, rows: Sequence[Row]) -> Tensor:
    """(n, width) of n rows."""
    model, encoder = network.model, network.encoder
    examples = encoder.encode(rows, [{} for _ in rows])
    training, out = model.training, [torch.empty(0)] * len(rows)
    with ExitStack() as stack:
        for bay in bays(model).values():
            stack.enter_context(bay.disable())
        model.eval()
        for places in batches(examples, 64):
            given = moved(encoder.pieces([examples[i] for i in places]), network.device)
            hidden = _trunk(model)(**given).last_hidden_state.float()
            for i, one in zip(places, pooled(hidden, given["attention_mask"], "mean").cpu(), strict=True):
                out[i] = one
    model.train(training)
    return torch.stack(out)


def _trunk(model: Any) -> nn.Module:
    """What makes hidden states of a text: a model without its head."""
    if isinstance(model, TextModel):
        return model.trunk
    return model.get_encoder() if model.config.is_encoder_decoder else model.base_model


def _written(vector: Tensor) -> list[float]:
    """In few digits: a record is read by people, too."""
    return [float(f"{value:.5g}") for value in vector.tolist()]
