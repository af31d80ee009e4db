"""Whether what lies in a library is sound, and fits a base."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from ..errors import FileError, ModbayError, listed
from ._content import content
from ._files import walk
from ._fingerprint import compare
from ._places import find_places
from ._read import checked, read_bay, read_module, whole


def verify(root: Path, names: Sequence[str], model: nn.Module | None) -> list[dict[str, str]]:
    """[{name, problem}], of all modules and bays, or of some modules."""
    out: list[dict[str, str]] = []
    for name in names or sorted(name for name, _ in walk(root)):
        if problem := of_module(root / name, model):
            out.append({"name": name, "problem": problem})
    for path in [] if names else sorted(_bays(root)):
        if problem := of_bay(path):
            out.append({"name": path.relative_to(root).as_posix(), "problem": problem})
    return out


def of_module(path: Path, model: nn.Module | None = None) -> str:
    """What is wrong with a module; nothing, if it is sound."""
    try:
        for _ in range(8):  # again, where another process replaces it meanwhile
            file = read_module(path.parent, path.name)
            try:
                whole(path / "module.safetensors", file.record)
                break
            except FileError:
                if checked(path / "module.json") == file.record:
                    raise
        own = content(file.record, file.tensors)
        if file.record.get("content", own) != own:
            return f"its content is {own}, and its record says {file.record['content']}"
        if model is not None:
            file.kinds()
            compare(file.record["base"], model, f"module {path.name!r}")
            find_places(model, file.sites, path)
    except ModbayError as error:
        return str(error)
    return ""


def of_bay(path: Path) -> str:
    """What is wrong with a bay beside its modules."""
    try:
        file = read_bay(path.parent, path.name, only=[])
        whole(path / "bay.safetensors", file.record)
        gone, references = [], file.record.get("references", {})
        for name in file.record["modules"]:
            if name in references:
                read_bay(path.parent, path.name, only=[name])
            elif not (path / name / "module.json").exists():
                gone.append(name)
        return f"bay.json lists {listed(gone)}, which are not there" if gone else ""
    except ModbayError as error:
        return str(error)


def _bays(root: Path) -> list[Path]:
    """The bays of a library, at any depth."""
    if not root.is_dir():
        return []
    inner = [p for p in root.iterdir() if p.is_dir() and not p.is_symlink() and p.name[0] != "."]
    own = [root] if (root / "bay.json").exists() else []
    return own + [bay for path in inner if not (path / "module.json").exists() for bay in _bays(path)]
