"""A side network: another network beside the frozen one, the outputs of both mixed.

Zhang, Sax, Zamir, Guibas and Malik, "Side-Tuning: A Baseline for Network Adaptation via Additive Side Networks", 2020
(arXiv 1912.13503).
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..abstract import Kind
from ..aggregation import WeightedSum
from ..routing import Fixed
from ..types import System, systems


@systems(
    System(
        (49,),
        'methods.side_tuning({"side": network})',
        ("tests/test_networks.py::test_side_tuning_mixes_the_base_and_a_side_network",),
        "side-tuning",
    )
)
def side_tuning(sides: Mapping[str, Kind | nn.Module], weight: float = 0.5, learned: bool = True) -> dict[str, Any]:
    """α B(x) + (1 − α) S(x), with B the base and S the side network: what `mb.attach` is given beside a place.

        bay = mb.attach(encoder, at="", **methods.side_tuning({"side": small}))      # a network with the same output
        bay = mb.attach(encoder, at="", **methods.side_tuning({"side": mb.Full()}))  # a copy of the base, as the paper

    weight: 1 − α at first. learned: whether it is trained. Several sides: (1 − Σ w_i) B(x) + Σ w_i S_i(x).
    Differs: the paper's α is the sigmoid of what is learned; here it is learned itself, and may leave [0, 1].
    """
    router = Fixed(dict.fromkeys(sides, weight / len(sides)), learned=learned)
    return {"modules": dict(sides), "router": router, "aggregator": WeightedSum()}
