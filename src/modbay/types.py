"""The few names that all of modbay shares."""

from collections.abc import Mapping, Sequence

from torch import Tensor

Params = Mapping[str, Tensor]
"""One module's parameters at one site: tensor by name. Each may carry a leading group axis."""

Labels = str | Sequence[str | None] | Tensor
"""Labels of a call: one for all, one an example (None: the base alone), or indices (b,) into the names of the bay."""
