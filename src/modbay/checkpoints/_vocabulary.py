"""Whether models mean the same token by the same number."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import FileError
from ..library._files import read_json, sha256
from ._read import Checkpoint

FAST = "tokenizer.json"
SLOW = ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
        "source.spm", "target.spm", "tekken.json")  # fmt: skip


def check(everyone: Sequence[Checkpoint], donor: Checkpoint, allowed: bool) -> list[str]:
    """Notes; raises FileError where two models' tokenizers differ, unless that is allowed."""
    notes = []
    for one in everyone:
        why = None if one is donor else difference(one.folder, donor.folder)
        if why is not None and not allowed:
            raise FileError(
                f"{why}: rows of the embeddings would be added up that stand for different tokens. If they are meant "
                f"to, any_tokenizer=true (--any-tokenizer) merges row by row, with the tokenizer of {donor.name}."
            )
        notes += [f"{why}; rows are merged by number"] if why is not None else []
        if has(one.folder) and has(donor.folder) and not comparable(one.folder, donor.folder):
            notes.append(
                f"the tokenizers of {one.name} and {donor.name} are files of other kinds: they are not compared"
            )
        if one is not donor and has(donor.folder) and not has(one.folder):
            notes.append(f"{one.name} has no tokenizer: its tokens are taken to be those of {donor.name}")
    return notes


def has(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (FAST, *SLOW))


def comparable(one: Path, other: Path) -> bool:
    return any((one / name).is_file() and (other / name).is_file() for name in (FAST, *SLOW))


def difference(one: Path, other: Path) -> str | None:
    """Which file differs, and how; None if none does, or there is nothing to compare."""
    a, b = one / FAST, other / FAST
    if a.is_file() and b.is_file():
        if sha256(a) == sha256(b):
            return None
        mine, its = tokens(a), tokens(b)
        for (token, number), who in ((item, i) for i, items in enumerate((mine, its)) for item in items.items()):
            there = (its, mine)[who].get(token)
            if there != number:
                numbers = (number, there) if who == 0 else (there, number)
                return f"{a} and {b} differ: {token!r} is token {numbers[0]} and {numbers[1]}"
        keys = [
            key for key in ("model", "pre_tokenizer", "normalizer") if read_json(a).get(key) != read_json(b).get(key)
        ]
        return f"{a} and {b} differ in {', '.join(keys)}" if keys else None
    for name in SLOW:
        a, b = one / name, other / name
        if a.is_file() and b.is_file() and sha256(a) != sha256(b):
            return f"{a} and {b} differ"
    return None


def tokens(path: Path) -> dict[str, int]:
    """The number of each token of a tokenizer.json."""
    said: dict[str, Any] = read_json(path)
    vocabulary = (said.get("model") or {}).get("vocab") or {}
    if isinstance(vocabulary, list):  # unigram: [token, score]
        vocabulary = {one[0]: i for i, one in enumerate(vocabulary)}
    return {**vocabulary, **{one["content"]: one["id"] for one in said.get("added_tokens") or []}}
