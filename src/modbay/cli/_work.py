"""Work that takes minutes and leaves a folder: how its command ends, whatever happens."""

import json
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import training
from ..errors import Interrupted, ModbayError
from ._progress import Shown
from ._say import console, fail


@dataclass
class Work:
    """One run of a command. folder: what it makes, once that is known."""

    verb: str
    folder: Path | None
    progress: training.Progress

    @property
    def command(self) -> str:
        """As it was typed."""
        return shlex.join(["modbay", *sys.argv[1:]])

    def more(self) -> str:
        """What can be done after it has stopped."""
        if self.folder is None or not training.unfinished(self.folder).exists():
            return "Nothing was written."
        return f"What it reached is kept. To go on: modbay {self.verb} --resume {self.folder}"


@contextmanager
def work(verb: str, folder: Path | None, quiet: bool) -> Iterator[Work]:
    """Do it; what goes wrong becomes one message, which says how to go on, and an exit code: 130 after Ctrl-C, or 1."""
    doing = Work(verb, folder, training.Silent() if quiet else Shown())
    try:
        yield doing
    except Interrupted as stopped:
        print(f"modbay: {stopped}. To go on: modbay {verb} --resume {doing.folder}", file=sys.stderr)
        raise SystemExit(130) from None
    except KeyboardInterrupt:
        print(f"modbay: stopped. {doing.more()}", file=sys.stderr)
        raise SystemExit(130) from None
    except ModbayError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or doing.folder}: {error.strerror or error}. {doing.more()}")


def print_json(folder: Path, facts: Mapping[str, Any]) -> None:
    """The folder and its facts, for machines."""
    print(json.dumps({"folder": str(folder), **facts}, indent=1, ensure_ascii=False))


def print_folder(folder: Path, what: str) -> None:
    """Where all is, and what to look at."""
    console().print(f"\n{folder}/ {what}; open {folder}/report.html", soft_wrap=True)


def free_name(stem: Path) -> Path:
    """A name for a folder, numbered if there is one already."""
    taken = lambda path: path.exists() or training.unfinished(path).exists()
    names = (stem.with_name(stem.name if i == 1 else f"{stem.name}-{i}") for i in range(1, 10_000))
    return next(path for path in names if not taken(path))
