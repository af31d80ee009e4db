"""What a hypernetwork reads beside labels, the place in the network and the input, and the network that joins it."""

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..abstract import Context, Site
from ..errors import CompositionError, SiteError
from ..types import Params
from ._common import drawn, features_last

PLACES = ("site", "layer", "position", "input")
NUMBER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")  # the first is the layer's


def place_of(site: Site, what: str) -> str:
    """What of a site's name its embedding stands for: all of it, its layer's number, or the rest."""
    if what == "site":
        return site.name
    number = NUMBER.search(site.name)
    if number is None:
        raise CompositionError(
            f"Hyper(where=…, {what!r}) at site {site.name!r}: its name has no number of a layer. Use where=('site',)."
        )
    start, stop = number.span(1)
    return number[1] if what == "layer" else f"{site.name[:start]}*{site.name[stop:]}"


def place_codes(sites: Sequence[Site], where: Sequence[str], size: int) -> dict[str, dict[str, Tensor]]:
    """An embedding (size,) of each place, by site; sites of one layer share the layer's."""
    made: dict[tuple[str, str], Tensor] = {}
    out: dict[str, dict[str, Tensor]] = {site.name: {} for site in sites}
    for site in sites:
        for what in where:
            if what == "input":
                features_last(site, "Hyper(where=…, 'input')")
                site.features("inputs")
                continue
            key = (what, place_of(site, what))
            if key not in made:
                made[key] = nn.init.normal_(site.empty(size))
            out[site.name][what] = made[key]
    return out


def trunk(site: Site, width: int, hidden: int | None, code: int | None, norm: bool) -> dict[str, Tensor]:
    """What makes h of embeddings that are so wide together."""
    made = {}
    for name, size in (("project", hidden), ("code", code)):
        if size:
            made |= {name: drawn(site, size, width), f"{name}_bias": site.zeros(size)}
            width = size
    return made | ({"norm": site.zeros(width) + 1, "norm_bias": site.zeros(width)} if norm else {})


def joined(params: Params, codes: Sequence[Tensor]) -> Tensor:
    """h (b, d) of the embeddings (b or 1, ·), by such a trunk."""
    rows = max(map(len, codes))
    h = torch.cat([code.expand(rows, -1) for code in codes], -1)
    if "project" in params:
        h = torch.relu(F.linear(h, params["project"], params["project_bias"]))
    if "code" in params:
        h = F.linear(h, params["code"], params["code_bias"])
    return F.layer_norm(h, h.shape[-1:], params["norm"], params["norm_bias"], 1e-6) if "norm" in params else h


def pooled(x: Tensor, c: Context) -> Tensor:
    """(b, d): the mean of x over its positions, without those that are padding."""
    mask = c.mask if x.ndim == 3 else None
    if mask is None:
        return x.flatten(1, -2).mean(1) if x.ndim > 2 else x
    if mask.shape[1] < x.shape[1]:
        raise SiteError(
            f"Hyper(where=…, 'input'): the input has {x.shape[1]} positions, the attention mask {mask.shape[1]}: they "
            f"are not the same positions. Give the call no attention mask, or attach where they are."
        )
    count = mask[:, -x.shape[1] :].to(x.dtype).unsqueeze(-1)
    return (x * count).sum(1) / count.sum(1).clamp(min=1)
