"""modbay: modular deep learning on PyTorch. y = A(f, x, {m_1 … m_n}, r(x, c), c).

A method that its folder exports is exported here, too: a new one is one line there.
"""

from . import errors as errors
from .abstract import Aggregator as Aggregator
from .abstract import Context as Context
from .abstract import Delta as Delta
from .abstract import FunctionComposition as FunctionComposition
from .abstract import Generator as Generator
from .abstract import InputComposition as InputComposition
from .abstract import Kind as Kind
from .abstract import ParameterComposition as ParameterComposition
from .abstract import Replacement as Replacement
from .abstract import Router as Router
from .abstract import Routing as Routing
from .abstract import Site as Site
from .aggregation import *
from .attach import Bay as Bay
from .attach import attach as attach
from .attach import bays as bays
from .attach import load as load
from .core import Modular as Modular
from .deltas import Affine as Affine
from .deltas import After as After
from .deltas import Beside as Beside
from .deltas import Bias as Bias
from .deltas import Dense as Dense
from .deltas import InputScale as InputScale
from .deltas import Kronecker as Kronecker
from .deltas import LowRank as LowRank
from .deltas import Mask as Mask
from .deltas import Scale as Scale
from .deltas import Sparse as Sparse
from .deltas import Sum as Sum
from .dequantise import dequantise as dequantise
from .merge import MergeReport as MergeReport
from .modules import *
from .routing import *
from .seams import at as at
from .seams import before as before
from .seams import part as part
from .seams import role as role
from .seams import span as span
