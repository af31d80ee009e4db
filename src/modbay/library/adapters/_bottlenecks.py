"""adapters' bottlenecks: Houlsby, Pfeiffer, parallel, with new norms, as Compacter; and invertible ones."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ...abstract import Aggregator
from ...aggregation import Again, WeightedSum
from ...core import describe
from ...errors import FileError
from ...modules import Bottleneck, Compacter, Invertible
from ._places import End, behind_embeddings, end, inverted
from ._source import CONFIG, Source

ACTIVATIONS = {
    "relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "swish": "silu",
    "silu": "silu", "tanh": "tanh", "sigmoid": "sigmoid", "leakyrelu": "leaky_relu", "linear": "identity",
}  # fmt: skip
SWAPPED = {"dense": "whole", "whole": "dense"}  # where a bottleneck is that is given r for h
BEFORE = {"gelu": "gelu_tanh", "gelu_orig": "gelu"}  # what these were called before there was a version in the file


def activation(source: Source, method: Mapping[str, Any], default: str = "relu") -> str:
    said = source.get(method, "non_linearity", str, default).lower()
    table = ACTIVATIONS if "version" in source.said else {**ACTIVATIONS, **BEFORE}
    if said not in table:
        raise source.refuse(f"non_linearity={said!r:.40}")
    return table[said]


def bottlenecks(source: Source, method: Mapping[str, Any]) -> None:
    """Where it reads and where it adds follows from four options. With h the last projection's output, r the residual
    and N the norm: h + A(h), then N(· + r); or N(x + A(N(x))) with x = h + r (Pfeiffer et al.); or N(x) + A(N(x));
    or, in parallel, h + A(r). Where no norm follows, the two in the middle are x + A(x), or, where no module gives x,
    h + A(x), to which r is added."""
    flag = lambda key, default=False: source.get(method, key, bool, default)
    parallel, before, after = flag("is_parallel"), flag("original_ln_before"), flag("original_ln_after", True)
    residual = source.get(method, "residual_before_ln", (bool, str), True)
    again: Aggregator | None = None
    if parallel and after:
        where = "whole"
    elif not parallel and not before and after:
        where = "dense"
    elif not parallel and before and after and residual is True:
        where, again = "norm", Again("input")
    elif not parallel and before and not after and residual is False:
        where = "norm"
    else:
        raise source.refuse(
            f"original_ln_before={before}, original_ln_after={after}, residual_before_ln={residual!r} and "
            f"is_parallel={parallel} make a block with a residual left out, or there twice"
        )
    for path, own in source.take("adapters").items():
        place: End = end(source, path)
        sums = where == "norm" and not place.norm
        here, inner = ("total" if place.total else "whole", None) if sums else (where, again)
        here = SWAPPED.get(here, here) if place.swapped else here  # what reads h is given r, and what reads r, h
        site = getattr(place, here)
        phm, summed = flag("phm_layer"), sums and not place.total
        if summed and (phm or "gate.weight" in own):
            raise source.refuse(
                f"a Compacter, or a gate, that reads a sum which no module gives, behind {place.dense!r}"
            )
        if place.swapped and here == "whole" and phm:
            raise source.refuse(f"a Compacter that reads what goes into the part that ends in {place.dense!r}")
        _gate(source, path, here, place, own)
        kind, tensors = (_phm if phm else _plain)(source, method, path, own)
        if place.scale is not None and here != "total":
            if summed or site in source.gates or getattr(kind, "norm", True) or not bool(place.scale.all()):
                raise source.refuse(
                    f"a sum, a norm, a gate or a Compacter of what {type(source.model).__name__} scales before it is "
                    f"added, behind {place.dense!r}, or a scale of 0"
                )
            tensors = scaled(tensors, place.scale, here)
        placed = "sum" if summed else "parallel" if here == "whole" else None if phm else "serial"
        kind = replace(kind, placement=placed) if placed else kind  # type: ignore[call-arg]
        source.done(path, own)
        source.keep(site, kind, **tensors)
        if inner is not None:
            source.aggregators[site] = inner


def scaled(tensors: Mapping[str, Tensor], scale: Tensor, where: str) -> dict[str, Tensor]:
    """A bottleneck of h, from one of λ h: W_down diag(λ), unless it reads what goes in, and diag(1/λ) W_up. λ is taken
    as it is now: it stays, as all of the base."""
    scale = scale.detach().to(tensors["up"])
    down = tensors["down"] if where == "whole" else tensors["down"] * scale
    return {**tensors, "down": down, "up": tensors["up"] / scale.unsqueeze(-1), "up_bias": tensors["up_bias"] / scale}


def _gate(source: Source, path: str, where: str, place: End, own: dict[str, Tensor]) -> None:
    """UniPELT's gate reads what the bottleneck does, and modbay's the input of the site: of W x + b it is a gate of x,
    of γ ⊙ n + β one of n, which is x as the norm has it before these; or the output, where that is a sum."""
    site = getattr(place, where)
    source.gate(path, site, own)
    if site not in source.gates or where == "whole":
        return
    if where == "total":
        source.aggregators[site] = WeightedSum("output")
        return
    weight, bias = source.gates[site]
    last, shift = affine(source.modules[site], weight)
    source.gates[site] = (weight * last if where == "norm" else weight @ last, bias + weight @ shift)


def affine(module: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
    """(W (out, in), or γ; b, or β) of a layer."""
    own = module._parameters
    weight, bias = own["weight"], own.get("bias")
    assert weight is not None
    weight = weight.detach().to(like)
    weight = weight.mT if describe("", module).form == "transposed" else weight
    return weight, weight.new_zeros(len(weight)) if bias is None else bias.detach().to(like)


def _plain(source: Source, method: Mapping[str, Any], path: str, own: dict[str, Tensor]):
    """W_down, W_up and what stands about them; a scale by channel goes into W_up."""
    first, last = source.get(method, "ln_before", bool, False), source.get(method, "ln_after", bool, False)
    scale = source.get(method, "scaling", (int, float, str), 1.0)
    if (first and last) or (last and (source.get(method, "adapter_residual_before_ln", bool, False) or scale != 1)):
        raise source.refuse("ln_after beside ln_before, a scale, or adapter_residual_before_ln")
    down = f"adapter_down.{1 if first else 0}"
    names = {"down": f"{down}.weight", "down_bias": f"{down}.bias", "up": "adapter_up.weight",
             "up_bias": "adapter_up.bias"}  # fmt: skip
    if first or last:
        norm = "adapter_norm_before" if first else "adapter_norm_after"
        names |= {"norm": f"{norm}.weight", "norm_bias": f"{norm}.bias"}
    tensors = dict(zip(names, source.needs(path, own, *names.values()), strict=True))
    if first:
        for name in ("weight", "bias"):
            own.pop(f"adapter_down.0.{name}", None)  # the same norm by another name
    if scale == "learned":
        (tensors["scale"],) = source.needs(path, own, "scaling")
    elif scale == "channel":
        (channel,) = source.needs(path, own, "scaling")
        tensors |= {"up": channel.unsqueeze(-1) * tensors["up"], "up_bias": channel * tensors["up_bias"]}
        scale = 1.0
    elif isinstance(scale, str):
        raise source.refuse(f"scaling={scale!r:.40}")
    kind = Bottleneck(
        len(tensors["down"]), placement="parallel" if source.get(method, "is_parallel", bool, False) else "serial",
        norm="after" if last else first, activation=activation(source, method), scale=scale,
    )  # fmt: skip
    return kind, tensors


def _phm(source: Source, method: Mapping[str, Any], path: str, own: dict[str, Tensor]):
    """Their x H with H = Σ A_i ⊗ B_i is x Wᵀ with W = Σ A_iᵀ ⊗ B_iᵀ."""
    for key, default in {"factorized_phm_rule": False, "shared_W_phm": False, "is_parallel": False, "ln_before": False,
                         "ln_after": False}.items():  # fmt: skip
        if source.get(method, key, bool, default):
            raise source.refuse(f"phm_layer with {key}")
    if source.get(method, "scaling", (int, float, str), 1.0) != 1 or not source.get(method, "phm_bias", bool, True):
        raise source.refuse("phm_layer with a scale, or without biases")
    factored = source.get(method, "factorized_phm_W", bool, True)
    tensors: dict[str, Tensor] = {"A": _rule(source, path, own).mT}
    for ours, theirs in (("down", "adapter_down.0"), ("up", "adapter_up")):
        if factored:
            left, right = source.needs(path, own, f"{theirs}.W_left", f"{theirs}.W_right")
            tensors |= {f"{ours}_s": right.mT, f"{ours}_t": left.mT}
        else:
            (whole,) = source.needs(path, own, f"{theirs}.W")
            tensors[ours] = whole.mT
        (tensors[f"{ours}_bias"],) = source.needs(path, own, f"{theirs}.b")
    rank = tensors["down_s"].shape[-1] if factored else None
    n, size = len(tensors["A"]), len(tensors["down_bias"])
    return Compacter(n, size, rank=rank, activation=activation(source, method)), tensors


def _rule(source: Source, path: str, own: dict[str, Tensor]) -> Tensor:
    """A, which is one for all layers."""
    shared = source.shared.get("phm_rule")
    if shared is None:
        raise FileError(
            f"{source.file} has no shared_parameters.{source.name}.phm_rule: adapters does not save it where the model "
            f"has no head. Save it from a model with one (BertAdapterModel, BertForSequenceClassification …)."
        )
    return shared


def invertible(source: Source, method: Mapping[str, Any]) -> None:
    """Behind the embeddings, and its inverse before the layer that gives words, if the model has one and it is run
    there: by adapters' own classes (BertAdapterModel …), and by its forerunner in all."""
    block = source.get(method, "inv_adapter", str)
    if block is None:
        return
    inverts = source.get(source.said, "model_class", str, "").endswith("AdapterModel") or not source.get(
        source.said, "version", str, ""
    ).startswith("adapters.")
    last = words(source.model, source.modules) if inverts else None
    if block != "nice":
        raise source.refuse(f"inv_adapter={block!r:.40}")
    for path, own in source.take("invertible_adapters").items():
        site = inverted(source.model, source.modules, source.roles) or behind_embeddings(
            source, "an invertible adapter"
        )
        ends = {"down": "0.weight", "down_bias": "0.bias", "up": "2.weight", "up_bias": "2.bias"}
        names = {f"{net}_{ours}": f"{net}.{theirs}" for net in "FG" for ours, theirs in ends.items()}
        tensors = dict(zip(names, source.needs(path, own, *names.values()), strict=True))
        source.done(path, own)
        half = tensors["F_down"].shape[1]
        reduction = source.get(method, "inv_adapter_reduction_factor", (int, float), 2)
        if int(half // reduction) != len(tensors["F_down"]):
            raise FileError(f"{source.path}/{CONFIG}: inv_adapter_reduction_factor={reduction} is not the tensors'.")
        kind, source.widths[site] = Invertible(reduction, activation(source, method)), 2 * half
        source.keep(site, kind, **tensors)
        if last is not None:
            source.keep(f"{last}[before]", kind, **{f"{kind.inverse}{name}": t for name, t in tensors.items()})


def words(model: nn.Module, modules: Mapping[str, nn.Module]) -> str | None:
    """The layer that gives words; None if the model has none."""
    get: Any = getattr(model, "get_output_embeddings", None)
    layer = None if get is None else get()
    return None if layer is None else next((name for name, module in modules.items() if module is layer), None)
