"""Bays as YAML takes them, such that `parse_bays` gives them back."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from functools import partial
from typing import Any

from ..abstract import Aggregator, Kind, Router
from ..errors import ConfigError
from ..seams import Role
from ._classes import PLACES, classes, signature
from ._spec import BaySpec


def dump(specs: Sequence[BaySpec]) -> list[dict[str, Any]]:
    """Plain lists, mappings, text and numbers. Raises ConfigError for what text can't say (a class of one's own)."""
    return [_bay(spec) for spec in specs]


def dump_kind(kind: Kind) -> str | dict[str, Any]:
    """A kind as `parse_kind` takes it."""
    defaults = {f.name: f.default if f.default is not MISSING else MISSING for f in fields(kind)}
    return _said(type(kind), {f.name: getattr(kind, f.name) for f in fields(kind) if f.init}, defaults)


def _bay(spec: BaySpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "at": dump_at(spec.at),
        "modules": {name: dump_kind(kind) for name, kind in spec.modules.items()},
        "router": _part(spec.router),
        "aggregator": _part(spec.aggregator),
    }


def _part(one: Any) -> str | dict[str, Any]:
    if isinstance(one, (Router, Aggregator)):
        defaults = {name: p.default for name, p in signature(type(one)).items()}
        return _said(type(one), one.arguments(), defaults)
    cls = one.func if isinstance(one, partial) else one
    if not isinstance(cls, type) or (isinstance(one, partial) and one.args):
        raise ConfigError(f"{one!r}: only a class, or a partial of one with named arguments, can be written as text.")
    arguments = one.keywords if isinstance(one, partial) else {}
    said = _said(cls, arguments, {name: p.default for name, p in signature(cls).items()})
    return {**({said: {}} if isinstance(said, str) else said), "per_site": True}


def _said(cls: type, arguments: Mapping[str, Any], defaults: Mapping[str, Any]) -> str | dict[str, Any]:
    """NAME, or {NAME: {what differs from the defaults}}."""
    if not any(classes(base).get(cls.__name__) is cls for base in PLACES):
        raise ConfigError(
            f"{cls.__name__}: only what modbay exports can be written as text; this is {cls.__module__}'s."
        )
    told = {
        key: _plain(value, f"{cls.__name__}({key}=…)")
        for key, value in arguments.items()
        if not (type(value) is type(defaults.get(key)) and value == defaults[key])
    }
    return {cls.__name__: told} if told else cls.__name__


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, Kind):
        return dump_kind(value)
    if isinstance(value, (list, tuple)):
        return [_plain(one, where) for one in value]
    if isinstance(value, Mapping):
        return {key: _plain(one, where) for key, one in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ConfigError(f"{where}: {value!r:.80} can't be written as text.")


def dump_at(at: Any) -> Any:
    """`at` as `parse_bays` takes it."""
    if isinstance(at, Role):
        return f"role.{at.name}"
    if isinstance(at, str):
        return at
    if isinstance(at, (list, tuple)):
        return [dump_at(one) for one in at]
    if getattr(at, "until", None) is not None:
        return {"span": [dump_at(at.what), dump_at(at.until)]}
    if getattr(at, "output", None) is not None:
        return {"part": [dump_at(at.what), *at.output]}
    if getattr(at, "before", False) and at.features is None:
        return {"before": dump_at(at.what)}
    if getattr(at, "features", None) is not None and not at.before:
        return {"at": dump_at(at.what), "features": at.features}
    raise ConfigError(f"at={at!r}: only roles, name patterns, parts, spans and lists of these can be written as text.")
