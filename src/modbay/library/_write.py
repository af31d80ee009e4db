"""Writing a bay: FOLDER/<bay>/bay.json, bay.safetensors, and FOLDER/<bay>/<module>/module.json, module.safetensors.

Format 1. One folder a module, which stands alone: it can be sent, kept and deleted by itself.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..abstract import Kind
from ..core import BayState, Session
from ..errors import BaseMismatch, BayError, FileError, listed
from ..seams import Fitting
from ._about import About, remembered, told
from ._content import content
from ._files import aside, inside, read_json, write_json, write_pair
from ._fingerprint import fingerprint
from ._format import FORMAT, describe, written_by
from ._index import entries
from ._locks import locked
from ._places import site_record
from ._store import place


def save(
    folder: str | Path, fitting: Fitting, *names: str, about: About | None = None, library: str | Path | None = None
) -> Path:
    """Write the bay and its modules, or only those named, and return the bay's folder. library: where modules go, which
    the bay's folder then refers to by their content.

    Modules that are not named are not touched, on disk or in the listing. Each module is the old or the new, whenever
    this is cut short. Raises BayError for an unknown name or while something is folded, BaseMismatch if the folder
    holds modules of another base, FileError for what can't be written.
    """
    state, own = fitting.state, fitting.state.inventory.names
    unknown = [name for name in names if name not in own]
    if unknown:
        raise BayError(f"save({', '.join(map(repr, names))}): bay {state.name!r} has no modules {listed(unknown)}.")
    unfolded(fitting.session, "save")
    base = fingerprint(fitting.model)
    chosen = [name for name in own if name in names] if names else list(own)
    said = told(about, chosen)
    path = inside(Path(folder), state.name)
    if library is not None and path.resolve() == (Path(library) / state.name).resolve():
        raise FileError(
            f"save({str(folder)!r}, library={str(library)!r}): modules would lie where they are referred to."
        )
    records = [
        (name, *_module(fitting, name, base, said.get(name, {}))) for name in chosen
    ]  # what can't be written raises before anything is
    head = _bay(fitting, base, chosen)
    with locked(path):
        before = read_json(inside(path, "bay.json")) if names and (path / "bay.json").exists() else None
        if before is not None and before.get("base", {}).get("digest") != base["digest"]:
            raise BaseMismatch(
                f"{path} holds modules that were made on another base ({before.get('base', {}).get('digest')}) than "
                f"this one ({base['digest']}): save {listed(names)} into a folder of their own."
            )
        known = {} if library is None else {one.content: one.name for one in entries(Path(library))}
        references: dict[str, dict[str, str]] = {}
        for name, record, tensors in records:
            if library is None:
                write_pair(inside(path, name, "module.safetensors"), inside(path, name, "module.json"), record, tensors)
            else:
                own = record["content"]
                at = known.get(own) or _shelve(Path(library), f"{state.name}/{name}", record, tensors)
                references[name] = {"content": own, "at": at}
            remember(state, name, record, False)
        if before is None:
            head = ({**head[0], **({"references": references} if references else {})}, head[1])
            write_pair(inside(path, "bay.safetensors"), inside(path, "bay.json"), *head)
        else:
            new = [name for name in chosen if name not in before["modules"]]
            old = {key: said for key, said in before.get("references", {}).items() if key not in chosen}
            if new or {**old, **references} != before.get("references", {}):
                more = {"modules": [*before["modules"], *new], "references": {**old, **references}}
                write_json(inside(path, "bay.json"), {**before, **more})
        for own in [inside(path, name) for name in references]:  # of a bay that had its modules itself
            if own.exists():
                gone = aside(own)
                os.rename(own, gone)
                shutil.rmtree(gone)
    return path


def _shelve(library: Path, name: str, record: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Put a module into a library, under its name or, if another has that, with its content in it; returns the name."""
    for at in (name, f"{name}-{record['content'][:12]}"):
        path = place(library, at)
        with locked(path.parent):
            if not (path / "module.json").exists():
                write_pair(path / "module.safetensors", path / "module.json", record, tensors)
                return at
            if read_json(path / "module.json").get("content") == record["content"]:
                return at
    raise FileError(f"{library} has another module {name!r}, and one of that content: save it under another name.")


def remember(state: BayState, name: str, record: Mapping[str, Any], loaded: bool) -> None:
    """Keep what a module's file says of it, for the next save."""
    if "content" in record:
        state.about[name] = {"content": record["content"], "about": record.get("about", {}), "loaded": loaded}


def unfolded(session: Session, verb: str) -> None:
    """Raise BayError while a bay of the model is folded, for then its base is not the base."""
    folded = [name for name, bay in session.bays.items() if bay.folded is not None]
    if folded:
        raise BayError(f"{verb}: bay {listed(folded)} is folded into the base's weights: unfold it first.")


def _head(**what: str) -> dict[str, Any]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"format": FORMAT, "modbay": written_by(), "created": now, **what}


def _module(
    fitting: Fitting, name: str, base: Mapping[str, Any], about: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(module.json, the tensors) of one module."""
    said: list[dict[str, Any]] = []
    number: dict[int, int] = {}
    sites = {}
    for site, modular in fitting.modulars.items():
        part = modular.parts._modules.get(name)
        if part is None:
            continue
        kind: Kind = part.kind  # type: ignore[assignment]
        if id(kind) not in number:
            record = describe(kind, f"module {name!r} at {site!r}")
            if record not in said:
                said.append(record)
            number[id(kind)] = said.index(record)
        sites[site] = {"kind": number[id(kind)], **site_record(fitting.places[site])}
    tensors, shared = once(module_tensors(fitting, name))
    floats = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.is_floating_point()})
    learning = any(t.requires_grad for t in tensors.values())
    record = {
        **_head(bay=fitting.state.name, module=name),
        "kinds": said,
        "sites": sites,
        "shared": shared,
        "dtype": floats[0] if len(floats) == 1 else floats,
        "frozen": not learning,
        "base": {key: value for key, value in base.items() if key != "tensors"},
    }
    record["content"] = content(record, tensors)
    about = remembered(fitting.state.about.get(name), record["content"]) | about
    elsewhere = fitting.state.foreign.get(name)
    return record | ({"about": about} if about else {}) | ({"made_on": elsewhere} if elsewhere else {}), tensors


def _bay(fitting: Fitting, base: Mapping[str, Any], names: Sequence[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(bay.json, the tensors of routers and aggregators) of the bay."""
    state = fitting.state
    tensors, shared = once(bay_tensors(fitting))
    record = {
        **_head(bay=state.name),
        "position": list(fitting.session.bays).index(state.name),
        "modules": list(names),
        "names": list(state.inventory.names),  # what the router's columns stand for
        "router": described(fitting, "router"),
        "aggregator": described(fitting, "aggregator"),
        "sometimes": state.sometimes,
        "add_losses": state.add_losses,
        "sites": {site: site_record(place) for site, place in fitting.places.items()},
        "shared": shared,
        "base": base,
    }
    return record, tensors


def described(fitting: Fitting, role: str) -> dict[str, Any]:
    """A router or aggregator as it is made again: one for all sites, or one a site."""
    one = getattr(fitting.state, role)
    if one is not None:
        return {**describe(one, f"bay {fitting.state.name!r}"), "per_site": False}
    several = [describe(getattr(m, role), f"site {site!r}") for site, m in fitting.modulars.items()]
    if any(other != several[0] for other in several):
        raise FileError(
            f"bay {fitting.state.name!r} has {role}s with different arguments at its sites, which a file can't tell "
            f"apart: {listed({str(said) for said in several}, 3)}. Let the callable make equal ones, or attach two."
        )
    return {**several[0], "per_site": True}


# Names of tensors, in files as in memory


def module_tensors(fitting: Fitting, name: str) -> dict[str, Tensor]:
    """All tensors of one module by "site/parameter"."""
    return _keyed({site: modular.parts._modules.get(name) for site, modular in fitting.modulars.items()})


def bay_tensors(fitting: Fitting) -> dict[str, Tensor]:
    """All tensors of the bay's routers and aggregators by "router/parameter", or "router/site/parameter"."""
    parts: dict[str, nn.Module | None] = {}
    for role in ("router", "aggregator"):
        parts[role] = getattr(fitting.state, role)
        parts |= {f"{role}/{site}": getattr(m, role) for site, m in fitting.modulars.items()}
    return _keyed(parts)


def _keyed(parts: Mapping[str, nn.Module | None]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for prefix, part in parts.items():
        for key, tensor in ({} if part is None else part.state_dict(keep_vars=True)).items():
            if not isinstance(tensor, Tensor) or f"{prefix}/{key}" in out:
                raise FileError(f"{prefix}/{key} is {type(tensor).__name__}, or there twice: a file can't hold it.")
            out[f"{prefix}/{key}"] = tensor
    return out


def once(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(each tensor once, the key under which it is stored by each further key of it)."""
    first: dict[int, str] = {}
    kept, shared = {}, {}
    for key, tensor in tensors.items():
        if id(tensor) in first:
            shared[key] = first[id(tensor)]
        else:
            first[id(tensor)], kept[key] = key, tensor
    return kept, shared
