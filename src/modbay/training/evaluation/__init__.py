"""Judging and using a finished run: its figures with intervals, and files with its predictions beside their rows."""

from ._evaluate import Evaluation as Evaluation
from ._evaluate import evaluate as evaluate
from ._evaluate import own_routing as own_routing
from ._evaluate import write_evaluation as write_evaluation
from ._given import Reading as Reading
from ._tell import tell_files as tell_files
from ._tell import tell_rows as tell_rows
