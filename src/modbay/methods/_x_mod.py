"""X-MOD: a bottleneck a language, from the first step of pre-training on.

Pfeiffer, Goyal, Lin, Li, Cross, Riedel and Artetxe, "Lifting the Curse of Multilinguality by Pre-training Modular
Transformers", 2022 (arXiv 2205.06266).
"""

from collections.abc import Sequence
from typing import Any

from ..aggregation import Again
from ..modules import Bottleneck
from ..routing import ByLabel
from ..types import System, systems


@systems(
    System(
        (50,),
        'methods.x_mod(("en", "de"))',
        (
            "tests/test_networks.py::test_x_mod_is_the_model_of_transformers",
            "tests/test_networks.py::test_x_mod_trains_the_trunk_and_the_languages_of_a_batch",
        ),
        "X-MOD",
        "LN(y + W_up gelu(W_down y + b_down) + b_up), y = LN(h + FFN(h)), by the language of the row; all is trained",
    )
)
def x_mod(languages: Sequence[str], reduction: int | float = 2, label: str = "language") -> dict[str, Any]:
    """LN(y + W_up gelu(W_down y + b_down) + b_up), y = LN(h + FFN(h)), by language: what `mb.attach` is given beside a
    place.

        mb.attach(model, at="*.layer.?.output.LayerNorm", **methods.x_mod(("en", "de")))

    The place is the norm behind each feed-forward part, which the languages share and which is used twice, before the
    adapter and after it. freeze is False: trunk and languages are trained together; later the trunk is frozen, and
    bay.add adds a language. Weights are drawn from N(0, 0.02²), cut off at two deviations, as a new transformer's are.
    """
    kind = Bottleneck(reduction=reduction, activation="gelu", std=0.02)
    modules, router = dict.fromkeys(languages, kind), ByLabel(label)
    return {"modules": modules, "router": router, "aggregator": Again(), "name": label, "freeze": False}
