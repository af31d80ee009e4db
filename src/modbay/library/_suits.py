"""Whether what was read suits a bay: its base, sites, kinds, parts and tensors. All raise before anything changes."""

import copy
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..abstract import Site
from ..aggregation import PerSite, WeightedSum
from ..errors import BaseMismatch, BayError, FileError, listed
from ..seams import Fitting, named
from ._fingerprint import compare
from ._foreign import Foreign
from ._format import describe
from ._places import site_record
from ._read import BayFile, ModuleFile, fill, fits, whole
from ._write import bay_tensors, described, module_tensors

LOG = logging.getLogger("modbay")


def same_way(fitting: Fitting, file: Foreign) -> None:
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


def here(model: nn.Module, file: ModuleFile) -> ModuleFile:
    """A module without its sites before layers that this model lacks, if it has nothing of its own there: an invertible
    adapter's inverse, before a head that gives words. Nothing that was learned is left out."""
    own = {key for key in file.tensors if key not in file.record["shared"]}
    there = set(named(model))
    lost = [
        site
        for site, said in file.sites.items()
        if said.get("before")
        and site.removesuffix("[before]") not in there
        and not any(key.startswith(f"{site}/") for key in own)
    ]
    if not lost:
        return file
    LOG.warning(
        "%s: %s has no %s, so that the module acts only at its other sites, whose tensors are all it has.", file.path,
        type(model).__name__, listed(site.removesuffix("[before]") for site in lost),
    )  # fmt: skip
    return file.only(file.sites.keys() - lost)


def made_elsewhere(
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


def same_sites(fitting: Fitting, file: ModuleFile) -> None:
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


def same_kinds(fitting: Fitting, file: ModuleFile) -> None:
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


def same_parts(fitting: Fitting, bay: BayFile) -> None:
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


def module_sources(fitting: Fitting, file: ModuleFile) -> Mapping[str, Tensor]:
    """A module's tensors, which fit those of the bay."""
    targets, path = module_tensors(fitting, file.name), file.path / "module.safetensors"
    fits(path, file.tensors, targets)
    stored: dict[int, Tensor] = {}
    for key, target in targets.items():
        if stored.setdefault(id(target), file.tensors[key]) is not file.tensors[key]:
            raise FileError(f"{path}: {key!r} is one tensor with another here, but the file has two. Save it again.")
    whole(path, file.record)
    return file.tensors


def bay_sources(fitting: Fitting, file: BayFile) -> Mapping[str, Tensor]:
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
