"""What a merge did: a row a site."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..abstract import Kind


def short(kind: Kind) -> str:
    """A kind as one would type it: what is as by default is left out."""
    own = [(f.name, getattr(kind, f.name)) for f in fields(kind) if f.init and getattr(kind, f.name, None) != f.default]
    return f"{type(kind).__name__}({', '.join(f'{name}={value!r}' for name, value in own)})"


@dataclass(frozen=True)
class SiteReport:
    """One site of a merged module.

    modules: whose parts are in it. of: "deltas", "parameters", or "module", one as it is. how: what was done, in words.
    kind: the result's. error: ‖ΔW − ΔW'‖/‖ΔW‖ of what was cut to a lower rank; 0 where the result is exact, but for
    rounding to the parameters' dtype.
    """

    site: str
    modules: tuple[str, ...]
    of: str
    how: str
    kind: str
    error: float = 0.0


@dataclass(frozen=True)
class MergeReport:
    """What `bay.merge` did, by site; `print(report)` shows it as a table."""

    name: str
    method: str
    weights: Mapping[str, float]
    rows: tuple[SiteReport, ...]

    @property
    def error(self) -> float:
        """The largest relative error of a site; 0 if all is exact."""
        return max((row.error for row in self.rows), default=0.0)

    def __str__(self) -> str:
        given = ", ".join(f"{name}: {w:.4g}" for name, w in self.weights.items())
        cells = [("site", "modules", "of", "what was done", "kind", "error")]
        for row in self.rows:
            error = f"{row.error:.2e}" if row.error else "0"
            cells.append((row.site or "(the model)", " + ".join(row.modules), row.of, row.how, row.kind, error))
        widths = [max(len(row[i]) for row in cells) for i in range(6)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells]
        worst = max(self.rows, key=lambda row: row.error)
        last = f"largest relative error: {worst.error:.2e}, at {worst.site!r}" if worst.error else "exact at every site"
        return "\n".join([f"{self.name!r} = {self.method}({given})", *lines, last])

    def as_dict(self) -> dict[str, Any]:
        """The same for programs and JSON."""
        rows = [{**asdict(row), "modules": list(row.modules)} for row in self.rows]
        given = {"name": self.name, "method": self.method, "weights": dict(self.weights)}
        return {**given, "error": self.error, "sites": rows}
