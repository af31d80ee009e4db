"""Learned masks: a sub-network of a site, found by scores beside weights that need not learn.

Edge-popup: Ramanujan, Wortsman, Kembhavi, Farhadi and Rastegari, 2020 (arXiv 1911.13299). Movement pruning: Sanh, Wolf
and Rush, 2020 (arXiv 2005.07683). Piggyback: Mallya, Davis and Lazebnik, 2018 (arXiv 1801.06519). Supermasks: Zhou,
Lan, Liu and Yosinski, 2019 (arXiv 1905.01067). Gumbel-sigmoid masks: Csordás, van Steenkiste and Schmidhuber, 2021
(arXiv 2010.02066).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..abstract import ParameterComposition, Site
from ..deltas import Mask
from ..errors import CompositionError, listed
from ..ops import logistic, straight_through, top_share
from ..types import Params, System
from ._common import drawing, positive, weighted

TOP, DRAWN = ("edge-popup", "movement"), ("bernoulli", "gumbel")
MODES = (*TOP, "threshold", *DRAWN)
FORMULA, MOVEMENT, DRAWS, COST, PENALTY = (
    f"tests/test_sparse.py::test_{name}"
    for name in (
        "a_learned_mask_is_its_formula",
        "movement_scores_are_those_of_movement_pruning",
        "drawn_masks_are_bernoulli",
        "what_masks_and_sparse_updates_cost_on_disk",
        "penalties_are_their_formulas",
    )
)


@dataclass(frozen=True)
class Masked(ParameterComposition):
    """f by W ⊙ m(s) instead of W, with learned scores s shaped like W; m has values 0 and 1, and a gradient to s.

        mb.Masked("edge-popup", density=0.5)                            # m = 1 at the largest |s|
        mb.Masked("movement", density=1, start=0)                       # at the largest s; W learns, too: freeze=False
        mb.Masked("threshold", threshold=5e-3, start=1e-2)              # Piggyback: m = 1[s > τ]
        mb.Masked("threshold", threshold=0.0, start=0.1, regularise=1.0)  # soft movement pruning
        mb.Masked("bernoulli", start=0)                                 # Zhou et al.: m ~ Bernoulli(σ(s))
        mb.Masked("gumbel", start=2, regularise=1e-4)                   # Csordás et al.

    The gradient of m is that of s (of |s| for edge-popup), of σ(s) for bernoulli, and of σ((s + noise)/temperature) for
    gumbel, whose noise is logistic, so that m is a Bernoulli draw, too. density: the share kept at a site, of equal
    scores the first; `sparsity.set_density` changes it (movement pruning: from 1 down by `ops.cubic`). start: of s, or
    None: uniform within ±1/√inputs. regularise: λ of λ/n Σ σ(s), n entries a site; for bernoulli and gumbel λ Σ s.
    Masks are drawn in training mode, with gradients on, while s learns; elsewhere, and with noise=False, m = 1[s > 0]
    (Zhou et al. evaluate ten draws).
    Biases stay. At a Linear, Conv1D, Conv or Embedding; raises CompositionError elsewhere, or for a bad argument.
    `sparsity.harden` makes a SubNetwork of it: one bit a weight instead of a number.
    """

    batched: ClassVar[bool] = True
    constants: ClassVar[tuple[str, ...]] = ("density",)
    systems: ClassVar[tuple[System, ...]] = (
        System((3,), 'mb.Masked("movement", density=1, start=0)', (FORMULA, MOVEMENT), "movement pruning",
               "W ⊙ 1[s among the largest]; s and W learn, s by −∂L/∂W ⊙ W; soft: 1[s > τ] and λ/n Σ σ(s).",
               "Sanh, Wolf and Rush, 2020 (arXiv 2005.07683)"),
        System((5,), 'mb.Masked("bernoulli", start=0)', (FORMULA, DRAWS), "supermask",
               "W ⊙ m, m ~ Bernoulli(σ(s)), W as it was drawn.",
               "Zhou, Lan, Liu and Yosinski, 2019 (arXiv 1905.01067)"),
        System((6,), 'mb.Masked("edge-popup", density=0.5)', (FORMULA,), "edge-popup",
               "W ⊙ 1[|s| among the largest], W as it was drawn.", "Ramanujan et al., 2020 (arXiv 1911.13299)"),
        System((14,), 'mb.Masked("threshold", threshold=5e-3, start=1e-2)', (FORMULA, COST), "Piggyback",
               "W ⊙ 1[s > τ], one bit a weight and task.", "Mallya, Davis and Lazebnik, 2018 (arXiv 1801.06519)"),
        System((18,), 'mb.Masked("gumbel", start=2, regularise=1e-4)', (FORMULA, PENALTY), "weight-mask probing",
               "W ⊙ 1[s + noise > 0], with the gradient of σ(s + noise), and λ Σ s: which weights a function uses.",
               "Csordás, van Steenkiste and Schmidhuber, 2021 (arXiv 2010.02066)"),
    )  # fmt: skip
    mode: Literal["edge-popup", "movement", "threshold", "bernoulli", "gumbel"] = "edge-popup"
    density: int | float = 0.5
    threshold: int | float = 0.0
    temperature: int | float = 1.0
    start: int | float | None = None
    regularise: int | float = 0.0
    noise: bool = True

    def __post_init__(self):
        if self.mode not in MODES:
            raise CompositionError(f"Masked(mode={self.mode!r}): there is no such mask; there are {listed(MODES)}.")
        if not 0 < self.density <= 1:
            raise CompositionError(f"Masked(density={self.density!r}): a share of the entries, above 0 and at most 1.")
        positive("Masked", temperature=self.temperature)

    @property
    def neutral(self) -> bool:  # type: ignore[override]
        if self.mode in TOP:
            return self.density == 1
        drawn = self.mode in DRAWN and self.noise
        return not drawn and self.start is not None and self.start > self.threshold * (self.mode == "threshold")

    def init(self, sites: Sequence[Site]) -> dict[str, dict[str, Tensor]]:
        made = {}
        for site in sites:
            weighted(site, "Masked")
            scores = site.empty(*site.weight.shape)
            bound = (site.features("outputs") / scores.numel()) ** 0.5
            scores = scores.uniform_(-bound, bound) if self.start is None else scores.fill_(self.start)
            made[site.name] = {"scores": scores}
            if self.mode in TOP:
                made[site.name]["density"] = torch.full((1,), float(self.density), device=site.device)
        return made

    def penalty(self, params: Params) -> Tensor | None:
        if not self.regularise:
            return None
        s = params["scores"]
        return self.regularise * (s.sum() if self.mode in DRAWN else torch.sigmoid(s).mean())

    def delta(self, params: Params, site: Site) -> Mask:
        s = params["scores"]
        if self.mode == "threshold":
            return Mask(straight_through(s > self.threshold, s))
        if self.mode in TOP:
            ranked = s.abs() if self.mode == "edge-popup" else s
            hard = top_share(ranked.detach().flatten(-site.weight.ndim), params["density"].squeeze(-1))
            return Mask(straight_through(hard.view(s.shape), ranked))
        drawn = s + logistic(s) if self.noise and drawing(site, s) else s
        soft = s if self.mode == "bernoulli" else drawn / self.temperature
        return Mask(straight_through(drawn > 0, torch.sigmoid(soft)))
