"""The labels of a call as numbers of tasks, for the routers that learn something for each."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import LabelError, listed
from ..types import Labels


def tasks(given: Labels | None, labels: Sequence[str], keyword: str, device: torch.device) -> Tensor:
    """The tasks as indices into `labels`, () or (b,), −1 for none; raises LabelError for a label that is no task."""
    if isinstance(given, Tensor):
        return _checked(given, labels, keyword).to(device)
    if given is None or isinstance(given, str):
        return torch.tensor(_number(given, labels, keyword), device=device)
    return torch.tensor([_number(label, labels, keyword) for label in given], dtype=torch.long, device=device)


def distinct(who: str, keyword: str, labels: Sequence[str]) -> list[str]:
    """The tasks as a list; raises LabelError unless they are different names."""
    if isinstance(labels, str) or len(set(labels)) != len(labels):
        raise LabelError(f"{who}({keyword!r}, labels={labels!r}): the tasks are a list of different names.")
    return list(labels)


def declared(who: str, keyword: str | None, labels: Sequence[str] | None) -> tuple[tuple[str, ...], list[str] | None]:
    """(the keywords, the tasks) of a router that may know tasks: none of either, or a keyword and its labels."""
    if keyword is None and labels is None:
        return (), None
    if keyword is None or labels is None:
        raise LabelError(f"{who}(label={keyword!r}, labels={labels!r}): a keyword, and a list of different tasks.")
    return (keyword,), distinct(who, keyword, labels)


def _number(label: str | None, labels: Sequence[str], keyword: str) -> int:
    if label is None:
        return -1
    if label not in labels:
        raise LabelError(
            f"{keyword}={label!r}: no such task. Known: {listed(labels)}; None runs the base alone. "
            f"extend({label!r}) adds a task."
        )
    return labels.index(label)


def _checked(given: Tensor, labels: Sequence[str], keyword: str) -> Tensor:
    if given.is_floating_point() or given.dtype == torch.bool or given.ndim > 1:
        raise LabelError(
            f"{keyword}={tuple(given.shape)} {given.dtype}: labels as a tensor are integers (b,), indices into "
            f"{listed(labels)}, −1 for the base alone."
        )
    if given.device.type == "cpu" and not torch.compiler.is_compiling() and given.numel():
        low, high = given.min().item(), given.max().item()
        if low < -1 or high >= len(labels):
            raise LabelError(f"{keyword} has indices from {low} to {high}; there are {len(labels)} tasks.")
    return given
