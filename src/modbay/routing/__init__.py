"""The routing functions, one file each (survey section 3 of the digest, 4 of the paper)."""

from ._bm25 import BM25 as BM25
from ._by_label import ByLabel as ByLabel
from ._drop import Drop as Drop
from ._fixed import Fixed as Fixed
from ._gate import Gate as Gate
from ._skills import Skills as Skills
from ._top_k import TopK as TopK
from ._uniform import Uniform as Uniform
