"""The classes that text may name, and whether arguments fit their signatures."""

import inspect
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .. import aggregation, modules, routing
from ..abstract import Aggregator, Kind, Router
from ..errors import ConfigError, ModbayError, listed

PLACES = {Kind: modules, Router: routing, Aggregator: aggregation}
TERMS = {Kind: "kind of module", Router: "router", Aggregator: "aggregator"}


def near(name: str, known: Sequence[str]) -> str:
    """What is likely meant, and all that there is."""
    folded = {one.lower(): one for one in known}
    found = get_close_matches(name.lower(), folded, 1)
    meant = f"; did you mean {folded[found[0]]!r}? There" if found else "; there"
    return f"{meant} are {listed(known, 20)}." if known else "; there are none."


def classes(base: type) -> dict[str, type]:
    """What modbay exports of a term, by name."""
    return {name: c for name, c in vars(PLACES[base]).items() if isinstance(c, type) and issubclass(c, base)}


def found(base: type, name: Any, where: str) -> type:
    """The class of that name; raises ConfigError."""
    known = classes(base)
    if not isinstance(name, str) or name not in known:
        raise ConfigError(f"{where}: {name!r} is no {TERMS[base]}{near(str(name), list(known))}")
    return known[name]


def signature(cls: type) -> dict[str, inspect.Parameter]:
    """The arguments of a class; none where it has no __init__ of its own."""
    if cls.__init__ in (Router.__init__, Aggregator.__init__):
        return {}
    return dict(inspect.signature(cls).parameters)


def checked(cls: type, said: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError, with all that is wrong, where arguments are unknown, missing or of another type."""
    known = signature(cls)
    name = cls.__name__
    wrong = [
        f"{where}: {name} has no argument {key!r}{near(str(key), list(known))}" for key in said if key not in known
    ]
    lacks = [key for key, p in known.items() if p.default is p.empty and key not in said]
    wrong += [f"{where}: {name} wants {listed(lacks)}, too."] if lacks else []
    if isinstance(cls, type) and known:
        hints = get_type_hints(cls) if issubclass(cls, Kind) else get_type_hints(cls.__init__)
        wrong += [
            f"{where}: {name}({key}={value!r}): {worded(hints[key])} is wanted, not {described(value)}."
            for key, value in said.items()
            if key in known and key in hints and not fits(value, hints[key])
        ]
    if wrong:
        raise ConfigError("\n".join(wrong))


def made(cls: type, said: Mapping[str, Any], where: str) -> Any:
    """cls(**said), what it says itself against its arguments with the place put before."""
    checked(cls, said, where)
    try:
        return cls(**said)
    except ModbayError as error:
        raise ConfigError(f"{where}: {error}") from None


def fits(value: Any, hint: Any) -> bool:
    """Whether a value that came from YAML is of a type, a whole number being a float, too."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if hint in (int, float):
        return isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(fits(one, inner[1]) for one in value.values())
    if origin is not None and issubclass(origin, Sequence):
        return isinstance(value, (list, tuple)) and all(fits(one, inner[0]) for one in value)
    return value is None if hint in (None, NoneType) else not isinstance(hint, type) or isinstance(value, hint)


def worded(hint: Any) -> str:
    """A type in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(worded(one) for one in inner))
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin is not None:
        return "a mapping" if issubclass(origin, Mapping) else f"a list of {_plural(worded(inner[0]))}"
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}
    words[Kind] = "a kind of module"
    return words.get(hint, getattr(hint, "__name__", str(hint)))


def _plural(words: str) -> str:
    return words.removeprefix("a ") + ("" if words == "text" else "s")


def described(value: Any) -> str:
    """What a value is, in words: text that looks like a number is the usual slip."""
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list"}
    words |= {dict: "a mapping", NoneType: "nothing"}
    return words.get(type(value), type(value).__name__)
