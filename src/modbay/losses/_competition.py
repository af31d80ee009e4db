"""The likelihood by which experts compete, so that each learns the rows that it is best at.

Jacobs, Jordan, Nowlan and Hinton, "Adaptive Mixtures of Local Experts", 1991 (Neural Computation 3), equations 1.2 and
1.3; the normalised Gaussian in its exponent: Jordan and Jacobs, 1994 (Neural Computation 6).
"""

import torch
from torch import Tensor

from ..types import System, systems


@systems(
    System(
        (98,),
        "losses.competition(outputs, gates, target)",
        (
            "tests/test_experts.py::test_competition_is_the_likelihood_written_out",
            "tests/test_experts.py::test_experts_that_compete_part_a_task_of_two_rules",
        ),
        "Competitive mixture of experts",
        "L = −log Σ_i g_i exp(−½ ‖d − o_i‖²)",
    )
)
def competition(outputs: Tensor, gates: Tensor, target: Tensor) -> Tensor:
    """−log Σ_i g_i exp(−½ ‖d − o_i‖²), the mean over rows: the nearest expert learns most of a row.

    outputs: (n, …, d), one an expert (mb.Stack gives them). gates: (…, n), that sum to one (mb.TopK(None) gives them).
    target: (…, d).
    """
    distance = (outputs - target).square().sum(-1).movedim(0, -1)
    return -torch.logsumexp(gates.clamp(min=torch.finfo(gates.dtype).tiny).log() - distance / 2, -1).mean()
