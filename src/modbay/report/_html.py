"""HTML that can't be broken by data: whatever is not `Safe` is escaped on its way in."""

import re
from collections.abc import Iterable
from html import escape
from typing import Any

VOID = {"meta", "br", "hr", "col"}
NOT_TEXT = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)  # no HTML may have them


class Safe(str):
    """Markup, made by `tag` and `join` alone."""


def text(value: Any) -> Safe:
    """One value as markup: escaped, unless it is markup already."""
    if isinstance(value, Safe):
        return value
    return Safe(escape(NOT_TEXT.sub("\ufffd", str(value))))


def join(*parts: Any) -> Safe:
    """All parts in a row, sequences of parts taken apart; None and False are left out."""
    out: list[str] = []
    for part in parts:
        if part is None or part is False:
            continue
        if isinstance(part, Iterable) and not isinstance(part, str):
            out.append(join(*part))
        else:
            out.append(text(part))
    return Safe("".join(out))


def tag(name: str, /, *parts: Any, **attributes: Any) -> Safe:
    """<name attributes>parts</name>; `class_` is class, `aria_label` is aria-label, None and False are left out."""
    opened = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        opened.append(key if value is True else f'{key}="{text(str(value))}"')
    start = f"<{' '.join(opened)}>"
    return Safe(start if name in VOID else f"{start}{join(*parts)}</{name}>")


def section(name: str, title: str, lead: Any, *parts: Any) -> Safe:
    """A part of the page: its heading, the sentence that says what to see, and the rest."""
    heading = tag("h2", title, id=name)
    return tag("section", heading, tag("p", lead, class_="lead"), *parts, aria_labelledby=name)


def fold(summary: Any, *parts: Any) -> Safe:
    return tag("details", tag("summary", summary), *parts)
