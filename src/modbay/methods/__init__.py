"""Named methods: modules, sites, a router and an aggregator that a paper, or practice, puts together."""

from ._at import default_at as default_at
from ._at import default_kind as default_kind
from ._at import place as place
from ._catalogue import AXES as AXES
from ._catalogue import Entry as Entry
from ._catalogue import catalogue as catalogue
from ._domains import residual_adapter as residual_adapter
from ._dump import dump as dump
from ._dump import dump_at as dump_at
from ._dump import dump_kind as dump_kind
from ._few import t_few as t_few
from ._named import METHODS as METHODS
from ._parse import parse_bays as parse_bays
from ._parse import parse_kind as parse_kind
from ._ranks import RankBudget as RankBudget
from ._side import side_tuning as side_tuning
from ._spec import BaySpec as BaySpec
from ._spec import Method as Method
from ._spec import Values as Values
from ._stitched import cross_stitch as cross_stitch
from ._stitched import sluice as sluice
from ._supsup import infer_task as infer_task
from ._supsup import signed_constant as signed_constant
from ._typology import typology as typology
from ._x_mod import x_mod as x_mod
