"""Sums of routes by level, value of a label, and module, kept on the device until somebody reads them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

EXTRA = 2  # rows beside the modules': (entropy, examples) and (routes, –)
NOBODY = 0  # the place of examples without a value


class Book:
    """The sums of the levels that choose among the same modules: {label: (levels, 1 + values, n + EXTRA, 2)} a window.

    Of a module, the last axis is (weight, share). Levels, values and modules that turn up later get a place of theirs.
    """

    def __init__(self, modules: Sequence[str]):
        self.modules = list(modules)
        self.levels: dict[str, int] = {}
        self.values: dict[str, dict[str, int]] = {}
        self.windows: dict[int, dict[str, Tensor]] = {}
        self.placed: dict[tuple, Tensor] = {}  # places of levels, on a device

    def columns(self, names: Sequence[str]) -> list[int] | None:
        """Where the modules of a bay that has changed have their columns; None if it has not."""
        if self.modules == names:
            return None
        self.modules += [name for name in names if name not in self.modules]
        return [self.modules.index(name) for name in names]

    def place(self, label: str, value: str | None) -> int:
        """The place of a value."""
        if value is None:
            return NOBODY
        values = self.values.setdefault(label, {})
        return values.setdefault(value, 1 + len(values))

    def where(self, levels: Sequence[str], device: torch.device) -> Tensor:
        """The places of levels (s,)."""
        key = (tuple(levels), device)
        if key not in self.placed:
            ids = [self.levels.setdefault(level, len(self.levels)) for level in levels]
            self.placed[key] = torch.tensor(ids).to(device, non_blocking=True)
        return self.placed[key]

    def add(self, window: int, label: str, levels: Sequence[str], rows: Tensor, places: Tensor) -> None:
        """Add rows (s, b, n + EXTRA, 2) of levels (s,) and values at `places` (b,)."""
        self.where(levels, rows.device)  # a new level has its place before the sums are sized
        sums = self._sums(window, label, rows)
        rows, places = rows.to(sums.device, non_blocking=True), places.to(sums.device, non_blocking=True)
        at = (self.where(levels, sums.device)[:, None] * sums.shape[1] + places).flatten()
        sums.flatten(0, 1).index_add_(0, at, rows.flatten(0, 1))

    def _sums(self, window: int, label: str, like: Tensor) -> Tensor:
        """The window's sums, with a place for all that is known."""
        size = self._size(label)
        by_label = self.windows.setdefault(window, {})
        old = by_label.get(label)
        if old is None:
            by_label[label] = like.new_zeros(size)
        elif old.shape != size:
            by_label[label] = grown(old, size)
        return by_label[label]

    def merge(self) -> None:
        """Two windows become one."""
        merged: dict[int, dict[str, Tensor]] = {}
        for number, by_label in self.windows.items():
            mine = merged.setdefault(number // 2, {})
            for label, sums in by_label.items():
                size = self._size(label)
                mine[label] = grown(sums, size) + grown(mine[label], size) if label in mine else sums
        self.windows = merged

    def _size(self, label: str) -> tuple[int, ...]:
        return (len(self.levels), 1 + len(self.values.get(label, ())), len(self.modules) + EXTRA, 2)

    def read(self, label: str, window: int | None = None) -> np.ndarray:
        """The sums of a window, or of all, on the host."""
        found = [w[label] for k, w in self.windows.items() if label in w and window in (None, k)]
        total = torch.zeros(self._size(label), dtype=torch.float64)
        for sums in found:
            total += grown(sums, self._size(label)).double().cpu()
        return total.numpy()


def grown(sums: Tensor, size: tuple[int, ...]) -> Tensor:
    """Sums with room for more levels, values and modules."""
    if sums.shape == size:
        return sums
    new = sums.new_zeros(size)
    levels, values, n = sums.shape[0], sums.shape[1], sums.shape[2] - EXTRA
    new[:levels, :values, :n] = sums[:, :, :n]
    new[:levels, :values, size[2] - EXTRA :] = sums[:, :, n:]
    return new
