"""Full fine-tuning of a site: a trainable copy of it, as a module (what peft calls modules_to_save)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..abstract import Context, Replacement, Site
from ..core import quantised
from ..errors import CompositionError
from ..types import Params


@dataclass(frozen=True)
class Full(Replacement):
    """f_φ(x) instead of f_θ(x), where φ is a copy of all the parameters of the site, frozen or not.

    Parameters are named as in the site, with "/" for "."; tied ones stay tied. Other modules attached inside the site
    stay at work. Several copies in one batch run one by one, since an arbitrary network can't be vectorised safely.
    Differs from a deep copy of the site: buffers (running statistics) are the site's own. Raises CompositionError at a
    site without parameters.
    """

    batched: ClassVar[bool] = True
    tokenwise: ClassVar[bool] = False
    neutral: ClassVar[bool] = True
    folds: ClassVar[bool] = True

    def init(self, sites: Sequence[Site]) -> dict[str, dict[str, Tensor]]:
        return {site.name: self._one(site) for site in sites}

    def _one(self, site: Site) -> dict[str, Tensor]:
        module = site.module
        own = [] if module is None else module.named_parameters(remove_duplicate=False)
        packed = [name for name, inner in _modules(module) if quantised(inner)]
        if packed:
            raise CompositionError(
                f"Full at site {site.name!r} ({type(module).__name__}): the weight of {packed[0] or 'it'!r} is "
                f"quantised, and no copy of it could learn. Use mb.LoRA, or dequantise the base."
            )
        copies: dict[int, Tensor] = {}  # one a tensor, so that tied parameters stay one
        params = {
            name.replace(".", "/"): copies.setdefault(id(p), p.detach().clone())
            for name, p in own
            if "_bay" not in name.split(".")
        }
        if not params:
            raise CompositionError(
                f"Full at site {site.name!r} ({type(module).__name__}): it has no parameters that could be copied. "
                f"Attach at a layer that has."
            )
        return params

    def forward(self, params: Params, x: Tensor, f: Callable | None, c: Context) -> Tensor:
        if f is None:
            raise CompositionError("Full stands in for f with parameters of its own, but there is no f here.")
        module = f.module  # type: ignore[attr-defined]
        name = next(iter(params))
        if params[name].ndim == module.get_parameter(name.replace("/", ".")).ndim:
            return self._run(params, x, f, c.rows)
        rows = torch.arange(x.shape[0] * x.shape[1], device=x.device) if c.rows is None else c.rows
        rows = rows.view(len(x), -1)
        several = [{key: tensor[i] for key, tensor in params.items()} for i in range(len(x))]
        return torch.stack([self._run(p, x[i], f, rows[i]) for i, p in enumerate(several)])

    def _run(self, params: Params, x: Tensor, f: Callable, rows: Tensor | None) -> Tensor:
        named = {name.replace("/", "."): tensor for name, tensor in params.items()}
        return f.under(named, x, rows)  # type: ignore[attr-defined]


def _modules(module: nn.Module | None) -> list[tuple[str, nn.Module]]:
    """The modules of a site by name, without those of its bays."""
    found = [] if module is None else module.named_modules()
    return [(name, inner) for name, inner in found if "_bay" not in name.split(".")]
