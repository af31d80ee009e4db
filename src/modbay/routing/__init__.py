"""The routing functions, one file each (survey section 3 of the digest, 4 of the paper)."""

from ._balanced import Balanced as Balanced
from ._bm25 import BM25 as BM25
from ._by_label import ByLabel as ByLabel
from ._d_select import DSelect as DSelect
from ._dispatch import Dispatch as Dispatch
from ._drop import Drop as Drop
from ._expert_choice import ExpertChoice as ExpertChoice
from ._fixed import Fixed as Fixed
from ._gate import Gate as Gate
from ._hash import Hash as Hash
from ._path import Path as Path
from ._policy import Policy as Policy
from ._prototypes import Prototypes as Prototypes
from ._random import Random as Random
from ._scouts import Scouts as Scouts
from ._skills import Skills as Skills
from ._soft_gate import SoftGate as SoftGate
from ._split import Split as Split
from ._switches import Switches as Switches
from ._top_k import TopK as TopK
from ._tree import Tree as Tree
from ._types import Types as Types
from ._uniform import Uniform as Uniform
