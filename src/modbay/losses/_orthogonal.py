"""Losses that keep what modules do, or what they are, apart.

Features: Bousmalis, Trigeorgis, Silberman, Krishnan and Erhan, "Domain Separation Networks", 2016 (arXiv 1608.06019);
Liu, Qiu and Huang, "Adversarial Multi-task Learning for Text Classification", 2017 (arXiv 1704.05742). Modules: Vidoni,
Vulić and Glavaš, "Orthogonal Language and Task Adapters in Zero-Shot Cross-Lingual Transfer", 2020 (arXiv 2012.06460).
"""

from collections.abc import Iterable
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import System, systems

WRITTEN = "tests/test_tasks.py::test_the_losses_of_orthogonality_are_written_out"


@systems(
    System(
        (114,),
        "losses.difference(shared, private)",
        (WRITTEN, "tests/test_tasks.py::test_the_difference_loss_parts_shared_and_private"),
        "orthogonality of shared and private features",
        section="4.2.1",
    )
)
def difference(shared: Tensor, private: Tensor, normalise: bool = True) -> Tensor:
    """‖H_sᵀ H_p‖²_F of the features that the same rows get of two modules: nought if these see nothing in common.

    shared, private: (…, d) and (…, e), rows first. normalise: the mean over the rows is taken out, each row has length
    one, and the squares are averaged, as in the code of Domain Separation Networks; without it their plain sum.
    """
    s, p = shared.reshape(-1, shared.shape[-1]), private.reshape(-1, private.shape[-1])
    if not normalise:
        return (s.mT @ p).square().sum()
    s, p = F.normalize(s - s.mean(0), dim=-1), F.normalize(p - p.mean(0), dim=-1)
    return (s.mT @ p).square().mean()


@systems(
    System(
        (114,),
        "losses.orthogonal(weights)",
        (WRITTEN,),
        "orthogonality of modules",
        section="4.2.1",
    )
)
def orthogonal(weights: Iterable[Tensor]) -> Tensor:
    """Σ_{a<b} ‖φ_aᵀ φ_b‖²_F of one parameter in several modules: their columns span different spaces.

    weights: (o, i) each, or more axes, of which the last is the columns'.
    """
    several = [w.reshape(-1, w.shape[-1]) for w in weights]
    pairs = [(a.mT @ b).square().sum() for a, b in combinations(several, 2)]
    return torch.stack(pairs).sum() if pairs else several[0].new_zeros(())
