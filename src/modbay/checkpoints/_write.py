"""Safetensors written as they come: sizes are known before values, so the header goes first, and memory is small."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..errors import FileError
from ._read import DTYPES, INDEX

NAMES = {dtype: name for name, dtype in DTYPES.items()}
WRITING = ".writing"


@dataclass(frozen=True)
class Place:
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """A file that will be written."""

    file: str
    places: tuple[Place, ...]

    @cached_property
    def head(self) -> bytes:
        """What stands before the values."""
        record: dict = {"__metadata__": {"format": "pt"}}
        at = 0
        for place in self.places:
            ends = [at, at + place.size]
            record[place.name] = {"dtype": NAMES[place.dtype], "shape": list(place.shape), "data_offsets": ends}
            at += place.size
        text = json.dumps(record, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # values begin at a multiple of 8
        return len(text).to_bytes(8, "little") + text

    @cached_property
    def size(self) -> int:
        return len(self.head) + sum(place.size for place in self.places)


def shards(places: Sequence[Place], most: int) -> list[Shard]:
    """Files of at most `most` bytes, but for a tensor larger than that; wide numbers first, so that all are aligned."""
    groups: list[list[Place]] = [[]]
    filled = 0
    for place in places:
        if groups[-1] and filled + place.size > most:
            groups.append([])
            filled = 0
        groups[-1].append(place)
        filled += place.size
    n = len(groups)
    names = ["model.safetensors"] if n == 1 else [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    order = lambda group: tuple(sorted(group, key=lambda place: -place.dtype.itemsize))  # sorted keeps the rest
    return [Shard(name, order(group)) for name, group in zip(names, groups, strict=True)]


def write_index(folder: Path, made: Sequence[Shard]) -> None:
    """What says which tensors are in which shard; nothing for one file."""
    if len(made) > 1:
        total = sum(place.size for shard in made for place in shard.places)
        where = {place.name: shard.file for shard in made for place in shard.places}
        record = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / INDEX).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


class Writer:
    """Values of one shard, in the order of its places; the file takes its name when all of them are on disk."""

    def __init__(self, folder: Path, shard: Shard) -> None:
        self.path, self.shard = folder / shard.file, shard
        self.aside = folder / (shard.file + WRITING)
        self.file = open(self.aside, "wb", buffering=0)  # noqa: SIM115 (it is closed on leaving)
        self._all(memoryview(shard.head))

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None:
                if self.file.tell() != self.shard.size:
                    raise FileError(f"{self.path}: {self.file.tell():,} bytes were written of {self.shard.size:,}.")
                os.fsync(self.file.fileno())
        finally:
            self.file.close()
        if kind is None:
            os.replace(self.aside, self.path)

    def write(self, values: Tensor) -> None:
        """The next values, of any shape."""
        if values.numel():
            self._all(values.contiguous().view(-1).view(torch.uint8).numpy().data)

    def _all(self, octets: memoryview) -> None:
        while octets:  # one call writes 2 GiB at most
            octets = octets[self.file.write(octets) :]
