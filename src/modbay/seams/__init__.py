"""Where f meets the model: matching places, swapping classes, and the sites at which f is not a plain call."""

from ._fitting import Fitting as Fitting
from ._fitting import Pairs as Pairs
from ._fitting import Spec as Spec
from ._fitting import free as free
from ._fitting import pairs_of as pairs_of
from ._match import At as At
from ._match import Place as Place
from ._match import at as at
from ._match import before as before
from ._match import named as named
from ._match import part as part
from ._match import places as places
from ._match import span as span
from ._match import union as union
from ._prefix import window as window
from ._roles import Role as Role
from ._roles import Roles as Roles
from ._roles import collapsed as collapsed
from ._roles import describe_roles as describe_roles
from ._roles import find_roles as find_roles
from ._roles import role as role
from ._seams import seam_for as seam_for
from ._seat import Seam as Seam
from ._seat import Seat as Seat
from ._swap import swap as swap
from ._swap import unswap as unswap
