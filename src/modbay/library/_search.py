"""Which modules of a library answer to what is asked."""

import base64
import json
import operator
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..errors import FileError
from ._index import Entry

COMPARE = {
    ">=": operator.ge, "<=": operator.le, "!=": operator.ne, "==": operator.eq, ">": operator.gt, "<": operator.lt,
    "=": operator.eq,
}  # fmt: skip
FORM = re.compile(r"\s*(.+?)\s*(>=|<=|!=|==|>|<|=)\s*([-+0-9.eE]+)\s*")

Comparison = tuple[str, str, float]


def comparison(text: str) -> Comparison:
    """`accuracy>0.8` in parts."""
    said = FORM.fullmatch(text)
    try:
        return said[1], said[2], float(said[3])  # type: ignore[index]
    except (TypeError, ValueError):
        raise FileError(f"metrics={text!r}: a comparison is NAME>NUMBER, as accuracy>0.8; also < >= <= = !=.") from None


def matches(
    entry: Entry,
    words: Sequence[str],
    labels: Mapping[str, str] | Sequence[str],
    base: str | None,
    kind: str | None,
    metrics: Sequence[Comparison],
) -> bool:
    """Whether a module answers to all of it. One whose files can't be read answers to its name alone."""
    facts, about = entry.facts, entry.about
    if "error" in facts:
        return not (labels or base or kind or metrics) and all(word.lower() in entry.name.lower() for word in words)
    return (
        _labelled(about.get("labels", {}), labels)
        and (base is None or _based(facts["base"], base))
        and (kind is None or any(_plain(kind) in _plain(one) for one in facts["kinds"]))
        and all(n in about.get("metrics", {}) and COMPARE[c](about["metrics"][n], x) for n, c, x in metrics)
        and (not words or _told(entry, words))
    )


def _plain(text: str) -> str:
    return text.lower().replace(" ", "")


def _labelled(has: Mapping[str, Sequence[str]], wanted: Mapping[str, str] | Sequence[str]) -> bool:
    if isinstance(wanted, Mapping):
        return all(value in has.get(label, ()) for label, value in wanted.items())
    return all(any(value in several for several in has.values()) for value in wanted)


def _based(base: Mapping[str, str | None], wanted: str) -> bool:
    named = wanted.lower() in f"{base.get('name') or ''} {base['class']}".lower()
    return named or (base["digest"] or "").startswith(wanted)


def _told(entry: Entry, words: Sequence[str]) -> bool:
    about = {key: entry.about[key] for key in ("labels", "data", "licence", "notes") if key in entry.about}
    text = f"{entry.name} {json.dumps(about, ensure_ascii=False)}".lower()
    return all(word.lower() in text for word in words)


def nearest(several: Sequence[Entry], vector: Sequence[float]) -> list[Entry]:
    """Those that keep an embedding as long as the vector, each with its cosine."""
    size, own = sum(x * x for x in vector) ** 0.5, []
    for one in several:
        theirs = unpacked(one.facts.get("embedding", ""))
        if len(theirs) == len(vector):
            other = sum(x * x for x in theirs) ** 0.5
            product = sum(x * y for x, y in zip(vector, theirs, strict=True))
            own.append(replace(one, score=product / (size * other) if size * other else 0.0))
    return own


def unpacked(text: str) -> tuple[float, ...]:
    raw = base64.b64decode(text)
    return struct.unpack(f"<{len(raw) // 4}f", raw)
