"""The few names that all of modbay shares."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

F = TypeVar("F", bound=Callable)

Params = Mapping[str, Tensor]
"""One module's parameters at one site: tensor by name. Each may carry a leading group axis."""

Labels = str | Sequence[str | None] | Tensor
"""Labels of a call: one for all, one an example (None: the base alone), or indices (b,) into the names of the bay."""


@dataclass(frozen=True)
class System:
    """A system of the literature that a part is, or is when made so: one row of the catalogue, `modbay methods`.

    numbers: of the survey's systems. build: what makes it, as one would type it. tests: that prove it, as pytest names
    them. name, equation, source: the part's own, its docstrings', if None. section: the survey's; by the term if None.
    """

    numbers: tuple[int, ...]
    build: str
    tests: tuple[str, ...]
    name: str | None = None
    equation: str | None = None
    source: str | None = None
    section: str | None = None


def systems(*rows: System) -> Callable[[F], F]:
    """Say which systems a function makes; a class says so itself, in `systems`."""

    def mark(function: F) -> F:
        function.systems = rows  # type: ignore[attr-defined]
        return function

    return mark
