"""The training loop, the same for every way to learn: AdamW, 5 % warm-up, then linearly to nothing."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ._encode import Batch, Row, in_order

WARM_UP = 0.05

Call = Callable[[nn.Module, Batch], Tensor]
"""How a model reads a batch: whether it is told the language is all in which the ways differ here."""


def plain(model: nn.Module, batch: Batch) -> Tensor:
    """Logits of a model that has nothing to route."""
    return model(batch.input_ids, batch.attention_mask)


def by_language(model: nn.Module, batch: Batch) -> Tensor:
    """Logits of a model whose modules are routed by language."""
    return model(batch.input_ids, batch.attention_mask, language=batch.language)


def fit(
    model: nn.Module,
    batches: Iterable[Batch],
    groups: Sequence[dict[str, Any]],
    steps: int,
    *,
    call: Call = plain,
) -> nn.Module:
    """Train what `groups` names on `steps` batches; everything else stays as it is. Returns the model.

    **Arguments:** `groups`: parameter groups as torch's optimisers take them, `[{"params": …, "lr": …}, …]`.
    """
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    warm = max(1, round(WARM_UP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )
    for batch in batches:
        loss = cross_entropy(call(model, batch), batch.intent)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model


@torch.no_grad()
def logits(model: nn.Module, chosen: Sequence[Row], *, call: Call = plain) -> Tensor:
    """Logits of every row, in the order of `chosen`; the batches are the same each time, so bits can be compared."""
    said: list[Tensor] = []
    places: list[int] = []
    for now, batch in in_order(chosen):
        said.append(call(model, batch))
        places += now
    return torch.cat(said)[torch.tensor(places).argsort()]


def predict(model: nn.Module, chosen: Sequence[Row], intents: Sequence[str], *, call: Call = plain) -> list[str]:
    """The likeliest intent of every row."""
    return [intents[i] for i in logits(model, chosen, call=call).argmax(dim=-1).tolist()]
