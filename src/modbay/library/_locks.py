"""One writer at a time in a folder. A lock is the folder's own, leaves no file, and ends with its process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not on Windows: there two writers in one folder must take turns by themselves
    fcntl: Any = None


@contextmanager
def locked(folder: Path, shared: bool = False, wait: bool = True) -> Iterator[bool]:
    """Hold the folder, which is made if it isn't there; whether it is held, which without `wait` it may not be.

    shared: others may hold it so too, but none alone. Where the file system knows no locks, the folder is not held, and
    it is said that it is: a single writer needs none.
    """
    if fcntl is None:
        folder.mkdir(parents=True, exist_ok=True)
        yield True
        return
    how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue  # it was tidied away since
        try:
            held = _lock(handle, how)
            if held and not _same(folder, handle):
                continue
            yield held
            return
        finally:
            os.close(handle)  # and with it the lock


def _lock(handle: int, how: int) -> bool:
    try:
        fcntl.flock(handle, how)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _same(folder: Path, handle: int) -> bool:
    """Whether the folder that is held is the one that has its name now."""
    try:
        return os.path.samestat(os.stat(folder), os.fstat(handle))
    except FileNotFoundError:
        return False
