"""Checkpoints as they lie on disk: headers are read at once, tensors later and one at a time, from memory maps.

A folder has model.safetensors, or shards with model.safetensors.index.json, as `save_pretrained` writes them.
"""

import json
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FileError, listed
from ..library._files import PICKLES, read_json, refuse_pickle
from ._hub import fetch, repository

INDEX = "model.safetensors.index.json"
HEADER = 100_000_000  # bytes; safetensors itself reads no longer one
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """Where a tensor is."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # of its bytes in the file
    size: int


@dataclass
class Checkpoint:
    """A folder that was opened: its tensors by name, and its config. name: as the user gave it; repository, commit: of
    the hub, if it is from there."""

    name: str
    folder: Path
    files: list[Path]
    entries: dict[str, Entry]
    config: dict[str, Any]
    repository: str | None = None
    commit: str | None = None
    _maps: dict[Path, mmap.mmap] = field(default_factory=dict)

    def tensor(self, name: str) -> Tensor:
        """A tensor whose values stay on disk until they are touched. It must not be written to."""
        entry = self.entries[name]
        if entry.size == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        where, start = self._map(entry.file), entry.start
        if start % entry.dtype.itemsize:  # no writer of today leaves a tensor so
            where, start = bytearray(where[start : start + entry.size]), 0
        flat = torch.frombuffer(where, dtype=entry.dtype, count=math.prod(entry.shape), offset=start)
        return flat.view(entry.shape)

    def release(self, name: str) -> None:
        """Let go of the pages that a tensor was read from: they count as this process's memory until then."""
        entry = self.entries[name]
        if entry.file in self._maps and hasattr(mmap, "MADV_DONTNEED"):
            start = entry.start // mmap.PAGESIZE * mmap.PAGESIZE
            self._maps[entry.file].madvise(mmap.MADV_DONTNEED, start, entry.start + entry.size - start)

    def _map(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            with open(path, "rb") as file:  # a private map: torch warns of memory that can't be written
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[path]


def open_checkpoint(name: str) -> Checkpoint:
    """Read the headers of a folder, or of a model of the hub (`org/name`, `org/name@revision`), fetched to its cache.

    Raises FileError for a pickle, a damaged or missing file, or what isn't there.
    """
    folder, remote, commit = Path(name), None, None
    if not folder.is_dir():
        remote = None if folder.exists() else repository(name)
        if remote is None:
            raise FileError(_nothing(name))
        folder, commit = fetch(remote)
    index = folder / INDEX
    entries = _sharded(index) if index.is_file() else header(_single(folder))
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    files = sorted({entry.file for entry in entries.values()})
    return Checkpoint(name, folder, files, entries, config, remote.name if remote is not None else None, commit)


def _nothing(name: str) -> str:
    """Why there is no such checkpoint."""
    model, plus, adapter = name.partition("+")
    if plus and not Path(name).exists():
        return (
            f"{name!r}: a model with an adapter on it is no checkpoint yet. Make it one, and give that: `modbay fold "
            f"{model} {adapter} --out FOLDER`; in Python, bay.fold(NAME) of each bay of mb.load(model, "
            f"{adapter!r}), then model.save_pretrained(FOLDER)."
        )
    at = "is a file" if Path(name).exists() else "does not exist"
    return (
        f"{name!r} {at}: a folder with config.json and safetensors is wanted, or ORG/NAME or ORG/NAME@REVISION of the "
        f"hub (hf://ORG/NAME where a folder ORG is in the way)."
    )


def _single(folder: Path) -> Path:
    """The one file of an unsharded checkpoint."""
    there = sorted(path for path in folder.glob("*.safetensors"))
    whole = folder / "model.safetensors"
    if whole in there or (len(there) == 1 and there[0].name != "adapter_model.safetensors"):
        return whole if whole in there else there[0]
    if there and there[0].name == "adapter_model.safetensors":
        raise FileError(
            f"{folder} holds an adapter, not a checkpoint: fold it into its base: `modbay fold MODEL "
            f"{folder} --out FOLDER`."
        )
    if there:
        names = listed([path.name for path in there])
        raise FileError(f"{folder} has {names}, but no {INDEX} that says which tensors are where: copy it, too.")
    pickles = [path.name for path in folder.iterdir() if path.suffix in PICKLES]
    if pickles:
        raise FileError(
            f"{folder}/{pickles[0]} is a pickle, which runs whatever code it holds when it is loaded: modbay reads "
            f"safetensors only. If you trust it, load the model and write it by "
            f"save_pretrained(FOLDER, safe_serialization=True)."
        )
    raise FileError(f"{folder} has no safetensors: it is no checkpoint.")


def _sharded(index: Path) -> dict[str, Entry]:
    """The tensors of all shards; the index and the headers must agree."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, Mapping) or not where:
        raise FileError(f"{index} has no weight_map: damaged, or edited by hand. Copy it again.")
    odd = [file for file in where.values() if not isinstance(file, str) or Path(file).name != file]
    if odd:
        raise FileError(f"{index} names {odd[0]!r}, which is no plain file name: shards lie beside their index.")
    found: dict[str, Entry] = {}
    for file in sorted(set(where.values())):
        there = header(index.parent / file)
        said = {name for name, its in where.items() if its == file}
        wrong = sorted(said ^ there.keys())
        if wrong:
            raise FileError(
                f"{index} and {file} do not agree on {listed(wrong)}: they are of different saves. Copy the whole "
                f"folder again."
            )
        found |= there
    return found


def header(path: Path) -> dict[str, Entry]:
    """The tensors that a safetensors file says it has, in the order of their bytes; raises FileError if it can't be."""
    if not path.is_file():
        raise FileError(f"{path} is missing: the index names it. Copy the whole folder again.")
    refuse_pickle(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        said = file.read(length) if length <= min(HEADER, size) else b""
    try:
        record = json.loads(said)
        items = {key: value for key, value in record.items() if key != "__metadata__"}
        entries = {key: _entry(path, 8 + length, value) for key, value in items.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        why = str(error) if isinstance(error, UnknownType) else "its header can't be read"
        raise FileError(f"{path} is not a sound safetensors file ({size:,} bytes, {why}). Copy it again.") from None
    entries = dict(sorted(entries.items(), key=lambda item: item[1].start))
    at = 8 + length
    for name, entry in entries.items():
        if entry.start != at or entry.size != math.prod(entry.shape) * entry.dtype.itemsize:
            raise FileError(f"{path}: {name!r} has {entry.size:,} bytes at {entry.start:,}, which can't be: damaged.")
        at += entry.size
    if at != size:
        what = "truncated" if size < at else "longer than its header says"
        raise FileError(f"{path} is {what}: {size:,} bytes of {at:,}. Copy it again.")
    return entries


class UnknownType(ValueError):
    """A number format that can't be averaged as it is."""


def _entry(path: Path, data: int, said: Any) -> Entry:
    if said["dtype"] not in DTYPES:
        raise UnknownType(f"numbers of type {said['dtype']}: quantised, perhaps; merge the checkpoint it was made from")
    shape = tuple(said["shape"])
    start, end = said["data_offsets"]
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, start, end)):
        raise ValueError("negative sizes")
    return Entry(path, DTYPES[said["dtype"]], shape, data + start, end - start)
