"""Modules from one library to another: a folder, or a hub, "hf://owner/name", by huggingface_hub."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import FileError, listed
from . import _store
from ._cards import card, contents
from ._files import inside, walk, write_text
from ._index import entries
from ._read import read_bay, read_module

HUB = "hf://"
WANTED = ("module.json", "module.safetensors", "bay.json", "bay.safetensors")


def push(
    root: Path, to: str, names: Sequence[str] = (), *, replace: bool = False, subfolder: str = "",
    revision: str | None = None, token: str | None = None, private: bool | None = None, message: str | None = None,
) -> list[str]:  # fmt: skip
    """Copy modules, or all bays and modules, with cards; returns their names there."""
    if not to.startswith(HUB):
        _local(revision=revision, token=token, private=private, message=message)
        return _copied(root, _under(Path(to), subfolder), names, replace, cards=True)
    repo = _repo(to)
    api = _api(token)
    with tempfile.TemporaryDirectory() as made:
        out = _copied(root, Path(made), names, replace=False, cards=True)
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=made, path_in_repo=subfolder or None, revision=revision,
            commit_message=message or f"Modules: {', '.join(out[:8])}", ignore_patterns=[".*", "**/.*"],
        )  # fmt: skip
    return out


def pull(
    root: Path, source: str, names: Sequence[str] = (), *, replace: bool = False, subfolder: str = "",
    revision: str | None = None, token: str | None = None,
) -> list[str]:  # fmt: skip
    """Copy modules, each checked, from a library; returns their names here."""
    if not source.startswith(HUB):
        _local(revision=revision, token=token)
        if not (folder := _under(Path(source), subfolder)).is_dir():
            raise FileError(f"{folder} is no folder; a hub's repository is hf://OWNER/NAME.")
        return _copied(folder, root, names, replace, cards=False)
    with tempfile.TemporaryDirectory() as made:
        under = f"{subfolder}/" if subfolder else ""
        wanted = [f"{under}{pattern}{file}" for pattern in ("", "**/") for file in WANTED]
        repo = _repo(source)
        _api(token).snapshot_download(repo, revision=revision, local_dir=made, allow_patterns=wanted)
        return _copied(_under(Path(made), subfolder), root, names, replace, cards=False)


def _copied(source: Path, to: Path, names: Sequence[str], replace: bool, cards: bool) -> list[str]:
    """Bays whole, with their routers, and modules that are in none; or only the modules named."""
    own = [name for name, _ in walk(source)]
    missing = [name for name in names if name not in own]
    if missing:
        raise FileError(f"{source} has no modules {listed(missing)}; there are {listed(own) or 'none'}.")
    out: list[str] = []
    done: set[str] = set()
    writing = card if cards else None
    bays = {name.rpartition("/")[0] for name in own if (source / name).parent.joinpath("bay.json").exists()}
    for bay in [] if names else sorted(bays):
        path = source / bay
        file = read_bay(path.parent, path.name)
        out += _store.add_bay(to, file, bay or path.resolve().name, replace, writing)
        done |= {f"{bay}/{module}".removeprefix("/") for module in file.modules}
    for name in names or [name for name in sorted(own) if name not in done]:
        path = source / name
        _store.add_module(to, read_module(path.parent, path.name), name, replace, card=writing)
        out.append(name)
    if cards:
        write_text(to / "README.md", contents(to.resolve().name, entries(to)))
    return out


def _under(folder: Path, subfolder: str) -> Path:
    for one in [one for one in subfolder.split("/") if one]:
        folder = inside(folder, one)
    return folder


def _repo(text: str) -> str:
    repo = text.removeprefix(HUB)
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise FileError(f"{text!r}: a hub's repository is hf://OWNER/NAME.")
    return repo


def _local(**said: Any) -> None:
    given = [name for name, value in said.items() if value is not None]
    if given:
        raise FileError(f"{given[0]}={said[given[0]]!r} is of a hub (hf://OWNER/NAME): a plain folder has none.")


def _api(token: str | None) -> Any:
    from huggingface_hub import HfApi  # noqa: PLC0415 (an optional package)

    return HfApi(token=token)
