"""A mixture of experts over adapters: a gate at each site sends each token to the few that suit it.

Li et al., "MixLoRA", 2024 (arXiv 2404.15159): the two likeliest of eight LoRA experts a token, and the Switch
Transformer's load balance (Fedus, Zoph and Shazeer, 2021, arXiv 2101.03961). Soft, without a balance: Zadouri et al.,
2023 (arXiv 2309.05444).
"""

from functools import partial
from typing import Any

from ..abstract import Kind
from ..errors import ConfigError
from ..routing import TopK
from ._at import default_kind
from ._defaults import number, sites
from ._spec import BaySpec, Method, Values


def build(
    values: Values,
    by: str = "task",
    kind: Kind | None = None,
    at: Any = None,
    experts: int = 8,
    k: int = 2,
    tokens: bool = True,
    balance: float = 1e-2,
) -> list[BaySpec]:
    """y = f(x) + Σ_{i ∈ top k} p_i Δ_i, p = softmax(W x) made to sum to one over the top k; labels play no part.

    experts, k: how many there are, and how many a token takes. tokens: False routes whole texts, by the mean of x.
    balance: the coefficient of the load balance. Differs from MixLoRA: a gate at each site instead of one for a
    feed-forward block, and experts in attention, too, by default.
    """
    if isinstance(balance, bool) or not isinstance(balance, (int, float)) or balance < 0:
        raise ConfigError(f"options: balance={balance!r}: the load balance's coefficient is a number from 0.")
    if number("k", k) > number("experts", experts):
        raise ConfigError(f"options: k={k} of experts={experts}: a token can't take more experts than there are.")
    modules = {f"expert{i}": kind or default_kind() for i in range(experts)}
    router = partial(TopK, k=k, by="token" if tokens else "example", balance=float(balance))
    return [BaySpec("experts", sites(at), modules, router)]


MIXTURE = Method(
    "mixture",
    "Mixture of experts",
    "Several modules; a learned gate sends each token to the two that suit it best, whatever the labels.",
    "Li et al., MixLoRA, 2024 (arXiv 2404.15159); balance: Fedus et al., 2021 (arXiv 2101.03961)",
    "Labels are missing or say little, and there are many rows.",
    build,
    labels=0,
)
