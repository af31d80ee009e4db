"""Numbers as people read them: one unit by metric, a true minus, and a dash for what is not known."""

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from typing import Any

NONE = "–"
NAMES = {"macro_f1": "macro-F1", "f1": "F1", "span_f1": "span F1", "rmse": "RMSE", "nll": "negative log-likelihood"}
OF_ONE = ("accuracy", "f1", "precision", "recall")  # shares: shown in per cent
LOWER = ("perplexity", "rmse", "loss", "nll", "error", "mae", "mse")


def is_share(metric: str) -> bool:
    return any(word in metric.lower() for word in OF_ONE)


def lower_is_better(metric: str) -> bool:
    return any(word in metric.lower() for word in LOWER)


def named(metric: str) -> str:
    """The metric's name in a sentence."""
    return NAMES.get(metric, metric.replace("_", " ")) or "metric"


def capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def headed(metric: str) -> str:
    """The metric's name over a column, with its unit."""
    return f"{named(metric)}, %" if is_share(metric) else named(metric)


def number(value: Any) -> float | None:
    """A finite float, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if isfinite(value) else None


def numbers(values: Iterable[Any]) -> list[float]:
    return [x for x in map(number, values) if x is not None]


def show(value: Any, metric: str = "", *, sign: bool = False) -> str:
    """`86.3` of an accuracy of 0.863; three or four figures of anything else."""
    x = number(value)
    if x is None:
        return NONE
    if is_share(metric):
        x, form = 100 * x, ".1f"
    else:
        form = ",.0f" if abs(x) >= 1000 else ".1f" if abs(x) >= 100 else ".2f" if abs(x) >= 10 else ".3f"
    shown = f"{abs(x):{form}}"
    zero = not any(c in "123456789" for c in shown)
    return ("" if zero else "−" if x < 0 else "+" if sign else "") + shown


def two(value: Any) -> str:
    """Two decimals: a cosine, a weight."""
    x = number(value)
    return NONE if x is None else f"{round(x, 2) + 0.0:.2f}".replace("-", "−")


def interval(low: Any, high: Any, metric: str = "", *, sign: bool = False) -> str:
    if number(low) is None or number(high) is None:
        return ""
    return f"[{show(low, metric, sign=sign)}, {show(high, metric, sign=sign)}]"


def unit(metric: str) -> str:
    return "\u202f%" if is_share(metric) else ""


def points(metric: str) -> str:
    """The unit of a difference."""
    return " points" if is_share(metric) else ""


def chance(p: Any) -> str:
    x = number(p)
    return NONE if x is None else "<\u202f0.001" if x < 0.001 else f"{x:.3f}" if x < 0.1 else f"{x:.2f}"


def p_is(p: Any) -> str:
    """`p = 0.03`, for a sentence."""
    shown = chance(p)
    return f"p {shown}" if shown.startswith("<") else f"p = {shown}"


def count(value: Any) -> str:
    x = number(value)
    return NONE if x is None else f"{x:,.0f}".replace("-", "−")


def short(value: Any) -> str:
    """`22.7 M` of 22 713 216."""
    x = number(value)
    if x is None:
        return NONE
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= size:
            return f"{x / size:.3g}\u202f{letter}"
    return f"{x:.0f}"


def duration(seconds: Any) -> str:
    x = number(seconds)
    if x is None:
        return NONE
    if x < 60:
        return f"{x:.1f}\u202fs" if x < 10 else f"{x:.0f}\u202fs"
    minutes, s = divmod(round(x), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}\u202fh {minutes:02d}\u202fmin" if hours else f"{minutes}\u202fmin {s:02d}\u202fs"


def memory(mib: Any) -> str:
    x = number(mib)
    return NONE if x is None else f"{x / 1024:.1f}\u202fGiB" if x >= 1024 else f"{x:.0f}\u202fMiB"


def plural(n: int, one: str, many: str = "") -> str:
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def listed(names: Sequence[Any], most: int = 4) -> str:
    """`a, b and c`, or the first few `and 9 more`."""
    shown = [str(name) for name in names[:most]]
    if len(names) > most:
        return f"{', '.join(shown)} and {len(names) - most} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else "".join(shown)


def rows(facts: Mapping[str, Any], *keys: str) -> list[Mapping[str, Any]]:
    """The list of rows under facts[key][key]…; empty if a key is absent."""
    at: Any = facts
    for key in keys:
        at = at.get(key) if isinstance(at, Mapping) else None
    return [row for row in at if isinstance(row, Mapping)] if isinstance(at, list | tuple) else []


def strings(value: Any) -> list[str]:
    """A list of sentences, be it one."""
    return [value] if isinstance(value, str) else [str(x) for x in value] if isinstance(value, list | tuple) else []


def grouped(items: Iterable[Any], key) -> dict[Any, list[Any]]:
    """Items by key, both in the order in which they come."""
    out: dict[Any, list[Any]] = {}
    for item in items:
        out.setdefault(key(item), []).append(item)
    return out
