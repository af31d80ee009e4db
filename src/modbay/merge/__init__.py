"""Merging modules: one module made of several of a bay, exactly where it can be, and with the error told where not."""

from ._lora import Plain as Plain
from ._lora import as_lora as as_lora
from ._merge import merge as merge
from ._report import MergeReport as MergeReport
from ._report import SiteReport as SiteReport
