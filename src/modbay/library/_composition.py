"""Several modules of another library that are one there: with the router and the aggregator that they have."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..seams import Fitting
from ._foreign import Foreign
from ._read import fill, fits
from ._write import bay_tensors, module_tensors


@dataclass(frozen=True, eq=False)
class Composition:
    """Modules, their router (or what makes one a site), their aggregator, and the tensors of these two, by
    "router/site/parameter"."""

    path: Path
    format: str
    files: Sequence[Foreign]
    router: Any
    aggregator: Any
    state: Mapping[str, Tensor] = field(default_factory=dict)

    def fill(self, fitting: Fitting) -> None:
        """Put all values into a bay that was just made of it; the modules come frozen."""
        targets = bay_tensors(fitting)
        fits(self.path, self.state, targets)
        for file in self.files:
            file.fill(module_tensors(fitting, file.name))
        fill(targets, self.state, True)

    def tell(self, model: nn.Module) -> None:
        self.files[0].tell(model)
