"""Prompts and prefixes as peft keeps them: the inverse of `_prompts`. Of an encoder, what it gives is kept."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ...abstract import Context, Kind
from ...modules import Prompt, Shift
from ...seams import two_sided
from ._draft import Draft
from ._prompts import attentions, place, positions, relative
from ._rotary import turning


def prompt(draft: Draft, sites: Mapping[str, Kind]) -> None:
    kind = next(iter(sites.values()))
    if list(sites) != [""] or getattr(kind, "after", 0):
        raise draft.refuse(next(iter(sites)), "the prompt is not in front of the whole input, as peft's are")
    own = draft.params[""]
    table = own["prompt"] if isinstance(kind, Prompt) else kind.extend(own, Context())  # type: ignore[attr-defined]
    draft.tensors["prompt_embeddings"] = table
    draft.config |= {"num_virtual_tokens": len(table), "token_dim": table.shape[1], "num_transformer_submodules": 1,
                     "num_attention_heads": 1, "num_layers": 1, "prompt_tuning_init": "RANDOM"}  # fmt: skip


def prefix(draft: Draft, sites: Mapping[str, Kind]) -> None:
    order = attentions(draft.model)
    shifted = {site: kind.by for site, kind in sites.items() if isinstance(kind, Shift)}
    sites = {site: kind for site, kind in sites.items() if site not in shifted}
    if set(order) != set(sites) or len({draft.params[site]["prefix"].shape for site in sites}) > 1:
        raise draft.refuse(next(iter(sites)), "prefixes are not at every attention alike, as peft's are")
    n = draft.params[order[0]]["prefix"].shape[2]
    for site in order:
        if getattr(sites[site], "relative", None) != (theirs := relative(draft.model, site)):
            raise draft.refuse(site, f"it has not relative={theirs!r}, as peft's prefixes are there")
    at = positions(draft.model, f"export of module {draft.name!r} as peft: this model")
    if shifted != ({} if at is None else {at: n}):
        raise draft.refuse(
            at or next(iter(shifted)),
            f"positions are learned, and under peft the text begins at {n}, behind the prefix, as mb.Shift({n}) there "
            f"has it; without, no prefix of peft's is equal to this one"
            if at is not None
            else "there is mb.Shift, and peft shifts no such table",
        )
    kept: dict[int, Tensor] = {}
    for i, site in enumerate(order):
        keys, values = draft.params[site]["prefix"]
        _, turn = turning(draft.model, site, n)
        own = torch.stack([turn(keys), values])
        if not torch.equal(kept.setdefault(place(draft.model, i, len(order)), own), own):
            raise draft.refuse(site, "peft has the same prefix as at another layer, as it passes every other one on")
    unused = torch.zeros_like(own)
    table = torch.cat([kept.get(i, unused) for i in range(len(order))])  # (2 L, heads, n, d)
    heads, width = table.shape[1], table.shape[3]
    draft.tensors["prompt_embeddings"] = table.permute(2, 0, 1, 3).flatten(1)
    draft.config |= {"num_virtual_tokens": n, "token_dim": heads * width,
                     "num_transformer_submodules": 2 if two_sided(draft.model) else 1,
                     "num_attention_heads": heads, "num_layers": len(order), "prefix_projection": False,
                     "encoder_hidden_size": heads * width}  # fmt: skip
