"""What to merge: the models, a method, its parameters. As YAML it is mergekit's own, with a few keys more.

mergekit: Goddard, Siriwardhana, Ehghaghi, Meyers, Karpukhin, Benedict, McQuade and Solawetz, "Arcee's MergeKit: A
Toolkit for Merging Large Language Models", 2024 (arXiv 2403.13257).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError, listed

DTYPES = ("bfloat16", "float16", "float32", "float64")
SHARD = 5_000_000_000
NOT_YET = {
    "modules": "one entry a part of the network; give `models`",
    "tokenizer": "vocabularies are not put together; give models with one vocabulary",
    "chat_template": "the base's own is copied; change chat_template.jinja afterwards",
    "residual_weight": "leave it out",
}


@dataclass(frozen=True)
class Source:
    """A checkpoint, and the parameters that hold for it alone."""

    model: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """How one checkpoint is made of several.

    **Arguments:**

    - method: linear, task_arithmetic, ties, dare_linear, dare_ties or slerp.
    - models: folders, or Sources with parameters of their own.
    - base: what task vectors are differences from, or where SLERP begins; config and tokenizer are copied from it, or
      else from the first model.
    - parameters: weight, density, normalize, lambda, t, for all models: a number; a list of numbers, a gradient over
      the layers from first to last; or [{filter: mlp, value: …}, {value: …}], where the first filter that is part of a
      tensor's name is taken. What a model's own parameters say goes first.
    - dtype: what is written; the base's own unless told.
    - keep: patterns (`*.position_ids`) of tensors that stay as the base has them, or are left out if it has not.
    - any_tokenizer: merge embeddings row by row although the models' vocabularies differ.
    - seed: of DARE's draws; shard: most bytes a file.

    Raises ConfigError for what makes no sense.
    """

    method: str
    models: Sequence[str | Source]
    base: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    keep: Sequence[str] = ()
    any_tokenizer: bool = False
    seed: int = 0
    shard: int = SHARD

    def __post_init__(self) -> None:
        plain = lambda given: {name: numbers(setting) for name, setting in given.items()}
        sources = [one if isinstance(one, Source) else Source(str(one)) for one in self.models]
        sources = tuple(Source(one.model, plain(one.parameters)) for one in sources)
        object.__setattr__(self, "parameters", plain(self.parameters))
        object.__setattr__(self, "models", sources)
        object.__setattr__(self, "keep", tuple(self.keep))
        names = [source.model for source in sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"models: {listed(twice)} is given twice; give it once, with the sum of its weights.")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"dtype={self.dtype!r}: it must be one of {', '.join(DTYPES)}.")
        if not isinstance(self.shard, int) or self.shard < 1:
            raise ConfigError(f"shard={self.shard!r}: a number of bytes is wanted, such as 5GB.")
        for where, given in (("parameters", self.parameters), *((s.model, s.parameters) for s in sources)):
            for name, setting in given.items():
                check(f"{where}: {name}", setting)

    @property
    def sources(self) -> tuple[Source, ...]:
        return self.models  # type: ignore[return-value]

    def dump(self) -> dict[str, Any]:
        """As the YAML has it."""
        said: dict[str, Any] = {"merge_method": self.method}
        said |= {"base_model": self.base} if self.base is not None else {}
        said["models"] = [
            {"model": source.model} | ({"parameters": dict(source.parameters)} if source.parameters else {})
            for source in self.sources
        ]
        plain = {"parameters": dict(self.parameters), "dtype": self.dtype, "keep": list(self.keep)}
        plain |= {"any_tokenizer": self.any_tokenizer, "seed": self.seed}
        said |= {key: value for key, value in plain.items() if value}
        return said | ({"shard": self.shard} if self.shard != SHARD else {})

    def text(self) -> str:
        return yaml.safe_dump(self.dump(), sort_keys=False, allow_unicode=True)

    def gradients(self) -> bool:
        """Whether anything depends on the layer."""
        said = (self.parameters, *(source.parameters for source in self.sources))
        return any(_graded(setting) for given in said for setting in given.values())


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The YAML file of a recipe; raises ConfigError if there is none."""
    try:
        said = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: it can't be read as YAML ({' '.join(str(error).split())}).") from None
    if not isinstance(said, dict):
        raise ConfigError(f"{path}: it has no keys; `merge_method` and `models` are wanted.")
    return said


def recipe(said: Mapping[str, Any], where: str = "the recipe") -> Recipe:
    """A Recipe of mergekit's keys, or modbay's; raises ConfigError for keys that it does not know, or can't do."""
    said = {key: value for key, value in said.items() if value is not None}
    for key, why in NOT_YET.items():
        if key in said:
            raise ConfigError(f"{where}: {key} can't be had yet: {why}.")
    if sum(key in said for key in ("models", "slices")) != 1:
        raise ConfigError(f"{where}: `models` is wanted: a list of {{model: FOLDER, parameters: {{weight: 0.5}}}}.")
    models = said.get("models")
    parameters = _mapping(said.get("parameters"), f"{where}: parameters")
    if models is None:
        models, parameters = _one_slice(said["slices"], parameters, where)
    names = {
        "method": ("merge_method", "method"), "base": ("base_model", "base"), "dtype": ("out_dtype", "dtype"),
        "keep": ("keep",), "any_tokenizer": ("any_tokenizer",), "seed": ("seed",), "shard": ("shard",),
    }  # fmt: skip
    known = {"models", "slices", "parameters", "tokenizer_source", "out"}.union(*names.values())
    odd = [key for key in said if key not in known]
    if odd:
        raise ConfigError(f"{where}: unknown keys {listed(odd)}; it takes {', '.join(sorted(known))}.")
    given = {
        field: next(said[key] for key in keys if key in said)
        for field, keys in names.items()
        if any(key in said for key in keys)
    }
    if "method" not in given:
        raise ConfigError(f"{where}: `merge_method` is wanted: linear, task_arithmetic, ties, dare_ties, slerp …")
    if said.get("tokenizer_source") == "union":
        raise ConfigError(
            f"{where}: tokenizer_source: union: vocabularies are not put together; give base, or nothing."
        )
    for name in ("method", "base", "dtype"):
        if not isinstance(given.get(name, ""), str):
            raise ConfigError(f"{where}: {name}={given[name]!r}: a name is wanted.")
    if "shard" in given:
        given["shard"] = octets(given["shard"])
    if isinstance(given.get("keep"), str):
        given["keep"] = [given["keep"]]
    return Recipe(models=_sources(models, where), parameters=parameters, **given)


def octets(said: Any) -> int:
    """5GB, 500MB or a number, as bytes."""
    text, units = str(said).strip().upper(), {"GB": 10**9, "MB": 10**6, "KB": 10**3, "B": 1, "": 1}
    digits = text.rstrip("GKMB ")
    try:
        return int(float(digits) * units[text[len(digits) :].strip()])
    except (ValueError, KeyError, OverflowError):
        raise ConfigError(f"shard={said!r}: a number of bytes is wanted, such as 5GB or 500MB.") from None


def _sources(models: Any, where: str) -> list[Source]:
    if not isinstance(models, list) or not models:
        raise ConfigError(f"{where}: models={models!r:.80}: a list of folders is wanted.")
    made = []
    for one in models:
        one = {"model": one} if isinstance(one, str) else one
        if (
            not isinstance(one, Mapping)
            or not isinstance(one.get("model"), str)
            or one.keys() - {"model", "parameters"}
        ):
            raise ConfigError(f"{where}: models: {one!r:.80}: {{model: FOLDER, parameters: {{…}}}} is wanted.")
        made.append(Source(one["model"], _mapping(one.get("parameters"), f"{where}: {one['model']}: parameters")))
    return made


def _mapping(said: Any, where: str) -> dict[str, Any]:
    if said is not None and not isinstance(said, Mapping):
        raise ConfigError(f"{where}: {said!r:.80}: names and values are wanted, such as {{weight: 0.5}}.")
    return dict(said or {})


def _one_slice(slices: Any, parameters: dict[str, Any], where: str) -> tuple[list[Any], dict[str, Any]]:
    """`slices` that say no more than `models`: one slice of the same layers of each; its parameters go before all's."""
    one = slices[0] if isinstance(slices, list) and len(slices) == 1 else None
    sources = one.get("sources") if isinstance(one, Mapping) and not one.keys() - {"sources", "parameters"} else None
    ranges = [s.get("layer_range") if isinstance(s, Mapping) else None for s in sources or [None]]
    if not sources or any(r != ranges[0] or not isinstance(r, list) or r[0] != 0 for r in ranges):
        raise ConfigError(
            f"{where}: slices that cut or stack layers can't be had yet: one slice of all layers of each model can, "
            f"and means the same as `models`."
        )
    models = [{key: value for key, value in source.items() if key != "layer_range"} for source in sources]
    return models, parameters | _mapping(one.get("parameters"), f"{where}: slices: parameters")  # type: ignore[union-attr]


# A setting: a number, a gradient, or values by filter


def _graded(setting: Any) -> bool:
    if isinstance(setting, Mapping):
        return _graded(setting.get("value"))
    return isinstance(setting, list) and any(_graded(one) if isinstance(one, Mapping) else True for one in setting)


def numbers(setting: Any) -> Any:
    """With 1e-3 as a number, which is text in YAML."""
    if isinstance(setting, Mapping):
        return {key: numbers(one) if key == "value" else one for key, one in setting.items()}
    if isinstance(setting, list):
        return [numbers(one) for one in setting]
    try:
        return float(setting) if isinstance(setting, str) else setting
    except ValueError:
        return setting


def check(where: str, setting: Any) -> None:
    """Raise ConfigError for what is no setting."""
    number = lambda one: isinstance(one, (bool, int, float)) and math.isfinite(one)
    if number(setting) or (where.endswith("rescale") and setting in ("l1", "density")):
        return
    if isinstance(setting, Mapping):
        odd = setting.keys() - {"value", "filter"} or not isinstance(setting.get("filter", ""), (str, type(None)))
        if "value" not in setting or odd or isinstance(setting["value"], Mapping):
            raise ConfigError(f"{where}={setting!r:.80}: {{filter: PART OF A NAME, value: …}} is wanted.")
        check(where, setting["value"])
        return
    if isinstance(setting, list) and setting and all(number(one) for one in setting):
        return
    if isinstance(setting, list) and setting and all(isinstance(one, Mapping) for one in setting):
        for one in setting:
            check(where, one)
        return
    raise ConfigError(
        f"{where}={setting!r:.80}: a number, a list of numbers (from the first layer to the last), or a list of "
        f"{{filter: PART OF A NAME, value: …}} is wanted."
    )


def evaluate(setting: Any, name: str, depth: float) -> Any:
    """The value for a tensor at depth 0 … 1 of its layers; None if no filter is part of its name."""
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    if isinstance(setting[0], Mapping):
        for one in setting:
            wanted = one.get("filter")
            if wanted is None or wanted == "*" or wanted in name:
                return evaluate(one["value"], name, depth)
        return None
    scaled = depth * (len(setting) - 1)
    low = int(scaled)
    high = min(len(setting) - 1, low + 1)
    return (1 - (scaled - low)) * setting[low] + (scaled - low) * setting[high]


def first(settings: Iterable[Mapping[str, Any]], parameter: str, name: str, depth: float, default: Any) -> Any:
    """The value by the first of several groups of settings that says one."""
    for given in settings:
        value = evaluate(given[parameter], name, depth) if parameter in given else None
        if value is not None:
            return value
    return default
