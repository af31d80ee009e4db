"""State dicts to merge: what must fit, and the merge of each name by itself."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import MergeError, listed

State = Mapping[str, Tensor]


def each(
    method: str, models: Sequence[State], base: State | None, core: Callable[[str, list[Tensor], Tensor | None], Tensor]
) -> dict[str, Tensor]:
    """{name: core(name, the models' tensors, the base's)}, in the order of the first model.

    Tensors that are not of floating point (counters, position ids) must be equal in all, and are taken as they are.
    Raises MergeError where names, shapes, dtypes or devices differ, and for a result that is not finite.
    """
    fit(method, models, base)
    merged = {}
    for name, first in models[0].items():
        tensors, start = [model[name] for model in models], None if base is None else base[name]
        out = core(name, tensors, start) if first.is_floating_point() else first.detach().clone()
        if out.is_floating_point() and not bool(out.isfinite().all()):
            alike = tensors if start is None else [*tensors, start]
            if not all(torch.equal(one, alike[0]) for one in alike):  # a mask of −inf is one, and stays
                raise MergeError(
                    f"{method}: {name!r} would not be finite in {str(out.dtype)[6:]}. A model is not, or the weights "
                    f"are too large for this dtype: look at the models, or merge them in float32."
                )
            out = first.detach().clone()
        merged[name] = out
    return merged


def fit(method: str, models: Sequence[State], base: State | None = None) -> None:
    """Raise MergeError unless all have the same names, shapes, dtypes, devices and integers."""
    if not models:
        raise MergeError(f"{method}(models=[]): there is nothing to merge.")
    others = {f"models[{i}]": model for i, model in enumerate(models)} | ({} if base is None else {"base": base})
    first = models[0]
    for who, other in others.items():
        missing, extra = [n for n in first if n not in other], [n for n in other if n not in first]
        if missing or extra:
            lacks = f"lacks {listed(missing)}" if missing else ""
            has = f"has {listed(extra)}, which models[0] has not" if extra else ""
            raise MergeError(
                f"{method}: {who} {' and '.join(filter(None, (lacks, has)))}. Models to merge are of one architecture: "
                f"take out what one of them alone has."
            )
    for who, other in others.items():
        for what, of, way in _MUST_BE_ONE:
            odd = [name for name in first if of(other[name]) != of(first[name])]
            if odd:
                mine, its = of(first[odd[0]]), of(other[odd[0]])
                raise MergeError(
                    f"{method}: the {what} of {listed(odd)} in {who} differs from models[0]: {its} and {mine}. {way}"
                )
        odd = [n for n, t in first.items() if not t.is_floating_point() and not torch.equal(other[n], t)]
        if odd:
            raise MergeError(
                f"{method}: {listed(odd)} in {who} and models[0] hold different integers, which have no mean. Counters "
                f"can be set to one value or left out; quantised weights must be dequantised first."
            )


_MUST_BE_ONE: tuple[tuple[str, Callable[[Tensor], object], str], ...] = (
    ("shape", lambda t: tuple(t.shape), "Vocabularies or heads of different size are resized, or left out, first."),
    ("dtype", lambda t: str(t.dtype)[6:], "Convert one of them: `tensor.to(dtype)`."),
    ("device", lambda t: str(t.device), "Move one of them: `tensor.to(device)`."),
)


def wide(tensor: Tensor) -> torch.dtype:
    """What is computed in: float32 at least."""
    return torch.promote_types(tensor.dtype, torch.float32)


def weighing(method: str, weights: Sequence[float] | None, n: int, normalise: bool = False) -> list[float]:
    """One weight a model, 1 if none are given; with `normalise` their sum is 1."""
    given = [1.0] * n if weights is None else [float(w) for w in weights]
    if len(given) != n:
        raise MergeError(f"{method}(weights={weights!r}): there are {len(given)} of {n} models. Give one a model.")
    total = sum(given)
    if normalise and abs(total) < 1e-8:
        raise MergeError(f"{method}(weights={weights!r}): their sum is 0, so that they can't be normalised.")
    return [w / total for w in given] if normalise else given


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float], base: Tensor | None = None) -> Tensor:
    """Σ_i w_i t_i, or Σ_i w_i (t_i − base), in float32 at least; one difference is in memory at a time.

    What has no weight is not read, and a weight of 1 alone gives its tensor.
    """
    kind = wide(tensors[0] if base is None else base)
    start = None if base is None else base.to(kind)
    live = [(t, w) for t, w in zip(tensors, weights, strict=True) if w]
    if not live:
        return torch.zeros_like(tensors[0], dtype=kind)
    of = lambda t: t.to(kind) if start is None else t.to(kind) - start
    (first, w), *others = live
    total = of(first) * w if start is None else of(first).mul_(w)
    for tensor, weight in others:
        total.add_(of(tensor), alpha=weight)  # in one pass
    return total


def alone(weights: Sequence[float]) -> int | None:
    """The place of the one model that has a weight, if that is 1: θ + 1 (θ₁ − θ) is θ₁, which rounding would miss."""
    live = [i for i, w in enumerate(weights) if w]
    return live[0] if len(live) == 1 and weights[live[0]] == 1 else None


def one_of(method: str, argument: str, value: object, among: Sequence[object]) -> None:
    """Raise MergeError unless value is among those that there are."""
    if value not in among:
        raise MergeError(f"{method}({argument}={value!r}): it is one of {', '.join(map(repr, among))}.")


def share(method: str, density: float) -> None:
    """Raise MergeError unless density is a share."""
    if not 0 < density <= 1:
        raise MergeError(f"{method}(density={density!r}): the share of entries to keep, above 0 and at most 1.")
