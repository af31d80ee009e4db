"""peft's prompts and prefixes: all of them lie in one tensor, under a bare name."""

from typing import Any

import torch
from torch import Tensor, nn

from ...errors import FileError, listed
from ...modules import Prefix, Prompt, Shift
from ...seams import crosses, find_roles, named, two_sided, window
from ._rotary import turning
from ._source import TENSORS, Source

LEARNED = ("wpe", "position_embeddings", "embed_positions")  # tables of positions, by the names that models give them


def _embeddings(source: Source) -> Tensor:
    """prompt_embeddings (n, …)."""
    if "prompt_embeddings" not in source.tensors:
        raise FileError(f"{source.path}/{TENSORS} has no prompt_embeddings: not all of it was saved.")
    table = source.tensors.pop("prompt_embeddings")
    if table.ndim != 2:
        raise FileError(f"{source.path}/{TENSORS}: prompt_embeddings is {tuple(table.shape)}, not (n, width).")
    return table


def prompt(source: Source) -> None:
    """Prompt tuning, and P-tuning, of which peft keeps what its encoder last gave.

    For an encoder-decoder peft keeps twice as many rows, unless num_transformer_submodules is 1, and uses the first
    half alone, in front of the encoder's input: the others never acted and never learned.
    """
    table = _embeddings(source)
    length = int(source.number("num_virtual_tokens", len(table)))
    if len(table) not in (length, 2 * length):
        raise FileError(f"{source.path}: {len(table)} rows for {length} virtual tokens.")
    source.keep("", Prompt(length), prompt=table[:length].contiguous())


def prefix(source: Source) -> None:
    """P (n, 2 L heads d): layer l's keys are at 2 l, its values at 2 l + 1.

    peft's text begins at position n. Under rotary positions keys are turned back by n steps, which is the same
    (`_rotary`); where positions are learned they are shifted.
    """
    table, sites = _embeddings(source), attentions(source.model)
    n, layers = len(table), int(source.number("num_layers", len(sites)))
    if layers != len(sites) or layers < 1:
        raise FileError(f"{source.path}: it has prefixes for {layers} layers, and this model {len(sites)} attentions.")
    heads = int(source.number("num_attention_heads", 1))
    parts = table.view(n, layers, 2, heads, -1).unbind(1)
    at = positions(source.model, f"{source.path}: its text begins at position {n}, and this model")
    if at is not None:
        source.keep(at, Shift(n))
    for i, site in enumerate(sites):
        keys, values = parts[place(source.model, i, layers)].permute(1, 2, 0, 3)  # (heads, n, d)
        turn, _ = turning(source.model, site, n)
        kind = Prefix(n, relative=relative(source.model, site))
        source.keep(site, kind, prefix=torch.stack([turn(keys), values]))


def place(model: nn.Module, layer: int, layers: int) -> int:
    """Where in peft's table a layer's prefix is. Of an encoder-decoder peft takes four rows a layer, of its table twice
    over, and passes two of them on: every other one, so that with an even number of layers two have the same."""
    return 2 * layer % layers if two_sided(model) else layer


def attentions(model: nn.Module) -> list[str]:
    """The attentions that have a prefix under peft, in order of the layers: those over the text itself, of an
    encoder-decoder the decoder's."""
    found = find_roles(model)["attention"]
    if not two_sided(model):
        return list(found)
    inside = decoder(model)
    return [name for name in found if name.startswith(inside) and not crosses(name)]


def decoder(model: Any) -> str:
    """How names in the decoder of an encoder-decoder begin."""
    return next(name for name, module in named(model).items() if module is model.get_decoder()) + "."


def relative(model: nn.Module, site: str) -> str | None:
    """What a prefix of peft's is under a bias of relative positions, or a window: right before the text."""
    attention = named(model)[site]
    placed = hasattr(attention, "has_relative_attention_bias") or window(attention) is not None
    return "front" if placed else None


def positions(model: nn.Module, what: str) -> str | None:
    """The name of the table of positions, if the model has one, of an encoder-decoder the decoder's; FileError where it
    is no table, or where there are several."""
    inside = decoder(model) if two_sided(model) else ""
    found = {
        name: module
        for name, module in named(model).items()
        if name.rpartition(".")[2] in LEARNED and name.startswith(inside)
    }
    if len(found) > 1 or not all(isinstance(module, nn.Embedding) for module in found.values()):
        raise FileError(f"{what} finds its positions in a way that can't be shifted ({listed(found)}).")
    return next(iter(found), None)
