"""Spans of tags, as the shared task of CoNLL-2000 counts them.

Tjong Kim Sang and Buchholz, "Introduction to the CoNLL-2000 Shared Task: Chunking", 2000 (aclanthology.org/W00-0726);
IOB2: Ratnaparkhi, 1998; Tjong Kim Sang and Veenstra, 1999 (cs/9907006).
"""

from collections.abc import Sequence


def spans(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """The spans (start, end, type) of a row's tags; the end is the first word that is not in the span.

    A span of a type begins at B-type, and at I-type where the word before is outside or of another type; it goes on
    through every I-type. A bare tag is read as I-: equal neighbours are one span. Only B and I are prefixes, so that
    "DRUG-dose" is a type; "O" is outside.
    """
    found, start, kind = set(), 0, None
    for i, tag in enumerate([*tags, "O"]):
        begins, new = _read(tag)
        if kind is not None and (begins or new != kind):
            found.add((start, i, kind))
            kind = None
        if kind is None and new is not None:
            start, kind = i, new
    return found


def _read(tag: str) -> tuple[bool, str | None]:
    """(whether it begins a span whatever stands before, its type; None outside)."""
    if tag == "O":
        return False, None
    prefix, dash, kind = tag.partition("-")
    if prefix in ("B", "I"):
        return prefix == "B", kind if dash else ""
    return False, tag
