"""Benchmarks that judge routing: is a modular architecture enough, and which router comes near to ground truth?"""

from ._grid import grid as grid
from ._grid import judge as judge
from ._grid import modularity as modularity
from ._grid import standings as standings
from ._nets import NETWORKS as NETWORKS
from ._rules import FAMILIES as FAMILIES
from ._rules import MHARules as MHARules
from ._rules import MLPRules as MLPRules
from ._rules import RNNRules as RNNRules
from ._run import Setting as Setting
from ._run import run as run
from ._ways import PAPER as PAPER
from ._ways import way as way
