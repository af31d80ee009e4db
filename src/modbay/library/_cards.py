"""Cards: what README.md says of a module, or of a library of them, to people."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ._format import called
from ._index import Entry


def card(path: Path, record: Mapping[str, Any]) -> str:
    """README.md of one module, with the head that a hub reads (YAML, of which JSON is a part)."""
    about, base = record.get("about", {}), record["base"]
    name, bay = str(record.get("module", path.name)), record.get("bay", "modules")
    head = {"library_name": "modbay", "tags": ["modbay", *dict.fromkeys(said["class"] for said in record["kinds"])]}
    head |= {"license": about["licence"].lower()} if "licence" in about else {}
    head |= {"base_model": base["name"]} if _on_a_hub(base["name"]) else {}
    lines = [_head(head), f"# {name}\n", f"A module for {base['name'] or base['class']}, made with modbay.\n"]
    if "notes" in about:
        lines.append(about["notes"] + "\n")
    lines += [
        "| | |\n| --- | --- |",
        f"| computes | {_cell('; '.join(dict.fromkeys(called(said) for said in record['kinds'])))} |",
        f"| sites | {len(record['sites'])}: {_cell(', '.join(list(record['sites'])[:4]))}"
        f"{' …' if len(record['sites']) > 4 else ''} |",
        f"| base | {_cell(base['class'])}, fingerprint `{base['digest']}` |",
    ]
    for label, values in about.get("labels", {}).items():
        lines.append(f"| {_cell(label)} | {_cell(', '.join(values))} |")
    for metric, value in about.get("metrics", {}).items():
        lines.append(f"| {_cell(metric)} | {value:.6g} |")
    for one in about.get("data", []):
        rows = f", {one['rows']:,} rows" if "rows" in one else ""
        digest = f", SHA-256 `{one['sha256']}`" if "sha256" in one else ""
        lines.append(f"| trained on | {_cell(one['name'])}{rows}{digest} |")
    for one in about.get("parents", []):
        lines.append(f"| made of | `{one}` |")
    lines.append(f"| licence | {_cell(about.get('licence', 'not told'))} |")
    lines.append(f"| content | `{record['content']}` |\n")
    lines.append(
        f"Its folder goes beside others of its bay, as `FOLDER/{bay}/{name}`: attach that bay to the model, then "
        f"`bay.load(FOLDER, {name!r}, add=True)`.\n"
    )
    return "\n".join(lines)


def contents(title: str, several: Sequence[Entry]) -> str:
    """README.md of a library."""
    rows = [
        f"| [{_cell(one.name)}]({one.name.replace(' ', '%20')}) | {_cell('; '.join(one.facts['kinds']))} "
        f"| {_cell(one.facts['base']['name'] or one.facts['base']['class'])} "
        f"| {_cell(', '.join(v for values in one.about.get('labels', {}).values() for v in values))} "
        f"| {_cell(', '.join(f'{k} {v:.4g}' for k, v in one.about.get('metrics', {}).items()))} "
        f"| {_cell(one.about.get('licence', ''))} | `{one.content[:12]}` |"
        for one in several
        if "error" not in one.facts
    ]
    heads = ("module", "computes", "base", "labels", "metrics", "licence", "content")
    head = f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}"
    return "\n".join([_head({"library_name": "modbay", "tags": ["modbay"]}), f"# {title}\n", head, *rows, ""])


def _head(said: Mapping[str, Any]) -> str:
    rows = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in said.items())
    return f"---\n{rows}\n---\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _on_a_hub(name: str | None) -> bool:
    return name is not None and name.count("/") == 1 and not Path(name).is_absolute() and not Path(name).exists()
