"""What a comparison is: a run's arguments, given once, and the methods that they are tried with."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from ...errors import ConfigError, listed
from ...methods import METHODS
from .._build import DEFAULT
from .._config import Config, config
from .._run import write_text
from ._baselines import BASELINES

ALL = (*METHODS, *BASELINES)
ALONE = ("full", "probe", "sequence")  # the run's module and sites are not theirs: they have, or want, their own
MAY = ("method", "title", "module", "at", "options", "bays", "lr", "router_lr", "head_lr", "warmup", "weight_decay",
       "clip")  # fmt: skip
NAME = re.compile(r"[\w+-][\w+. -]*")


@dataclass(frozen=True)
class Entry:
    """One method of a comparison. own: what it is given that the others are not; baseline: whether it needs no base."""

    name: str
    method: str
    title: str
    own: dict[str, Any]
    baseline: bool = False


@dataclass(frozen=True)
class Comparison:
    """Methods on the same data, splits, steps and seeds. config: what all have; reference: whom differences are to."""

    config: Config
    entries: dict[str, Entry]
    seeds: tuple[int, ...]
    reference: str

    def run(self, entry: Entry, seed: int) -> Config:
        """The run of a method and a seed; raises ConfigError for what it can't be given."""
        all_have = self.config.dump() | {"seed": seed}
        if entry.method in ALONE:
            all_have = {key: value for key, value in all_have.items() if key not in ("module", "at")}
        own = {key: value for key, value in entry.own.items() if key not in ("title", "method")}
        method = {} if "bays" in own or entry.baseline else {"method": entry.method}
        return config({**all_have, **method, **own}, f"methods: {entry.name}")

    def dump(self) -> dict[str, Any]:
        """As YAML takes it."""
        asked = {key: value for key, value in self.config.dump().items() if key != "seed"}
        methods = {name: dict(entry.own) for name, entry in self.entries.items()}
        return {**asked, "methods": methods, "seeds": list(self.seeds), "reference": self.reference}


def comparison(given: Mapping[str, Any], where: str = "the command line") -> Comparison:
    """A Comparison of a run's arguments, with `methods`, `seeds` and `reference` beside them.

    methods: names, or {NAME: {ARGUMENT: VALUE}}; a name that is no method's is a variant and says its `method`.
    Raises ConfigError for what is wrong in any of them.
    """
    given = dict(given)
    said, seeds, reference = (given.pop(name, None) for name in ("methods", "seeds", "reference"))
    for name in ("method", "bays", "options"):
        if given.get(name):
            raise ConfigError(
                f"{where}: {name}={given[name]!r}: a comparison has several methods, and says of each what is its own: "
                f"methods: {{private: {{lr: 0.001}}, polytropon: {{options: {{skills: 4}}}}}}."
            )
    entries = _entries(said if said is not None else list(ALL), where)
    seeds = (given.get("seed", 0),) if seeds is None else tuple(seeds if isinstance(seeds, list | tuple) else [seeds])
    if not seeds or any(isinstance(s, bool) or not isinstance(s, int) or s < 0 for s in seeds):
        raise ConfigError(f"{where}: seeds={list(seeds)!r}: whole numbers from 0 are wanted, as [0, 1, 2].")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"{where}: seeds={list(seeds)!r}: a seed comes twice; it would only give the same numbers.")
    if reference is None:
        reference = DEFAULT if DEFAULT in entries else next(iter(entries))
    if reference not in entries:
        raise ConfigError(f"{where}: reference={reference!r} is none of the methods {listed(entries, 20)}.")
    made = Comparison(config(given | {"seed": seeds[0]}, where), entries, seeds, reference)
    for entry in entries.values():
        made.run(entry, seeds[0])
    return made


def _entries(said: Any, where: str) -> dict[str, Entry]:
    if isinstance(said, str):
        said = [name.strip() for name in said.split(",") if name.strip()]
    if isinstance(said, Sequence):
        twice = [name for i, name in enumerate(said) if name in said[:i]]
        if twice:
            raise ConfigError(f"{where}: methods: {listed(twice)} twice. Variants need names of their own, in YAML.")
        said = dict.fromkeys(said)
    if not isinstance(said, Mapping) or len(said) < 2:
        raise ConfigError(f"{where}: methods={said!r}: two or more are wanted, by name or {{NAME: {{…}}}}.")
    return {str(name): _entry(str(name), own or {}, where) for name, own in said.items()}


def _entry(name: str, own: Any, where: str) -> Entry:
    place = f"{where}: methods: {name}"
    if not NAME.fullmatch(name):
        raise ConfigError(f"{place}: it names a folder: letters, digits, '+', '-', '_', '.' and spaces are wanted.")
    if not isinstance(own, Mapping):
        raise ConfigError(f"{place}: {own!r}: a mapping is wanted, {{lr: 0.001}}.")
    unknown = [key for key in own if key not in MAY]
    if unknown:
        raise ConfigError(
            f"{place}: {listed(unknown)} can't be its own: methods have the same data, splits, steps and base. Its own "
            f"may be {listed(MAY, 20)}."
        )
    method = own.get("method") or ("bays" if "bays" in own else name)
    if method not in ALL and method != "bays":
        near = get_close_matches(method, ALL, 1)
        more = f"did you mean {near[0]!r}?" if near else f"there are {listed(ALL, 20)}."
        variant = "" if "method" in own else f" A variant says its method: {{{name}: {{method: shared, …}}}}."
        raise ConfigError(f"{place}: there is no method {method!r}; {more}{variant}")
    baseline = method in BASELINES
    if baseline and set(own) - {"method", "title"}:
        raise ConfigError(f"{place}: {listed(set(own) - {'method', 'title'})}: a baseline has no arguments.")
    known = BASELINES[method].title if baseline else METHODS[method].title if method in METHODS else name
    return Entry(name, method, str(own.get("title") or (known if name == method else name)), dict(own), baseline)


def write_comparison(folder: Path, asked: Comparison, name: str) -> None:
    """compare.yaml, which runs it again."""
    text = yaml.safe_dump(asked.dump(), sort_keys=False, allow_unicode=True)
    write_text(folder / "compare.yaml", f"# modbay compare {name}/compare.yaml --out ANOTHER\n{text}")
