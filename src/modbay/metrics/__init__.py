"""Metrics: what test records say, with intervals; and what modules, and their routing, look like."""

from ._paired import Difference as Difference
from ._paired import paired as paired
from ._paired import shown as shown
from ._paired import verdict as verdict
from ._records import Record as Record
from ._records import records as records
from ._records import write_records as write_records
from ._spans import spans as spans
from ._table import Cell as Cell
from ._table import table as table
