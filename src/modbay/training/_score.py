"""One number by which a run keeps its best modules: the mean over tasks and label values, so that small ones count."""

from collections.abc import Mapping, Sequence
from math import sqrt
from statistics import fmean
from typing import Any

from ..metrics import Record


def score(records: Sequence[Record], kinds: Mapping[str, str], by: Sequence[str]) -> dict[str, float]:
    """{"score": larger is better, "loss": mean loss a target}, of records whose targets are known.

    Of each group (a task, and a value of the first label): accuracy of classes or tags, 1 − rmse / deviation of what is
    measured, minus the mean loss of language models; then the mean over groups.
    """
    groups: dict[tuple[str, str], list[Record]] = {}
    label = by[0] if by else None
    for record in records:
        groups.setdefault((record.task, record.labels.get(label, "") if label else ""), []).append(record)
    each = [_one(several, kinds[task]) for (task, _), several in groups.items()]
    told = sum(record.tokens for record in records)
    loss = sum(record.nll or 0.0 for record in records) / max(1, told)
    return {"score": fmean(each) if each else float("nan"), "loss": loss}


def _one(records: Sequence[Any], kind: str) -> float:
    if kind == "classification":
        return fmean(record.prediction == record.target for record in records)
    if kind == "tagging":
        pairs = [pair for record in records for pair in zip(record.prediction, record.target, strict=True)]
        return fmean(said == true for said, true in pairs)
    if kind == "regression":
        true = [float(record.target) for record in records]
        spread = sqrt(fmean((t - fmean(true)) ** 2 for t in true)) or 1.0
        return 1 - sqrt(fmean((float(r.prediction) - t) ** 2 for r, t in zip(records, true, strict=True))) / spread
    return -sum(record.nll or 0.0 for record in records) / max(1, sum(record.tokens for record in records))
