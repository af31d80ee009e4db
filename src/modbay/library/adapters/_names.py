"""What modules are called in the transformers that adapters runs on, 4.57, where later ones differ: ViT, BEiT."""

import re

from torch import nn

LATER = (
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
    ("attention.attention", "attention"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
)  # of a layer: (then, now)
RENAMED = ("vit", "beit")
STRIPPED = ("xmod",)  # adapters takes these models' own modules out, so that all others act on another base


def kind(model: nn.Module) -> str:
    """transformers' word for the architecture; "" if it has none."""
    return getattr(getattr(model, "config", None), "model_type", None) or ""


def then(model: nn.Module, name: str) -> str:
    """A module's name, as adapters has it."""
    layer = re.fullmatch(r"(|.*\.)layers\.(\d+)(?:\.(.*))?", name) if kind(model) in RENAMED else None
    if layer is None:
        return name
    inner = {new: old for old, new in LATER}.get(layer[3] or "", layer[3])
    return f"{layer[1]}encoder.layer.{layer[2]}" + (f".{inner}" if inner else "")


def now(model: nn.Module, name: str) -> str:
    """The inverse."""
    layer = re.fullmatch(r"(|.*\.)encoder\.layer\.(\d+)(?:\.(.*))?", name) if kind(model) in RENAMED else None
    if layer is None:
        return name
    inner = dict(LATER).get(layer[3] or "", layer[3])
    return f"{layer[1]}layers.{layer[2]}" + (f".{inner}" if inner else "")
