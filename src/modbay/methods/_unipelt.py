"""UniPELT: low-rank updates, a prefix and an adapter in one module, each behind a gate.

Mao, Mathias, Hou, Almahairi, Ma, Han, Yih and Khabsa, "UniPELT: A Unified Framework for Parameter-Efficient Language
Model Tuning", 2022 (arXiv 2110.07577).
"""

from typing import Any

from ..abstract import Kind
from ..modules import Bottleneck, LoRA, Prefix
from ..seams import role
from ..types import System, systems


@systems(
    System(
        (53,),
        "methods.unipelt(), with router=mb.Gate",
        ("tests/test_unify.py::test_unipelt_by_hand", "tests/test_unify.py::test_mam_and_unipelt_equal_adapters"),
        "UniPELT",
        "f(x) + G(x) Δ(x) at each site, G = mean_t σ(w · x_t + b); a prefix G(x) [P_k, P_v]",
        section="3.5",
    )
)
def unipelt(
    rank: int = 8, prefix: int = 10, bottleneck: int | None = 512, reduction: int = 16, qkv: Any = None
) -> dict[Any, Kind]:
    """What one module is at each of its sites, to be gated by mb.Gate there: f(x) + G Δ(x), G = mean_t σ(w · x_t + b).

        bay = mb.attach(model, modules={"task": methods.unipelt()}, router=mb.Gate)
        bay = mb.attach(model, modules={"ner": kinds, "pos": kinds}, router=lambda: mb.Gate("task"), name="task")

    rank: of LoRA at query and value, whose factor α/r the gate stands for, as in the official code; qkv: their place if
    they are fused, a mb.part of it, or mb.role.qkv, where keys change, too. prefix: places, reparametrised by
    `bottleneck` features, keys and values gated alike. reduction: of the adapter after the last projection of the
    feed-forward part.
    The adapter's gate reads that projection's input h. The official one reads its output W h + c, by w' · (W h + c), so
    that it is one of these, with w = Wᵀ w'. Differs: the adapter is after the projection, not after the norm that
    follows; padding does not count in the mean.
    """
    at = {role.query: LoRA(rank), role.value: LoRA(rank)} if qkv is None else {qkv: LoRA(rank)}
    return {**at, role.attention: Prefix(prefix, bottleneck), role.ffn_out: Bottleneck(reduction=reduction)}
