"""Pure tensor code; each function beside the few lines that say what it must equal."""

from .grouped import add_linear as add_linear
from .grouped import align as align
from .grouped import autocasts as autocasts
from .grouped import linear as linear
from .grouped import shared_linear as shared_linear
from .hadamard import hadamard as hadamard
from .lowrank import lowrank as lowrank
from .lowrank import lowrank_mixture as lowrank_mixture
from .masks import cubic as cubic
from .masks import hard_concrete as hard_concrete
from .masks import logistic as logistic
from .masks import open_probability as open_probability
from .masks import pack_bits as pack_bits
from .masks import smooth_step as smooth_step
from .masks import straight_through as straight_through
from .masks import top_share as top_share
from .masks import unpack_bits as unpack_bits
from .queues import capacity as capacity
from .queues import places as places
from .remade import generator as generator
from .remade import normals as normals
from .remade import uniforms as uniforms
from .transport import assignment as assignment
from .transport import shares as shares
from .transport import sinkhorn as sinkhorn
from .uncompiled import uncompiled as uncompiled
