"""The mix-and-match adapter: a prefix in attention, a wide scaled adapter beside the feed-forward part.

He, Zhou, Ma, Berg-Kirkpatrick and Neubig, "Towards a Unified View of Parameter-Efficient Transfer Learning", 2022
(arXiv 2110.04366).
"""

from typing import Any

from ..abstract import Kind
from ..modules import Bottleneck, Prefix
from ..seams import role
from ..types import System, systems


@systems(
    System(
        (52,),
        "methods.mam()",
        ("tests/test_unify.py::test_mam_by_hand", "tests/test_unify.py::test_mam_and_unipelt_equal_adapters"),
        "MAM adapter",
        "softmax(q [P_k; K]ᵀ) [P_v; V] in attention, FFN(x) + 4 · (W_up relu(W_down x + b) + b') beside it",
        section="3.5",
    )
)
def mam(
    prefix: int = 30, size: int = 512, scale: float = 4.0, bottleneck: int | None = 800, ffn: Any = role.ffn
) -> dict[Any, Kind]:
    """What one module is at each of its sites: softmax(q [P_k; K]ᵀ) [P_v; V], and FFN(x) + s (W_up relu(W_down x)).

        bay = mb.attach(model, modules={"xsum": methods.mam(), "ro-en": methods.mam()}, name="task")

    prefix: places of P, reparametrised by a map of `bottleneck` features as the official code does (None: P itself).
    size, scale: rows of W_down, and s; for classification the code has prefix=16, size=16, scale=2. ffn: the place of
    the feed-forward part, mb.span(mb.role.ffn_in, mb.role.ffn_out) where it is no module of its own (BERT).
    """
    adapter = Bottleneck(size, placement="parallel", scale=scale)
    return {role.attention: Prefix(prefix, bottleneck), ffn: adapter}
