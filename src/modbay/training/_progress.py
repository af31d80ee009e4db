"""How long work says where it is; the command line draws it, a library call stays silent."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Bar(Protocol):
    """One piece of work."""

    def step(self, done: int, note: str = "") -> None:
        """So much of it is done; `note` says what stands beside the bar."""


class Progress(Protocol):
    """Shows pieces of work, one after the other."""

    def stage(self, what: str, total: int | None = None) -> AbstractContextManager[Bar]:
        """A piece of work begins; `total` is what `step` counts to."""
        ...

    def say(self, line: str) -> None:
        """A line for the reader."""


class _Nothing:
    def step(self, done: int, note: str = "") -> None:
        pass


class Silent:
    """Shows nothing."""

    @contextmanager
    def stage(self, what: str, total: int | None = None) -> Iterator[Bar]:
        yield _Nothing()

    def say(self, line: str) -> None:
        pass
