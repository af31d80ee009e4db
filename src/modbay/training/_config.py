"""What a run is: the same names are the Python arguments, the flags and the YAML file."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..errors import ConfigError, listed

Kind = Literal["classification", "regression", "tagging", "causal", "masked", "seq2seq"]


class _Strict(BaseModel):
    """A typo is an error, not an option that does nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Source(_Strict):
    """One task's data, where it differs from what the run says for all of them."""

    path: str | list[str]
    text: str | list[str] | None = None
    target: str | None = None
    kind: Kind | None = None
    validation: str | float | None = None
    test: str | float | None = None


class Config(_Strict):
    """All of a run. Only `data` and `base` must be given.

    **Arguments:**
    - base: a folder with a transformers model, or its id on the hub; revision: of the hub; layers: only its first n.
    - data: a file (CSV, TSV, JSONL, Parquet), a folder of them or a `datasets` id; several tasks as {name: file}.
    - text, target: the columns; two texts as [one, other]. group: a column whose rows never part over splits.
    - kind: of the task. by: labels to route by, {label: column}. validation, test: a share of the rows, or a file.
    - method: a named composition (`modbay methods`); module, at, options: its kind, sites and arguments. bays: spelled
      out instead of a method.
    - steps, or epochs; batch: examples a step, over all processes; accumulate: parts that a step is computed in.
    - lr: of modules; router_lr, head_lr: of routers and heads. Rates rise for `warmup` of the steps, then fall to zero.
    - sampling: how tasks and labels are drawn, ∝ n, ∝ n^(1/temperature), or alike.
    - pool, hidden: how a text becomes one vector; standardise: features to mean 0, deviation 1; probe: steps of the
      linear probe that heads start from, 0 for a random start. dropout: of the base; None: as its config says.
    - streaming: rows are read as they are needed and not held, each task's drawn through a buffer of so many; sampling
      then balances tasks alone, and `steps` must be given.
    - licence: of the modules, as their files then say.
    - keep: the modules of the best validation score, or of the last step. evaluate_every: steps; None: ten times a run.
    """

    base: str
    data: str | list[str] | dict[str, str | list[str] | Source]
    revision: str | None = None
    layers: int | None = Field(None, ge=1)
    kind: Kind = "classification"
    text: str | list[str] = "text"
    target: str = "target"
    by: dict[str, str] = Field(default_factory=dict)
    group: str | None = None
    validation: str | float = 0.1
    test: str | float = 0.2
    method: str | None = None
    module: str | dict[str, Any] | None = None
    at: str | list[str] | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    bays: list[dict[str, Any]] | None = None
    steps: int | None = Field(None, ge=0)
    epochs: float = Field(3.0, gt=0)
    batch: int = Field(32, ge=1)
    accumulate: int = Field(1, ge=1)
    lr: float = Field(1e-3, gt=0)
    router_lr: float | None = Field(None, gt=0)
    head_lr: float | None = Field(None, gt=0)
    warmup: float = Field(0.05, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, gt=0)
    sampling: Literal["proportional", "temperature", "uniform"] = "temperature"
    temperature: float = Field(2.0, ge=1)
    pool: list[Literal["mean", "max", "first", "last"]] = ["mean"]
    hidden: list[int] = [-1]
    standardise: bool = True
    probe: int = Field(300, ge=0)
    dropout: float | None = Field(0.0, ge=0, lt=1)
    max_length: int = Field(128, ge=4)
    bf16: bool = False
    checkpointing: bool = False
    keep: Literal["best", "last"] = "best"
    evaluate_every: int | None = Field(None, ge=1)
    save_every: int | None = Field(None, ge=1)
    streaming: bool = False
    buffer: int = Field(10_000, ge=1)
    seed: int = Field(0, ge=0)
    licence: str | None = Field(None, min_length=1)

    @field_validator("by", mode="before")
    @classmethod
    def _columns(cls, given: Any) -> Any:
        """`language`, [language, customer] and {language: lang} are all understood."""
        if isinstance(given, str):
            given = [given]
        return {name: name for name in given} if isinstance(given, list) else given

    @field_validator("pool", "hidden", mode="before")
    @classmethod
    def _several(cls, given: Any) -> Any:
        return given if isinstance(given, list) else [given]

    @model_validator(mode="after")
    def _together(self) -> "Config":
        if self.method is not None and self.bays is not None:
            raise ValueError("method and bays exclude each other: a method's name, or bays spelled out")
        if "task" in self.by:
            raise ValueError("by: 'task' is always a label, the name of the data's task; choose another name")
        if self.batch % self.accumulate:
            raise ValueError(f"batch={self.batch} is no multiple of accumulate={self.accumulate}")
        for name in ("validation", "test"):
            share = getattr(self, name)
            if not isinstance(share, str) and not 0 <= share < 1:
                raise ValueError(f"{name}={share}: a share of the rows, from 0 to below 1, or a file")
        return self

    @property
    def sources(self) -> dict[str, Source]:
        """The tasks by name; a single one is named as its file is."""
        if isinstance(self.data, dict):
            given = {name: one if isinstance(one, Source) else Source(path=one) for name, one in self.data.items()}
        else:
            first = self.data if isinstance(self.data, str) else self.data[0]
            given = {Path(first).name.split(".")[0] or "task": Source(path=self.data)}
        blank = {"text": self.text, "target": self.target, "kind": self.kind}
        blank |= {"validation": self.validation, "test": self.test}
        return {
            name: one.model_copy(update={k: v for k, v in blank.items() if getattr(one, k) is None})
            for name, one in given.items()
        }

    def dump(self) -> dict[str, Any]:
        """What differs from the defaults, as YAML takes it."""
        return self.model_dump(mode="json", exclude_defaults=True)


def config(given: dict[str, Any], where: str = "the command line") -> Config:
    """A Config, or a ConfigError that names each wrong argument, its value, and what was meant."""
    try:
        return Config(**given)
    except ValidationError as error:
        said = [_said(one, given) for one in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(dict.fromkeys(said)) + ".") from None


def read_config(path: str | Path) -> dict[str, Any]:
    """The mapping of a YAML file; raises ConfigError for what is none."""
    try:
        read = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: it is no YAML ({' '.join(str(error).split())}).") from None
    if not isinstance(read, dict):
        raise ConfigError(f"{path}: a run's file is a mapping (base: …, data: …), not a {type(read).__name__}.")
    return read


def _said(error: Any, given: dict[str, Any]) -> str:
    """One of pydantic's errors as a clause."""
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        name, known = str(error["loc"][-1]), Config.model_fields if len(error["loc"]) == 1 else Source.model_fields
        near = get_close_matches(name, known, 1)
        return f"{place!r} is no argument" + (
            f", did you mean {near[0]!r}?" if near else f"; there are {listed(known)}"
        )
    if error["type"] == "missing":
        return f"{place!r} is missing"
    what = error["msg"].removeprefix("Value error, ")
    return f"{place}={error['input']!r}: {what[0].lower()}{what[1:]}" if place else what
