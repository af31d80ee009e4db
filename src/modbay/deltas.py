"""The few representations of an update: each acts on x without being materialised, and can be materialised."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .abstract import Delta, Factors, Site
from .errors import CompositionError
from .ops import add_linear, align, autocasts, linear, shared_linear

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


def act(site: Site, weight: Tensor, x: Tensor) -> Tensor:
    """The site's linear map, without bias, by another weight in its own layout; for one module, or a group of them."""
    if site.form not in ("linear", "transposed") and weight.ndim > site.weight.ndim:
        return torch.func.vmap(lambda w, v: act(site, w, v))(weight, x)
    if site.form == "linear":
        return linear(x, weight)
    if site.form == "transposed":
        return linear(x, weight.mT)
    if site.form == "embedding":
        return _looked_up(site, F.embedding(x, weight))
    if site.form == "convolution":
        m: Any = site.module
        weight = weight.to(x.dtype)  # autocast does not reach into vmap
        return CONVOLUTIONS[weight.ndim - 3](x, weight, None, m.stride, m.padding, m.dilation, m.groups)
    raise CompositionError(
        f"site {site.name!r} ({type(site.module).__name__}) has no weight that a parameter composition could change: "
        f"attach at the Linear, Conv1D, Conv or Embedding inside it, or use a bottleneck."
    )


def _looked_up(site: Site, rows: Tensor) -> Tensor:
    """Some classes scale what they look up (Gemma's words, BART's), and so a change of it."""
    scale: Any = getattr(site.module, "embed_scale", 1.0)
    if isinstance(scale, Tensor):
        return rows * scale.to(rows.dtype)
    return rows if scale == 1.0 else rows * scale


def grow(factor: Tensor | float, tensor: Tensor) -> Tensor:
    """tensor × factor, where the factor is a number or one an entry of the leading axis."""
    if isinstance(factor, Tensor) and factor.ndim:
        factor = factor.view(-1, *[1] * (tensor.ndim - 1))
    return tensor * factor


@dataclass(frozen=True, eq=False)
class LowRank(Delta):
    """ΔW = s·B A with A (r, i), B (o, r); A (r, i, *kernel) at a convolution, (r, vocabulary) at an embedding; and
    A (E, r, i), B (E, o, r) for E fused experts."""

    reads_output: ClassVar[bool] = False
    a: Tensor
    b: Tensor
    s: float | Tensor = 1.0

    def apply(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        if site.form in ("linear", "transposed"):
            hidden = linear(x, self.a)
            return linear(hidden if isinstance(self.s, float) and self.s == 1.0 else hidden * self._s(hidden), self.b)
        if self.b.ndim == 3:
            each = torch.func.vmap(lambda a, b, x, y: LowRank(a, b).apply(x, y, site))
            change = each(self.a, self.b, x, y)
        elif site.form == "embedding":
            change = _looked_up(site, F.embedding(x, self.a.mT) @ self.b.mT)
        else:
            hidden = act(site, self.a, x)
            change = CONVOLUTIONS[self.a.ndim - 3](hidden, self.b.view(*self.b.shape, *[1] * (self.a.ndim - 2)))
        return change if isinstance(self.s, float) and self.s == 1.0 else change * self._s(change)

    def _s(self, like: Tensor) -> Tensor | float:
        grouped = isinstance(self.s, Tensor) and self.s.ndim
        return self.s.view(-1, *[1] * (like.ndim - 1)) if grouped else self.s  # type: ignore[union-attr]

    def onto(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        if site.form not in ("linear", "transposed") or autocasts(x):
            return y + self.apply(x, y, site)
        hidden = linear(x, self.a)
        return add_linear(
            y, hidden if isinstance(self.s, float) and self.s == 1.0 else hidden * self._s(hidden), self.b
        )

    def factors(self, x: Tensor, y: Tensor, site: Site) -> Factors | None:
        if site.form not in ("linear", "transposed"):
            return None
        out = self.b if isinstance(self.s, float) and self.s == 1.0 else grow(self.s, self.b)
        return Factors(shared_linear(x, self.a), out)

    def scale(self, factor: Tensor | float) -> "LowRank":
        return replace(self, s=factor * self.s)

    def dense(self, site: Site) -> tuple[Tensor, Tensor | None]:
        if site.form == "experts":
            return torch.bmm(self.b, self.a) * self.s, None
        product = torch.tensordot(self.b, self.a, 1) * self.s  # (o, i, *kernel)
        return (product.mT if site.form in ("transposed", "embedding") else product), None


@dataclass(frozen=True, eq=False)
class Kronecker(Delta):
    """ΔW = C ⊗ D of W (o₁o₂, i₁i₂), with C (o₁, i₁) and D (o₂, i₂); D (o₂, i₂, *kernel) at a convolution."""

    reads_output: ClassVar[bool] = False
    c: Tensor
    d: Tensor

    def apply(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        if site.form in ("linear", "transposed"):
            group = x.shape[: self.c.ndim - 2]
            hidden = linear(x.reshape(*group, -1, self.c.shape[-1], self.d.shape[-1]), self.d)  # (…, i₁, o₂)
            product = self.c.unsqueeze(-3) @ hidden  # (…, o₁, o₂)
            return product.reshape(*x.shape[:-1], -1)
        if self.c.ndim == 3:
            return torch.func.vmap(lambda c, d, x, y: Kronecker(c, d).apply(x, y, site))(self.c, self.d, x, y)
        if site.form == "embedding":  # the columns of C and D that make a token's column
            width = self.d.shape[1]
            left, right = F.embedding(x // width, self.c.mT), F.embedding(x % width, self.d.mT)
            return _looked_up(site, (left.unsqueeze(-1) * right.unsqueeze(-2)).flatten(-2))
        return act(site, self.dense(site)[0], x)

    def scale(self, factor: Tensor | float) -> "Kronecker":
        return replace(self, c=grow(factor, self.c))

    def dense(self, site: Site) -> tuple[Tensor, Tensor | None]:
        product = torch.kron(self.c.view(*self.c.shape, *[1] * (self.d.ndim - 2)), self.d)
        return (product.mT if site.form in ("transposed", "embedding") else product), None


@dataclass(frozen=True, eq=False)
class Sparse(Delta):
    """ΔW of given values at given flat indices of the weight: indices (k,) int64, values (k,)."""

    reads_output: ClassVar[bool] = False
    indices: Tensor
    values: Tensor

    def apply(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return act(site, self._spread(site), x)

    def _spread(self, site: Site) -> Tensor:
        shape = site.weight.shape
        flat = self.values.new_zeros(*self.values.shape[:-1], shape.numel())
        flat = flat.scatter_add(-1, self.indices, self.values)
        return flat.view(*self.values.shape[:-1], *shape)

    def scale(self, factor: Tensor | float) -> "Sparse":
        return replace(self, values=grow(factor, self.values))

    def dense(self, site: Site) -> tuple[Tensor, Tensor | None]:
        return self._spread(site), None


@dataclass(frozen=True, eq=False)
class Dense(Delta):
    """ΔW of the weight's own shape."""

    reads_output: ClassVar[bool] = False
    weight: Tensor

    def apply(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return act(site, self.weight, x)

    def scale(self, factor: Tensor | float) -> "Dense":
        return replace(self, weight=grow(factor, self.weight))

    def dense(self, site: Site) -> tuple[Tensor, Tensor | None]:
        return self.weight, None


@dataclass(frozen=True, eq=False)
class Bias(Delta):
    """Δb (o,): an offset of the output, whether or not the site has a bias."""

    bias: Tensor

    def apply(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        grouped = self.bias.ndim > 1
        return align(self.bias, y, site.axis).expand(y.shape) if grouped or y.ndim else self.bias

    def factors(self, x: Tensor, y: Tensor, site: Site) -> Factors | None:
        group = self.bias.shape[:-1]
        if site.axis != -1:
            return None
        return Factors(y.new_empty(*group, *y.shape[:-1], 0), self.bias.new_empty(*self.bias.shape, 0), self.bias)

    def scale(self, factor: Tensor | float) -> "Bias":
        return replace(self, bias=grow(factor, self.bias))

    def dense(self, site: Site) -> tuple[Tensor, Tensor | None]:
        return torch.zeros_like(site.weight), self.bias


@dataclass(frozen=True, eq=False)
class Scale(Delta):
    """y ⊙ (1 + g): the output's features, bias included, scaled; g (o,), zero for no change."""

    gain: Tensor

    def apply(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return align(self.gain, y, site.axis) * y

    def onto(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return y * align(1 + self.gain, y, site.axis)

    def scale(self, factor: Tensor | float) -> "Scale":
        return replace(self, gain=grow(factor, self.gain))

    def dense(self, site: Site) -> tuple[Tensor, Tensor | None]:
        weight = site.weight
        axis = {"transposed": -1, "embedding": -1, "experts": -2}.get(site.form, -weight.ndim)
        change = weight * align(self.gain, weight, axis)
        return change, None if site.bias is None else site.bias * self.gain


@dataclass(frozen=True, eq=False)
class Affine(Delta):
    """(1 + g) ⊙ (f(x) − β) + β + b, β being the site's own bias: γ (1 + g) and β + b at a norm f(x) = γ ⊙ n(x) + β.

    gain: g (o,); shift: b (o,), or None for none."""

    gain: Tensor
    shift: Tensor | None

    def apply(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        own, gain = site.bias, align(self.gain, y, site.axis)
        change = gain * (y if own is None else y - align(own.expand(self.gain.shape), y, site.axis))
        return change if self.shift is None else change + align(self.shift, y, site.axis)

    def scale(self, factor: Tensor | float) -> "Affine":
        return Affine(grow(factor, self.gain), None if self.shift is None else grow(factor, self.shift))

    def dense(self, site: Site) -> tuple[Tensor, Tensor | None]:
        return Scale(self.gain).dense(site)[0], self.shift


@dataclass(frozen=True, eq=False)
class InputScale(Delta):
    """f(x ⊙ (1 + g)): the input's features scaled; g (i,), zero for no change. Its kind must say that it `enters`."""

    gain: Tensor

    def apply(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return align(self.gain, x, site.axis) * x

    def scale(self, factor: Tensor | float) -> "InputScale":
        return replace(self, gain=grow(factor, self.gain))

    def dense(self, site: Site) -> tuple[Tensor, Tensor | None]:
        weight = site.weight
        axis = {"transposed": -2, "linear": -1, "convolution": 1 - weight.ndim, "experts": -1}[site.form]
        groups = self.gain.numel() // weight.shape[1] if site.form == "convolution" else 1
        if groups > 1:  # each group of rows has its own inputs
            gain = self.gain.view(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)
            return weight * gain.view(*gain.shape, *[1] * (weight.ndim - 2)), None
        return weight * align(self.gain, weight, axis), None


@dataclass(frozen=True, eq=False)
class After(Delta):
    """M f(x): a linear map of the output's features, M (o, o), beside it; ΔW = M W, Δb = M b."""

    map: Tensor

    def apply(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return linear(y.movedim(site.axis, -1), self.map).movedim(-1, site.axis)

    def scale(self, factor: Tensor | float) -> "After":
        return replace(self, map=grow(factor, self.map))

    def dense(self, site: Site) -> tuple[Tensor, Tensor | None]:
        change = site.weight @ self.map.mT if site.form == "transposed" else torch.tensordot(self.map, site.weight, 1)
        return change, None if site.bias is None else self.map @ site.bias


@dataclass(frozen=True, eq=False)
class Beside(Delta):
    """M x, M (o, i), at the site's stride: ΔW = M in the middle of a kernel whose sizes are odd."""

    map: Tensor

    def apply(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        for axis, step in enumerate(getattr(site.module, "stride", ()), site.axis + 1):
            x = x[(..., slice(None, None, step), *[slice(None)] * (-1 - axis))]
        return linear(x.movedim(site.axis, -1), self.map).movedim(-1, site.axis)

    def scale(self, factor: Tensor | float) -> "Beside":
        return replace(self, map=grow(factor, self.map))

    def dense(self, site: Site) -> tuple[Tensor, Tensor | None]:
        if site.form != "convolution":
            return (self.map.mT if site.form == "transposed" else self.map), None
        change = torch.zeros_like(site.weight)
        change[(..., *[k // 2 for k in change.shape[2:]])] = self.map
        return change, None


@dataclass(frozen=True, eq=False)
class Mask(Delta):
    """W ⊙ m instead of W, with m shaped like the weight: a sub-network. ΔW = W ⊙ (m − 1)."""

    mask: Tensor

    def apply(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        change, _ = self.dense(site)
        return act(site, change.to(x.dtype) if x.is_floating_point() else change, x)

    def scale(self, factor: Tensor | float) -> "Mask":
        return replace(self, mask=1 + grow(factor, self.mask.to(torch.get_default_dtype()) - 1))

    def dense(self, site: Site) -> tuple[Tensor, Tensor | None]:
        return site.weight * (self.mask.to(site.weight.dtype) - 1), None


@dataclass(frozen=True, eq=False)
class Sum(Delta):
    """Several updates at once."""

    parts: Sequence[Delta]

    def apply(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        first, *rest = [part.apply(x, y, site) for part in self.parts]
        return sum(rest, start=first)

    def factors(self, x: Tensor, y: Tensor, site: Site) -> Factors | None:
        parts = [part.factors(x, y, site) for part in self.parts]
        if any(part is None for part in parts):
            return None
        offsets = [part.offset for part in parts if part.offset is not None]  # type: ignore[union-attr]
        code, out = (torch.cat([getattr(part, name) for part in parts], -1) for name in ("code", "out"))
        return Factors(code, out, sum(offsets[1:], start=offsets[0]) if offsets else None)

    def scale(self, factor: Tensor | float) -> "Sum":
        return Sum([part.scale(factor) for part in self.parts])

    def dense(self, site: Site) -> tuple[Tensor, Tensor | None]:
        pairs = [part.dense(site) for part in self.parts]
        biases = [bias for _, bias in pairs if bias is not None]
        return sum(weight for weight, _ in pairs), sum(biases) if biases else None  # type: ignore[return-value]
