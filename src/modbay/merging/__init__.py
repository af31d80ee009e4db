"""Merging: pure functions of state dicts, and of the tensors of one name; they know no models, bays or files.

    merged = merging.ties([one, two], base, density=0.2)

A method has two forms. `ties(models, base, …)` merges state dicts name by name, and refuses what does not fit.
`ties_tensor(tensors, base, …)` is the same of one name's tensors: what does not fit in memory is merged with it a
tensor at a time. Both compute in float32 at least, and round once, at the end, to the models' dtype. Networks that do
not lie in one basin are first brought together: `match_weights`, `match_activations`, `ot_fusion`.
"""

from ._arithmetic import analogy as analogy
from ._arithmetic import task_arithmetic as task_arithmetic
from ._arithmetic import task_arithmetic_tensor as task_arithmetic_tensor
from ._average import average as average
from ._average import average_tensor as average_tensor
from ._conflicts import Conflicts as Conflicts
from ._conflicts import conflicts as conflicts
from ._curve import bezier as bezier
from ._curve import interpolated as interpolated
from ._curve import polychain as polychain
from ._dare import dare as dare
from ._dare import dare_tensor as dare_tensor
from ._dare import draw as draw
from ._dare import drop as drop
from ._dare import factor as factor
from ._dare import named as named
from ._dare import numbers as numbers
from ._fisher import fisher as fisher
from ._fisher import fisher_tensor as fisher_tensor
from ._fisher import norms as norms
from ._models import State as State
from ._permutations import Permutations as Permutations
from ._permutations import PermutationSpec as PermutationSpec
from ._permutations import permutation_sizes as permutation_sizes
from ._permutations import permuted as permuted
from ._permutations import unpermuted as unpermuted
from ._rebasin import match_activations as match_activations
from ._rebasin import match_weights as match_weights
from ._regmean import gram as gram
from ._regmean import regmean as regmean
from ._regmean import regmean_tensor as regmean_tensor
from ._running import RunningMean as RunningMean
from ._slerp import products as products
from ._slerp import shares as shares
from ._slerp import slerp as slerp
from ._slerp import slerp_tensor as slerp_tensor
from ._soup import Soup as Soup
from ._soup import greedy_soup as greedy_soup
from ._sparse import add_sparse as add_sparse
from ._sparse import add_sparse_tensor as add_sparse_tensor
from ._sparse import sparse_difference as sparse_difference
from ._sparse import sum_sparse as sum_sparse
from ._ties import Cut as Cut
from ._ties import cut as cut
from ._ties import resolve as resolve
from ._ties import thresholds as thresholds
from ._ties import ties as ties
from ._ties import ties_tensor as ties_tensor
from ._ties import trim as trim
from ._ties import trimmed as trimmed
from ._transport import ot_fusion as ot_fusion
from ._transport import transport_plans as transport_plans
from ._transport import transported as transported
