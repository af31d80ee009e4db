"""Checkpoints, whole models as folders of safetensors: one made of several, without loading any of them."""

from ._expect import per_cent as per_cent
from ._expect import two as two
from ._explain import Explanation as Explanation
from ._explain import explain as explain
from ._merge import Merged as Merged
from ._merge import merge as merge
from ._merge import ready as ready
from ._merge import unfinished as unfinished
from ._plan import Plan as Plan
from ._plan import prepare as prepare
from ._read import Checkpoint as Checkpoint
from ._read import open_checkpoint as open_checkpoint
from ._recipe import Recipe as Recipe
from ._recipe import Source as Source
from ._recipe import read_recipe as read_recipe
from ._recipe import recipe as recipe
