"""What is done to a folder of modules: put in, taken out, tidied. Killed at any moment, a step is whole or not there.

Something new is made under a name that begins with a dot, which nobody reads, and takes its own by one rename; what
goes is renamed so first. Who writes into a folder, or into the folder of a module in it, holds its lock (`locked`):
shared, for new names; alone, to replace and to tidy.
"""

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import FileError, listed
from ._about import checked as checked_about
from ._content import content
from ._files import aside, at_hand, inside, read_json, settle, sha256, write_json, write_pair
from ._index import CACHE as INDEX
from ._locks import locked
from ._read import BayFile, ModuleFile, checked, find_bays, read_bay, read_module, whole
from ._sketch import CACHE as LIKENESS

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}\.tmp|\.tmp\w{6}")  # ours, and the one that safetensors writes to
PENDING = re.compile(r"\.(module|bay)\.safetensors\.([0-9a-f]{16})")
CACHES = (INDEX.name, LIKENESS.name)

Card = Callable[[Path, Mapping[str, Any]], str]  # what README.md says of a module


def place(root: Path, name: str) -> Path:
    """Where a module of that name lies; raises FileError for a name that leads elsewhere, or is not to be read."""
    path = root
    for one in name.split("/"):
        if one.startswith("."):
            raise FileError(f"{root}: {name!r} can't be a module's name: what begins with '.' is never read.")
        if (path / "module.json").exists():
            raise FileError(f"{root}: {name!r} would lie in the folder of module {path.name!r}: give it another name.")
        path = inside(path, one)
    return path


def found(source: Path) -> list[ModuleFile | BayFile]:
    """What there is in a folder: one module, one bay, or several bays."""
    if (source / "module.json").is_file():
        return [read_module(source.parent, source.name)]
    if (source / "bay.json").is_file():
        return [read_bay(source.parent, source.name)]
    return list(find_bays(source))


def add_module(
    root: Path,
    file: ModuleFile,
    name: str,
    replace: bool,
    about: Mapping[str, Any] | None = None,
    card: Card | None = None,
) -> str:
    """Put a copy of a module into a library; returns its content. Nothing is done if it is there already."""
    path, record = place(root, name), _sound(file, about)
    while True:
        if (path / "module.json").exists():
            _over(path, file, record, replace, about is not None)
            return record["content"]
        with locked(path.parent, shared=True):
            new = aside(path)
            try:
                _copy(file, new, record, card)
                os.rename(new, path)
                settle(path.parent)
                return record["content"]
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not (path / "module.json").exists():
                    raise
            finally:
                shutil.rmtree(new, ignore_errors=True)


def _sound(file: ModuleFile, about: Mapping[str, Any] | None) -> dict[str, Any]:
    """The record of a module as a library keeps it; raises FileError if the module is not what its record says."""
    whole(file.path / "module.safetensors", file.record)
    own = content(file.record, file.tensors)
    if file.record.get("content", own) != own:
        raise FileError(
            f"{file.path}: its content is {own[:12]}…, and its record says {file.record['content'][:12]}…: changed by "
            f"hand, or damaged. Copy it again; if it was changed on purpose, delete 'content' in module.json."
        )
    said = {**file.record.get("about", {}), **checked_about(about or {}, "about")}
    return {**file.record, "content": own} | ({"about": said} if said else {})


def _copy(file: ModuleFile, new: Path, record: dict[str, Any], card: Card | None) -> None:
    new.mkdir()
    tensors_at = at_hand(file.path / "module.safetensors", file.record)
    if file.tensors:
        shutil.copyfile(tensors_at, new / "module.safetensors")
        with open(new / "module.safetensors", "rb+") as copied:
            os.fsync(copied.fileno())
        digest = sha256(new / "module.safetensors")
        if record.setdefault("sha256", digest) != digest:
            raise FileError(f"{file.path} changed while it was copied: add it again.")
    if card is not None:
        (new / "README.md").write_text(card(new, record), encoding="utf-8")
    write_json(new / "module.json", record)


def _over(path: Path, file: ModuleFile, record: dict[str, Any], replace: bool, told: bool) -> None:
    """The same for a name that is taken."""
    there = read_module(path.parent, path.name, allow_nan=True)
    if content(there.record, there.tensors) == record["content"]:
        if there.record.get("about", {}) == record.get("about", {}) or not (replace or told):
            return
    elif not replace:
        raise FileError(
            f"{path} is another module (content {there.record.get('content', '')[:12]}…) than {file.path} "
            f"({record['content'][:12]}…): give it another name, or replace it (replace=True, --replace)."
        )
    own = {key: tensor for key, tensor in file.tensors.items() if key not in record["shared"]}
    with locked(path.parent):
        write_pair(path / "module.safetensors", path / "module.json", _unhashed(record), own)


def _unhashed(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in ("sha256", "empty")}


def _unreferred(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a bay whose modules lie in its own folder."""
    return {key: value for key, value in record.items() if key != "references"}


def add_bay(root: Path, file: BayFile, name: str, replace: bool, card: Card | None = None) -> dict[str, str]:
    """Put a copy of a bay into a library, router and aggregator too; returns the content of its modules, by name."""
    path = place(root, name)
    records = {module: _sound(one, None) for module, one in file.modules.items()}
    whole(file.path / "bay.safetensors", file.record)
    out = {f"{name}/{module}": record["content"] for module, record in records.items()}
    if not path.exists():
        with locked(path.parent, shared=True):
            new = aside(path)
            try:
                new.mkdir()
                for module, one in file.modules.items():
                    _copy(one, new / module, records[module], card)
                    settle(new / module)
                if file.tensors:
                    shutil.copyfile(at_hand(file.path / "bay.safetensors", file.record), new / "bay.safetensors")
                    with open(new / "bay.safetensors", "rb+") as copied:
                        os.fsync(copied.fileno())
                write_json(new / "bay.json", _unreferred(file.record))
                os.rename(new, path)
                settle(path.parent)
                return out
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            finally:
                shutil.rmtree(new, ignore_errors=True)
    _bay_over(path, file, records, replace)
    return out


def _bay_over(path: Path, file: BayFile, records: Mapping[str, dict[str, Any]], replace: bool) -> None:
    """The same where there is a bay of that name: all of it must be the same, or new, or is to be replaced."""
    before = checked(path / "bay.json") if (path / "bay.json").exists() else None
    what = ("router", "aggregator", "modules", "names", "sha256")
    differs = [key for key in what if before is not None and before.get(key) != file.record.get(key)]
    renew = before is None or bool(differs)
    for module, record in records.items():
        if (path / module / "module.json").exists():
            there = read_module(path, module, allow_nan=True)
            differs += [module] if content(there.record, there.tensors) != record["content"] else []
    if differs and not replace:
        raise FileError(
            f"{path} is another bay than {file.path}: {listed(differs)} differ. Give it another name, or replace what "
            f"differs (replace=True, --replace)."
        )
    for module, one in file.modules.items():
        add_module(path, one, module, replace)
    if renew:
        with locked(path):
            write_pair(path / "bay.safetensors", path / "bay.json", _unhashed(_unreferred(file.record)), file.tensors)


def referring(root: Path, name: str, own: str) -> list[str]:
    """The compositions in a library that refer to a module: by where it is, and what it is."""
    out = []
    for folder in _folders(root):
        said = read_json(folder / "bay.json").get("references", {}) if (folder / "bay.json").exists() else {}
        if any(one.get("at") == name and one.get("content") == own for one in said.values()):
            out.append(folder.relative_to(root).as_posix())
    return out


def remove(root: Path, name: str) -> None:
    """Take a module or a bay out of a library."""
    path = place(root, name)
    if (path / "bay.json").exists():
        with locked(path):
            return _away(path)
    head = path.parent / "bay.json"
    if (path / "module.json").exists() and head.exists():
        with locked(path.parent):
            record = read_json(head)
            left = [module for module in record.get("modules", []) if module != path.name]
            if left != record.get("modules"):
                write_json(head, {**record, "modules": left})
    _away(path)


def _away(path: Path) -> None:
    gone = aside(path)
    with locked(path.parent, shared=True):
        os.rename(path, gone)
        shutil.rmtree(gone)


def tidy(root: Path) -> list[str]:
    """Remove what writers that were killed left behind, and finish what they had all but done; returns what went.

    Caches of other versions of modbay go, too: what lies in the index and is none of its own. A folder in which someone
    is writing is passed over. Nothing that is a module, or a bay, goes.
    """
    out: list[str] = []
    for folder in _folders(root):
        if folder == root:
            out += [str(path.relative_to(root)) for path in _held(folder, True)]
        else:
            with locked(folder.parent, wait=False) as held:
                out += [str(path.relative_to(root)) for path in _held(folder, False)] if held else []
    return out


def _held(folder: Path, is_root: bool) -> list[Path]:
    """What went of a folder, if nobody was writing there."""
    if not folder.is_dir():
        return []
    with locked(folder, wait=False) as held:
        return list(_tidied(folder, is_root)) if held else []


def _folders(root: Path) -> Iterator[Path]:
    """All folders that are no modules, inner ones first."""
    try:
        inner = sorted(root.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return
    for path in inner:
        if path.is_dir() and not path.is_symlink() and path.name[0] != "." and not (path / "module.json").exists():
            yield from _folders(path)
    yield root


def _tidied(folder: Path, is_root: bool) -> Iterator[Path]:
    """What is removed in a folder that is held."""
    for path in sorted(folder.iterdir()):
        if TEMPORARY.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            yield path
        elif path.is_dir() and not path.is_symlink() and path.name == INDEX.parent.name:
            for inner in sorted(path.iterdir()):
                if inner.name not in CACHES and inner.is_file() and not inner.is_symlink():
                    inner.unlink(missing_ok=True)  # readers write there without a lock
                    yield inner
        elif path.is_dir() and not path.is_symlink() and (path / "module.json").exists():
            for inner in sorted(path.iterdir()):
                yield from _leftover(inner)
        else:
            yield from _leftover(path)
    alone = folder / "module.safetensors"
    if [path.name for path in folder.iterdir()] == [alone.name]:  # 0.1.0 wrote tensors first, and was killed
        alone.unlink()
        yield alone
    if not is_root and not any(folder.iterdir()):
        folder.rmdir()
        yield folder


def _leftover(path: Path) -> Iterator[Path]:
    said = PENDING.fullmatch(path.name)
    if TEMPORARY.fullmatch(path.name) and path.is_file():
        path.unlink()
        yield path
    elif said is not None:
        record = path.with_name(f"{said[1]}.json")
        if record.exists() and str(read_json(record).get("sha256", "")).startswith(said[2]):
            os.replace(path, path.with_name(f"{said[1]}.safetensors"))
        else:
            path.unlink()
            yield path
