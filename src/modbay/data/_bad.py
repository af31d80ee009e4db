"""Bad rows: the first ten are shown with file and line, all are counted, and one error is raised for them."""

from ..errors import DataError

SHOWN = 10


class BadRow(ValueError):
    """Why one row can't be used; caught by whoever knows its place."""


class BadRows:
    """What is wrong in a source, collected so that one run shows it all; `first`: the first raises at once."""

    def __init__(self, first: bool = False) -> None:
        self.first = first
        self.shown: list[str] = []
        self.count = 0

    def add(self, where: str, why: object) -> None:
        """Note one bad row."""
        self.count += 1
        if len(self.shown) < SHOWN:
            self.shown.append(f"  {where}: {why}")
        if self.first:
            raise DataError(f"{told(self.shown, 1)} (A stream stops at the first bad row; modbay.data.read shows all.)")

    def stop(self) -> None:
        """Raise DataError if any row was bad."""
        if self.count:
            raise DataError(told(self.shown, self.count))


def told(lines: list[str], count: int) -> str:
    """The message for `count` bad rows, of which `lines` are shown."""
    head = "1 row can't be used" if count == 1 else f"{count:,} rows can't be used"
    rest = f"\n  … and {count - len(lines):,} more" if count > len(lines) else ""
    them = "it" if count == 1 else "them"
    return (
        f"{head}:\n" + "\n".join(lines) + f"{rest}\nMend {them} in the file, or take {them} out; nothing was left out."
    )
