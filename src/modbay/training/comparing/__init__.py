"""Comparing: methods and baselines on the same rows, one table, and what to take."""

from ._baselines import linear as linear
from ._compare import Compared as Compared
from ._compare import begun as begun
from ._compare import compare as compare
from ._compare import planned as planned
from ._comparison import Comparison as Comparison
from ._comparison import comparison as comparison
