"""Loading: from what was read to the parameters of a bay, new or already there. All is checked, then all is copied."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core import Session
from ..errors import BayError, FileError, ModbayError, listed
from ..seams import Fitting, Pairs, Place
from ._composition import Composition
from ._doors import composes, find_foreign, read_composition, read_foreign
from ._files import inside
from ._foreign import Foreign
from ._places import find_places
from ._read import BayFile, ModuleFile, fill, find_bays, read_bay, read_module
from ._setting import Setting, setting
from ._suits import bay_sources, here, made_elsewhere, module_sources, same_kinds, same_parts, same_sites, same_way
from ._write import bay_tensors, module_tensors, remember, unfolded


@dataclass(frozen=True, eq=False)
class Plan(ABC):
    """A bay that was read and fits the model: what `attach` needs to make it, and `finish` to fill it."""

    guest: ClassVar[bool] = False  # whether another library wrote it
    name: str
    path: Path
    router: Any
    aggregator: Any
    places: Mapping[str, Place]
    pairs: Mapping[str, Pairs]
    known: Mapping[str, Mapping[str, Mapping[str, Tensor]]]
    sometimes: bool = False
    add_losses: bool = True

    @property
    def start(self) -> tuple | None:
        """What `bay.use` is told at once."""
        return None

    @abstractmethod
    def finish(self, fitting: Fitting) -> None:
        """Fill the bay that was just attached; raises FileError if it is not the one that was saved."""


@dataclass(frozen=True, eq=False)
class _Saved(Plan):
    """A bay that modbay wrote."""

    file: BayFile = field(kw_only=True)
    foreign: Mapping[str, str] = field(kw_only=True)

    def finish(self, fitting: Fitting) -> None:
        sources = {file.name: module_sources(fitting, file) for file in self.file.modules.values()}
        state = bay_sources(fitting, self.file)
        for name, tensors in sources.items():
            fill(module_tensors(fitting, name), tensors, True)
        fill(bay_tensors(fitting), state, True)
        for file in self.file.modules.values():
            _mark(fitting, file, self.foreign, True)


@dataclass(frozen=True, eq=False)
class _Strange(Plan):
    """Modules that others wrote. They come frozen, as they come there, and one that is alone is at work at once."""

    guest: ClassVar[bool] = True
    files: Sequence[Foreign] = field(kw_only=True)
    setting: Setting = field(kw_only=True)

    @property
    def start(self) -> tuple | None:
        return self.setting.start

    def finish(self, fitting: Fitting) -> None:
        for file in self.files:
            file.fill(module_tensors(fitting, file.name))
        self.setting.fill(fitting, self.path)


@dataclass(frozen=True, eq=False)
class _Composed(Plan):
    """Modules that others wrote, with the router and the aggregator that they have there."""

    guest: ClassVar[bool] = True
    made: Composition = field(kw_only=True)

    def finish(self, fitting: Fitting) -> None:
        self.made.fill(fitting)


def plans(
    model: nn.Module, session: Session, folder: str | Path, base: str, allow_nan: bool, name: str | None
) -> list[Plan]:
    """The bays of a folder, each read and checked against the model, which stays as it is."""
    unfolded(session, "load")
    if strangers := find_foreign(Path(folder)):
        return _strangers(model, strangers, Path(folder), name)
    out: list[Plan] = []
    for file in find_bays(folder, allow_nan):
        file = _present(model, file)
        foreign = made_elsewhere(model, file.record["base"], file.modules.values(), base)
        places = find_places(model, file.sites, file.path)
        kinds = {module_name: module.kinds() for module_name, module in file.modules.items()}
        pairs = {key: [(places[site], kind) for site, kind in at.items()] for key, at in kinds.items()}
        known = {key: module.known for key, module in file.modules.items()}
        said = {key: file.record[key] for key in ("sometimes", "add_losses")}
        made = _Saved(
            file.name, file.path, file.part("router"), file.part("aggregator"), places, pairs, known, **said,
            file=file, foreign=foreign,
        )  # fmt: skip
        out.append(made)
    return out


def _present(model: nn.Module, file: BayFile) -> BayFile:
    """A bay with its modules as they are in this model, and without sites that none of them has then."""
    modules = {name: here(model, one) for name, one in file.modules.items()}
    lost = {site for name, one in file.modules.items() for site in one.sites.keys() - modules[name].sites.keys()}
    sites = {site: said for site, said in file.record["sites"].items() if site not in lost}
    return replace(file, record={**file.record, "sites": sites}, modules=modules)


def _strangers(model: nn.Module, folders: Mapping[str, Path], folder: Path, name: str | None) -> list[Plan]:
    """One bay of the modules that stand alone, and one of each composition, called by its folder but for the first."""
    whole = {key: path for key, path in folders.items() if composes(path)}
    single = {key: path for key, path in folders.items() if key not in whole}
    out = [_strange(model, single, folder, name)] if single else []
    for key, path in whole.items():
        made = read_composition(path, model)
        made.tell(model)
        pairs = {file.name: file.pairs(model) for file in made.files}
        places = {place.site.name: place for several in pairs.values() for place, _ in several}
        known = {file.name: file.known for file in made.files}
        own = key if out else name or made.format
        out.append(_Composed(own, path, made.router, made.aggregator, places, pairs, known, True, made=made))
    return out


def _strange(model: nn.Module, folders: Mapping[str, Path], folder: Path, name: str | None) -> Plan:
    files = [read_foreign(path, key, model) for key, path in folders.items()]
    for file in files:
        file.tell(model)
    pairs = {file.name: file.pairs(model) for file in files}
    places = {place.site.name: place for several in pairs.values() for place, _ in several}
    known = {file.name: file.known for file in files}
    name = name or files[0].format
    how = setting(folder, name, files, model)
    return _Strange(name, folder, how.router, how.aggregator, places, pairs, known, True, files=files, setting=how)


def load(fitting: Fitting, folder: str | Path, names: Sequence[str], add: bool, base: str, allow_nan: bool) -> None:
    """Load modules into a bay, in place, so that optimisers keep their references.

    Without names: all that the file lists, and the routers and aggregators. Modules that the bay lacks are added only
    if `add`. Raises FileError, BaseMismatch or BayError, and then nothing has changed.
    """
    unfolded(fitting.session, "load")
    if strangers := find_foreign(Path(folder)):
        _add(fitting, strangers, Path(folder), names, add)
        return
    bay, modules = _read(fitting, folder, names, allow_nan)
    own = fitting.state.inventory.names
    new = [file for file in modules if file.name not in own]
    if new and not add:
        raise BayError(
            f"load: bay {fitting.state.name!r} has no modules {listed(file.name for file in new)}; its own are "
            f"{listed(own)}. add=True adds them; load(FOLDER, NAME) loads only those named."
        )
    foreign = made_elsewhere(fitting.model, bay and bay.record["base"], modules, base)
    for file in modules:
        same_sites(fitting, file)
        if file not in new:
            same_kinds(fitting, file)
    if names:
        bay = None
    if bay is not None:
        same_parts(fitting, bay)
    before = list(own)
    try:
        for file in new:
            with making(fitting.model, file.path):
                pairs = [(fitting.places[site], kind) for site, kind in file.kinds().items()]
                fitting.plug(file.name, pairs, file.known)
        sources = {file.name: module_sources(fitting, file) for file in modules}
        state = {} if bay is None else bay_sources(fitting, bay)
    except BaseException:
        for name in own[len(before) :]:
            fitting.unplug(len(before), name)
        raise
    if new:
        fitting.rebuild()
    for name, tensors in sources.items():
        fill(module_tensors(fitting, name), tensors, name not in before)
    fill(bay_tensors(fitting), state)
    for file in modules:
        _mark(fitting, file, foreign, file in new)


def _add(fitting: Fitting, there: Mapping[str, Path], folder: Path, names: Sequence[str], add: bool) -> None:
    """Add modules that others wrote, frozen, at sites that the bay has."""
    own, unknown = fitting.state.inventory.names, [name for name in names if name not in there]
    if unknown:
        raise FileError(f"{folder} has no modules {listed(unknown)}; there are {listed(there)}.")
    wanted = list(names) or list(there)
    taken = [name for name in wanted if name in own]
    if taken or not add:
        why = f"it has {listed(taken)} already" if taken else f"add=True adds {listed(wanted)}"
        raise BayError(
            f"load: bay {fitting.state.name!r} gets what another library wrote only as new modules: {why}. Rename the "
            f"folder, or the module."
        )
    files = [read_foreign(there[name], name, fitting.model) for name in wanted]
    for file in files:
        file.tell(fitting.model)
        new = [site for site in file.kinds if site not in fitting.places]
        if new:
            raise BayError(
                f"load: bay {fitting.state.name!r} has no sites {listed(new)}, at which {file.name!r} has a module; "
                f"mb.load(model, FOLDER, name=…) makes a bay of its own for it."
            )
        same_way(fitting, file)
    before = len(own)
    try:
        for file in files:
            pairs = [(fitting.places[site], kind) for site, kind in file.kinds.items()]
            for place, kind in pairs:
                modular = fitting.modulars[place.site.name]
                (modular.aggregator or fitting.state.aggregator).admit(kind, place.site)  # type: ignore[union-attr]
            with making(fitting.model, file.path):
                fitting.plug(file.name, pairs, file.known)
            file.fill(module_tensors(fitting, file.name))
    except BaseException:
        for name in own[before:]:
            fitting.unplug(before, name)
        raise
    fitting.rebuild()


def _read(
    fitting: Fitting, folder: str | Path, names: Sequence[str], allow_nan: bool
) -> tuple[BayFile | None, list[ModuleFile]]:
    """(the bay's file, if there is one; the modules that are wanted)."""
    path = inside(Path(folder), fitting.state.name)
    if not path.is_dir():
        bays = [file.name for file in find_bays(folder, allow_nan)]
        raise FileError(f"{folder} has no bay {fitting.state.name!r}; there are {listed(bays)}.")
    wanted = list(names) or None
    bay = (
        read_bay(path.parent, path.name, allow_nan, wanted) if wanted is None or (path / "bay.json").exists() else None
    )
    if bay is None:
        return None, [here(fitting.model, read_module(path, name, allow_nan)) for name in names]
    bay = _present(fitting.model, bay)
    return bay, list(bay.modules.values())


def _mark(fitting: Fitting, file: ModuleFile, foreign: Mapping[str, str], new: bool) -> None:
    """What the files say of a module beside its tensors: whether it is frozen, and on which base it was made."""
    if new and file.record["frozen"]:
        for tensor in module_tensors(fitting, file.name).values():
            tensor.requires_grad_(False)
    fitting.state.foreign.pop(file.name, None)
    fitting.state.about.pop(file.name, None)
    remember(fitting.state, file.name, file.record, True)
    if file.name in foreign:
        fitting.state.foreign[file.name] = foreign[file.name]


@contextmanager
def making(model: nn.Module, path: Path) -> Iterator[None]:
    """While parts are made that a file describes: the random numbers drawn for what is overwritten at once are not the
    user's, and what goes wrong is the file's fault."""
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=sorted(i for i in devices if i is not None)):
            yield
    except ModbayError:
        raise
    except (TypeError, ValueError, RuntimeError, KeyError, IndexError) as error:
        raise FileError(
            f"{path}: what the file describes can't be made here ({type(error).__name__}: {error}). It may have been "
            f"written by another version, or edited by hand."
        ) from error
