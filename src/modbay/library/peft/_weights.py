"""peft's changes of weights: LoRA with its options, AdaLoRA, VeRA, LoHa, LoKr, (IA)³, layer norms, biases, whole
copies. The formulas are the kinds' own; here stand the names of the tensors, and where peft counts otherwise."""

import re

import torch
from torch import Tensor, nn

from ...abstract import Kind
from ...core import base_type, describe
from ...errors import FileError, listed
from ...modules import IA3, AdaLoRA, BitFit, DoRA, Full, LoHa, LoKr, LoRA, Norm, VeRA
from ...types import Params
from ._source import SHARED, TENSORS, Source

OTHER_LORA = {
    "layer_replication": "layers that are there several times",
    "alora_invocation_tokens": "a LoRA that begins at a token",
    "use_qalora": "pooled inputs (QA-LoRA)",
    "use_bdlora": "block-diagonal factors",
    "kasa_config": "singular values (KaSA)",
    "monteclora_config": "sampled factors (MonteCLoRA)",
    "arrow_config": "routing between LoRAs (use mb.Arrow over the LoRAs themselves)",
}


def lora(source: Source) -> None:
    """LoRA, rsLoRA, DoRA, LoRA with a bias, at Linear, Conv1D, Conv and Embedding, and at fused experts."""
    source.refuse(OTHER_LORA)
    start = source.config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise FileError(
            f"{source.path}: init_lora_weights={start!r}: peft has taken a part out of the base's weights, so that it "
            f"fits no base as it is. Save it by save_pretrained(…, path_initial_model_for_weight_conversion=…)."
        )
    stable, dora = source.get("use_rslora", bool, False), source.get("use_dora", bool, False)
    names = ("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector", "lora_embedding_A",
             "lora_embedding_B")  # fmt: skip
    fused = _parameters(source)
    for path, own in source.by_path(names).items():
        embedded = "lora_embedding_A" in own
        a, b = source.needs(path, own, *(names[4:] if embedded else names[:2]))
        if path in fused:
            _parameter(source, fused[path], a, b, stable)
            continue
        site = source.site(path)
        b = b.flatten(1)
        rank = a.shape[0]
        _ungrouped(source, path, rank)
        alpha = source.number("lora_alpha", 8, path, "alpha_pattern")
        if dora:
            (length,) = source.needs(path, own, "lora_magnitude_vector")
            _dora(source, path, site, a, b, length, alpha / (rank**0.5 if stable else rank))
        elif "lora_B.bias" in own:
            source.keep(path, LoRA(rank, float(alpha), stable, bias=True), A=a, B=b, bias=own["lora_B.bias"])
        else:
            source.keep(path, LoRA(rank, float(alpha), stable), A=a, B=b)
    _same_base(source)


def _ungrouped(source: Source, path: str, rank: int) -> None:
    if getattr(source.modules[source.site(path)], "groups", 1) > 1:
        raise FileError(
            f"{source.path}: at {path!r}, a convolution with groups, peft's A mixes the groups, and no change of the "
            f"weight there does. Load it with peft itself, or train mb.LoRA({rank}) there."
        )


def _dora(source: Source, path: str, site: str, a: Tensor, b: Tensor, length: Tensor, factor: float) -> None:
    """peft keeps the lengths of the rows themselves, modbay their change."""
    weight = source.own(site, "weight")
    assert weight is not None
    form = source.modules[site]
    rows = weight.mT if isinstance(form, nn.Embedding) or type(form).__name__ == "Conv1D" else weight
    base = rows.float().flatten(1).norm(dim=1)
    change = length.flatten().float() - base.to(length.device)
    source.keep(path, DoRA(a.shape[0], factor * a.shape[0]), A=a, B=b, magnitude=change.to(a.dtype))


def _parameters(source: Source) -> dict[str, str]:
    """What `target_parameters` names: the parameter's own name, by the path under which peft keeps its factors.

    Several parameters of one module are nested: the last in peft's order is at the module, the one before it at its
    base_layer, and so on.
    """
    wanted = source.get("target_parameters", list, [])
    at: dict[str, list[str]] = {}
    for owner, module in source.modules.items():
        for name, tensor in module._parameters.items():
            full = f"{owner}.{name}" if owner else name
            if tensor is not None and any(full == w or full.endswith(f".{w}") for w in wanted):
                at.setdefault(owner, []).append(name)
    out = {}
    for owner, names in at.items():
        for depth, name in enumerate(reversed(names)):
            out[owner + ".base_layer" * depth] = f"{owner}.{name}"
    return out


def _parameter(source: Source, name: str, a: Tensor, b: Tensor, stable: bool) -> None:
    """LoRA of a parameter, a matrix or fused experts, of which peft's A is (E r, i) and B (o, r E), the expert counting
    fastest in B; modbay's are (E, r, i) and (E, o, r)."""
    owner, _, last = name.rpartition(".")
    weight = source.own(owner, last)
    assert weight is not None
    if weight.ndim not in (2, 3):
        raise FileError(f"{source.path}/{TENSORS}: {name!r} is {tuple(weight.shape)}, no matrix, or stack of them.")
    module, alpha = source.modules[owner], float(source.number("lora_alpha", 8, name, "alpha_pattern"))
    layer = base_type(module) if last == "weight" else None
    if layer in (nn.Linear, nn.Embedding):  # which is changed at the layer
        a, b = (a, b) if layer is nn.Linear else (b.mT, a.mT)
        source.keep(owner, LoRA(len(a), alpha, stable), A=a.contiguous(), B=b.contiguous())
        return
    if weight.ndim == 3:
        experts = weight.shape[0]
        a, b = a.view(experts, -1, a.shape[-1]), b.view(b.shape[0], -1, experts).permute(2, 0, 1)
        if getattr(module, "is_transposed", False):  # the weight is (E, i, o), and ΔW = (B A)ᵀ = Aᵀ Bᵀ
            a, b = b.mT, a.mT
    source.keep(name, LoRA(a.shape[-2], alpha, stable), A=a, B=b)


def _same_base(source: Source) -> None:
    """peft saves an embedding that a LoRA is at, too: it must be the base's, else the vocabulary has grown."""
    for path, own in source.by_path(("base_layer.weight",)).items():
        base = source.own(source.site(path), "weight")
        if base is None or base.shape != own["base_layer.weight"].shape:
            raise FileError(
                f"{source.path}: it was trained with an embedding {tuple(own['base_layer.weight'].shape)} at {path!r}, "
                f"where this model has {None if base is None else tuple(base.shape)}: call "
                f"model.resize_token_embeddings({len(own['base_layer.weight'])}), and load again."
            )
        saved = own["base_layer.weight"].to(base)
        if not torch.equal(saved, base):
            raise FileError(
                f"{source.path}: the embedding that it was trained with, at {path!r}, differs from this model's. Copy "
                f"it into the model first, or load the base that it was made on."
            )


def adalora(source: Source) -> None:
    """peft scales by α, and divides by the rank at first and 1e-5."""
    names = ("lora_A", "lora_B", "lora_E")
    sites = source.by_path(names)
    for path, own in sites.items():
        q, p, values = source.needs(path, own, *names)
        rank = len(values)
        begun = source.number("init_r", 12)
        _ungrouped(source, path, rank)
        alpha = source.number("lora_alpha", 8, path, "alpha_pattern") or begun
        source.keep(
            path,
            AdaLoRA(rank, alpha / (begun + 1e-5) * rank, float(source.number("orth_reg_weight", 0.5))),
            P=p, Q=q.view(_kernel(source, path, rank)), values=values.flatten(),
            share=torch.full((1,), 1 / (2 * len(sites)), dtype=q.dtype),
        )  # fmt: skip


def loha(source: Source) -> None:
    """ΔW = (w1_a w1_b) ⊙ (w2_a w2_b)."""
    source.refuse({"use_effective_conv2d": "factors for each place of a kernel"})
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    for path, own in source.by_path(names).items():
        b1, a1, b2, a2 = source.needs(path, own, *names)
        rank = b1.shape[1]
        alpha = source.number("alpha", 8, path, "alpha_pattern")
        shape = _kernel(source, path, rank)
        source.keep(path, LoHa(rank, float(alpha)), A1=a1.view(shape), B1=b1, A2=a2.view(shape), B2=b2)


def _kernel(source: Source, path: str, rank: int) -> tuple[int, ...]:
    """The shape of a factor A at a site: (r, i, *kernel)."""
    module = source.modules[source.site(path)]
    weight = module._parameters["weight"]
    assert weight is not None
    if isinstance(module, nn.Embedding):
        return (rank, weight.shape[0])
    if type(module).__name__ == "Conv1D":
        return (rank, weight.shape[0])
    return (rank, *weight.shape[1:])


def lokr(source: Source) -> None:
    """ΔW = w1 ⊗ w2, each of them whole or a product w_a w_b."""
    source.refuse({"use_effective_conv2d": "a third factor for the places of a kernel"})
    names = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
    for path, own in source.by_path(names).items():
        params: Params = {}
        for whole, ours in (("lokr_w1", "C"), ("lokr_w2", "D")):
            if whole in own:
                params |= {ours: own[whole]}
            else:
                left, right = source.needs(path, own, f"{whole}_a", f"{whole}_b")
                params |= {f"{ours}_left": left, f"{ours}_right": right}
        if "D_right" in params:  # (r, i₂, *kernel), which peft keeps flat
            first = params["C" if "C" in params else "C_right"].shape[1]
            _, inputs, *kernel = _kernel(source, path, 1)
            params["D_right"] = params["D_right"].unflatten(1, (inputs // first, *kernel))
        rank = int(source.number("r", 8, path, "rank_pattern"))
        alpha = float(source.number("alpha", 8, path, "alpha_pattern"))
        both = source.get("decompose_both", bool, False)
        split = int(source.number("decompose_factor", -1))
        source.keep(path, LoKr(rank, alpha, None if split == -1 else split, both), **params)


def vera(source: Source) -> None:
    """VeRA where its matrices are those that modbay draws from the seed; else LoRA, of the products with peft's own."""
    names = ("vera_lambda_d", "vera_lambda_b")
    if not all(name in source.tensors for name in SHARED):
        raise FileError(
            f"{source.path}/{TENSORS}: it was saved with save_projection=False, without its random matrices, which "
            f"only peft on a like machine draws again. Save it with save_projection=True."
        )
    a, b = (source.tensors.pop(name) for name in SHARED)
    found = source.by_path(names)
    rank = len(a)
    kind = VeRA(rank, seed=int(source.number("projection_prng_key", 0)))
    sites = [describe(name, source.modules[name]) for name in map(source.site, found)]
    drawn = kind.init(sites)[sites[0].name]
    same = all(ours.shape == t.shape and torch.equal(ours.cpu(), t) for ours, t in ((drawn["A"], a), (drawn["B"], b)))
    for (path, own), site in zip(found.items(), sites, strict=True):
        d, scale = source.needs(path, own, *names)
        if same:
            source.keep(path, kind, d=d, b=scale)
            continue
        wide, tall = a[:, : site.features("inputs")], b[: site.features("outputs")]
        source.keep(path, LoRA(rank), A=d.unsqueeze(-1) * wide, B=scale.unsqueeze(-1) * tall)


def ia3(source: Source) -> None:
    """One vector a module: of the inputs where it lies in a row, of the outputs where it stands in a column; at a
    convolution both are (1, n, 1 …), and `feedforward_modules` says which."""
    into = source.get("feedforward_modules", (str, list), [])
    for path, own in source.by_path(("ia3_l",)).items():
        (scale,) = own.values()
        entering = scale.shape[0] == 1 and scale.numel() > 1
        if scale.ndim > 2:
            entering = bool(re.fullmatch(into, path)) if isinstance(into, str) else path.endswith(tuple(into))
        source.keep(path, IA3("input" if entering else "output"), l=scale.flatten())


def layer_norms(source: Source) -> None:
    """peft keeps a norm's γ and β themselves, modbay their change, γ's relative to γ."""
    pairs = source.by_path(("ln_tuning_layers.weight", "ln_tuning_layers.bias"))
    for path, own in pairs.items():
        site = source.site(path)
        gain, shift = source.own(site, "weight"), source.own(site, "bias")
        weight, bias = own.get("ln_tuning_layers.weight"), own.get("ln_tuning_layers.bias")
        if weight is None or gain is None or gain.ndim > 1 or not bool(gain.all()):  # peft copies any layer it is at
            source.keep(path, Full(), **{k.rpartition(".")[2]: t for k, t in own.items()})
            continue
        kept = {"gain": weight / gain.to(weight) - 1}
        if bias is not None and shift is not None:
            kept["bias"] = bias - shift.to(bias)
        source.keep(path, Norm("bias" in kept), **kept)


def rest(source: Source) -> None:
    """Biases of the base (bias="all" or "lora_only"), and copies of whole modules (modules_to_save, heads)."""
    for path, own in source.by_path(("base_layer.bias",)).items():
        _bias(source, path, own["base_layer.bias"])
    copies: dict[str, dict[str, Tensor]] = {}
    wanted = tuple(str(name) for name in source.get("modules_to_save", list, []))
    if wanted and source.get("ensure_weight_tying", bool, False):
        wanted += _tied(source, wanted)  # each has in the file a copy of the one copy
    biases = source.get("bias", str, "none") == "all"
    for key in list(source.tensors):
        if ".original_module." in key:  # with bias="all" peft saves the base's own beside the copy's
            del source.tensors[key]
            continue
        path, _, name = _copied(source, key).rpartition(".")
        whole = next((p for p in _above(path) if p.endswith(wanted)), None)  # DistilBERT's pre_classifier, too
        if whole is not None:
            inner = f"{path}.{name}".removeprefix(f"{whole}.").replace(".", "/")
            tensor = source.tensors.pop(key)
            kept = copies.setdefault(whole, {}).setdefault(inner, tensor)
            if not torch.equal(kept, tensor):
                raise FileError(f"{source.path}/{TENSORS} has {whole}.{inner} twice, with other values.")
        elif biases and name == "bias":
            _bias(source, path, source.tensors.pop(key))
    for path, tensors in copies.items():
        source.keep(path, Full(), **tensors)
    if source.tensors:
        raise FileError(
            f"{source.path}/{TENSORS}: {listed(source.tensors)} are not known to be parts of "
            f"{source.config.get('peft_type')}: newer than modbay, or changed by hand."
        )


def _tied(source: Source, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """The layers that share their weight with one of these."""
    weights = {name: module._parameters.get("weight") for name, module in source.modules.items()}
    shared = {id(weight) for name, weight in weights.items() if weight is not None and name.endswith(wanted)}
    return tuple(name for name, weight in weights.items() if id(weight) in shared)


def _copied(source: Source, key: str) -> str:
    """A key without what peft puts between a module and its copy; with bias="all" that is the adapter's name, too."""
    owner, between, inner = key.partition(".modules_to_save.")
    if not between:
        return key
    first, _, rest = inner.partition(".")
    module = source.modules[source.site(owner)]
    return f"{owner}.{inner if first in module._modules or first in module._parameters or not rest else rest}"


def _above(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _bias(source: Source, path: str, bias: Tensor) -> None:
    site = source.site(path)
    base = source.own(site, "bias")
    if base is None:
        raise FileError(f"{source.path}/{TENSORS}: it has a bias of {path!r}, where this model has none.")
    change = bias - base.to(bias)
    if site not in source.kinds:
        if bool(change.any()):
            source.keep(path, BitFit(), bias=change)
        return
    kind: Kind = source.kinds[site]
    if not isinstance(kind, LoRA):
        raise FileError(f"{source.path}: a base's bias beside {type(kind).__name__} at {site!r} can't be kept there.")
    factor, own = kind.factor, source.found.pop(site)
    del source.kinds[site]
    given = own.get("bias")
    source.keep(
        path,
        LoRA(kind.rank, kind.alpha, kind.stable, bias=True),
        A=own["A"], B=own["B"], bias=change / factor if given is None else given + change / factor,
    )  # fmt: skip
