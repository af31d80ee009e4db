"""Which modules of a library answer to what is asked."""

import json
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

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


def nearest(several: Sequence[Entry], vector: Sequence[float], limit: int | None) -> list[Entry]:
    """Those whose embeddings are as long as the vector and most alike to it, each with its cosine."""
    own = np.asarray(vector, np.float64)
    same = [one for one in several if len(one.said.vector) == 4 * len(own)]
    table = np.frombuffer(b"".join(one.said.vector for one in same), "<f4").reshape(len(same), len(own)).astype(float)
    scale = np.linalg.norm(table, axis=1) * np.linalg.norm(own)
    score = np.where(scale > 0, table @ own / np.where(scale > 0, scale, 1.0), 0.0)
    return [replace(same[i], score=float(score[i])) for i in np.argsort(-score, kind="stable")[:limit]]
