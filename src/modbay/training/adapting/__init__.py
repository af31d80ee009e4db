"""Adapting: a new task or label value from few rows, over the modules that a finished run has."""

from ._adapt import adapt as adapt
from ._ways import WAYS as WAYS
