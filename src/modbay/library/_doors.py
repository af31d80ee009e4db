"""Doors: the formats of other libraries, known by what lies in a folder."""

from pathlib import Path

from torch import nn

from ..abstract import Kind, Routing
from ..errors import BayError, FileError, listed
from ..seams import Fitting
from ..types import Params
from . import adapters, peft, sft
from ._composition import Composition
from ._files import read_json, refuse_pickle
from ._foreign import Foreign
from ._gguf import write_gguf
from ._setting import joined
from ._write import unfolded

FORMATS = ("peft", "adapters", "lora", "gguf")


def find_foreign(folder: Path) -> dict[str, Path]:
    """The modules of another library in a folder, by name: its own, and those of folders in it, as peft keeps them."""
    if not folder.is_dir() or (folder / "bay.json").exists():
        return {}
    inner = {path.name: path for path in sorted(folder.iterdir()) if _strange(path)}
    own = {folder.resolve().name: folder} if _strange(folder) else {}
    return own | inner


def _strange(folder: Path) -> bool:
    return (folder / peft.CONFIG).is_file() or (folder / sft.DIFF).is_file()


def read_foreign(folder: Path, name: str, model: nn.Module) -> Foreign:
    """Read one of them. Raises FileError for what is not known, or is damaged."""
    if (folder / sft.DIFF).is_file():
        return sft.read(folder, name, model)
    said = read_json(folder / peft.CONFIG)
    if "peft_type" in said:
        pickle = folder / "adapter_model.bin"
        if pickle.exists() and not (folder / peft.TENSORS).exists():
            refuse_pickle(pickle)
        return peft.read(folder, name, model)
    if "config" in said and "peft_type" not in said:
        return adapters.read(folder, name, model)
    raise FileError(
        f"{folder}/{peft.CONFIG} says neither peft_type, as peft's do, nor config, as those of adapters: it is of no "
        f"library that modbay reads."
    )


def composes(folder: Path) -> bool:
    """Whether a folder of another library's holds several modules, with their router and aggregator."""
    return (folder / peft.CONFIG).is_file() and peft.composes(folder)


def read_composition(folder: Path, model: nn.Module) -> Composition:
    """Read one of those. Raises FileError for what is damaged."""
    return peft.read_composition(folder, model)


def composed(fitting: Fitting, format: str) -> bool:
    """Whether a format can hold a bay as one: its modules with their router and aggregator."""
    return format == "peft" and peft.composed(fitting)


def export(
    folder: str | Path, fitting: Fitting, name: str | None, format: str, rank: int | None, error: float
) -> dict[str, float]:
    """Write one module in another format, or the whole bay, where it has such; return the relative error by site, 0
    where it is exact.

    Raises BayError for an unknown name, CompositionError for what the format can't hold: then nothing is written.
    """
    state = fitting.state
    if format not in FORMATS:
        raise BayError(f"export(format={format!r}): it is {listed(FORMATS)}.")
    if name is None and composed(fitting, format):
        unfolded(fitting.session, "export")
        peft.write_composition(Path(folder), fitting)
        return dict.fromkeys(fitting.modulars, 0.0)
    if name is None and format == "adapters" and len(state.inventory.names) > 1:
        unfolded(fitting.session, "export")
        _together(Path(folder), fitting)
        return dict.fromkeys(fitting.modulars, 0.0)
    if name is None:
        if len(state.inventory.names) != 1:
            raise BayError(
                f"export(): bay {state.name!r} has {listed(state.inventory.names)}: say which, export(FOLDER, NAME)."
            )
        name = state.inventory.names[0]
    if name not in state.inventory.names:
        there = listed(state.inventory.names)
        raise BayError(f"export({name!r}): bay {state.name!r} has no such module; there are {there}.")
    unfolded(fitting.session, "export")
    if format == "lora":
        return peft.write_plain(Path(folder), fitting, name, rank, error)
    if format == "gguf":
        return write_gguf(Path(folder), fitting, name, rank, error)
    kinds, params = _parts(fitting, name)
    if format == "adapters":
        adapters.write(Path(folder), adapters.Draft(name, fitting.model, kinds, params, *joined(fitting, name, kinds)))
        return dict.fromkeys(kinds, 0.0)
    peft.write(Path(folder), peft.Draft(name, fitting.model, fitting.places, kinds, params))
    return dict.fromkeys(kinds, 0.0)


def _parts(fitting: Fitting, name: str) -> tuple[dict[str, Kind], dict[str, Params]]:
    """What a module is, and its tensors, by site."""
    kinds: dict[str, Kind] = {}
    params: dict[str, Params] = {}
    for site, modular in fitting.modulars.items():
        part = modular.order[fitting.state.inventory.names.index(name)]
        if part is not None:
            kinds[site] = part.kind
            params[site] = {key: tensor.detach() for key, tensor in part.tensors().items()}
    return kinds, params


def _together(folder: Path, fitting: Fitting) -> None:
    """The modules that are at work, as a setup of adapters'; one of them alone, as itself."""
    names, chosen = fitting.state.inventory.names, fitting.state.chosen
    if not isinstance(chosen, Routing) or not chosen.host:
        raise BayError(
            f"export(): bay {fitting.state.name!r} has {listed(names)}, and none is set to work: a setup of adapters' "
            f"is of those that are, bay.use({names[0]!r}, {names[1]!r}); export(FOLDER, NAME) writes one."
        )
    drafts = []
    for name in (names[i] for i in chosen.host[0]):
        kinds, params = _parts(fitting, name)
        drafts.append(adapters.Draft(name, fitting.model, kinds, params, *joined(fitting, name, kinds)))
    adapters.write_setup(folder, drafts, chosen.weights is not None)
