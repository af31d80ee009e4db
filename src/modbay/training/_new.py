"""What a command makes appears whole, under a name that was free."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ._run import unfinished

Page = Callable[[Path, dict[str, Any]], object]  # writes report.html from the facts


def free(out: Path, *, resume: bool | None = None) -> Path:
    """The name itself; raises ConfigError if there is something of that name, or such work is begun.

    resume: whether begun work is to be gone on with; None where it can't be.
    """
    if out.exists():
        raise ConfigError(f"out={str(out)!r}: it exists, and is not overwritten. Choose another folder, or remove it.")
    if unfinished(out).exists() and not resume:
        way = "Remove it." if resume is None else f"Go on with --resume {out}, or remove it."
        raise ConfigError(f"out={str(out)!r}: unfinished work is in {unfinished(out)}. {way}")
    return out


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which takes its name when all is in it, and is gone if anything fails before."""
    partial = unfinished(free(out))
    try:
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, out)
    except OSError as error:
        raise ConfigError(f"{out}: it can't be written ({error.strerror or error}).") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
