"""The methods that `modbay train --method` takes, by name."""

from ._full import FULL, PROBE
from ._mixture import MIXTURE
from ._polytropon import POLYTROPON
from ._private import BOTH, PRIVATE
from ._sequence import SEQUENCE
from ._shared import SHARED
from ._spec import Method

METHODS: dict[str, Method] = {
    method.name: method for method in (SHARED, PRIVATE, BOTH, SEQUENCE, POLYTROPON, MIXTURE, FULL, PROBE)
}
