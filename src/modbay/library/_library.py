"""A library: a folder of modules that outlive the runs that trained them. Its plain folders are all that it is."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import FileError, listed
from . import _hub, _search, _sketch, _store, _verify
from ._alike import Changes, alike, cosine
from ._content import content
from ._index import Entry, entries, look
from ._read import ModuleFile, read_module

SHORT = 6  # digits of a content that are enough to look for it


class Library:
    """The modules in a folder, at any depth; a folder that bay.save wrote is one.

        lib = modbay.library.Library("library")
        lib.add("runs/mail/modules")                        # a module, a bay, or several
        for entry in lib.search(labels={"language": "en"}, metrics=["accuracy>0.8"]):
            print(entry.name, entry.content, entry.facts["kinds"])
        bays = mb.load(model, "library")                    # all its bays; Bay.load for single modules

    A module's name is its path in the folder; a name's end, or the first digits of its content, will do where only one
    has it. Several processes may write at a time. Raises FileError for what is not there, or is not sound.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise FileError(f"{folder} is a file; a library is a folder.")

    def entries(self) -> list[Entry]:
        """All modules, by name."""
        return entries(self.folder)

    def find(self, ref: str) -> Entry:
        """The one module of that name, name's end, or content."""
        with suppress(FileError):  # of a name that can't be one
            if (path := _store.place(self.folder, ref)).joinpath("module.json").is_file():
                return Entry(ref, self.folder, look(path))
        return _one(self.folder, self.entries(), ref)

    def read(self, ref: str | Path) -> ModuleFile:
        """The record and the tensors of a module: of this library, or of any folder."""
        path = Path(ref) if (Path(ref) / "module.json").is_file() else self.find(str(ref)).path
        return read_module(path.parent, path.name)

    def search(
        self,
        text: str = "",
        *,
        labels: Mapping[str, str] | Sequence[str] = (),
        base: str | None = None,
        kind: str | None = None,
        metrics: Sequence[str] = (),
        like: str | Path | None = None,
        near: str | Sequence[float] | None = None,
        limit: int | None = None,
    ) -> list[Entry]:
        """The modules that answer to all that is said, by name; by likeness, with `like` or `near`.

        text: words that are in its name, labels, data, licence or notes. labels: {"language": "en"}, or values of any
        label. base: a part of the base's name or class, or the first digits of its digest. kind: a class, or a part of
        it with its arguments. metrics: "accuracy>0.8"; also < >= <= = !=. like: a module, by the cosine of what it and
        they change at the sites that both have; of more than 256, only the 64 that a sketch finds most alike. near: a
        vector, or a module, by the cosine of example embeddings.
        """
        every = out = self.entries()
        words, compared = text.split(), [_search.comparison(one) for one in metrics]
        if words or labels or base is not None or kind is not None or compared:
            out = [one for one in every if _search.matches(one, words, labels, base, kind, compared)]
        if near is not None:
            vector = self.read(near).record.get("about", {}).get("embedding") if isinstance(near, str) else near
            if vector is None:
                raise FileError(f"near={near!r}: that module's record has no 'embedding' of its examples.")
            out = _search.nearest(out, vector, limit if like is None else None)
        if like is not None:
            inside = isinstance(like, str) and not (Path(like) / "module.json").is_file()
            mine = Changes(self.read(_one(self.folder, every, like).path if inside else like))  # type: ignore[arg-type]
            out = list(self._scored(_sketch.closest(self.folder, out, mine, self.read), mine))
            out.sort(key=lambda one: -(one.score or 0.0))
        return out[:limit]

    def _scored(self, several: Sequence[Entry], mine: Changes) -> Iterator[Entry]:
        """Those that have something in common with a module, each with the cosine."""
        for one in several:
            try:
                score = alike(mine, Changes(self.read(one.path))).cosine
            except FileError:  # damaged: `verify` tells
                continue
            if score is not None:
                yield changed(one, score=score)

    def add(
        self,
        source: str | Path,
        name: str | None = None,
        *,
        by_content: bool = False,
        replace: bool = False,
        about: Mapping[str, Any] | None = None,
    ) -> dict[str, str]:
        """Copy a module, a bay or several bays into the library; returns the content of each module, by its name here.

        name: here; the folder's own, if None. by_content: a module is named by its content. replace: another one of
        that name; without it, that raises. about: what to add to a module's record, as for `bay.save`.
        """
        found = _store.found(Path(source))
        if (len(found) > 1 and name is not None) or (about is not None and not isinstance(found[0], ModuleFile)):
            raise FileError(f"add({str(source)!r}): a name is for one module or bay, and about=… for one module.")
        out: dict[str, str] = {}
        for one in found:
            if isinstance(one, ModuleFile):
                chosen = one.path.resolve().name if name is None else name
                if by_content:
                    chosen = content(one.record, one.tensors)[:16]
                out[chosen] = _store.add_module(self.folder, one, chosen, replace, about)
            else:
                out |= _store.add_bay(self.folder, one, one.name if name is None else name, replace)
        return out

    def remove(self, ref: str, force: bool = False) -> str:
        """Take a module out, or a whole bay by its name; returns its name. One that a composition in the library refers
        to stays, unless `force`."""
        if (_store.place(self.folder, ref) / "bay.json").is_file():
            name, gone = ref, [one for one in self.entries() if one.name.startswith(f"{ref}/")]
        else:
            gone = [self.find(ref)]
            name = gone[0].name
        users = sorted({user for one in gone for user in _store.referring(self.folder, one.name, one.content)} - {name})
        if users and not force:
            raise FileError(f"{self.folder}: {listed(users)} refer to {name!r}: remove them first, or force it.")
        _store.remove(self.folder, name)
        return name

    def verify(self, *refs: str, model: nn.Module | None = None) -> list[dict[str, str]]:
        """What is wrong: [{name, problem}], with the modules named, or with all, and all bays; nothing, if all is well.

        Records, hashes, finite values; that what bays list is there; and with a model, that it is their base.
        """
        return _verify.verify(self.folder, [self.find(ref).name for ref in refs], model)

    def diff(self, one: str | Path, two: str | Path) -> dict[str, Any]:
        """How two modules differ: {of, cosine, norms, sites: [{site, cosine, norms}], only: [sites, sites]}."""
        a, b = self.read(one), self.read(two)
        found = alike(Changes(a), Changes(b))
        only = [[site for site in x.sites if site not in y.sites] for x, y in ((a, b), (b, a))]
        return {
            "modules": [str(one), str(two)],
            "of": found.of,
            "cosine": found.cosine,
            "norms": [sum(max(row[i], 0.0) for row in found.sites.values()) ** 0.5 for i in (1, 2)],
            "sites": [
                {"site": site, "cosine": cosine(p, x, y), "norms": [max(x, 0.0) ** 0.5, max(y, 0.0) ** 0.5]}
                for site, (p, x, y) in found.sites.items()
            ],
            "only": only,
        }

    def gc(self) -> list[str]:
        """Remove what killed writers left, and caches of other versions; never a module. Returns what went."""
        return _store.tidy(self.folder)

    def push(self, to: str | Path, *refs: str, **hub: Any) -> list[str]:
        """Copy modules (all bays and modules, if none is named) to another folder, or to a hub: "hf://owner/name".

        Cards for people, README.md, are written beside them. replace: what is there and differs. Of a hub: revision,
        subfolder, token, private, message.
        """
        return _hub.push(self.folder, str(to), [self.find(ref).name for ref in refs], **hub)

    def pull(self, source: str | Path, *names: str, **hub: Any) -> list[str]:
        """Copy modules from another folder or a hub, each checked. replace, revision, subfolder, token: see push."""
        return _hub.pull(self.folder, str(source), names, **hub)


def _one(folder: Path, every: Sequence[Entry], ref: str) -> Entry:
    """The one of several that has a name's end, or a content."""
    same = [one for one in every if f"/{one.name}".endswith(f"/{ref}")]
    if not same and len(ref) >= SHORT:
        same = [one for one in every if one.content.startswith(ref)]
        same = same[:1] if len({one.content for one in same}) == 1 else same
    if len(same) == 1:
        return same[0]
    if same:
        raise FileError(f"{folder} has several modules {ref!r}: {listed(one.name for one in same)}.")
    have = listed(one.name for one in every) or "none"
    raise FileError(f"{folder} has no module {ref!r}; there are {have}.")
