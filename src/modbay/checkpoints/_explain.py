"""What to expect of a merge before it is paid for: every tensor is read and merged, a piece at a time; none is kept."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import merging
from ..errors import ConfigError, FileError, listed
from ._expect import words
from ._layers import split
from ._merge import PIECE
from ._methods import METHODS, Core, Values
from ._plan import Plan, Step, prepare
from ._read import Checkpoint, open_checkpoint
from ._recipe import Recipe

VOTING = ("ties", "dare_ties")
BY_VECTOR = ("along", "cosine", "against", "still", "weight")  # what has no sense of differences from the mean


@dataclass
class Explanation:
    """What task vectors do to each other, in all tensors and by layer.

    models: whose task vectors they are; base: what from, None for the mean of the models. every: of all tensors;
    layers: of each layer. kept: tensors that are not merged. notes: the plan's.
    """

    method: str
    models: list[str]
    base: str | None
    dtype: str
    every: merging.Conflicts
    layers: dict[str, merging.Conflicts]
    tensors: int
    kept: int
    notes: list[str]

    @property
    def short(self) -> list[str]:
        """The models' names as short as they can be told apart."""
        parts = [name.rstrip("/").split("/") for name in self.models]
        for most in range(1, max(map(len, parts)) + 1):
            cut = ["/".join(one[-most:]) for one in parts]
            if len(set(cut)) == len(cut):
                return cut
        return self.models

    def words(self) -> list[str]:
        """What the figures mean, in sentences."""
        return words(self)

    def as_dict(self) -> dict[str, Any]:
        """For programs; `merging.Conflicts` says what each figure is. None: of nothing, or without meaning here."""
        return {
            "method": self.method,
            "base": self.base,
            "from": "the base" if self.base is not None else "the mean of the models",
            "dtype": self.dtype,
            "tensors": self.tensors,
            "kept": self.kept,
            **self.figures(self.every),
            "layers": [{"layer": name, **self.figures(one)} for name, one in self.layers.items()],
            "words": self.words(),
            "notes": self.notes,
        }

    def figures(self, one: merging.Conflicts) -> dict[str, Any]:
        """Those of all tensors, or of a layer, with the models' names."""
        whole = one.whole()
        named = zip(self.models, self.short, one.models(), strict=True)
        models: list[dict[str, Any]] = [{"model": name, "name": short, **said} for name, short, said in named]
        pairs = [{**said, "of": [self.short[i] for i in said["of"]]} for said in one.pairs()]
        voted = (
            ("trimmed", *(("outvoted",) if self.method in VOTING else ()))
            if "density" in METHODS[self.method].each
            else ()
        )
        for said in models:
            out = [key for key in ("trimmed", "outvoted") if key not in voted]
            said |= dict.fromkeys([*out, *(BY_VECTOR if self.base is None else ())])
        if self.base is None:  # the differences add up to nothing, whatever the models are
            whole |= dict.fromkeys(("cancelled", "kept", "unrelated"))
        return {"all": whole, "models": models, "pairs": pairs}


def explain(recipe: Recipe, base: str | None = None, watch: Callable[[float, str], None] | None = None) -> Explanation:
    """Sign conflicts, cosines, norms and interference of what a recipe would add up; nothing is written.

    base: what task vectors are differences from, if the method itself has none (linear, slerp): what the models were
    made from; a recipe's base that is none of its models is taken for it. Without one they are differences from the
    models' mean, which tell how far apart these are, and little more. watch(share done, name) is called after each
    tensor.

    Raises what `ready` raises for models that can't be merged, and FileError for a base that is not of their kind.
    """
    recipe, origin = _origin(recipe, base)
    plan = prepare(recipe)
    start = next((one for one in plan.inputs if one.name == origin), None)
    if origin is not None and start is None:
        start = _fits(open_checkpoint(origin), plan)
    which = [i for i, one in enumerate(plan.sources) if one is not start]
    names = [plan.sources[i].name for i in which]
    size, done = sum(step.place.size for step in plan.steps.values()), 0
    every, layers = merging.Conflicts.none(len(which)), {}
    with torch.no_grad():
        for name, step in plan.steps.items():
            if step.values is not None:
                found = _tensor(plan, step, start, which)
                every, layer = every + found, part(name)
                layers[layer] = layers.get(layer, merging.Conflicts.none(len(which))) + found
                for one in {id(one): one for one in (*plan.inputs, start) if one is not None}.values():
                    one.release(name)
            done += step.place.size
            if watch is not None:
                watch(done / size if size else 1.0, name)
    merged = [step for step in plan.steps.values() if step.values is not None]
    if not merged:
        raise ConfigError("models: no tensor would be merged, so that there is nothing to expect of it.")
    return Explanation(
        method=recipe.method,
        models=names,
        base=start.name if start is not None else None,
        dtype=str(merged[0].place.dtype)[6:],
        every=every,
        layers=dict(sorted(layers.items(), key=lambda item: _natural(item[0]))),
        tensors=len(merged),
        kept=len(plan.steps) - len(merged),
        notes=plan.notes,
    )


def _origin(recipe: Recipe, base: str | None) -> tuple[Recipe, str | None]:
    """(the recipe that the plan is made of, what task vectors are from)."""
    method = METHODS.get(recipe.method)
    if method is None or method.vectors:
        if base is not None and base != recipe.base:
            raise ConfigError(f"base={base!r}: {recipe.method} measures from the recipe's own, {recipe.base!r}.")
        return recipe, recipe.base
    names = [source.model for source in recipe.sources]
    apart = recipe.base is not None and recipe.base not in names and len(names) >= (method.exactly or 0)
    if apart:
        base, recipe = base or recipe.base, replace(recipe, base=None)
    elif base is None and recipe.base is not None and method.exactly is None:
        base = recipe.base  # it is averaged with what was made of it
    if base is not None and names == [base]:
        raise ConfigError(f"models: there is the base alone, {base!r}: give what was made of it.")
    return recipe, base


def _fits(base: Checkpoint, plan: Plan) -> Checkpoint:
    """Raise FileError for a base that lacks a tensor that is merged, or has it in another shape."""
    wanted = {name: step.place for name, step in plan.steps.items() if step.values is not None}
    odd = [
        name for name, place in wanted.items() if name not in base.entries or base.entries[name].shape != place.shape
    ]
    if odd:
        said = f"has it as {base.entries[odd[0]].shape}" if odd[0] in base.entries else "has none of that name"
        raise FileError(
            f"base={base.name!r}: {listed(odd)} can't be compared: {odd[0]!r} is {wanted[odd[0]].shape} in the models, "
            f"and it {said}. The base is what the models were made from; --keep leaves tensors out."
        )
    return base


# One tensor


def _tensor(plan: Plan, step: Step, start: Checkpoint | None, which: Sequence[int]) -> merging.Conflicts:
    name, method = step.place.name, plan.method
    assert step.values is not None
    tensors = [one.tensor(name) for one in plan.sources]
    base = plan.base.tensor(name) if plan.base is not None else None
    origin = start.tensor(name) if start is not None else None
    core = method.core(tensors, base, step.values)
    total = merging.Conflicts.none(len(which))
    flat = [None if t is None else t.view(-1) for t in (*tensors, base, origin)]
    for at in range(0, tensors[0].numel(), PIECE):
        *own, below, begin = [None if t is None else t[at : at + PIECE] for t in flat]
        total = total + _values(plan, step, core, own, below, begin, which, at)  # type: ignore[arg-type]
    return total


def _values(
    plan: Plan, step: Step, core: Core, tensors: Sequence[Tensor], base: Tensor | None, origin: Tensor | None,
    which: Sequence[int], at: int,
) -> merging.Conflicts:  # fmt: skip
    """Of some entries of one tensor, which begin at the place `at`."""
    wide = torch.promote_types(step.place.dtype, torch.float32)
    tensors = [t.to(wide) for t in tensors]
    base = None if base is None else base.to(wide)
    out = core.run(tensors, base, at)
    begin = torch.stack(list(tensors)).mean(0) if origin is None else origin.to(wide)
    vectors = [tensors[i] - begin for i in which]
    assert step.values is not None
    weights, kept = asked(step.values), core.kept
    return merging.conflicts(
        vectors,
        [weights[i] for i in which],
        merged=out - begin,
        base=begin,
        parts=[kept(i, t, at) for i, t in zip(which, vectors, strict=True)] if kept is not None else None,
        voting=plan.recipe.method in VOTING,
        rounded=out.to(step.place.dtype).to(wide) - begin if step.place.dtype != wide else None,
    )


def asked(values: Values) -> list[float]:
    """λ w_i, or λ w_i / Σ_j w_j: how far the merge is to go along each task vector."""
    weights = [float(one.get("weight", 1.0)) for one in values.each]
    total = sum(weights) if values.whole.get("normalize") else 1.0
    return [float(values.whole.get("lambda", 1.0)) * w / (total if abs(total) >= 1e-8 else 1.0) for w in weights]


# Layers


def part(name: str) -> str:
    """The layer of a tensor (`encoder.layer.3`); outside the layers, the module that it is in, two names deep."""
    where = split(name)
    return f"{where[0]}.{where[1]}".lstrip(".") if where is not None else ".".join(name.split(".")[:-1][:2]) or name


def _natural(name: str) -> list[tuple[int, str]]:
    """With 2 before 10."""
    return [(int(one), "") if one.isdigit() else (-1, one) for one in re.split(r"(\d+)", name)]
