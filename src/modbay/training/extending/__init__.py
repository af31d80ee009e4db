"""Extending: one more task or label value onto a finished run, whose own answers stay bit for bit."""

from ._extend import extend as extend
from ._extend import ready_to_extend as ready_to_extend
from ._extension import Extension as Extension
from ._extension import extension as extension
