"""The computation functions, one file each (survey section 3)."""

from ._adalora import AdaLoRA as AdaLoRA
from ._bitfit import BitFit as BitFit
from ._bottleneck import Bottleneck as Bottleneck
from ._compacter import Compacter as Compacter
from ._diff import DiffPruning as DiffPruning
from ._dora import DoRA as DoRA
from ._feedforward import FeedForward as FeedForward
from ._full import Full as Full
from ._gates import Gates as Gates
from ._head import Head as Head
from ._hyper import Hyper as Hyper
from ._ia3 import IA3 as IA3
from ._intrinsic import Intrinsic as Intrinsic
from ._loha import LoHa as LoHa
from ._lokr import LoKr as LoKr
from ._lora import LoRA as LoRA
from ._masked import Masked as Masked
from ._prefix import Prefix as Prefix
from ._prompt import Prompt as Prompt
from ._sparse import SparseDelta as SparseDelta
from ._subnetwork import SubNetwork as SubNetwork
from ._vera import VeRA as VeRA
