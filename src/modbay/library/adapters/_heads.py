"""Heads that lie beside an adapter: those of a model with one head, by its own names; and flexible ones, heads.NAME."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import FileError
from ...modules import Full, Head
from .._files import inside, read_json
from ._names import kind
from ._source import Source, stored

LOG = logging.getLogger("modbay")
HEAD, HEAD_TENSORS, HEAD_PICKLE = "head_config.json", "model_head.safetensors", "pytorch_model_head.bin"
ENDS = {
    "classification": "ForSequenceClassification",
    "multilabel_classification": "ForSequenceClassification",
    "tagging": "ForTokenClassification",
    "question_answering": "ForQuestionAnswering",
}  # by the type of a flexible head: the classes of models with the same one
HIDDEN = {"dense": "tanh", "pre_classifier": "relu"}  # the last name of a head's hidden layer, and what follows it
GELU = ("electra",)  # architectures where that is a GELU


def heads(source: Source) -> None:
    """A head that is the model's own changes nothing. One for another class of model is left out, with a warning."""
    if not inside(source.path, HEAD_TENSORS).exists() and not inside(source.path, HEAD_PICKLE).exists():
        return
    said = read_json(inside(source.path, HEAD))
    file, tensors = stored(source.path, HEAD_TENSORS, HEAD_PICKLE)
    config = said.get("config")
    if isinstance(config, dict):
        tensors = _own(source, config, tensors)
    labels = _labels(config if isinstance(config, dict) else said)
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        path, _, name = key.rpartition(".")
        site = source.own(path)
        if site is None or name not in source.modules[site]._parameters or any(source.modules[site].children()):
            LOG.warning(
                "%s has the head of a %s, which this %s has not: load it onto that class for its answers.",
                source.path, said.get("model_class"), type(source.model).__name__,
            )  # fmt: skip
            return
        layers.setdefault(site, {})[name] = tensor
    for site, own in layers.items():
        _keep(source, site, own, labels)
    if not layers:
        raise FileError(f"{file} holds no tensors of a head.")


def _keep(source: Source, site: str, own: dict[str, Tensor], labels: tuple[str, ...]) -> None:
    module = source.modules[site]
    base = {name: p.detach() for name, p in module._parameters.items() if p is not None}
    same = own.keys() == base.keys()
    if same and all(t.shape == base[k].shape and torch.equal(t, base[k].to(t)) for k, t in own.items()):
        return
    if isinstance(module, nn.Linear) and own.keys() == {"weight", "bias"} and len(own["bias"]) == len(labels):
        source.keep(site, Head(labels), **own)
    elif isinstance(module, nn.Linear) and own.keys() == {"weight", "bias"} and len(own["bias"]) != len(base["weight"]):
        source.keep(site, Head(len(own["bias"])), **own)
    else:
        source.keep(site, Full(), **own)


def _labels(said: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the classes in order; () if they are not all said."""
    table = said.get("label2id")
    if not isinstance(table, dict) or sorted(map(str, table.values())) != sorted(map(str, range(len(table)))):
        return ()
    return tuple(sorted(table, key=lambda label: int(table[label])))


def _follows(source: Source, layer: str) -> str | None:
    """The function behind a hidden layer of the model's own head; None if that is not known."""
    said = HIDDEN.get(layer.rpartition(".")[2])
    return "gelu" if said and kind(source.model) in GELU else said


def _own(source: Source, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A flexible head's tensors by the names of the model's head, if that is the same function; else as they are."""
    numbers = sorted({key.split(".")[-2] for key in tensors}, key=lambda n: int(n) if n.isdigit() else -1)
    layers, base = source.roles["head"], getattr(source.model, source.model.base_model_prefix or "", None)  # type: ignore
    pooled = getattr(base, "pooler", None) is not None
    end = ENDS.get(str(config.get("head_type")), "no such class")
    alike = (
        type(source.model).__name__.endswith(end)
        and len(layers) == len(numbers)
        and (not end.startswith("ForSeq") or bool(config.get("use_pooler")) == pooled)
        and all(_follows(source, layer) == config.get("activation_function") for layer in layers[:-1])
    )
    if not alike:
        return dict(tensors)
    names = dict(zip(numbers, layers, strict=True))
    return {f"{names[key.split('.')[-2]]}.{key.split('.')[-1]}": t for key, t in tensors.items()}
