"""Writing a module as a checkpoint of peft's: its kinds say which method it is, and what its tensors are called."""

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from ...abstract import Kind
from ...errors import listed
from ...modules import (
    IA3,
    AdaLoRA,
    BitFit,
    DoRA,
    EncodedPrompt,
    Full,
    Head,
    LoHa,
    LoKr,
    LoRA,
    Norm,
    Prefix,
    Prompt,
    Shift,
    VeRA,
)
from ...seams import Fitting, named
from .._files import write_json, write_tensors
from . import _write_prompts, _write_weights
from ._draft import Draft
from ._multitask import is_multitask, write_multitask
from ._poly import is_poly, write_poly
from ._source import CONFIG, PROMPTS, TENSORS, full

TASKS = {
    "SequenceClassification": "SEQ_CLS",
    "TokenClassification": "TOKEN_CLS",
    "QuestionAnswering": "QUESTION_ANS",
    "CausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ConditionalGeneration": "SEQ_2_SEQ_LM",
    "MTModel": "SEQ_2_SEQ_LM",
}  # of a model, by the end of its class's name

HEADED = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
HEADS = ("classifier", "score", "qa_outputs")


def write(folder: Path, draft: Draft) -> Path:
    """Write it; raises CompositionError for what peft has no name for, before anything is written."""
    others: dict[str, Kind] = {}
    offsets: dict[str, Kind] = {}
    for site, kind in draft.kinds.items():
        if isinstance(kind, (Full, Head)):
            _copy(draft, site, kind)
        else:
            (offsets if isinstance(kind, BitFit) else others)[site] = kind
    methods = {_method(draft, site, kind) for site, kind in others.items()}
    if len(methods) > 1:
        raise draft.refuse(next(iter(others)), f"and elsewhere it has {listed(sorted(methods))}, of which peft's "
                           f"checkpoints hold one")  # fmt: skip
    method = methods.pop() if methods else "LORA"
    if not others:
        method = "LN_TUNING"
        _copies(draft)
    draft.config |= {"peft_type": method, "base_model_name_or_path": _base(draft.model), "revision": None,
                     "task_type": None, "inference_mode": True, "auto_mapping": None}  # fmt: skip
    if others:
        WRITERS[method](draft, others)
    _task(draft, method)
    if offsets or (not draft.config.get("lora_bias") and any(key.endswith(".lora_B.bias") for key in draft.tensors)):
        _biases(draft, method, others, offsets)
    return _put(folder, draft, method)


def composed(fitting: Fitting) -> bool:
    """Whether a bay as a whole is something that peft has: skills of tasks, or prompts that share one."""
    return is_poly(fitting) or is_multitask(fitting)


def write_composition(folder: Path, fitting: Fitting) -> Path:
    """Write all of such a bay; raises CompositionError for what peft has no name for, before anything is written."""
    draft = write_poly(fitting) if is_poly(fitting) else write_multitask(fitting)
    draft.config |= {"base_model_name_or_path": _base(draft.model), "revision": None, "inference_mode": True,
                     "auto_mapping": None}  # fmt: skip
    method = draft.config["peft_type"]
    _task(draft, method)
    return _put(folder, draft, method)


def _put(folder: Path, draft: Draft, method: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / TENSORS, {full(method, key): tensor for key, tensor in draft.tensors.items()})
    write_json(folder / CONFIG, dict(sorted(draft.config.items())))
    return folder


def _base(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None


def _task(draft: Draft, method: str) -> None:
    """task_type; where it makes peft look for a head in the file, there is one, or there is no such task."""
    model = type(draft.model).__name__
    task = next((task for end, task in TASKS.items() if model.endswith(end)), None)
    if task in HEADED and "modules_to_save" not in draft.config:
        if method not in PROMPTS:
            task = None  # peft loads any other method without
        else:
            for head in [head for head in HEADS if hasattr(draft.model, head)]:
                own = getattr(draft.model, head).named_parameters()
                draft.put(head, **{name.replace(".", "__"): p.detach() for name, p in own})
                draft.config.setdefault("modules_to_save", []).append(head)
    if task is None and method in PROMPTS:
        raise draft.refuse("", f"peft wants to know the task of a {model}, and has none for it")
    draft.config["task_type"] = task


def _biases(draft: Draft, method: str, sites: Mapping[str, Kind], offsets: Mapping[str, Kind]) -> None:
    """bias="all": every bias of the base as it is with the module; what LoRA's own bias adds goes in there."""
    if method != "LORA" or any(isinstance(kind, DoRA) for kind in sites.values()):
        raise draft.refuse(next(iter(offsets)), f"a bias is learned beside {method}, which peft has for LoRA alone")
    factor = {site: kind.factor for site, kind in sites.items() if isinstance(kind, LoRA)}
    lost = [site for site in offsets if draft.places[site].target._parameters.get("bias") is None]
    if lost:
        raise draft.refuse(lost[0], "BitFit gives a bias to a layer that has none")
    copied = draft.config.get("modules_to_save", [])
    for path, module in named(draft.model).items():
        bias = module._parameters.get("bias")
        if bias is None or any(path == site or path.startswith(f"{site}.") for site in copied):
            continue
        change = draft.params[path]["bias"] if path in offsets else 0
        own = draft.tensors.pop(f"{path}.lora_B.bias", None)
        if own is not None:
            change = factor[path] * own
        draft.put(path, **{"base_layer__bias" if path in sites else "bias": bias.detach() + change})
    draft.config |= {"bias": "all", "lora_bias": False}


def _copy(draft: Draft, site: str, kind: Kind) -> None:
    """modules_to_save."""
    own = draft.params[site]
    if isinstance(kind, Head):
        there = draft.places[site].target._parameters.get("weight")
        if there is None or there.shape != own["weight"].shape:
            raise draft.refuse(site, f"{kind!r} has other classes than the base's layer, which peft can't have")
    draft.config.setdefault("modules_to_save", []).append(site)
    draft.put(site, **{name.replace("/", "__"): tensor for name, tensor in own.items()})


def _copies(draft: Draft) -> None:
    """Copies of layers alone, which is what peft's LN tuning makes of any layer."""
    for site, kind in draft.kinds.items():
        own = draft.places[site].target._parameters
        if not isinstance(kind, Full) or set(draft.params[site]) != {n for n, p in own.items() if p is not None}:
            raise draft.refuse(site, "it is a copy of more than one layer, without a method of peft's beside it")
    draft.tensors = {}
    del draft.config["modules_to_save"]
    for site in draft.kinds:
        draft.put(site, **{f"ln_tuning_layers__{name}": tensor for name, tensor in draft.params[site].items()})
    draft.config["target_modules"] = draft.target(draft.kinds)


def _method(draft: Draft, site: str, kind: Kind) -> str:
    for types, method in METHODS.items():
        if type(kind) in types:
            return method
    raise draft.refuse(site, f"{type(kind).__name__} is none of peft's methods that modbay writes")


METHODS: dict[tuple[type, ...], str] = {
    (LoRA, DoRA): "LORA",
    (AdaLoRA,): "ADALORA",
    (LoHa,): "LOHA",
    (LoKr,): "LOKR",
    (VeRA,): "VERA",
    (IA3,): "IA3",
    (Norm,): "LN_TUNING",
    (Prompt, EncodedPrompt): "PROMPT_TUNING",
    (Prefix, Shift): "PREFIX_TUNING",
}
WRITERS: dict[str, Callable[[Draft, Mapping[str, Kind]], None]] = {
    "LORA": _write_weights.lora,
    "ADALORA": _write_weights.adalora,
    "LOHA": _write_weights.loha,
    "LOKR": _write_weights.lokr,
    "VERA": _write_weights.vera,
    "IA3": _write_weights.ia3,
    "LN_TUNING": _write_weights.norms,
    "PROMPT_TUNING": _write_prompts.prompt,
    "PREFIX_TUNING": _write_prompts.prefix,
}
