"""Attention over prompts: each input takes its share of source prompts, on top of its task's own.

Asai, Salehi, Peters and Hajishirzi, "ATTEMPT: Parameter-Efficient Multi-task Tuning via Attentional Mixtures of Soft
Prompts", 2022 (arXiv 2205.11961); sizes and temperature as in the authors' code.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..abstract import Aggregator, Context, Generator, Kind, Routing, Site
from ..core import extension
from ..errors import CompositionError, listed
from ..types import System

TESTS = "tests/test_outputs.py::"


class PromptAttention(Aggregator):
    """f([P, x]), P = Σ_t α_t P_t + Σ_j a_j P_j, a = softmax_j(max P_j · N(W_u silu(W_d max x)) / T), an example each.

        modules = dict.fromkeys(["mnli", "squad", "rte", "cb"], mb.Prompt(100))
        bay = mb.attach(t5, modules=modules, aggregator=mb.PromptAttention(["mnli", "squad"]), name="task")
        bay.freeze("mnli", "squad")                    # trained before
        t5(**batch, task=["rte", "cb"])                # multi-task: the attention is shared

    t: the row's own prompt, that the router chose (several, or weights α, too); j: the sources and t. Maxima are over
    the positions of a prompt (n, d), and of the embedded input that are not padding. size: rows of W_d (size, d), W_u
    (d, size), no biases; N a layer norm. temperature: T, e·d if None, the paper's. A row without any module is f(x).
    Differs: the code takes the maximum over padding as well. A source that is also chosen counts once in the softmax.
    Raises CompositionError for what is no prompt, or a source that the bay lacks.
    """

    systems = (
        System(
            (132,), 'mb.PromptAttention(["mnli", "squad"])',
            (TESTS + "test_prompts_are_attended_by_the_input",
             TESTS + "test_the_attention_to_prompts_learns_and_is_kept"),
            "ATTEMPT",
        ),
    )  # fmt: skip

    def __init__(self, sources: Sequence[str], size: int = 100, temperature: float | None = None):
        super().__init__()
        if isinstance(sources, str) or not sources or len(set(sources)) < len(sources):
            raise CompositionError(f"PromptAttention(sources={sources!r}): different names of modules, one at least.")
        if size < 1 or (temperature is not None and not temperature > 0):
            raise CompositionError(f"PromptAttention(size={size}, temperature={temperature}): positive numbers.")
        self.sources, self.size, self.temperature = list(sources), size, temperature
        self.built = False

    def build(self, site: Site) -> None:
        if self.built:
            return
        try:
            d = site.module.get_input_embeddings().weight.shape[1]  # type: ignore[union-attr, operator]
        except (AttributeError, NotImplementedError):
            d = site.features("outputs")
        place = {"device": site.device, "dtype": site.dtype}
        self.down, self.up = nn.Linear(d, self.size, bias=False, **place), nn.Linear(self.size, d, bias=False, **place)
        self.norm, self.built = nn.LayerNorm(d, **place), True

    def admit(self, kind: Kind, site: Site) -> None:
        if kind.place != "input" or isinstance(kind, Generator):
            raise CompositionError(
                f"PromptAttention at site {site.name!r}: {type(kind).__name__} is no prompt, whose positions could be "
                f"compared with the input's. Use mb.Prompt, or another aggregator."
            )

    def forward(self, f: Callable | None, x: Tensor, modules: Any, routing: Routing, c: Context) -> Tensor:
        raise CompositionError(
            f"PromptAttention at site {modules.site.name!r}: here is no input that can be composed; a Prompt goes to "
            f"the model itself (at='')."
        )

    def extend(self, modules: Any, routing: Routing, x: Tensor, c: Context) -> tuple[Tensor, Tensor | None] | None:
        missing = [name for name in self.sources if name not in modules.names]
        if missing:
            raise CompositionError(
                f"PromptAttention(sources={self.sources}): the bay lacks {listed(missing)}; there are "
                f"{listed(modules.names)}."
            )
        active = modules.active(routing)
        if routing.axes > 1 or not active:
            return extension(modules, routing, x, c)  # nothing, or what says why not
        sources = [modules.names.index(name) for name in self.sources]
        index, alpha = _chosen(routing, len(modules), len(x), x.device)
        ids = list(dict.fromkeys([*sources, *active]))
        host = None if routing.host is None else _hosts(routing.host, sources, len(x))
        told = torch.tensor(sources, device=x.device)
        first = told.expand(len(x), -1)
        live = (alpha != 0).any(-1, keepdim=True)
        every = torch.cat([first, index], 1)
        counts = torch.cat([torch.ones_like(first), (alpha != 0) & ~torch.isin(index.contiguous(), told)], 1) > 0
        shares = self._shares(modules, ids, every, counts, x, c)
        weights = (shares + torch.cat([torch.zeros_like(first), alpha], 1)) * live
        every = torch.where(live & (every >= 0), every, -1)
        return extension(modules, Routing(index=every, weights=weights, host=host), x, c)

    def _shares(self, modules: Any, ids: list[int], every: Tensor, counts: Tensor, x: Tensor, c: Context) -> Tensor:
        """a (b, k) of the modules in every (b, k), those that count."""
        own = self.down.weight.dtype
        tops = [modules.parts[i].kind.extend(modules.parts[i].tensors(), c).amax(-2).to(own) for i in ids]
        place = [ids.index(i) if i in ids else 0 for i in range(len(modules))]
        at = torch.tensor(place, device=x.device)[every.clamp(min=0)]
        mask = c.mask
        seen = x if mask is None else x.masked_fill(mask[:, -x.shape[1] :, None] == 0, torch.finfo(x.dtype).min)
        query = self.norm(self.up(nn.functional.silu(self.down(seen.amax(1).to(own)))))  # (b, d)
        scores = (torch.stack(tops)[at] @ query.unsqueeze(-1)).squeeze(-1).float()
        scores = scores / (self.temperature or math.e * query.shape[-1])
        return scores.masked_fill(~counts, torch.finfo(scores.dtype).min).softmax(-1)


def _chosen(routing: Routing, n: int, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(index (b, k), α (b, k)) of the route of every row, −1 and 0 for none."""
    if routing.index is None:
        index, alpha = torch.arange(n, device=device), routing.weights.float()  # type: ignore[union-attr]
    else:
        index = routing.index.to(device)
        alpha = (index >= 0).float() if routing.weights is None else routing.weights.float() * (index >= 0)
    return index.expand(rows, -1), alpha.to(device).expand(rows, -1)


def _hosts(host: Any, sources: list[int], rows: int) -> tuple[tuple[int, ...], ...]:
    """What the index holds, row by row: nothing where a row has no module."""
    several = host * rows if len(host) == 1 and rows > 1 else host
    return tuple((*sources, *ids) if ids else () for ids in several)
