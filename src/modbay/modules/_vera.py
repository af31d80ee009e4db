"""VeRA: vectors learn, between random matrices that all sites share.

Kopiczko, Blankevoort and Asano, "VeRA: Vector-based Random Matrix Adaptation", 2024 (arXiv 2310.11454).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..abstract import ParameterComposition, Site
from ..deltas import LowRank
from ..errors import CompositionError
from ..ops import generator, uniforms
from ..types import Params, System
from ._common import positive


@dataclass(frozen=True)
class VeRA(ParameterComposition):
    """W + diag(b) B diag(d) A, with d (r,) at first `start` and b (o,) zero; A (r, i) and B (o, r) random, fixed.

    rank: r. A and B are as large as the widest site's, uniform within ±√(6/fan in), and cut to each site; all modules
    of a seed have the same ones. They are made again from the seed, on any machine, and never stored.
    At a Linear or Conv1D; raises CompositionError elsewhere.
    """

    batched: ClassVar[bool] = True
    constants: ClassVar[tuple[str, ...]] = ("A", "B")
    remade: ClassVar[tuple[str, ...]] = ("A", "B")
    systems: ClassVar[tuple[System, ...]] = (
        System(
            (24,),
            "mb.VeRA(256)",
            ("tests/test_lowrank.py::test_vera_is_two_vectors", "tests/test_lowrank.py::test_vera_in_peft"),
        ),
    )
    rank: int = 256
    start: float = 0.1
    seed: int = 0

    def __post_init__(self):
        positive("VeRA", rank=self.rank)

    def init(self, sites: Sequence[Site]) -> dict[str, dict[str, Tensor]]:
        for site in sites:
            if site.form not in ("linear", "transposed"):
                raise CompositionError(
                    f"VeRA at site {site.name!r} ({type(site.module).__name__}): its matrices are shared by Linear and "
                    f"Conv1D layers alone. Attach at those, or use mb.LoRA."
                )
        inputs, outputs = (max(site.features(side) for site in sites) for side in ("inputs", "outputs"))
        first, r = sites[0], self.rank
        a = uniforms(generator("VeRA", self.seed, "A"), math.sqrt(6 / inputs), r, inputs).to(first.device, first.dtype)
        b = uniforms(generator("VeRA", self.seed, "B"), math.sqrt(6 / r), outputs, r).to(first.device, first.dtype)
        made = {}
        for site in sites:
            own = {"d": site.zeros(r) + self.start, "b": site.zeros(site.features("outputs"))}
            made[site.name] = own | {"A": a.to(site.device, site.dtype), "B": b.to(site.device, site.dtype)}
        return made

    def delta(self, params: Params, site: Site) -> LowRank:
        d, b = params["d"], params["b"]
        wide, tall = params["A"].to(d.dtype), params["B"].to(d.dtype)
        a = d.unsqueeze(-1) * wide[..., : site.features("inputs")]
        return LowRank(a, b.unsqueeze(-1) * tall[..., : site.features("outputs"), :])
