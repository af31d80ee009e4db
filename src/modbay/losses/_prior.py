"""The Indian buffet process as a prior over which task uses which skill.

Griffiths and Ghahramani, 2011 (JMLR 12); relaxed to gates between 0 and 1 as in Ponti, Sordoni, Bengio and Reddy,
"Combining Modular Skills in Multitask Learning", 2022 (arXiv 2202.13914).
"""

import math

import torch
from torch import Tensor

from ..types import System, systems


@systems(
    System(
        (90,),
        "losses.indian_buffet(gates, alpha=3.0)",
        (
            "tests/test_routers.py::test_indian_buffet_prior_of_whole_gates",
            "tests/test_routers.py::test_skills_start_near_nought_learn_a_prior_and_take_new_tasks",
        ),
        "Indian buffet prior",
        section="4.2.2",
    )
)
def indian_buffet(gates: Tensor, alpha: float = 3.0) -> Tensor:
    """−log p(Z | α) = −n log α + α H_T − Σ_j [log Γ(T − m_j + 1) + log Γ(m_j) − log Γ(T + 1)], with m_j = Σ_t z_tj.

    gates: (T, n) between 0 and 1, tasks by modules. The term of equal columns, constant for relaxed gates, is left out.
    """
    tasks, n = gates.shape
    m = gates.sum(0).clamp(min=torch.finfo(gates.dtype).tiny)
    harmonic = sum(1 / t for t in range(1, tasks + 1))
    counts = torch.lgamma(tasks - m + 1) + torch.lgamma(m) - math.lgamma(tasks + 1)
    return -(n * math.log(alpha) - alpha * harmonic + counts.sum())
