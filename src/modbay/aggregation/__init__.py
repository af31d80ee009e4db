"""The aggregation functions, one file each (survey section 4)."""

from ._sum import WeightedSum as WeightedSum
