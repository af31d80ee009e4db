"""Named methods: modules, sites, a router and an aggregator that a paper, or practice, puts together."""

from ._at import default_at as default_at
from ._at import default_kind as default_kind
from ._at import place as place
from ._dump import dump as dump
from ._dump import dump_at as dump_at
from ._dump import dump_kind as dump_kind
from ._full import FULL, PROBE
from ._mixture import MIXTURE
from ._parse import parse_bays as parse_bays
from ._parse import parse_kind as parse_kind
from ._polytropon import POLYTROPON
from ._private import BOTH, PRIVATE
from ._sequence import SEQUENCE
from ._shared import SHARED
from ._spec import BaySpec as BaySpec
from ._spec import Method as Method
from ._spec import Values as Values

METHODS: dict[str, Method] = {
    method.name: method for method in (SHARED, PRIVATE, BOTH, SEQUENCE, POLYTROPON, MIXTURE, FULL, PROBE)
}
