"""The page: its order, its head, and how it is written."""

import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..metrics import Recorder, Recording
from ..recording import facts as facts_of
from . import _compare, _modules, _recorded, _results, _run
from ._html import Safe, join, tag, text

SECTIONS = (
    ("warnings", "Warnings", _run.warnings),
    ("results", "Results", _results.results),
    ("compare", "Methods", _compare.compare),
    ("against", "Against another run", _results.against),
    ("transfer", "Transfer", _compare.transfer),
    ("shots", "Few examples", _compare.shots),
    ("proof", "Proofs", _modules.proof),
    ("use", "Use", _modules.use),
    ("routing", "Routing", _modules.routing),
    ("over_time", "Over time", _recorded.over_time),
    ("tokens", "Tokens", _recorded.tokens),
    ("figures", "Figures", _recorded.figures),
    ("similarity", "Similarity", _modules.similarity),
    ("curve", "Learning", _run.curve),
    ("parameters", "Parameters", _modules.parameters),
    ("data", "Data", _run.data),
    ("run", "Command", _run.run),
    ("config", "Configuration", _run.config),
)
# Nothing may be loaded or run, whatever the data say.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def html(facts: Mapping[str, Any]) -> str:
    """All that the facts know, as one page; an absent key leaves its section out, equal facts give equal bytes."""
    made = [(name, short, part(facts)) for name, short, part in SECTIONS]
    shown = [(name, short, part) for name, short, part in made if part is not None]
    title = str(facts.get("title") or "A run of modbay")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="generator", content="modbay"),
        tag("title", title),
        tag("style", Safe(_style())),
    )
    nav = tag("nav", [tag("a", short, href=f"#{name}") for name, short, _ in shown], aria_label="Sections")
    top = tag(
        "header",
        tag("p", _line(facts), class_="kicker"),
        tag("h1", title),
        _verdict(facts),
        _results.key_figures(facts),
    )
    body = tag("body", top, nav if len(shown) > 1 else None, tag("main", [part for *_, part in shown]))
    return f"<!doctype html>\n{tag('html', head, chr(10), body, lang='en')}\n"


def write(path: str | os.PathLike[str], facts: Mapping[str, Any]) -> None:
    """Write the page to `path`: whole, or not at all."""
    path = Path(path)
    page = html(facts).encode()
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def routing(
    recording: Recording | Recorder,
    path: str | os.PathLike[str],
    *,
    labels: Sequence[str] | None = None,
    decode: Callable[[int], str] = str,
    title: str = "Routing",
) -> None:
    """Write what was recorded as a page: alarms, maps by site and label, over time, which tokens went where, figures.

    recording: what `bay.record()` or `metrics.recorded(model)` gave. labels: those that are shown; by default all.
    decode: a token id as text, a tokenizer's `convert_ids_to_tokens` for one.
    """
    several = list(recording.bays.values()) if isinstance(recording, Recorder) else [recording]
    write(path, {"title": title, **facts_of(several, labels, decode)})


def _style() -> str:
    return files("modbay.report").joinpath("style.css").read_text(encoding="utf-8")


def _verdict(facts: Mapping[str, Any]) -> Safe | None:
    said = _results.verdict(facts)
    return tag("p", said, class_="verdict") if said else None


def _line(facts: Mapping[str, Any]) -> Safe:
    """What stands small over the title: method, base, when."""
    base = facts.get("base")
    name = base.get("name") if isinstance(base, Mapping) else None
    parts = [
        "modbay",
        facts.get("method"),
        f"on {'/'.join(Path(str(name)).parts[-2:])}" if name else None,
        _when(facts.get("when")),
    ]
    return join([tag("span", text(part)) for part in parts if part])


def _when(when: Any) -> str | None:
    if not when:
        return None
    try:
        at = datetime.fromisoformat(str(when))
    except ValueError:
        return str(when)
    return f"{at.day} {at:%B %Y, %H:%M}" + (f" {at:%Z}" if at.tzinfo else "")
