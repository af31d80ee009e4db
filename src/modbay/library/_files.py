"""Files on disk: written whole or not at all, read only as safetensors and JSON, and never outside their folder."""

import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import FileError

Stamp = tuple[int, int, int]  # of a file: its time, size and inode

NUMBERS = re.compile(r"\[\n(\s+-?[\d.]+(e[+-]?\d+)?,?\n)+\s*\]")  # in JSON, a list of more than none
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # torch.save's archive, and bare pickles


def inside(folder: Path, *names: str) -> Path:
    """folder/name/…; raises FileError for a name that is no plain file name, or a link that leads out of the folder."""
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\:\0"):
            raise FileError(
                f"{folder}: {name!r} can't be the name of a file there: it must have no '/', '\\', ':' or '..'."
            )
    path = folder.joinpath(*names)
    try:
        path.resolve()
    except (OSError, RuntimeError) as error:  # a link to itself
        raise FileError(f"{path} can't be followed ({error}): copy the file itself into the folder.") from error
    if not path.resolve().is_relative_to(folder.resolve()):
        raise FileError(f"{path} is a link out of {folder}, to {path.resolve()}: copy the file itself into the folder.")
    return path


def replaced(path: Path, write: Callable[[Path], Any], named: Callable[[Path], Path] | None = None) -> Path:
    """Write beside the file, and put it in its place when it is safely on disk: `path`, or what `named` makes of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = aside(path)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the user's umask has it; safetensors writes for the owner alone
        write(temporary)
        temporary.chmod(mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        path = path if named is None else named(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    settle(path.parent)
    return path


def aside(path: Path) -> Path:
    """A name beside a file or folder for what is being written: nothing that reads a folder takes it for anything."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


def settle(folder: Path) -> None:
    """New names in a folder, too, must outlive a crash."""
    if os.name == "posix":
        directory = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record to be read by people, too: a list of numbers (an embedding) is one line."""
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(path, NUMBERS.sub(lambda found: f"[{' '.join(found[0][1:-1].split())}]", text) + "\n")


def write_text(path: Path, text: str) -> None:
    replaced(path, lambda temporary: temporary.write_bytes(text.encode()))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], named: Callable[[Path], Path] | None = None) -> Path:
    """Write a safetensors file."""
    own = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    try:
        return replaced(path, lambda temporary: save_file(own, temporary, {"format": "pt"}), named)
    except SafetensorError as error:  # a full disk, say
        raise OSError(0, str(error), str(path)) from None


def write_pair(tensors_at: Path, record_at: Path, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write tensors and what says of them as one: whenever this is cut short, both are the old or both are the new.

    The new tensors lie beside the old, under a name made of their SHA-256, until the record that has it is in place:
    that is the moment. Whoever reads looks there first (`at_hand`). One writer at a time: hold the folder's lock.
    """
    if not tensors:
        write_json(record_at, {**record, "empty": True})
        tensors_at.unlink(missing_ok=True)  # of a router that had something to keep
        return
    found: list[str] = []

    def named(temporary: Path) -> Path:
        found.append(sha256(temporary))
        return pending(tensors_at, found[0])

    new = write_tensors(tensors_at, tensors, named)
    try:
        write_json(record_at, {**record, "sha256": found[0]})
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    os.replace(new, tensors_at)
    settle(tensors_at.parent)


def pending(path: Path, digest: str) -> Path:
    """Where tensors lie that will be `path`, once the record beside them says so."""
    return path.with_name(f".{path.name}.{digest[:16]}")


def at_hand(path: Path, record: Mapping[str, Any]) -> Path:
    """Where the tensors of a record are: in their file, or beside it, if their writer was cut short."""
    new = pending(path, record["sha256"]) if "sha256" in record else path
    return new if new.exists() else path


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises FileError if there is none."""
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileError(f"{path} is missing. {_found(path.parent)}") from None
    except OSError as error:  # a folder of that name, a disk that fails
        raise FileError(f"{path} can't be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is not JSON ({error}): cut short, or edited by hand. Copy it again.") from error
    if not isinstance(record, dict):
        raise FileError(f"{path} holds a {type(record).__name__}, not an object.")
    return record


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the host; raises FileError for anything else, a pickle in particular."""
    if not path.is_file():
        raise FileError(f"{path} is missing. {_found(path.parent)}")
    refuse_pickle(path)
    try:
        with safe_open(path, "pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
    except (SafetensorError, ValueError, OSError) as error:
        size = path.stat().st_size
        wanted = _declared(path)
        why = (
            f"{size:,} bytes of {wanted:,}: it is truncated" if wanted and size < wanted else f"{size:,} bytes, {error}"
        )
        raise FileError(f"{path} is not a sound safetensors file ({why}). Copy it or save it again.") from error


def _declared(path: Path) -> int | None:
    """How long a safetensors file must be, as its header says; None if that can't be read either."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, 1 << 27))
    try:
        ends = [said["data_offsets"][1] for key, said in json.loads(header).items() if key != "__metadata__"]
        return 8 + length + max(ends, default=0)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        return 8 + length


def refuse_pickle(path: Path) -> None:
    """Raise FileError if the file is a pickle, by its name or by its first bytes."""
    with open(path, "rb") as file:
        start = file.read(9)
    sound = (
        start[4:] == b"\0\0\0\0{"
    )  # safetensors: a header's length, which may begin as a pickle does, and the header
    if path.suffix in PICKLES or (start.startswith(MAGIC) and not sound):
        raise FileError(_pickle(path))


def _pickle(path: Path) -> str:
    return (
        f"{path} is a pickle, which runs whatever code it holds when it is loaded: modbay reads safetensors and JSON "
        f"only. If you trust it, read it yourself by torch.load(path, weights_only=True), copy its tensors into a "
        f"module of the same kind, and keep that by bay.save(FOLDER)."
    )


def _found(folder: Path) -> str:
    """What lies in the folder instead of the file that is missing; raises FileError if that is a pickle."""
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    for name in names:
        if name.endswith(PICKLES):
            raise FileError(_pickle(folder / name))
    return f"There {'are ' + ', '.join(names[:8]) if names else 'is nothing'} in {folder}."


def walk(root: Path) -> Iterator[tuple[str, Stamp]]:
    """(name, stamp) of each module. Links are not followed, for they may lead out of the folder."""
    folders = [str(root)]
    start = len(folders[0].rstrip(os.sep)) + 1
    while folders:
        try:
            with os.scandir(folders.pop()) as inner:
                several = [one.path for one in inner if one.name[0] != "." and one.is_dir(follow_symlinks=False)]
        except (FileNotFoundError, NotADirectoryError):
            continue
        for path in several:
            try:
                seen = os.stat(f"{path}/module.json", follow_symlinks=False)
                yield path[start:].replace(os.sep, "/"), (seen.st_mtime_ns, seen.st_size, seen.st_ino)
            except FileNotFoundError:
                folders.append(path)


def typed(path: Path, table: Mapping[str, Any], key: str, wanted: type | tuple[type, ...], default: Any = None) -> Any:
    """A value of a JSON that another library wrote to `path`, of the type that it writes there; null is the default."""
    value = table.get(key)
    if value is None:
        return default
    types = wanted if isinstance(wanted, tuple) else (wanted,)
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise FileError(
            f"{path}: {key} is {value!r:.80}, but must be {' or '.join(t.__name__ for t in types)}: damaged, or edited "
            f"by hand. Copy it again."
        )
    return value
