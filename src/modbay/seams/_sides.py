"""The two sides of an encoder-decoder, and the attention between them."""

import re

from torch import nn

_CROSS = re.compile(r"(cross|enc_?dec|encoder_?att)[^.]*", re.IGNORECASE)


def two_sided(model: nn.Module) -> bool:
    """Whether a model is an encoder-decoder, as its config says."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def crosses(name: str) -> bool:
    """Whether a module is, or is inside, the attention to an encoder, which its name alone tells from the other
    (cross…, EncDec…, encoder_attn)."""
    return _CROSS.search(name) is not None
