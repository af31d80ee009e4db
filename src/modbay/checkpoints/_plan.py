"""What will be done, and everything that could go wrong, found before a tensor is merged."""

import fnmatch
import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, FileError, listed
from ..merging import named
from . import _vocabulary
from ._layers import Layers
from ._methods import METHODS, RESCALE, Method, Values
from ._read import Checkpoint, open_checkpoint
from ._recipe import Recipe, first
from ._write import Place, Shard, shards

COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py", ".vocab", ".bpe")
LEFT = ("model.safetensors.index.json", "README.md", "modbay_merge.json", "pytorch_model.bin.index.json")
SPARE = 16 << 20  # bytes, for what is beside the tensors
HARMLESS = {
    "_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "architectures", "id2label",
    "label2id", "_commit_hash", "_attn_implementation_autoset", "finetuning_task", "problem_type",
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One tensor: merged by `values`, or copied from the donor if there are none."""

    place: Place
    values: Values | None


@dataclass
class Plan:
    """A merge that is ready. sources: without the base, if it is what they are differences from; donor: whose config,
    tokenizer and kept tensors are taken; copied: its files beside the tensors."""

    recipe: Recipe
    method: Method
    sources: list[Checkpoint]
    base: Checkpoint | None
    donor: Checkpoint
    steps: dict[str, Step]
    shards: list[Shard]
    copied: list[Path]
    notes: list[str]

    @property
    def size(self) -> int:
        """Bytes that will be written."""
        return sum(shard.size for shard in self.shards)

    @property
    def inputs(self) -> list[Checkpoint]:
        return [*([self.base] if self.base is not None else []), *self.sources]

    def digest(self) -> str:
        """Of all that the output follows from: what is half done by another digest can't be gone on with."""
        files = [file for one in self.inputs for file in one.files]
        stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        said = json.dumps([self.recipe.dump(), stats, [shard.file for shard in self.shards]])
        return hashlib.sha256(said.encode()).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        merged = [name for name, step in self.steps.items() if step.values is not None]
        return {
            "recipe": self.recipe.dump(),
            "models": [
                {"model": one.name, "commit": one.commit, "tensors": len(one.entries), "files": len(one.files)}
                for one in self.inputs
            ],
            "base": self.base.name if self.base is not None else None,
            "config_from": self.donor.name,
            "merged": len(merged),
            "kept": [name for name, step in self.steps.items() if step.values is None],
            "parameters": groups(self.steps),
            "files": {shard.file: shard.size for shard in self.shards}
            | {f.name: f.stat().st_size for f in self.copied},
            "bytes": self.size,
            "notes": self.notes,
        }


def prepare(recipe: Recipe) -> Plan:
    """Open everything, and refuse what can't be merged; raises ConfigError and FileError."""
    method = _method(recipe)
    sources, base = _opened(recipe, method)
    everyone = [*([base] if base is not None else []), *sources]
    donor = next((one for one in everyone if one.name == recipe.base), everyone[0])
    notes = [f"{one.name} is {one.repository} of the hub at {one.commit}" for one in everyone if one.commit]
    notes += _configs(everyone, donor)
    names = _names(recipe, everyone, donor)
    _shapes(everyone, donor, names)
    _types(recipe, everyone, donor, names)
    notes += _vocabulary.check(everyone, donor, recipe.any_tokenizer)
    layers = Layers(donor.entries, donor.config) if recipe.gradients() else None
    steps: dict[str, Step] = {}
    for name in sorted(donor.entries, key=lambda name: (str(donor.entries[name].file), donor.entries[name].start)):
        entry = donor.entries[name]
        floating = entry.dtype.is_floating_point
        dtype = getattr(torch, recipe.dtype) if recipe.dtype and floating else entry.dtype
        values = _values(recipe, method, sources, name, layers) if name in names and floating else None
        steps[name] = Step(Place(name, dtype, entry.shape), values)
    _integers(everyone, donor, names)
    _unused(recipe, method)
    made = shards([step.place for step in steps.values()], recipe.shard)
    return Plan(recipe, method, sources, base, donor, steps, made, _beside(donor.folder), notes)


def _method(recipe: Recipe) -> Method:
    method = METHODS.get(recipe.method)
    if method is None:
        raise ConfigError(f"method={recipe.method!r}: there is no such method here; there are {', '.join(METHODS)}.")
    if method.vectors and recipe.base is None:
        raise ConfigError(
            f"method={recipe.method}: it adds what models changed of the one that they began from: give that, as base."
        )
    known = {*method.each, *method.whole}
    for where, given in (("parameters", recipe.parameters), *((s.model, s.parameters) for s in recipe.sources)):
        odd = [name for name in given if name not in known]
        if odd:
            raise ConfigError(f"{where}: {recipe.method} has no parameter {listed(odd)}; it has {', '.join(known)}.")
        whole = [name for name in given if name in method.whole] if given is not recipe.parameters else []
        if whole:
            raise ConfigError(f"{where}: {listed(whole)} is of the whole merge: move it to the recipe's parameters.")
    return method


def _opened(recipe: Recipe, method: Method) -> tuple[list[Checkpoint], Checkpoint | None]:
    """(the models, the base if it is apart from them)."""
    names = [source.model for source in recipe.sources]
    if method.exactly is not None:
        base = recipe.base if recipe.base is not None else names[0]
        names = [base, *(name for name in names if name != base)]
        if len(names) != method.exactly:
            raise ConfigError(f"method={recipe.method}: it takes {method.exactly} models; there are {listed(names)}.")
        return [open_checkpoint(name) for name in names], None
    if not method.vectors:
        if recipe.base is not None and recipe.base not in names:
            raise ConfigError(
                f"base={recipe.base!r}: {recipe.method} has no base, and it is none of the models: leave it out, or "
                f"give it among them, with its weight."
            )
        return [open_checkpoint(name) for name in names], None
    others = [name for name in names if name != recipe.base]
    if not others:
        raise ConfigError(f"models: there is the base alone, {recipe.base!r}: give what was made of it.")
    assert recipe.base is not None
    return [open_checkpoint(name) for name in others], open_checkpoint(recipe.base)


def _configs(everyone: Sequence[Checkpoint], donor: Checkpoint) -> list[str]:
    """What the configs say differently, as notes; raises FileError for other architectures and quantised models."""
    notes = [] if donor.config else [f"{donor.name} has no config.json: the tensors are merged by name alone."]
    for one in everyone:
        if "quantization_config" in one.config:
            raise FileError(f"{one.name}/config.json: the model is quantised: merge what it was made from.")
        mine, its = donor.config.get("model_type"), one.config.get("model_type")
        if donor.config and one.config and mine != its:
            raise FileError(
                f"{one.name}/config.json: model_type is {its!r}, that of {donor.name} is {mine!r}: only models of one "
                f"architecture can be merged."
            )
        if one.config and donor.config:
            keys = sorted((one.config.keys() | donor.config.keys()) - HARMLESS)
            odd = [key for key in keys if one.config.get(key) != donor.config.get(key)]
            said = ", ".join(f"{key} {donor.config.get(key)!r:.30} / {one.config.get(key)!r:.30}" for key in odd[:6])
            notes += [f"config.json of {donor.name}, which is copied, and {one.name} differ: {said}"] if odd else []
    return notes


def kept(recipe: Recipe, name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in recipe.keep)


def _names(recipe: Recipe, everyone: Sequence[Checkpoint], donor: Checkpoint) -> set[str]:
    """The names of what is merged; raises FileError where the models' differ."""
    wanted = {name for name in donor.entries if not kept(recipe, name)}
    for pattern in recipe.keep:
        if not any(fnmatch.fnmatchcase(name, pattern) for one in everyone for name in one.entries):
            raise ConfigError(f"keep={pattern!r}: no model has a tensor of such a name.")
    for one in everyone:
        missing = [name for name in donor.entries if name in wanted and name not in one.entries]
        extra = [name for name in one.entries if name not in donor.entries and not kept(recipe, name)]
        said = [f"lacks {listed(missing)}"] if missing else []
        said += [f"has {listed(extra)}, which {donor.name} lacks"] if extra else []
        if said:
            raise FileError(
                f"{one.name} {', and '.join(said)} ({_shape_of(one, donor, [*missing, *extra][0])}). Only models of "
                f"one architecture can be merged; keep=[{[*missing, *extra][0]!r}] leaves these as {donor.name} has "
                f"them, if at all."
            )
    return wanted


def _shape_of(one: Checkpoint, donor: Checkpoint, name: str) -> str:
    entry = one.entries.get(name) or donor.entries[name]
    return f"{name!r} is {entry.shape} in {entry.file.name}"


def _shapes(everyone: Sequence[Checkpoint], donor: Checkpoint, names: set[str]) -> None:
    for one in everyone:
        odd = [name for name in donor.entries if name in names and one.entries[name].shape != donor.entries[name].shape]
        if not odd:
            continue
        name = odd[0]
        mine, its = donor.entries[name], one.entries[name]
        vocabularies = one.config.get("vocab_size"), donor.config.get("vocab_size")
        words = vocabularies[0] != vocabularies[1] and its.shape[:1] == vocabularies[:1]
        why = (
            f"their vocabularies have {vocabularies[1]:,} and {vocabularies[0]:,} tokens: resize one "
            f"(model.resize_token_embeddings) so that equal rows are equal tokens, or"
            if words
            else "only models of one size can be merged;"
        )
        raise FileError(
            f"{listed(odd)} differ in shape: {name!r} is {mine.shape} in {mine.file} and {its.shape} in {its.file}; "
            f"{why} keep=[{name!r}] leaves it as {donor.name} has it."
        )


def _types(recipe: Recipe, everyone: Sequence[Checkpoint], donor: Checkpoint, names: set[str]) -> None:
    short = lambda entry: str(entry.dtype)[6:]
    for one in everyone:
        for name in (name for name in donor.entries if name in names):
            mine, its = donor.entries[name], one.entries[name]
            if mine.dtype == its.dtype:
                continue
            if not (mine.dtype.is_floating_point and its.dtype.is_floating_point):
                raise FileError(
                    f"{name!r} is {short(mine)} in {mine.file} and {short(its)} in {its.file}: not one thing."
                )
            if recipe.dtype is None:
                raise FileError(
                    f"{name!r} is {short(mine)} in {mine.file} and {short(its)} in {its.file}: say what is to be "
                    f"written, by dtype={short(mine)}, say (--dtype). They are added up in float32 in any case."
                )


def _integers(everyone: Sequence[Checkpoint], donor: Checkpoint, names: set[str]) -> None:
    """Integers have no mean: they must be equal. They are few, and the only values that are read here."""
    for name, entry in donor.entries.items():
        if name not in names or entry.dtype.is_floating_point:
            continue
        for one in everyone:
            if one is not donor and not torch.equal(one.tensor(name), donor.tensor(name)):
                raise FileError(
                    f"{name!r} {entry.shape}, {str(entry.dtype)[6:]}, differs in {entry.file} and "
                    f"{one.entries[name].file}: integers have no mean. keep=[{name!r}] takes those of {donor.name}."
                )


def _values(recipe: Recipe, method: Method, sources: Sequence[Checkpoint], name: str, layers: Layers | None) -> Values:
    """The parameters of one tensor; raises ConfigError for one that is missing or out of bounds."""
    depth = layers.depth(name) if layers is not None else 0.0
    own = {source.model: source.parameters for source in recipe.sources}
    each = tuple(
        {
            key: first((own.get(one.name, {}), recipe.parameters), key, name, depth, default)
            for key, default in method.each.items()
        }
        for one in sources
    )
    whole = {key: first((recipe.parameters,), key, name, depth, default) for key, default in method.whole.items()}
    for key, value in whole.items():
        if value is None:
            raise ConfigError(f"parameters: {recipe.method} wants {key}, and there is none for {name!r}.")
    for one, given in zip(sources, each, strict=True):
        if not 0 < given.get("density", 1.0) <= 1:
            raise ConfigError(
                f"{one.name}: density={given['density']!r} for {name!r}: the share that is kept, above 0 and at most 1."
            )
    if whole.get("normalize") and method.normalises and abs(sum(v["weight"] for v in each)) < 1e-8:
        raise ConfigError(
            f"weight: the weights of {name!r} add up to 0, so that they can't be normalised: set normalize to false."
        )
    if whole.get("rescale", True) not in RESCALE:
        raise ConfigError(f"parameters: rescale={whole['rescale']!r}: true, false, l1 or density is wanted.")
    return Values(each, whole, named(recipe.seed, name))


def _unused(recipe: Recipe, method: Method) -> None:
    """Raise ConfigError for parameters of a model that has none: the base that others are differences from."""
    for source in recipe.sources:
        if method.vectors and source.model == recipe.base and source.parameters:
            raise ConfigError(f"{source.model}: the base takes no parameters; what it is added to is itself.")


def _beside(folder: Path) -> list[Path]:
    """Config, tokenizer and the like."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and path.suffix in COPIED and path.name not in LEFT and not path.name.startswith(".")
    )


def groups(steps: Mapping[str, Step]) -> list[dict[str, Any]]:
    """Tensors that are merged by the same parameters, for people."""
    found: dict[str, dict[str, Any]] = {}
    for name, step in steps.items():
        if step.values is not None:
            said = {"models": [dict(one) for one in step.values.each], "all": dict(step.values.whole)}
            group = found.setdefault(json.dumps(said), {**said, "tensors": 0, "numbers": 0, "first": name})
            group["tensors"] += 1
            group["numbers"] += math.prod(step.place.shape)
    return list(found.values())


def room(out: Path, size: int) -> None:
    """Raise FileError if the output does not fit on its disk."""
    there = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(there).free
    if size + SPARE > free:
        raise FileError(
            f"{out}: {(size + SPARE) / 1e9:,.1f} GB are wanted, and {free / 1e9:,.1f} GB are free in {there}: choose "
            f"another disk (--out), or a smaller dtype."
        )
