"""Sites in files: what is written of a place, and how it is found again in a model."""

import glob
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..core import describe
from ..errors import FileError, MatchError
from ..seams import At, Place, at, before, part, places, span


def site_record(place: Place) -> dict[str, Any]:
    """A place as JSON: its form and widths, and how its target is tapped if it is not the whole call of a module."""
    site = place.site
    record: dict[str, Any] = {"form": site.form, "inputs": site.inputs, "outputs": site.outputs}
    if place.features is not None:
        record["output"] = [place.features.start, place.features.stop]
    if place.entry is not None:
        record["from"] = place.entry
    if place.before:
        record["before"] = True
    if site.bare:
        record["parameter"] = site.parameter
    elif place.features is None and place.entry is None and site.form == "other":
        plain = describe(site.name, place.target)
        if (plain.inputs, plain.inputs if place.before else plain.outputs) != (site.inputs, site.outputs):
            record["features"] = site.inputs  # it was said by the user
    return record


def find_places(model: nn.Module, records: Mapping[str, Mapping[str, Any]], path: Path) -> dict[str, Place]:
    """The places of a file in this model, by site name. Raises FileError for one that is not there, or is another."""
    found: dict[str, Place] = {}
    for name, record in records.items():
        try:
            (place,) = places(model, _what(name, record))
        except (MatchError, TypeError, ValueError) as error:
            raise FileError(
                f"{path}: this model has no site {name!r}, at which the file has modules ({error})."
            ) from error
        here, there = site_record(place), {key: record.get(key) for key in ("form", "inputs", "outputs")}
        here = {key: here[key] for key in there}
        if place.site.name != name or here != there:
            raise FileError(
                f"{path}: site {name!r} is {there} in the file, and {here} in this model ({place.site.name!r})."
            )
        found[name] = place
    return found


def _what(name: str, record: Mapping[str, Any]) -> At:
    """What `at=` would say of the site."""
    if "from" in record:
        first = str(record["from"])
        return span(glob.escape(first), glob.escape(name.removeprefix(first + ":")))
    if record.get("before"):
        return before(glob.escape(name.rpartition("[")[0]), features=record.get("features"))
    if "output" in record:
        start, stop = record["output"]
        return part(glob.escape(name.rpartition("[")[0]), start, stop)
    return at(glob.escape(name), features=record.get("features"))
