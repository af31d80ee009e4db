"""The equation as code: Modular, the sites, the session of a call, and the engine that runs modules in groups."""

from ._engine import Part as Part
from ._engine import apply as apply
from ._extension import extended as extended
from ._extension import extension as extension
from ._function import Function as Function
from ._modular import Inventory as Inventory
from ._modular import Modular as Modular
from ._modular import Network as Network
from ._modular import as_kind as as_kind
from ._modular import parameters as parameters
from ._modules import Modules as Modules
from ._pack import pack as pack
from ._pack import refuse_packed as refuse_packed
from ._pack import unpack as unpack
from ._session import BayState as BayState
from ._session import Session as Session
from ._session import recomputing as recomputing
from ._site import base_type as base_type
from ._site import describe as describe
from ._site import quantised as quantised
