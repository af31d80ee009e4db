"""Writing a module as a checkpoint of adapters': its kinds and sites say which method it is, or which several."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...abstract import Kind
from ...errors import CompositionError
from ...modules import IA3, Bottleneck, Compacter, Full, Head, Invertible, LoRA, Prefix, Prompt
from .._files import write_json, write_tensors
from . import _write_bottlenecks, _write_prompts, _write_weights
from ._draft import Draft
from ._heads import HEAD, HEAD_TENSORS
from ._names import STRIPPED
from ._source import CONFIG, TENSORS

VERSION = "adapters.1.3.0"
WRITERS: dict[tuple[type, ...], Callable[[Draft, Mapping[str, Kind]], dict[str, Any]]] = {
    (Prefix,): _write_prompts.prefix,
    (Bottleneck, Compacter, Invertible): _write_bottlenecks.bottlenecks,
    (LoRA,): _write_weights.lora,
    (IA3,): _write_weights.ia3,
    (Prompt,): _write_prompts.prompt,
}


def write(folder: Path, draft: Draft) -> Path:
    """Write it; raises CompositionError for what adapters has no name for, before anything is written."""
    return prepared(draft)(folder)


def prepared(draft: Draft) -> Callable[[Path], Path]:
    """What writes it into a folder; all is checked by then."""
    heads = {site: kind for site, kind in draft.kinds.items() if isinstance(kind, (Full, Head))}
    rest = {site: kind for site, kind in draft.kinds.items() if site not in heads}
    configs = []
    for types, writer in WRITERS.items():
        own = {site: kind for site, kind in rest.items() if type(kind) in types}
        if own:
            configs.append(writer(draft, own))
            rest = {site: kind for site, kind in rest.items() if site not in own}
    for site, kind in rest.items():
        raise draft.refuse(site, f"{type(kind).__name__} is none of adapters' methods that modbay writes")
    if not configs:
        raise draft.refuse(next(iter(heads), ""), "it is a head alone, and an adapter goes before it")
    said = top(draft)
    config = configs[0] if len(configs) == 1 else {"architecture": "union", "configs": configs}
    head = _head(draft, heads)
    apart = said["model_class"].endswith("AdapterModel") and not draft.base  # T5's trunk is a module only there
    front = f"{draft.model.base_model_prefix}." if apart else ""

    def make(folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / TENSORS, {f"{front}{key}": tensor.clone() for key, tensor in draft.tensors.items()})
        write_json(folder / CONFIG, {**said, "config": config, "name": draft.name})
        if head:
            write_tensors(folder / HEAD_TENSORS, head)
            labels = next((kind.labels for kind in heads.values() if isinstance(kind, Head)), None)
            known = getattr(draft.model.config, "label2id", None)
            table = {label: i for i, label in enumerate(labels)} if isinstance(labels, tuple) else known
            classes = labels if isinstance(labels, int) else len(table or ())
            more = {"config": None, "label2id": table, "name": None, "num_labels": classes}
            write_json(folder / HEAD, {**said, **more})
        return folder

    return make


def top(draft: Draft) -> dict[str, Any]:
    config = getattr(draft.model, "config", None)
    if config is None or not hasattr(config, "model_type"):
        raise CompositionError(
            f"export of module {draft.name!r} as adapters: {type(draft.model).__name__} has no transformers config, "
            f"and adapters loads onto models of transformers alone."
        )
    if config.model_type in STRIPPED:
        raise CompositionError(
            f"export of module {draft.name!r} as adapters: it takes the own adapters of a {type(draft.model).__name__} "
            f"out, and this module was trained beside them. bay.save keeps everything."
        )
    kind = type(draft.model).__dict__.get("_base", type(draft.model)).__name__
    if any(site.endswith("[before]") for site in draft.kinds):  # of its classes, those that run an inverse there
        kind = re.sub(r"(For[A-Z]|LMHead|Model$).*", "", kind) + "AdapterModel"
    return {"hidden_size": draft.width, "model_class": kind, "model_name": getattr(config, "_name_or_path", "") or "",
            "model_type": config.model_type, "version": VERSION}  # fmt: skip


def _head(draft: Draft, heads: Mapping[str, Kind]) -> dict[str, Tensor]:
    """The whole head with what the module has of it; {} if it has nothing."""
    if not heads:
        return {}
    front = f"{draft.base}." if draft.base else ""
    outside = [name for name in draft.modules if name and front and not f"{name}.".startswith(front)]
    for site, kind in heads.items():
        if site not in outside:
            raise draft.refuse(site, f"{type(kind).__name__} stands in for a layer that is in no head")
    out: dict[str, Tensor] = {}
    for name in outside:
        copied = next((site for site in heads if name == site or name.startswith(f"{site}.")), None)
        if copied is None:
            out |= {f"{name}.{k}": p.detach() for k, p in draft.modules[name]._parameters.items() if p is not None}
    for site in heads:
        out |= {f"{site}.{key.replace('/', '.')}": t for key, t in draft.params[site].items()}
    return {key: tensor.clone() for key, tensor in out.items()}
