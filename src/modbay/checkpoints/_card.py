"""What a merged checkpoint says of itself: README.md for people, modbay_merge.json for programs."""

import contextlib
import hashlib
import os
import platform
import re
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import safetensors
import torch
import yaml

from ..library._files import sha256
from ..library._format import written_by
from ._plan import Plan

FILE = "modbay_merge.json"
SETTLED = 2  # seconds


def file_hash(path: Path) -> str:
    """SHA-256 of a file, which is read for it once: later it is known, as long as the file is the same.

    The hub's cache keeps large files under theirs, so that they need not be read even once.
    """
    blob = path.resolve()
    if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return blob.name
    note, before = _note(blob), blob.stat()
    try:
        said = note.read_text(encoding="ascii")
        if re.fullmatch(r"[0-9a-f]{64}", said):
            return said
    except (OSError, ValueError):
        pass
    began = time.time()
    found = sha256(blob)
    # A clock may be so coarse that a write just now leaves no trace in it: what is so new is not kept.
    if _stamp(blob.stat()) == _stamp(before) and max(before.st_mtime, before.st_ctime) < began - SETTLED:
        with contextlib.suppress(OSError):  # a home that can't be written to costs time alone
            note.parent.mkdir(parents=True, exist_ok=True)
            aside = note.with_name(f"{note.name}.{uuid.uuid4().hex[:12]}")
            aside.write_text(found, encoding="ascii")
            os.replace(aside, note)
    return found


def _note(path: Path) -> Path:
    """Where the hash of this very file, as it is now, would be kept; ctime changes whenever a file is written to."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    key = hashlib.sha256(repr((str(path), _stamp(path.stat()))).encode()).hexdigest()
    return Path(home) / "modbay" / "sha256" / key


def _stamp(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def hashes(plan: Plan, pool: ThreadPoolExecutor) -> dict[Path, Any]:
    """{file: a future of its SHA-256} of all inputs; threads share the pages that the merge reads."""
    return {file: pool.submit(file_hash, file) for one in plan.inputs for file in one.files}


def facts(plan: Plan, sums: Mapping[Path, str], command: str | None) -> dict[str, Any]:
    """modbay_merge.json."""
    return {
        "format": 1,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "versions": versions(),
        **plan.as_dict(),
        "inputs": [
            {
                "model": one.name,
                "files": {f.name: {"sha256": sums[f], "bytes": f.stat().st_size} for f in one.files},
            }
            for one in plan.inputs
        ],
    }


@cache
def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "modbay": written_by(),
        "torch": torch.__version__,
        "safetensors": safetensors.__version__,
    }


def card(plan: Plan, said: Mapping[str, Any], title: str) -> str:
    """README.md, with the head that the hub reads."""
    head = {"library_name": "transformers", "tags": ["merge", "modbay"]} if plan.donor.config else {"tags": ["merge"]}
    names = dict.fromkeys(one.repository or one.name for one in plan.inputs)
    models = [name for name in names if not Path(name).is_absolute() and name.count("/") == 1]
    head |= {"base_model": models} if models and not any(Path(name).exists() for name in models) else {}
    count = f"{said['merged']:,} tensors were merged" + (f", {len(said['kept']):,} copied" if said["kept"] else "")
    lines = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n",
        f"# {title}\n",
        f"Merged by modbay {said['versions']['modbay']} with the method `{plan.recipe.method}`: {count}; config and "
        f"tokenizer are those of `{plan.donor.name}`.\n",
        "| model | file | bytes | SHA-256 |\n| --- | --- | ---: | --- |",
        *(
            f"| {one['model']} | {name} | {file['bytes']:,} | `{file['sha256']}` |"
            for one in said["inputs"]
            for name, file in one["files"].items()
        ),
        "\nThe recipe, for `modbay merge recipe.yaml --out FOLDER`:\n",
        f"```yaml\n{plan.recipe.text()}```\n",
        *(f"- {note}." for note in plan.notes),
        f"\nMade with {', '.join(f'{name} {number}' for name, number in said['versions'].items())}.",
    ]
    return "\n".join(lines) + "\n"
