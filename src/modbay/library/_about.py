"""What a module's file says of its making: what it was trained for and on, how well it does, whose it is."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import FileError
from ._schema import ABOUT, wrong

CARRIED = ("labels", "licence")  # what is still true of a module that was loaded and then learned more

About = Mapping[str, Mapping[str, Any]]


def told(about: About | None, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What `bay.save` was told, by module; raises FileError for a module that isn't saved, or a wrong field."""
    out: dict[str, dict[str, Any]] = {}
    for name, said in (about or {}).items():
        if name not in names:
            raise FileError(f"about={{{name!r}: …}}: no module of that name is saved; there are {list(names)}.")
        out[name] = checked(said, f"about[{name!r}]")
    return out


def checked(said: Any, where: str) -> dict[str, Any]:
    """The same, if a file may hold it: labels, metrics, data, parents, licence, notes, embedding; nothing else."""
    for at, value, wanted in wrong(said, ABOUT, where):
        raise FileError(f"{at} is {value!r:.80}, but must be {wanted}.")
    known = [key.removesuffix("?") for key in ABOUT]
    unknown = [key for key in said if key not in known]
    if unknown:
        raise FileError(f"{where} has {unknown[0]!r}; it may have {', '.join(known)}. Free text goes into 'notes'.")
    return dict(said)


def remembered(before: Mapping[str, Any] | None, content: str) -> dict[str, Any]:
    """What is still true, of what was known of a module that had the content `before["content"]`, now that it has
    another: all, if nothing was learned; else what it is for and whose it is, and what it was made of."""
    if before is None:
        return {}
    if before["content"] == content:
        return dict(before["about"])
    kept = {key: before["about"][key] for key in CARRIED if key in before["about"]}
    parents = [before["content"]] if before["loaded"] else before["about"].get("parents", [])
    return kept | ({"parents": parents} if parents else {})
