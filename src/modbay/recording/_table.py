"""One table of routing, and every figure that is read from it."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from . import _measures as measures


@dataclass(frozen=True, eq=False)
class Table:
    """The joint table of a label's values and modules, at one site or over several.

    counts: (v, n), the examples of each value that went to each module; one that takes several modules, or whose tokens
    part ways, counts by shares. weights: (v, n), the mean weights. examples, entropy: (v,), their number, and the mean
    entropy of their routes. rows: (v,), how many routes there were: tokens', if tokens are routed.
    """

    bay: str
    site: str
    label: str
    values: list[str]
    modules: list[str]
    counts: np.ndarray
    weights: np.ndarray
    examples: np.ndarray
    entropy: np.ndarray
    rows: np.ndarray

    @property
    def shares(self) -> np.ndarray:
        """P(v, m), (v, n): it sums to one, and each value counts alike."""
        return measures.joint(self.counts)

    @property
    def use(self) -> np.ndarray:
        """The share of each module (n,), as the examples came."""
        return measures.use(self.counts)

    def metrics(self) -> dict[str, Any]:
        """Every figure of it. H_a and H_b, gini and utilisation are of examples as they came; in the others each value
        counts alike."""
        total = float(self.examples.sum())
        told = measures.conditional(self.counts)
        return {
            "bay": self.bay,
            "site": self.site,
            "label": self.label,
            "values": len(told),
            "modules": len(self.modules),
            "examples": total,
            "collapse_average": measures.collapse_average(self.counts),
            "collapse_worst": measures.collapse_worst(self.counts),
            "mutual_information": measures.mutual_information(self.counts),
            "inverse_mutual_information": measures.inverse_mutual_information(self.counts),
            "alignment": measures.alignment(self.counts),
            "adaptation": measures.adaptation(self.counts),
            "specialise": measures.specialise_reuse(told)[0],
            "H_a": float((self.entropy * self.examples).sum() / total) if total else 0.0,
            "H_b": measures.entropy(self.use),
            "effective_modules": measures.effective_modules(self.use),
            "gini": measures.gini(self.counts),
            "utilisation": measures.utilisation(self.counts),
        }
