"""The training loop, the same for every way to learn: AdamW, 5 % warm-up, then linearly to nothing."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ._encode import Assistant, Batch, Row, in_order, root_weights

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
    """Train what `groups` names on `steps` batches; everything else stays as it is. Returns the model, in eval mode.

    **Arguments:** `groups`: parameter groups as torch's optimisers take them, `[{"params": …, "lr": …}, …]`.
    """
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    warm = max(1, round(WARM_UP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )
    model.train()
    for batch in batches:
        loss = cross_entropy(call(model, batch), batch.intent)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, chosen: Sequence[Row], *, call: Call = plain) -> Tensor:
    """Logits of every row, in the order of `chosen`; the batches are the same each time, so bits can be compared."""
    places, said = zip(*((now, call(model, batch)) for now, batch in in_order(chosen)), strict=True)
    return torch.cat(said)[torch.tensor([place for now in places for place in now]).argsort()]


def predict(model: nn.Module, chosen: Sequence[Row], intents: Sequence[str], *, call: Call = plain) -> list[str]:
    """The likeliest intent of every row."""
    return [intents[int(i)] for i in logits(model, chosen, call=call).argmax(dim=-1).tolist()]


def probe(model: Assistant, chosen: Sequence[Row], steps: int, *, lr: float = 2e-3, seed: int = 0) -> Assistant:
    """Train the head alone, by the same loop, on features that the frozen encoder computes once: seconds, not minutes.

    It is a baseline, and where every other way may start from.
    """
    seen = logits(model, chosen, call=lambda _, batch: model.features(batch.input_ids, batch.attention_mask))
    intent = torch.tensor([row.intent for row in chosen])
    generator = torch.Generator().manual_seed(seed)
    draws = torch.multinomial(torch.tensor(root_weights(chosen)), 32 * steps, True, generator=generator).split(32)
    batches = (Batch(draw, torch.ones_like(draw), [], intent[draw]) for draw in draws)  # a place stands for a sentence
    groups = [{"params": list(model.head.parameters()), "lr": lr}]
    fit(model.head, batches, groups, steps, call=lambda head, batch: head(seen[batch.input_ids]))
    return model
