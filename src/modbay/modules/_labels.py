"""Labels as a hypernetwork reads them: by an embedding each, or by features that tell of them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..abstract import Context, Site
from ..errors import CompositionError, LabelError, listed
from ..types import Labels, Params


class Label(NamedTuple):
    """One label: its keyword, what its tensors are called after, its names, and how many features tell of each."""

    word: str
    key: str
    names: tuple[str, ...]
    features: int


def described(label: Any, labels: Any, features: Any, table: Any) -> list[Label]:
    """What is told of one label, or of several, by what was given of them; raises CompositionError."""
    if isinstance(label, str):
        return [_described(label, "", labels, features, table or {})]
    labels, features, table = labels or [()] * len(label), features or [0] * len(label), table or {}
    if len({len(label), len(labels), len(features)}) > 1 or set(table) - set(label):
        raise CompositionError(f"Hyper(label={label!r}): labels, features and table must be of these, one each.")
    return [_described(word, f"/{word}", some, k, table.get(word, {}))
            for word, some, k in zip(label, labels, features, strict=True)]  # fmt: skip


def _described(word: str, key: str, names: Sequence[str], features: int, table: Mapping[str, Any]) -> Label:
    names, sizes = tuple(names or table), {len(row) for row in table.values()} | {features} - {0}
    if len(set(names)) < len(names) or not (names or features):
        raise CompositionError(f"Hyper(labels={names!r}) for {word!r}: one distinct name or more, or features=….")
    if len(sizes) > 1 or (table and set(names) - set(table)):
        raise CompositionError(f"Hyper(table=…) for {word!r}: each of {listed(names)} must have features, as many.")
    return Label(word, key, names, sizes.pop() if sizes else 0)


def label_codes(
    site: Site, label: Label, size: int, raw: bool, spread: bool, tables: Mapping[str, Any] | None
) -> dict[str, Tensor]:
    """The tensors of one label: an embedding of each name (n, size), with its spread if asked for; or the features of
    each (n, k), which stay as they are, and their projection (size, k) unless they enter raw. tables: None, if the
    features are filled in later."""
    if not label.features:
        drawn = nn.init.normal_(site.empty(len(label.names), size), std=0.1 if spread else 1.0)
        wide = {f"spread{label.key}": torch.rand_like(drawn) / 2} if spread else {}
        return {f"labels{label.key}": drawn, **wide}
    made = {}
    if label.names:
        rows = site.zeros(len(label.names), label.features)
        if tables is not None and label.word not in tables:
            raise CompositionError(f"Hyper: a new module needs the features of each {label.word!r}: pass table=….")
        for row, name in zip(rows, label.names if tables is not None else (), strict=False):
            row.copy_(torch.as_tensor(tables[label.word][name]))  # type: ignore[index]
        made[f"features{label.key}"] = rows
    if not raw:
        made[f"describe{label.key}"] = nn.init.normal_(site.empty(size, label.features), std=label.features**-0.5)
    return made


def told(params: Params, label: Label, c: Context, like: Tensor, neutral: bool) -> tuple[Tensor, Tensor]:
    """(e (b, ·), whether there is one (b,)) of one label, with b = 1 where it holds for all."""
    given = c.label(label.word)
    if isinstance(given, Tensor) and given.is_floating_point():
        if not label.features or given.ndim != 2 or given.shape[1] != label.features:
            want = f"features (b, {label.features})" if label.features else f"one of {listed(label.names)} an example"
            raise LabelError(f"{label.word}=floats of shape {tuple(given.shape)}: Hyper takes {want}.")
        code, known = given.to(like), torch.ones(len(given), dtype=torch.bool, device=like.device)
    else:
        ids = _indices(given, label, neutral).to(like.device)
        table = params[f"features{label.key}"] if label.features else _sampled(params, label, c)
        code, known = table[ids.clamp(min=0)], ids >= 0
    describe = params.get(f"describe{label.key}")
    return (code if describe is None else nn.functional.linear(code, describe)), known


def _sampled(params: Params, label: Label, c: Context) -> Tensor:
    """The embeddings: in training drawn, once a call, by their spread if they have one; else their means."""
    mean, spread = params[f"labels{label.key}"], params.get(f"spread{label.key}")
    if spread is None or not (c.training and torch.is_grad_enabled()):
        return mean
    noise = c.state.setdefault(f"{label.word} {tuple(mean.shape)}", torch.randn_like(mean))
    return mean + nn.functional.softplus(spread) * noise.to(mean)


def divergence(params: Params, label: Label) -> Tensor:
    """KL(N(μ, σ²) ‖ N(0, 1)), summed over the names of one label."""
    mean, sigma = params[f"labels{label.key}"], nn.functional.softplus(params[f"spread{label.key}"])
    return (mean.square() + sigma.square() - 1 - 2 * sigma.log()).sum() / 2


def _indices(given: Labels, label: Label, neutral: bool) -> Tensor:
    """(b,), or (1,) where one label holds for all: indices into its names, −1 for none."""
    if isinstance(given, Tensor) and label.names:
        return given.reshape(-1)
    names = [given] if isinstance(given, str) else list(given)
    unknown = [name for name in names if name is not None and name not in label.names]
    if unknown:
        way = f", or takes features: floats (b, {label.features})" if label.features else ""
        raise LabelError(f"{label.word}={unknown[0]!r}: Hyper has no such label; it has {listed(label.names)}{way}.")
    if None in names and not neutral:
        raise LabelError(
            f"{label.word}=[…, None, …]: the inner kind starts with a change of its own, so that there is no generated "
            f"module without any. Route those examples to no module instead."
        )
    return torch.tensor([-1 if name is None else label.names.index(name) for name in names])  # type: ignore[arg-type]
