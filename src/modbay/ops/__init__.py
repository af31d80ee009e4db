"""Pure tensor code; each function beside the few lines that say what it must equal."""

from .grouped import add_linear as add_linear
from .grouped import align as align
from .grouped import autocasts as autocasts
from .grouped import linear as linear
from .hadamard import hadamard as hadamard
from .lowrank import lowrank as lowrank
from .lowrank import lowrank_mixture as lowrank_mixture
from .remade import generator as generator
from .remade import normals as normals
from .remade import uniforms as uniforms
