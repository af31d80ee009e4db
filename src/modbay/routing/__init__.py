"""The routing functions, one file each (survey section 3 of the digest, 4 of the paper)."""

from ._by_label import ByLabel as ByLabel
