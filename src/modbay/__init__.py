"""modbay: modular deep learning on PyTorch. y = A(f, x, {m_1 … m_n}, r(x, c), c)."""

from . import errors as errors
from .abstract import Aggregator as Aggregator
from .abstract import Context as Context
from .abstract import FunctionComposition as FunctionComposition
from .abstract import InputComposition as InputComposition
from .abstract import Kind as Kind
from .abstract import ParameterComposition as ParameterComposition
from .abstract import Replacement as Replacement
from .abstract import Router as Router
from .abstract import Routing as Routing
from .abstract import Site as Site
from .aggregation import WeightedSum as WeightedSum
from .attach import Bay as Bay
from .attach import attach as attach
from .attach import bays as bays
from .core import Modular as Modular
from .modules import LoRA as LoRA
from .routing import ByLabel as ByLabel
from .seams import at as at
from .seams import part as part
from .seams import role as role
from .seams import span as span
