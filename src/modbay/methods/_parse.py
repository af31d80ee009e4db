"""Bays from YAML: what `mb.attach` is given, by the names that modbay exports.

- name: language
  at: [role.query, "*.layer.*.value"]
  each: language                      # a module for each value of the label; or
  kind: {LoRA: {rank: 8}}             # modules: {en: LoRA, de: {LoRA: {rank: 4}}}; or count: 8
  router: {ByLabel: {label: language}}
  aggregator: WeightedSum
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ..abstract import Aggregator, Kind, Router
from ..errors import ConfigError, ModbayError, listed
from ..routing import ByLabel
from ..seams import at as wide
from ..seams import before, part, span
from ._at import place
from ._classes import checked, found, made, near, signature
from ._defaults import number
from ._spec import BaySpec, Values

KEYS = ("name", "at", "modules", "each", "count", "kind", "router", "aggregator")
SOURCES = ("modules", "each", "count")


def parse_bays(said: Any, values: Values | None = None) -> list[BaySpec]:
    """The bays of a list of mappings; `values` by label, for `each`. Raises ConfigError with all that is wrong."""
    if not isinstance(said, Sequence) or isinstance(said, str):
        raise ConfigError(f"bays: a list of mappings is wanted (- name: …), not {said!r:.80}.")
    wrong: list[str] = []
    out = [_gather(lambda one=one, i=i: _bay(one, values or {}, f"bays[{i}]"), wrong) for i, one in enumerate(said)]
    names = [spec.name for spec in out if spec is not None]
    wrong += [f"bays: two bays are named {name!r}." for name in dict.fromkeys(names) if names.count(name) > 1]
    if wrong:
        raise ConfigError("\n".join(wrong))
    return [spec for spec in out if spec is not None]


def parse_kind(said: Any, where: str = "module") -> Kind:
    """A kind: "LoRA" or {LoRA: {rank: 8}}. Raises ConfigError with all that is wrong."""
    return made(*_class(Kind, said, where), where)


def _gather(make: Callable[[], Any], wrong: list[str]) -> Any:
    """What it makes; or None, what was wrong being kept."""
    try:
        return make()
    except ModbayError as error:
        wrong.append(str(error))
        return None


def _bay(said: Any, values: Values, where: str) -> BaySpec:
    if not isinstance(said, Mapping):
        raise ConfigError(f"{where}: a mapping is wanted (name: …, at: …), not {said!r:.80}.")
    wrong = [f"{where}: a bay has no {key!r}{near(str(key), KEYS)}" for key in said if key not in KEYS]
    wrong += [f"{where}: {key!r} is missing." for key in ("name", "at") if key not in said]
    name = said.get("name", "")
    if "name" in said and (not isinstance(name, str) or not name or "." in name):
        wrong.append(f"{where}.name: {name!r}: text without '.', and not empty, is wanted.")
    at = _gather(lambda: _at(said.get("at", ""), f"{where}.at"), wrong)
    kinds = _gather(lambda: _modules(said, values, where), wrong)
    router = _gather(lambda: _part(Router, said.get("router", {"ByLabel": {"label": name}}), f"{where}.router"), wrong)
    rule = said.get("aggregator", "WeightedSum")
    aggregator = _gather(lambda: _part(Aggregator, rule, f"{where}.aggregator"), wrong)
    if isinstance(router, ByLabel) and kinds and router.table is not None:
        unknown = [m for several in router.table.values() for m in several if m not in kinds]
        if unknown:
            wrong.append(f"{where}.router: the table names {listed(unknown)}; the modules are {listed(kinds)}.")
    if wrong:
        raise ConfigError("\n".join(wrong))
    return BaySpec(name, at, kinds, router, aggregator)


def _modules(said: Mapping, values: Values, where: str) -> dict[str, Kind]:
    """The kinds by name, of whichever of the three forms there is."""
    given = [key for key in SOURCES if key in said]
    if len(given) != 1:
        have = f"{listed(given)} exclude each other" if given else "no modules"
        raise ConfigError(f"{where}: {have}: say modules: {{NAME: KIND}}, or kind with each: LABEL or count: NUMBER.")
    if given == ["modules"]:
        return _named(said, where)
    if "kind" not in said:
        raise ConfigError(f"{where}: {given[0]} says how many modules, but not of which kind (kind: LoRA).")
    kind = parse_kind(said["kind"], f"{where}.kind")
    if given == ["count"]:
        return {f"module{i}": kind for i in range(number(f"{where}.count", said["count"]))}
    label = said["each"]
    if label not in values:
        raise ConfigError(f"{where}.each: {label!r} is no label of the data{near(str(label), list(values))}")
    return dict.fromkeys(values[label], kind)


def _named(said: Mapping, where: str) -> dict[str, Kind]:
    if "kind" in said:
        raise ConfigError(f"{where}: each of modules has its kind; leave out 'kind', or say each or count.")
    given = said["modules"]
    if not isinstance(given, Mapping) or not given:
        raise ConfigError(f"{where}.modules: {{NAME: KIND}} is wanted, not {given!r:.80}.")
    wrong = [
        f"{where}.modules: {name!r}: a module's name is text without '.' and '/', and not empty."
        for name in given
        if not isinstance(name, str) or not name or "." in name or "/" in name
    ]
    out = {name: _gather(lambda n=name, k=kind: parse_kind(k, f"{where}.modules.{n}"), wrong)
           for name, kind in given.items()}  # fmt: skip
    if wrong:
        raise ConfigError("\n".join(wrong))
    return out


def _class(base: type, said: Any, where: str, other: Sequence[str] = ()) -> tuple[type, dict[str, Any]]:
    """(class, arguments) of "NAME" or {NAME: {…}}; nested kinds are made."""
    if isinstance(said, str):
        said = {said: {}}
    names = [key for key in said if key not in other] if isinstance(said, Mapping) else []
    if len(names) != 1:
        raise ConfigError(f"{where}: NAME or {{NAME: {{ARGUMENT: VALUE}}}} is wanted, not {said!r:.80}.")
    cls, arguments = found(base, names[0], where), said[names[0]]
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise ConfigError(
            f"{where}: {names[0]}: its arguments are a mapping, {{{next(iter(signature(cls)), 'NAME')}: …}}, not "
            f"{arguments!r:.80}."
        )
    inner = {
        key: parse_kind(v, f"{where}.{key}") if base is Kind and key == "kind" else v for key, v in arguments.items()
    }
    return cls, inner


def _part(base: type, said: Any, where: str) -> Any:
    """A router or aggregator; with per_site: true, what makes one a site."""
    per_site = said.get("per_site", False) if isinstance(said, Mapping) else False
    if not isinstance(per_site, bool):
        raise ConfigError(f"{where}.per_site: {per_site!r}: true or false is wanted.")
    cls, arguments = _class(base, said, where, ("per_site",))
    checked(cls, arguments, where)
    one = made(cls, arguments, where)  # so that what it says against its arguments is said now
    return partial(cls, **arguments) if per_site else one


def _at(said: Any, where: str) -> Any:
    """`at` of YAML: text, a list, {part: [WHAT, START, STOP]}, {span: [FIRST, LAST]}, {before: WHAT} or {at: WHAT,
    features: N}."""
    if isinstance(said, (list, tuple)) and said:
        return [_at(one, where) for one in said]
    if isinstance(said, str):
        return place(said)
    match said:
        case {"part": [what, int(start), int(stop)], **rest} if not rest:
            return part(_at(what, where), start, stop)
        case {"span": [first, last], **rest} if not rest:
            return span(_at(first, where), _at(last, where))
        case {"before": what, **rest} if not rest:
            return before(_at(what, where))
        case {"at": what, "features": int(features), **rest} if not rest:
            return wide(_at(what, where), features=features)
    raise ConfigError(
        f"{where}: {said!r:.80}: a role (role.ffn), a name pattern, {{part: [WHAT, START, STOP]}}, "
        f"{{span: [FIRST, LAST]}}, {{before: WHAT}}, {{at: WHAT, features: NUMBER}}, or a list of these is wanted."
    )
