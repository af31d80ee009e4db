"""Loading: from what was read to the parameters of a bay, new or already there. All is checked, then all is copied."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..abstract import Site
from ..aggregation import PerSite, WeightedSum
from ..core import Session
from ..errors import BaseMismatch, BayError, FileError, ModbayError, listed
from ..seams import Fitting, Pairs, Place
from ._composition import Composition
from ._doors import composes, find_foreign, read_composition, read_foreign
from ._files import inside
from ._fingerprint import compare
from ._foreign import Foreign
from ._format import describe
from ._places import find_places, site_record
from ._read import BayFile, ModuleFile, fill, find_bays, fits, read_bay, read_module, whole
from ._setting import Setting, setting
from ._write import bay_tensors, described, module_tensors, remember, unfolded


@dataclass(frozen=True, eq=False)
class Plan(ABC):
    """A bay that was read and fits the model: what `attach` needs to make it, and `finish` to fill it."""

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
        sources = {file.name: _module(fitting, file) for file in self.file.modules.values()}
        state = _state(fitting, self.file)
        for name, tensors in sources.items():
            fill(module_tensors(fitting, name), tensors, True)
        fill(bay_tensors(fitting), state, True)
        for file in self.file.modules.values():
            _mark(fitting, file, self.foreign, True)


@dataclass(frozen=True, eq=False)
class _Strange(Plan):
    """Modules that others wrote. They come frozen, as they come there, and one that is alone is at work at once."""

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
        foreign = _foreign(model, file.record["base"], file.modules.values(), base)
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
        out.append(_Composed(own, path, made.router, made.aggregator, places, pairs, known, made=made))
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
    return _Strange(name, folder, how.router, how.aggregator, places, pairs, known, files=files, setting=how)


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
    foreign = _foreign(fitting.model, bay and bay.record["base"], modules, base)
    for file in modules:
        _same_sites(fitting, file)
        if file not in new:
            _same_kinds(fitting, file)
    if names:
        bay = None
    if bay is not None:
        _same_parts(fitting, bay)
    before = list(own)
    try:
        for file in new:
            with making(fitting.model, file.path):
                pairs = [(fitting.places[site], kind) for site, kind in file.kinds().items()]
                fitting.plug(file.name, pairs, file.known)
        sources = {file.name: _module(fitting, file) for file in modules}
        state = {} if bay is None else _state(fitting, bay)
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
        _same_way(fitting, file)
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


def _same_way(fitting: Fitting, file: Foreign) -> None:
    """Raise BayError unless the bay puts modules together with the base as a strange one is."""
    for site in file.kinds:
        own = fitting.modulars[site].aggregator or fitting.state.aggregator
        own = own.at(site) if isinstance(own, PerSite) else own
        wanted = file.aggregators.get(site) or WeightedSum()
        if file.gates or describe(own, site) != describe(wanted, site):  # type: ignore[arg-type]
            what = "gates of its own" if file.gates else f"{type(wanted).__name__} as aggregator, as it was made with"
            raise BayError(
                f"load: module {file.name!r} needs {what} at {site!r}, and bay {fitting.state.name!r} has "
                f"{type(own).__name__}; mb.load(model, FOLDER, name=…) makes a bay of its own for it."
            )


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
        return None, [read_module(path, name, allow_nan) for name in names]
    return bay, list(bay.modules.values())


def _foreign(
    model: nn.Module, whole_base: Mapping[str, Any] | None, modules: Iterable[ModuleFile], base: str
) -> dict[str, str]:
    """The modules that were made on another base, each with its digest; raises BaseMismatch unless base="any"."""
    if base not in ("same", "any"):
        raise BaseMismatch(
            f'base={base!r}: "same" compares the base with that of the files; "any" loads onto any base.'
        )
    out, known = {}, {}
    for file in modules:
        theirs = file.record["base"]
        digest = theirs["digest"]
        if digest not in known:
            full = whole_base if whole_base is not None and whole_base["digest"] == digest else theirs
            try:
                compare(full, model, f"module {file.name!r} in {file.path}")
                known[digest] = False
            except BaseMismatch:
                if base != "any":
                    raise
                known[digest] = True
        if known[digest]:
            out[file.name] = digest
        elif file.record.get("made_on"):
            out[file.name] = file.record["made_on"]
    return out


def _same_sites(fitting: Fitting, file: ModuleFile) -> None:
    """Raise FileError if the module sits at sites that the bay does not have, or that are others there."""
    here = {site: site_record(place) for site, place in fitting.places.items() if site in file.sites}
    there = {site: {k: v for k, v in said.items() if k != "kind"} for site, said in file.sites.items()}
    wrong = [site for site, said in there.items() if here.get(site) != said]
    if wrong:
        said = here.get(wrong[0], "no site of this bay")
        raise FileError(
            f"{file.path}: {len(wrong)} sites are not those of bay {fitting.state.name!r}: {wrong[0]!r} is "
            f"{there[wrong[0]]} in the file, and here {said}. Attach the bay where it was saved, or use mb.load."
        )


def _same_kinds(fitting: Fitting, file: ModuleFile) -> None:
    """Raise FileError unless the module has the same kind at the same sites here and there."""
    for site, modular in fitting.modulars.items():
        part, said = modular.parts._modules.get(file.name), file.sites.get(site)
        here = None if part is None else describe(part.kind, site)  # type: ignore[arg-type]
        there = None if said is None else file.record["kinds"][said["kind"]]
        if _what(here) != _what(there):
            raise FileError(
                f"{file.path}: module {file.name!r} is {_what(there) or 'nothing'} at {site!r} in the file, and "
                f"{_what(here) or 'nothing'} here. Remove it from the bay and load with add=True, or take another file."
            )


def _same_parts(fitting: Fitting, bay: BayFile) -> None:
    """Raise FileError unless router and aggregator are those of the file."""
    for role in ("router", "aggregator"):
        here, there = described(fitting, role), bay.record[role]
        if (_what(here), here["per_site"]) != (_what(there), there.get("per_site")):
            raise FileError(
                f"{bay.path}/bay.json: the {role} is {_what(there)} (one a site: {there.get('per_site')}) in the "
                f"file, and {_what(here)} ({here['per_site']}) here. Name modules to load them alone."
            )


def _what(said: Mapping[str, Any] | None) -> str:
    """A kind, router or aggregator in words, without the file that defines it."""
    if said is None:
        return ""
    return f"{said['class']}({', '.join(f'{key}={value!r}' for key, value in sorted(said['arguments'].items()))})"


def _module(fitting: Fitting, file: ModuleFile) -> Mapping[str, Tensor]:
    """A module's tensors, which fit those of the bay."""
    targets, path = module_tensors(fitting, file.name), file.path / "module.safetensors"
    fits(path, file.tensors, targets)
    stored: dict[int, Tensor] = {}
    for key, target in targets.items():
        if stored.setdefault(id(target), file.tensors[key]) is not file.tensors[key]:
            raise FileError(f"{path}: {key!r} is one tensor with another here, but the file has two. Save it again.")
    whole(path, file.record)
    return file.tensors


def _state(fitting: Fitting, file: BayFile) -> Mapping[str, Tensor]:
    """The tensors of routers and aggregators for the modules that the bay has now, in their order, by the names that
    the file has them for."""
    path, then, now = file.path / "bay.safetensors", file.record["names"], fitting.state.inventory.names
    twins: dict[str, Any] = {}
    routers: dict[str, tuple[Any, Site]] = {"router": (fitting.state.router, fitting.seen())}
    routers |= {f"router/{site}": (m.router, m.site) for site, m in fitting.modulars.items()}
    for prefix, (router, site) in routers.items():
        if router is not None and list(router.names) != then:
            twins[prefix] = (twin := copy.deepcopy(router), site)
            twin.build(then, site)
    wanted = dict(bay_tensors(fitting)) | {
        f"{p}/{k}": v for p, (twin, _) in twins.items() for k, v in twin.state_dict().items()
    }
    fits(path, file.tensors, wanted)
    if "sha256" in file.record:
        whole(path, file.record)
    sources = dict(file.tensors)
    for prefix, (twin, site) in twins.items():
        own = {f"{prefix}/{key}": value for key, value in twin.state_dict(keep_vars=True).items()}
        fill(own, sources)
        twin.build(now, site)
        sources |= {f"{prefix}/{key}": value for key, value in twin.state_dict().items()}
    return sources


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
