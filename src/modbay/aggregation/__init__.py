"""The aggregation functions, one file each (survey section 4)."""

from ._again import Again as Again
from ._average import ParameterAverage as ParameterAverage
from ._competition import Competition as Competition
from ._compositional import CompositionalAttention as CompositionalAttention
from ._concatenate import Concatenate as Concatenate
from ._cross_stitch import CrossStitch as CrossStitch
from ._ensemble import Ensemble as Ensemble
from ._exchange import Exchange as Exchange
from ._fusion import AdapterFusion as AdapterFusion
from ._join import Join as Join
from ._layout import Layout as Layout
from ._mixture import Mixture as Mixture
from ._per_site import PerSite as PerSite
from ._prompt_attention import PromptAttention as PromptAttention
from ._prompt_product import PromptProduct as PromptProduct
from ._recursion import Recursion as Recursion
from ._sequence import Sequence as Sequence
from ._stack import Stack as Stack
from ._sum import WeightedSum as WeightedSum
from ._workspace import Workspace as Workspace
