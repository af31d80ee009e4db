"""Datasets of the hub, through `datasets`: records like a file's, with classes' names in place of their numbers."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..errors import DataError, listed
from ._files import CALLED, Hub
from ._tables import Record


def parts(hub: Hub, streaming: bool = False) -> dict[str, Any]:
    """The splits of a dataset by our names; raises DataError if it can't be had, as without a network."""
    try:
        import datasets  # noqa: PLC0415 (an optional dependency)
    except ImportError:
        raise DataError(f"{hub}: a dataset of the hub needs datasets: pip install 'modbay[train]'.") from None
    try:
        got = datasets.load_dataset(hub.name, hub.config, revision=hub.revision, streaming=streaming)
    except Exception as error:  # it raises dozens of types, those of its file systems among them
        why = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
        raise DataError(
            f"{hub}: datasets.load_dataset could not get it ({type(error).__name__}: {why}). It must be on the hub, "
            f"with a network, or in datasets' cache; without either, save it elsewhere with dataset.to_parquet(…) and "
            f"name that file."
        ) from error
    return {CALLED.get(str(name), str(name)): part for name, part in got.items()}


def records(hub: Hub, split: str, part: Any) -> tuple[list[str] | None, Iterator[Record]]:
    """(columns, records) of one split."""
    features = part.features  # None in a stream whose columns are not declared

    def rows() -> Iterator[Record]:
        spell = {name: f for name, feature in (features or {}).items() if (f := _names(feature)) is not None}
        for number, record in enumerate(part, 1):
            for column, name in spell.items():
                record[column] = name(record[column])
            yield f"{hub} {split}, row {number}", record

    return (None if features is None else list(features)), rows()


def _names(feature: Any) -> Callable[[Any], Any] | None:
    """From numbers to the names that a ClassLabel, or a list of them, declares; −1 is its word for none."""
    inner = getattr(feature, "feature", feature)
    if inner is not feature:
        each = _names(inner)
        return None if each is None else lambda values: None if values is None else [each(value) for value in values]
    if not hasattr(feature, "int2str"):
        return None
    return lambda value: None if value is None or value == -1 else feature.int2str(value)


def chosen(hub: Hub, there: Mapping[str, Any], split: str | None) -> dict[str, Any]:
    """The split that is wanted, or all; raises DataError if there is none of that name."""
    if split is None:
        return dict(there)
    if split not in there:
        raise DataError(f"{hub} has no split {split!r}: it has {listed(there)}.")
    return {split: there[split]}
