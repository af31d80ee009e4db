"""`modbay predict`: files in, files out, with what a run says of each row."""

import json
import os
import sys
from pathlib import Path

from .. import training
from ..errors import ModbayError
from ._given import columns, values
from ._progress import Shown
from ._say import fail


def run(
    folder: Path,
    files: list[str],
    out: Path | None,
    text: str | list[str] | None,
    by: list[str],
    value: list[str],
    task: str | None,
    unknown: str,
    force: bool,
    as_json: bool,
) -> None:
    """Write files with predictions beside their rows; or rows with predictions, as JSON lines, to standard output."""
    progress = training.Silent() if as_json else Shown()
    try:
        opened = training.open_run(folder)
        reading = training.Reading(opened, text=text, by=columns(by), fixed=values(value))
        more = {"reading": reading, "task": task, "unknown": unknown, "progress": progress}
        if out is None or str(out) == "-":
            for row in training.tell_rows(opened, files, **more):
                print(json.dumps(row, ensure_ascii=False))
            sys.stdout.flush()
            return
        made = training.tell_files(opened, files, out, force=force, **more)
    except KeyboardInterrupt:
        print("modbay: stopped; no file was written", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # `| head` has seen enough; nothing more may be written there, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except ModbayError as error:
        fail(str(error))
    if as_json:
        print(json.dumps({"files": [str(path) for path in made]}, ensure_ascii=False))
    else:
        for path in made:
            print(path)
