"""Names for modules from values of data: a module's name is part of parameter names and of paths."""

import hashlib
import re
from collections.abc import Iterable

from ..errors import DataError

SAFE = re.compile(r"[^\W_][\w -]{0,58}[\w-]|[^\W_]")  # letters, digits, '_', '-', inner spaces; no '.' and no '/'
MARKED = re.compile(r".*-[0-9a-f]{8}")  # as a slug ends that had to be changed


def slug(value: str) -> str:
    """A name for a module, always the same for the same value: the value itself where it can be one.

    "pt" stays; "comp.os/x" becomes "comp-os-x-" and eight digits of its SHA-256, so that values which only differ in
    what a name can't have keep names of their own.
    """
    if SAFE.fullmatch(value) and not MARKED.fullmatch(value):
        return value
    kept = re.sub(r"[^\w]+", "-", value).strip("-_")[:50] or "x"
    return f"{kept}-{hashlib.sha256(value.encode()).hexdigest()[:8]}"


def slugs(values: Iterable[str]) -> dict[str, str]:
    """The table back: {name of the module: value}; raises DataError if two values would have one name."""
    table: dict[str, str] = {}
    for value in dict.fromkeys(values):
        other = table.setdefault(slug(value), value)
        if other != value:
            raise DataError(f"{value!r} and {other!r} would both be the module {slug(value)!r}: rename one.")
    return table
