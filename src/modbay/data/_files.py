"""Which files a source means, which splits they are, and their text as UTF-8."""

import difflib
import glob
import gzip
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..errors import DataError, listed

TEXT = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json"}
READABLE = (*TEXT, *(f"{suffix}.gz" for suffix in TEXT), ".parquet")
HUB = re.compile(r"(?:hf:)?(?P<id>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?")
SPLIT = re.compile(r"(?P<split>train(?:ing)?|validation|valid|val|dev|test)(?:[-_. ].*)?", re.IGNORECASE)
SPLITS = ("train", "validation", "test")
CALLED = {"training": "train", "valid": "validation", "val": "validation", "dev": "validation"}

Source = str | Path | Sequence["str | Path"]


@dataclass(frozen=True, slots=True)
class File:
    """One file: where it is, how it is written, the split that its name says."""

    path: Path
    form: str  # csv, tsv, jsonl, json, parquet
    split: str | None = None


@dataclass(frozen=True, slots=True)
class Hub:
    """A dataset of the hub, read through `datasets`."""

    name: str
    config: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        return (
            f"hf:{self.name}"
            + (f":{self.config}" if self.config else "")
            + (f"@{self.revision}" if self.revision else "")
        )


def resolve(source: Source, revision: str | None = None) -> Hub | list[File]:
    """What a source means: a dataset of the hub, or files in order; raises DataError if there is no such thing."""
    if not isinstance(source, str | Path):
        several = [file for one in source for file in _files(one)]
        if not several:
            raise DataError("an empty list of files: there is nothing to read.")
        return _as_splits(several, demanding=False)
    hub = _hub(str(source))
    if hub is not None:
        return Hub(hub.name, hub.config, revision or hub.revision)
    if revision is not None:
        raise DataError(f"revision={revision!r}: only a dataset of the hub has revisions, and {source} is a file.")
    path = Path(source)
    if path.is_dir():
        return _as_splits(_files(source), demanding=True)
    files = _files(source)
    return _as_splits(files, demanding=False) if len(files) > 1 else files


def form_of(path: Path) -> str | None:
    """How a file is written, by its suffix; None if it is no data."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".parquet":
        return "parquet"
    last = suffixes[-2:-1] if suffixes[-1:] == [".gz"] else suffixes[-1:]
    return TEXT.get(last[0]) if last else None


def _hub(source: str) -> Hub | None:
    if Path(source).exists():
        return None
    match = HUB.fullmatch(source)
    if source.startswith("hf:"):
        single = re.fullmatch(r"hf:([\w.-]+)", source)  # the hub has a few old names without an owner
        if match is None and single is None:
            raise DataError(f"{source}: a dataset of the hub is hf:owner/name, hf:owner/name:config, or …@revision.")
        return Hub(*match.group("id", "config", "revision")) if match else Hub(source.removeprefix("hf:"))
    if (
        match is None
        or form_of(Path(source)) is not None
        or Path(source).parts[0] in (".", "..")
        or Path(source).parent.is_dir()
    ):
        return None
    return Hub(*match.group("id", "config", "revision"))


def _files(source: str | Path) -> list[File]:
    path = Path(source)
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path)))
        found = [File(p, form, _split_of(p.relative_to(path))) for p in inside if (form := form_of(p)) is not None]
        if not found:
            there = listed([p.name for p in inside]) or "nothing"
            raise DataError(
                f"{path}: a folder without data. It holds {there}; what can be read: {', '.join(READABLE)}."
            )
        return found
    if path.is_file():
        form = form_of(path)
        if form is None:
            raise DataError(f"{path}: can't tell how it is written from its name. Call it {', '.join(READABLE)}.")
        return [File(path, form, _split_of(Path(path.name)))]
    if any(c in str(source) for c in "*?["):
        matched = sorted(Path(p) for p in glob.glob(str(source), recursive=True))
        found = [File(p, form, _split_of(Path(p.name))) for p in matched if p.is_file() and (form := form_of(p))]
        if found:
            return found
        raise DataError(f"{source}: the pattern matches no file with data ({', '.join(READABLE)}).")
    raise DataError(f"{path}: no such file or folder.{_near(path)}")


def _near(path: Path) -> str:
    if not path.parent.is_dir():
        return f" Nor is there a folder {path.parent}."
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=3)
    hub = f" For a dataset of the hub say hf:{path}." if len(path.parts) == 2 and not path.suffix else ""
    return (f" Did you mean {listed(near)}?" if near else "") + hub


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def _split_of(path: Path) -> str | None:
    """The split that a file's name says, or else the innermost folder's."""
    for part in reversed(path.parts):
        match = SPLIT.fullmatch(part.split(".")[0])
        if match:
            said = match["split"].lower()
            return CALLED.get(said, said)
    return None


def _as_splits(files: list[File], demanding: bool) -> list[File]:
    """Names mean splits where one of them is train's; a folder that mixes such names with others is refused."""
    without = [file for file in files if file.split is None]
    if not any(file.split == "train" for file in files) or (without and not demanding):
        return [File(file.path, file.form) for file in files]
    if without:
        raise DataError(
            f"{listed([f.path.name for f in without])} beside train.*: which split is that? Name every file train.*, "
            f"validation.* or test.*, or move it out of the folder."
        )
    return files


# Text


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked; raises DataError for what can't be read or unpacked."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as file:
            yield file  # type: ignore[misc]
    except (gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{path}: not a sound gzip file ({error}). Copy it again, or pack it again.") from error
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror or error}).") from error


@contextmanager
def text(path: Path, newline: str) -> Iterator[io.TextIOWrapper]:
    """The text of a UTF-8 file, with or without a byte-order mark; raises DataError that names the first wrong byte."""
    with opened(path) as file:
        start = file.read(2)
        if start in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError(f"{path}: this is UTF-16, not UTF-8. {_convert(path, 'UTF-16')}")
        file.seek(0)
        wrapped = io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline)
        try:
            yield wrapped
        except UnicodeDecodeError:
            raise DataError(_wrong_byte(path)) from None
        finally:
            wrapped.detach()


def _wrong_byte(path: Path) -> str:
    seen = 0
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return (
                    f"{path}:{number}: byte 0x{line[error.start]:02X} (byte {seen + error.start + 1:,} of the file) is "
                    f"not UTF-8. {_convert(path, 'WINDOWS-1252')} (WINDOWS-1252 is what Excel writes in the West; name "
                    f"another if it is another.)"
                )
            seen += len(line)
    return f"{path}: not UTF-8."


def _convert(path: Path, encoding: str) -> str:
    return f"Convert it: iconv -f {encoding} -t UTF-8 {path} > {path.stem}.utf8{path.suffix}"
