"""Metrics: what test records say, with intervals; and what modules, and their routing, look like."""

from ._modules import norms as norms
from ._modules import parameters as parameters
from ._modules import similarity as similarity
from ._paired import Difference as Difference
from ._paired import paired as paired
from ._paired import shown as shown
from ._paired import verdict as verdict
from ._records import Record as Record
from ._records import records as records
from ._records import write_records as write_records
from ._routing import Recorder as Recorder
from ._routing import collapse as collapse
from ._routing import effective_modules as effective_modules
from ._routing import entropy as entropy
from ._routing import recorded as recorded
from ._routing import routes as routes
from ._routing import use as use
from ._saved import saved as saved
from ._several import Gap as Gap
from ._several import Standing as Standing
from ._several import differ as differ
from ._several import gaps as gaps
from ._several import standings as standings
from ._spans import spans as spans
from ._table import Cell as Cell
from ._table import table as table
