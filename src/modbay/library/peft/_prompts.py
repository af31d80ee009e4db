"""peft's prompts and prefixes: all of them lie in one tensor, under a bare name."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ...errors import FileError
from ...modules import Prefix, Prompt
from ...seams import find_roles, named
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
    """Prompt tuning, and P-tuning, of which peft keeps what its encoder last gave."""
    table = _embeddings(source)
    length = int(source.number("num_virtual_tokens", len(table)))
    if len(table) != length:
        raise FileError(
            f"{source.path}: {len(table)} rows for {length} virtual tokens: a prompt for the encoder and one for the "
            f"decoder, and modbay's is the encoder's alone. Train it with num_transformer_submodules=1."
        )
    source.keep("", Prompt(length), prompt=table)


def prefix(source: Source) -> None:
    """P (n, 2 L heads d): layer l's keys are at 2 l, its values at 2 l + 1.

    peft's text begins at position n. Under rotary positions keys are turned back by n steps, which is the same; where
    positions are learned there is no equal.
    """
    table, sites = _embeddings(source), attentions(source.model)
    n, layers = len(table), int(source.number("num_layers", len(sites)))
    if layers != len(sites) or layers < 1:
        raise FileError(f"{source.path}: it has prefixes for {layers} layers, and this model {len(sites)} attentions.")
    heads = int(source.number("num_attention_heads", 1))
    parts = table.view(n, layers, 2, heads, -1).unbind(1)
    turn = turned(source.model, n, True, source.path)
    for site, own in zip(sites, parts, strict=True):
        keys, values = own.permute(1, 2, 0, 3)  # (heads, n, d)
        source.keep(site, Prefix(n), prefix=torch.stack([turn(keys), values]))


def attentions(model: nn.Module) -> list[str]:
    """The attentions over the input itself, in order of the layers."""
    return list(find_roles(model)["attention"])


def turned(model: nn.Module, n: int, back: bool, what: Path | str) -> Callable[[Tensor], Tensor]:
    """What makes of a key (heads, n, d) at the place where peft has it one that has no position; or, not `back`, of
    one that has none one for peft. Raises FileError where positions are learned."""
    modules = {name.rpartition(".")[2]: module for name, module in named(model).items()}
    if any(isinstance(modules.get(name), nn.Embedding) for name in LEARNED):
        raise FileError(
            f"{what}: under peft the text begins at position {n}, behind the prefix, and this model has learned its "
            f"positions: no prefix there is equal to one here. A prefix that modbay trains (mb.Prefix({n})) has its "
            f"text begin at 0; bay.save keeps it."
        )
    rotary = modules.get("rotary_emb")
    if rotary is None:
        return lambda keys: keys
    at = next(rotary.buffers(), torch.zeros(1)).device
    cosine, sine = rotary(torch.zeros(1, 1, 1, device=at), torch.tensor([[n]], device=at))
    length = (cosine.square() + sine.square()) if back else 1.0  # some scale what they turn

    def turn(keys: Tensor) -> Tensor:
        left, right = keys.chunk(2, -1)
        c, s = ((t / length)[0].to(keys) for t in (cosine, sine if back else -sine))
        return keys * c - torch.cat([-right, left], -1) * s

    return turn
