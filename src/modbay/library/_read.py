"""Reading a bay: what lies in its folder, every part of it checked before anything in a model changes."""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..abstract import Aggregator, Kind, Router
from ..errors import FileError, listed
from ._content import content
from ._files import at_hand, inside, read_json, read_tensors, refuse_pickle, sha256
from ._format import FORMAT, make
from ._references import resolve
from ._schema import check


@dataclass(frozen=True, eq=False)
class ModuleFile:
    """One module as its folder has it."""

    name: str
    path: Path
    record: Mapping[str, Any]
    tensors: Mapping[str, Tensor]  # by every name, those that are shared included

    @property
    def sites(self) -> Mapping[str, Mapping[str, Any]]:
        return self.record["sites"]

    @property
    def known(self) -> dict[str, dict[str, Tensor]]:
        """The tensors by site and name."""
        own = lambda site: {k.removeprefix(f"{site}/"): t for k, t in self.tensors.items() if k.startswith(f"{site}/")}
        return {site: own(site) for site in self.sites}

    def only(self, sites: Container[str]) -> "ModuleFile":
        """This module at some of its sites."""
        here = lambda key: any(key.startswith(f"{site}/") for site in kept)
        kept = {site: said for site, said in self.sites.items() if site in sites}
        shared = {alias: key for alias, key in self.record["shared"].items() if here(alias)}
        tensors = {key: tensor for key, tensor in self.tensors.items() if here(key)}
        return replace(self, record={**self.record, "sites": kept, "shared": shared}, tensors=tensors)

    def kinds(self) -> dict[str, Kind]:
        """The kind at each site: one object for those that were one."""
        made = [make(said, (Kind,), f"{self.path}: kind {i}") for i, said in enumerate(self.record["kinds"])]
        return {site: made[said["kind"]] for site, said in self.sites.items()}


@dataclass(frozen=True, eq=False)
class BayFile:
    """A bay as its folder has it."""

    name: str
    path: Path
    record: Mapping[str, Any]
    modules: Mapping[str, ModuleFile]
    tensors: Mapping[str, Tensor]

    @property
    def sites(self) -> dict[str, Mapping[str, Any]]:
        """The sites of the bay, and those of modules that were saved when it had others."""
        return {**self.record["sites"], **{k: v for m in self.modules.values() for k, v in m.sites.items()}}

    def part(self, role: str) -> Router | Aggregator | Callable:
        """The router or aggregator; a callable that makes one, if each site had its own."""
        said, base = self.record[role], (Router,) if role == "router" else (Aggregator,)
        make_it = lambda: make(said, base, f"{self.path}/bay.json: {role}")
        return make_it if said.get("per_site") else make_it()


def find_bays(folder: str | Path, allow_nan: bool = False) -> list[BayFile]:
    """The bays of a folder, in the order in which they were attached. Raises FileError if there are none."""
    folder = Path(folder)
    if folder.is_file():
        refuse_pickle(folder)
    if not folder.is_dir():
        raise FileError(f"{folder} is no folder: mb.load wants the folder that bay.save was given.")
    names = sorted(path.name for path in folder.iterdir() if path.name[0] != "." and (path / "bay.json").exists())
    if not names:
        there = listed(sorted(path.name for path in folder.iterdir())) or "nothing"
        hint = f" It is a bay's own folder: pass {folder.parent}." if (folder / "bay.json").exists() else ""
        raise FileError(f"{folder} holds no bay (a folder with a bay.json); there is {there}.{hint}")
    found = [read_bay(folder, name, allow_nan) for name in names]
    return sorted(found, key=lambda file: file.record["position"])


def read_bay(folder: str | Path, name: str, allow_nan: bool = False, only: Sequence[str] | None = None) -> BayFile:
    """One bay with all the modules that it lists, or only some."""
    path = inside(Path(folder), name)
    record, tensors = _pair(inside(path, "bay.json"), inside(path, "bay.safetensors"), allow_nan)
    if len(set(record["modules"])) < len(record["modules"]):
        raise FileError(f"{path}/bay.json lists a module twice: {record['modules']}.")
    wanted = record["modules"] if only is None else only
    return BayFile(name, path, record, {one: _listed(path, one, record, allow_nan) for one in wanted}, tensors)


def _listed(path: Path, name: str, record: Mapping[str, Any], allow_nan: bool) -> ModuleFile:
    """A module of a bay, from its folder, or from the library that the bay refers to."""
    said = record.get("references", {}).get(name)
    if said is None:
        return read_module(path, name, allow_nan)
    at = resolve(path, name, said)
    file = read_module(at.parent, at.name, allow_nan)
    own = content(file.record, file.tensors)
    if own != said["content"]:
        raise FileError(
            f"{at} is not the module {name!r} that {path}/bay.json refers to: its content is {own[:12]}…, not "
            f"{said['content'][:12]}…. It is damaged: modbay library verify."
        )
    return replace(file, name=name)


def read_module(path: Path, name: str, allow_nan: bool = False) -> ModuleFile:
    """One module, from the folder of its bay."""
    folder = inside(path, name)
    if not folder.is_dir():
        raise FileError(f"{path} has no module {name!r}: there is no folder of that name.")
    record, tensors = _pair(inside(path, name, "module.json"), inside(path, name, "module.safetensors"), allow_nan)
    for site, said in record["sites"].items():
        if said["kind"] not in range(len(record["kinds"])):
            raise FileError(
                f"{folder}/module.json: site {site!r} says no kind of the {len(record['kinds'])} in the file."
            )
    return ModuleFile(name, folder, record, tensors)


def _pair(record_at: Path, tensors_at: Path, allow_nan: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A record and its tensors; both again, if someone wrote new ones meanwhile."""
    text = lambda: record_at.read_bytes() if record_at.is_file() else b""
    while True:
        before, record = text(), checked(record_at)
        try:
            tensors, wrong = _tensors(tensors_at, record, allow_nan), None
        except FileError as error:
            tensors, wrong = {}, error
        if text() == before:
            if wrong is not None:
                raise wrong
            return record, tensors


def checked(path: Path) -> dict[str, Any]:
    """A record whose format is known, and whose fields are there and of the right type."""
    record = read_json(path)
    version = record.get("format")
    if not isinstance(version, int) or not 1 <= version <= FORMAT:
        raise FileError(
            f"{path} has format {version!r}; this modbay reads 1 … {FORMAT}. It was written by modbay "
            f"{record.get('modbay', '(unknown)')}: install that version or a newer one."
        )
    check(path, record)
    return record


def _tensors(path: Path, record: Mapping[str, Any], allow_nan: bool) -> dict[str, Tensor]:
    """The tensors that a record goes with, by every name, finite; they must be the ones that it was written with."""
    if record.get("empty") or ("sha256" not in record and not path.exists()):
        return {}
    tensors = read_tensors(at_hand(path, record))
    for alias, key in record["shared"].items():
        if key not in tensors or alias in tensors:
            raise FileError(
                f"{path}: {alias!r} should be the same tensor as {key!r}, which the file does not have alone."
            )
    bad = {
        key: int((~t.isfinite()).sum())
        for key, t in tensors.items()
        if t.is_floating_point() and not t.isfinite().all()
    }
    if bad and not allow_nan:
        said = ", ".join(f"{key!r} ({n} of {tensors[key].numel()})" for key, n in list(bad.items())[:4])
        raise FileError(
            f"{path} has values that are NaN or infinite, in {len(bad)} tensors: {said}. Its training diverged, or "
            f"the file is damaged: take an earlier one. allow_nan=True loads it all the same."
        )
    return tensors | {alias: tensors[key] for alias, key in record["shared"].items()}


def whole(path: Path, record: Mapping[str, Any]) -> None:
    """Raise FileError if the tensors are not those that the record was written with."""
    if "sha256" in record and sha256(at_hand(path, record)) != record["sha256"]:
        raise FileError(
            f"{path} is not the file that the JSON beside it was written with (its SHA-256 differs): changed, "
            f"damaged, or a save that was cut short. Copy both again; if it was changed on purpose, delete 'sha256'."
        )


def fits(path: Path, tensors: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    """Raise FileError unless the tensors are exactly those that the model wants, in shape too."""
    missing = [key for key in targets if key not in tensors]
    extra = [key for key in tensors if key not in targets]
    shapes = [
        f"{key!r} is {tuple(tensors[key].shape)}, not {tuple(t.shape)}"
        for key, t in targets.items()
        if key in tensors and tensors[key].shape != t.shape
    ]
    types = [
        f"{key!r} is {tensors[key].dtype}, not {t.dtype}"
        for key, t in targets.items()
        if key in tensors and tensors[key].is_floating_point() != t.is_floating_point()
    ]
    said = [
        f"{text.capitalize()} ({len(names)}): {', '.join(map(str, names[:6]))}{' …' if len(names) > 6 else ''}"
        for names, text in (
            ([repr(key) for key in missing], "missing tensors"),
            ([repr(key) for key in extra], "extra tensors"),
            (shapes, "other shapes"),
            (types, "other types"),
        )
        if names
    ]
    if said:
        raise FileError(
            f"{path} does not fit the bay's parts. {'. '.join(said)}. Load it with the kinds that it was saved with, "
            f"as its JSON tells them; a file that others wrote must have nothing more."
        )


def fill(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor], new: bool = False) -> None:
    """Fill tensors in place. New ones take the file's dtype: a module may be kept in another one than its base."""
    with torch.no_grad():
        for key, target in targets.items():
            if key in sources:
                if new and target.dtype != sources[key].dtype:
                    target.data = target.data.to(sources[key].dtype)
                target.copy_(sources[key])
