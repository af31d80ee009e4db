"""What is asked of `extend`: whose rows, what the newcomer gets, and how that is trained."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ...errors import ConfigError, listed
from .._build import method_of
from .._config import Config, Source, config
from .._run import Run, open_run, read_json
from .._tasks import absolute

WAYS = ("both", "module", "head")
OWN = ("run", "data", "task", "fixed", "shots", "on", "ways")
LIKE = ("text", "target", "by", "kind", "group", "validation", "test", "module", "steps", "epochs", "batch",
        "accumulate", "lr", "router_lr", "head_lr", "warmup", "weight_decay", "clip", "sampling", "temperature",
        "probe", "bf16", "checkpointing", "keep", "evaluate_every", "save_every", "seed")  # fmt: skip
LEFT = ("data", "kind", "validation", "test", "method", "module", "at", "options", "bays", "steps", "epochs",
        "weight_decay", "keep", "evaluate_every", "save_every")  # fmt: skip
ARRIVED = "arrivals.json"  # how the rows of those that came later are read


@dataclass(frozen=True)
class Extension:
    """One extension of a run.

    **Arguments:**
    - run: the finished run. data: as of a Config: of the run's task, or {task: file} with old tasks or new ones.
    - fixed: labels that are the same in all rows, {"language": "fr"}, instead of a column. shots: rows a class that are
      learned from, drawn by the seed; None for all.
    - on: the modules of the run under the newcomer's own: names, "average", "nearest" or "none"; None keeps those that
      all rows use. ways: a "module" of its own, a "head" of its own, or "both".
    - more: arguments of a run, where they differ from that run's. config: all of them, as training takes them.
    """

    run: Run
    data: dict[str, Any]
    fixed: dict[str, str] = field(default_factory=dict)
    shots: int | None = None
    on: str | None = None
    ways: str = "both"
    more: dict[str, Any] = field(default_factory=dict)
    config: Config = field(default=None)  # type: ignore[assignment]

    def dump(self) -> dict[str, Any]:
        """As YAML takes it, and `extension` again."""
        own = {"fixed": self.fixed, "shots": self.shots, "on": self.on}
        given = {**own, "ways": None if self.ways == "both" else self.ways, **self.more}
        data = self.config.model_dump(mode="json", exclude_none=True)["data"]
        said = {name: one for name, one in given.items() if one is not None and one != {}}  # a share of 0 is said, too
        return {"run": str(self.run.folder), "data": data, **said}


def extension(given: Mapping[str, Any], where: str = "the command line") -> Extension:
    """An Extension of the names above; raises ConfigError for what can't be meant. task: the name of bare data."""
    _known(given, where)
    run = open_run(Path(given["run"]).resolve())
    more = {name: value for name, value in given.items() if name in LIKE}
    if "by" in more:
        more["by"] = _labels(run, more["by"])
    ways, shots, on = given.get("ways") or "both", given.get("shots"), given.get("on")
    if ways not in WAYS:
        raise ConfigError(f"{where}: ways={ways!r}: there are {listed(WAYS)}.")
    if shots is not None and (not isinstance(shots, int) or shots < 1):
        raise ConfigError(f"{where}: shots={shots!r}: how many rows a class, from 1.")
    fixed = {str(label): str(value) for label, value in (given.get("fixed") or {}).items()}
    _labels(run, dict.fromkeys(fixed, ""))
    data = _named(run, given["data"], given.get("task"))
    asked = absolute(_config(run, data, more, where))
    return Extension(run, data, fixed, shots, on, ways, more, asked)


def _known(given: Mapping[str, Any], where: str) -> None:
    for name in ("run", "data"):
        if not given.get(name):
            raise ConfigError(f"{where}: {name!r} is missing")
    for name in given:
        if name in OWN or name in LIKE:
            continue
        if name in Config.model_fields:
            raise ConfigError(f"{where}: {name!r} is the run's own: what the others use stays as it is.")
        near = get_close_matches(name, [*OWN, *LIKE], 1)
        raise ConfigError(f"{where}: {name!r} is no argument" + (f", did you mean {near[0]!r}?" if near else ""))


def _labels(run: Run, given: Any) -> dict[str, str]:
    """{label: column}; raises ConfigError for a label that the run's rows do not have."""
    given = (
        {name: name for name in ([given] if isinstance(given, str) else given)}
        if not isinstance(given, dict)
        else given
    )
    unknown = [label for label in given if label not in run.config.by]
    if unknown:
        have = f"its rows have {listed(run.config.by)}" if run.config.by else "it was trained without any"
        raise ConfigError(
            f"by={unknown[0]!r}: the run knows no such label; {have}. --task NAME adds rows as a new task."
        )
    return given


def _named(run: Run, data: Any, task: str | None) -> dict[str, Any]:
    """The data by task."""
    if isinstance(data, dict):
        if task is not None:
            raise ConfigError(f"task={task!r}: the data names its tasks itself, {listed(data)}.")
        return data
    if task is None and len(run.known["kinds"]) > 1:
        raise ConfigError(
            f"data: the run has the tasks {listed(run.known['kinds'])}: say which, TASK=FILE. A new name is a new task."
        )
    return {task or next(iter(run.known["kinds"])): data}


def _config(run: Run, data: Mapping[str, Any], more: Mapping[str, Any], where: str) -> Config:
    """The run's own, for the newcomer's rows, with what was said otherwise."""
    own, columns = run.config, sources_of(run)
    said = {name: more.get(name) for name in ("text", "target", "kind", "validation", "test")}
    sources: dict[str, Any] = {}
    for name, path in data.items():
        new = name not in run.known["kinds"]
        like = None if new else columns.get(name)
        given = dict(path) if isinstance(path, dict) else {"path": path}
        for key in ("text", "target"):
            given.setdefault(key, said[key] or getattr(own if like is None else like, key))
        kind = run.known["kinds"].get(name)
        if not new and (given.get("kind") or said["kind"] or kind) != kind:
            raise ConfigError(
                f"{where}: kind={given.get('kind') or said['kind']!r}: task {name!r} is {kind} in the run."
            )
        given.setdefault("kind", kind or said["kind"] or _like(run))
        for key in ("validation", "test"):
            share = getattr(own, key)
            default = share if not isinstance(share, str) else Config.model_fields[key].default
            given.setdefault(key, default if said[key] is None else said[key])
        sources[name] = given
    start = {name: value for name, value in own.dump().items() if name not in LEFT}
    method = method_of(own)
    rate = (own.router_lr or 0) or (more.get("lr") or own.lr) * (1.0 if method is None else method.router_lr)
    rest = {name: value for name, value in more.items() if name not in said}
    rest["by"] = {**own.by, **(more.get("by") or {})}
    return config({**start, "router_lr": rate, **rest, "data": sources}, where)


def _like(run: Run) -> str:
    """The kind of a new task, if nothing is said: the one of the run's."""
    kinds = set(run.known["kinds"].values())
    return kinds.pop() if len(kinds) == 1 else run.known["kind"]


def sources_of(run: Run) -> dict[str, Source]:
    """How the rows of each of a run's tasks are read, those that came later included."""
    out = dict(run.config.sources)
    for _, one in arrived(run):
        out = {**one.sources, **out}
    return out


def arrived(run: Run) -> list[tuple[dict[str, str], Config]]:
    """(labels that are the same in all rows, how the rows are read) of each extension that led to a run, in order."""
    file = run.folder / ARRIVED
    if not file.is_file():
        return []
    return [(one["fixed"], config(one["config"], str(file))) for one in read_json(file)["arrivals"]]
