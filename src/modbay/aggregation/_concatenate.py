"""Concatenation: the prompts of several modules, one after another (survey section 5.3).

Prefixes one after another: Li and Liang, "Prefix-Tuning", 2021 (arXiv 2101.00190); a prompt for the task and one for
each of its parts: Vu, Lester, Constant, Al-Rfou and Cer, "SPoT", 2022 (arXiv 2110.07904).
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..abstract import Aggregator, Context, Kind, Routing, Site
from ..core import extension
from ..errors import CompositionError
from ..types import System


class Concatenate(Aggregator):
    """f([α_1 P_1, …, α_k P_k, x]): the active modules' prompts (or prefixes) in the order of the routing, before x.

    Their lengths may differ, within a row and between rows. A weight scales its prompt, so that a router can learn.
    Raises CompositionError for kinds that are no input compositions: outputs are not concatenated here (mb.Join).
    """

    systems = (
        System(
            (141,), "mb.Concatenate()",
            ("tests/test_prompt.py::test_concatenate", "tests/test_prefix.py::test_concatenate_and_reparametrised",
             "tests/test_input.py::test_demonstrations_are_concatenated"),
            "concatenation of prompts",
        ),
    )  # fmt: skip

    def admit(self, kind: Kind, site: Site) -> None:
        if not kind.place:
            raise CompositionError(
                f"Concatenate at site {site.name!r}: {type(kind).__name__} is put in front of no input, so that there "
                f"is nothing to concatenate. Use WeightedSum."
            )

    def forward(self, f: Callable | None, x: Tensor, modules: Any, routing: Routing, c: Context) -> Tensor:
        raise CompositionError(
            f"Concatenate at site {modules.site.name!r}: here is no input that can be composed; a Prompt goes to the "
            f"model itself (at=''), a Prefix to an attention module."
        )

    def extend(self, modules: Any, routing: Routing, x: Tensor, c: Context) -> tuple[Tensor, Tensor | None] | None:
        return extension(modules, routing, x, c, "concatenate")
