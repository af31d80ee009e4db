"""Plain values as YAML: strings are bare where that can't be misread, else as JSON, which YAML is."""

import json
import re
from collections.abc import Mapping
from math import isfinite
from typing import Any

# Words that no YAML reader takes for anything else; 1.1 reads "no", "on" and "1_000" as other things.
BARE = re.compile(r"(?!(?i:true|false|yes|no|on|off|null|y|n)$)[A-Za-z_][A-Za-z0-9_./+-]*")


def dump(value: Any) -> str:
    """Block style, two spaces a level."""
    return "\n".join(_lines(value)) + "\n"


def _lines(value: Any) -> list[str]:
    if isinstance(value, Mapping) and value:
        return [line for key, one in value.items() for line in _entry(f"{_scalar(str(key))}:", one)]
    if isinstance(value, list | tuple) and value:
        return [line for one in value for line in _item(one)]
    return [_scalar(value)]


def _entry(start: str, value: Any) -> list[str]:
    if isinstance(value, Mapping | list | tuple) and value and not _short(value):
        return [start, *[f"  {line}" for line in _lines(value)]]
    return [f"{start} {_flow(value)}"]


def _item(value: Any) -> list[str]:
    if isinstance(value, Mapping | list | tuple) and value and not _short(value):
        first, *rest = _lines(value)
        return [f"- {first}", *[f"  {line}" for line in rest]]
    return [f"- {_flow(value)}"]


def _short(value: Any) -> bool:
    """A list of few plain values stands on one line."""
    return (
        isinstance(value, list | tuple)
        and not any(isinstance(one, Mapping | list | tuple) for one in value)
        and len(_flow(value)) <= 80
    )


def _flow(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_scalar, value))}]"
    return _scalar(value)


def _scalar(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, Mapping):
        return "{}"
    if isinstance(value, list | tuple):
        return "[]"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return _float(value)
    shown = str(value)
    return shown if BARE.fullmatch(shown) else json.dumps(shown, ensure_ascii=False)


def _float(value: float) -> str:
    if not isfinite(value):
        return ".nan" if value != value else ".inf" if value > 0 else "-.inf"
    shown = repr(value)
    return shown.replace("e", ".0e") if "e" in shown and "." not in shown else shown  # 1e-05 is a string to YAML 1.1
