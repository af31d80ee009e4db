"""Labelled data: rows from files or the hub, every one checked; parts without leaks; what there is in them."""

from ._digest import digest as digest
from ._read import read as read
from ._read import stream as stream
from ._row import KINDS as KINDS
from ._row import Columns as Columns
from ._row import Row as Row
from ._slug import slug as slug
from ._slug import slugs as slugs
from ._split import Splits as Splits
from ._split import load as load
from ._split import split as split
from ._survey import Survey as Survey
from ._survey import survey as survey
from ._write import write_rows as write_rows
from ._write import written as written
