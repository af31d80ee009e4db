"""What a run minimises: the mean over a step's rows, or over its pieces for language models, and auxiliary losses."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._encode import IGNORED


def row_losses(logits: Tensor, labels: Tensor, measured: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    """(Σ of the losses of each row, how many targets it has), both (b,); nothing is averaged yet.

    logits (b, classes) or (b, t, classes); labels (b,) or (b, t), IGNORED where nothing is to be told. Rows that are
    measured are met by their first logit, at half the squared distance, as a unit normal would have it.
    """
    if kind in ("classification", "regression"):
        known = labels != IGNORED
        each = F.cross_entropy(
            logits.float(),
            labels.clamp(0).masked_fill(measured, 0).long() if measured is not None else labels.clamp(0).long(),
            reduction="none",
        )
        if measured is not None:
            each = torch.where(measured, 0.5 * (logits[:, 0].float() - labels) ** 2, each)
            known = known | measured
        return each.masked_fill(~known, 0.0), known.int()
    if kind == "causal":
        logits, labels = logits[:, :-1], labels[:, 1:]
    each = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return each.view(labels.shape).sum(1), (labels != IGNORED).sum(1)


def logits_of(out: Any) -> Tensor:
    """The logits of a network's output."""
    return out if isinstance(out, Tensor) else out["logits"] if isinstance(out, dict) else out[0]
