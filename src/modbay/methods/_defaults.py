"""What all methods do with their arguments."""

from typing import Any

from ..errors import ConfigError, listed
from ..seams import role
from ._spec import Values

SITES = [role.query, role.value, role.ffn_in, role.ffn_out]


def sites(at: Any) -> Any:
    """`at`, or the sites of most transformers; `default_at(model)` knows which a model has."""
    return SITES if at is None else at


def names_of(values: Values, by: str) -> list[str]:
    """The values of the label; raises ConfigError if there is no such label, or it has none."""
    if by not in values:
        raise ConfigError(f"by={by!r}: the data has no such label; there are {listed(values)}.")
    if not values[by]:
        raise ConfigError(f"by={by!r}: the label has no values, so that there would be no modules.")
    return list(values[by])


def bay_name(label: str) -> str:
    """A bay is named as its label, but for dots, which part the names of parameters."""
    return label.replace(".", "_")


def unused(name: str, taken: list[str]) -> str:
    """The name, with underscores until it is none of those."""
    while name in taken:
        name += "_"
    return name


def number(name: str, value: Any, least: int = 1) -> int:
    """An option that is a whole number; raises ConfigError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"options: {name}={value!r}: a whole number from {least} is wanted.")
    return value
