"""SLERP: from one model's weights to another's along the arc between them, not the chord, so that norms do not shrink.

Shoemake, "Animating Rotation with Quaternion Curves", 1985 (SIGGRAPH); of models, as mergekit has it.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import MergeError
from ..types import System, systems
from ._models import State, each, weighted_sum, wide

PIECE = 1 << 16  # numbers: so few can be summed in float32 to its sixth digit


@systems(
    System(
        (128,),
        "merging.slerp(a, b, 0.5)",
        ("tests/test_merging.py::test_the_laws_of_merging", "tests/test_merging.py::test_slerp_is_mergekit_s"),
        "SLERP",
        section="5.1",
    )
)
def slerp(a: State, b: State, t: float = 0.5, threshold: float = 0.9995) -> dict[str, Tensor]:
    """sin((1 − t) Ω)/sin Ω θ_a + sin(t Ω)/sin Ω θ_b, cos Ω = θ_a · θ_b / (‖θ_a‖ ‖θ_b‖), each tensor one vector.

    t: 0 is a, 1 is b. threshold: tensors whose |cos Ω| is above it, the same or opposite, are interpolated along the
    line, (1 − t) θ_a + t θ_b. mergekit's `slerp`, whose dot product is in float32; here pieces of it add up in float64.
    Raises MergeError for models that do not fit.
    """
    return each("slerp", [a, b], None, lambda _, tensors, __: slerp_tensor(tensors, t, threshold))


def slerp_tensor(tensors: Sequence[Tensor], t: float = 0.5, threshold: float = 0.9995) -> Tensor:
    """`slerp`, of the two tensors of one name."""
    if len(tensors) != 2:
        raise MergeError(f"slerp: an arc lies between two models, and there are {len(tensors)}.")
    return weighted_sum(tensors, shares(*products(*tensors), t, threshold)).to(tensors[0].dtype)


def products(a: Tensor, b: Tensor) -> tuple[float, float, float]:
    """(θ_a · θ_b, θ_a · θ_a, θ_b · θ_b), a piece at a time; pieces are added up in float64."""
    if a.numel() == 0:
        return 0.0, 0.0, 0.0
    kind, found = torch.promote_types(wide(a), wide(b)), []
    for x, y in zip(a.reshape(-1).split(PIECE), b.reshape(-1).split(PIECE), strict=True):
        x, y = x.to(kind), y.to(kind)
        found += [x.dot(y), x.dot(x), y.dot(y)]
    return tuple(torch.stack(found).double().view(-1, 3).sum(0).tolist())  # type: ignore[return-value]


def shares(ab: float, aa: float, bb: float, t: float = 0.5, threshold: float = 0.9995) -> tuple[float, float]:
    """The weights of θ_a and θ_b on the arc, of their `products`."""
    # A vector of no length has no direction: mergekit leaves it as it is, and its product with the other is small.
    length = math.prod(n if n > 1e-8 else 1.0 for n in (math.sqrt(aa), math.sqrt(bb)))
    cos = ab / length
    if not abs(cos) <= threshold:
        return 1 - t, t
    angle = math.acos(cos)
    return math.sin(angle - t * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
