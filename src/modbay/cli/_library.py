"""`modbay library`: the modules of a folder: kept, found, checked, compared, shared."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..library import Entry, Library

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

Folder = Annotated[
    Path, typer.Option("--library", "-l", envvar="MODBAY_LIBRARY", help="The library's folder.", show_default=True)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Replace = Annotated[bool, typer.Option("--replace", help="Replace another module of that name.")]
Label = Annotated[list[str] | None, typer.Option("--label", help="VALUE, or LABEL=VALUE, that it was trained for.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Of a hub: a branch, tag or commit.")]
Subfolder = Annotated[str, typer.Option("--subfolder", help="Within the folder or repository.")]
Token = Annotated[str | None, typer.Option("--token", envvar="HF_TOKEN", help="Of a hub [that of hf auth login].")]

HERE = Path("library")
HEADS = ("module", "kind", "base", "labels", "metrics", "parameters", "content")


@app.callback()
def _library() -> None:
    """A library of modules on disk: plain folders, which any number of runs write to.

    \b
    modbay library add runs/mail/modules                 a run's modules, copied into ./library
    modbay library list
    modbay library search --label language=en 'accuracy>0.8'
    modbay library show language/en
    modbay library push hf://me/mail-modules             or any other folder

    Its folder is --library, or $MODBAY_LIBRARY, or ./library. A module's name is its path there; the end of it, or the
    first digits of its content, will do where only one has it.
    """


@contextmanager
def _opened(folder: Path) -> "Iterator[Library]":
    """The library; what goes wrong becomes one message."""
    from ..errors import ModbayError
    from ..library import Library
    from ._say import fail

    try:
        yield Library(folder)
    except KeyboardInterrupt:
        print("modbay: stopped; what was copied until then is whole", file=sys.stderr)
        raise SystemExit(130) from None
    except ModbayError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or folder}: {error.strerror or error}.")


@app.command("list")
def list_(library: Folder = HERE, as_json: Json = False) -> None:
    """Print all modules."""
    with _opened(library) as lib:
        _print(lib.entries(), as_json, f"{library} holds no module")


@app.command()
def search(
    terms: Annotated[
        list[str] | None, typer.Argument(help="Words that are in it, and comparisons: 'accuracy>0.8'.")
    ] = None,
    label: Label = None,
    base: Annotated[str | None, typer.Option("--base", help="A part of the base's name, or of its digest.")] = None,
    kind: Annotated[str | None, typer.Option("--kind", help="LoRA, or 'LoRA(rank=8'.")] = None,
    like: Annotated[str | None, typer.Option("--like", help="A module: by the cosine of what both change.")] = None,
    near: Annotated[str | None, typer.Option("--near", help="A module, or a JSON list: by embeddings.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", "-n", help="How many at most.")] = None,
    library: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Print the modules that answer to all that is said; the most alike first, with --like or --near.

    \b
    modbay library search mail
    modbay library search 'accuracy>0.8' --label language=en --kind LoRA
    modbay library search --base bert-base --like language/en -n 5
    modbay library search --near '[0.1, 0.7, …]'
    """
    with _opened(library) as lib:
        compared = [term for term in terms or [] if any(sign in term for sign in "<>=")]
        text = " ".join(term for term in terms or [] if term not in compared)
        vector = json.loads(near) if near is not None and near.startswith("[") else near
        found = lib.search(
            text, labels=_labels(label), base=base, kind=kind, metrics=compared, like=like, near=vector, limit=limit
        )
        _print(found, as_json, "no module answers to that")


def _labels(given: Sequence[str] | None) -> Any:
    """LABEL=VALUE, or values alone."""
    if given and all("=" in one for one in given):
        return dict(one.split("=", 1) for one in given)
    return list(given or ())


@app.command()
def show(
    module: Annotated[str, typer.Argument(help="Its name, or the first digits of its content.")],
    library: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Print all that is known of a module."""
    with _opened(library) as lib:
        found = lib.find(module)
        if as_json or "error" in found.facts:
            print(json.dumps(found.as_dict(), indent=1, ensure_ascii=False))
            return
        _show(found, lib.read(found.path).sites)


@app.command()
def add(
    sources: Annotated[list[Path], typer.Argument(help="Folders: of a module, of a bay, or of several.")],
    name: Annotated[str | None, typer.Option("--name", help="In the library [the folder's own].")] = None,
    by_content: Annotated[bool, typer.Option("--by-content", help="Name a module by its content.")] = False,
    replace: Replace = False,
    label: Label = None,
    metric: Annotated[list[str] | None, typer.Option("--metric", help="NAME=NUMBER.")] = None,
    licence: Annotated[str | None, typer.Option("--licence", help="CC-BY-4.0, say.")] = None,
    notes: Annotated[str | None, typer.Option("--notes", help="Free text.")] = None,
    library: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Copy modules into the library, each checked; nothing is done for what is there already.

    \b
    modbay library add runs/mail/modules
    modbay library add runs/mail/modules/language/en --name english --label language=en --metric accuracy=0.93
    """
    with _opened(library) as lib:
        about = _about(label, metric, licence, notes)
        if name is not None and len(sources) > 1:
            raise typer.BadParameter(f"--name {name} is for one folder, and there are {len(sources)}.")
        made: dict[str, str] = {}
        for source in sources:
            made |= lib.add(source, name, by_content=by_content, replace=replace, about=about)
        _done(made, as_json, lambda one: f"{one}  {made[one][:12]}")


def _about(label: Any, metric: Any, licence: str | None, notes: str | None) -> dict[str, Any] | None:
    said: dict[str, Any] = {}
    for text, key in [(one, "labels") for one in label or []] + [(one, "metrics") for one in metric or []]:
        name, equals, value = text.partition("=")
        try:
            if not equals:
                raise ValueError
            known = said.setdefault(key, {})
            known[name] = [*known.get(name, []), value] if key == "labels" else float(value)
        except ValueError:
            raise typer.BadParameter(f"{text!r}: --label is LABEL=VALUE here, and --metric NAME=NUMBER.") from None
    said |= {key: value for key, value in (("licence", licence), ("notes", notes)) if value is not None}
    return said or None


@app.command()
def remove(
    modules: Annotated[list[str], typer.Argument(help="Names of modules, or of a whole bay.")],
    force: Annotated[bool, typer.Option("--force", help="Though a composition refers to it.")] = False,
    library: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Take modules out of the library."""
    with _opened(library) as lib:
        _done([lib.remove(one, force) for one in modules], as_json, lambda one: f"removed {one}")


@app.command()
def verify(
    modules: Annotated[list[str] | None, typer.Argument(help="Only these.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="A folder or hub name: is it their base, with their sites?")
    ] = None,
    library: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Check records, hashes, finite values, and what bays list; with --model, that modules fit it."""
    with _opened(library) as lib:
        problems = lib.verify(*(modules or []), model=None if model is None else _model(model))
        if as_json:
            print(json.dumps(problems, indent=1, ensure_ascii=False))
        elif not problems:
            print(f"{len(modules or lib.entries()):,} modules are sound.")
        for one in [] if as_json else problems:
            print(f"{one['name']}: {one['problem']}")
        if problems:
            raise typer.Exit(1)


def _model(name: str) -> Any:
    """A transformers model with its weights."""
    from transformers import AutoModel

    from ..errors import ConfigError

    try:
        return AutoModel.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model {name}: {error}") from None


@app.command()
def diff(
    one: Annotated[str, typer.Argument(help="A module of the library, or a folder.")],
    two: Annotated[str, typer.Argument(help="Another.")],
    library: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Print how alike two modules are, site by site: cosines and norms of what they change."""
    from ._say import console, table

    with _opened(library) as lib:
        found = lib.diff(one, two)
    if as_json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return
    out = console()
    rows = [(s["site"], f"{s['cosine']:+.4f}", *(f"{n:.4g}" for n in s["norms"])) for s in found["sites"]]
    if found["cosine"] is not None:
        rows.append(("all", f"{found['cosine']:+.4f}", *(f"{n:.4g}" for n in found["norms"])))
    heads = ("site", "cosine", f"norm of {one}", f"of {two}")
    out.print(table(heads, rows, right=heads[1:]))
    out.print(
        f"of {found['of']}" + ("" if found["of"] == "deltas" else ": what they change is known with the base alone")
    )
    for name, only in zip((one, two), found["only"], strict=True):
        if only:
            out.print(f"{name} alone is at {', '.join(only[:8])}{' …' if len(only) > 8 else ''}", soft_wrap=True)


@app.command()
def gc(library: Folder = HERE, as_json: Json = False) -> None:
    """Remove what killed writers and other versions of modbay left behind; never a module."""
    with _opened(library) as lib:
        gone = lib.gc()
        _done(gone, as_json, lambda one: f"removed {one}")
        if not gone and not as_json:
            print("There was nothing to remove.")


@app.command()
def push(
    to: Annotated[str, typer.Argument(help="A folder, or hf://OWNER/NAME.")],
    modules: Annotated[list[str] | None, typer.Argument(help="Only these.")] = None,
    replace: Replace = False,
    subfolder: Subfolder = "",
    revision: Revision = None,
    token: Token = None,
    private: Annotated[bool | None, typer.Option("--private/--public", help="Of a new repository of a hub.")] = None,
    message: Annotated[str | None, typer.Option("--message", help="Of the commit on a hub.")] = None,
    library: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Copy modules to another folder or to a hub, with a README.md for each."""
    hub = {"revision": revision, "token": token, "private": private, "message": message}
    with _opened(library) as lib:
        given = hub if to.startswith("hf://") else {**hub, "token": None}
        made = lib.push(to, *(modules or []), replace=replace, subfolder=subfolder, **given)
        _done(made, as_json, lambda one: f"{to}: {one}")


@app.command()
def pull(
    source: Annotated[str, typer.Argument(help="A folder, or hf://OWNER/NAME.")],
    modules: Annotated[list[str] | None, typer.Argument(help="Only these.")] = None,
    replace: Replace = False,
    subfolder: Subfolder = "",
    revision: Revision = None,
    token: Token = None,
    library: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Copy modules from another folder or from a hub into the library, each checked."""
    with _opened(library) as lib:
        given = {"revision": revision, "token": token if source.startswith("hf://") else None}
        made = lib.pull(source, *(modules or []), replace=replace, subfolder=subfolder, **given)
        _done(made, as_json, str)


@app.command()
def schema() -> None:
    """Print the JSON Schema of module.json and bay.json."""
    from ..library import schema_text

    print(schema_text())


def _done(what: Any, as_json: bool, line: Any) -> None:
    """A line each."""
    if as_json:
        print(json.dumps(what, indent=1, ensure_ascii=False))
        return
    for one in what:
        print(line(one))


def _print(several: "Sequence[Entry]", as_json: bool, nothing: str) -> None:
    """Modules as a table, those that can't be read below it."""
    from ._say import console, table

    if as_json:
        print(json.dumps([one.as_dict() for one in several], indent=1, ensure_ascii=False))
        return
    out = console()
    sound = [one for one in several if "error" not in one.facts]
    scored = any(one.score is not None for one in sound)
    if sound:
        heads = ("alike", *HEADS) if scored else HEADS
        out.print(table(heads, [_row(one, scored) for one in sound], right=("alike", "parameters")))
    for one in several:
        if "error" in one.facts:
            out.print(f"broken: {one.facts['error']}", soft_wrap=True)
    if not several:
        out.print(f"{nothing}.")


def _row(one: "Entry", scored: bool) -> tuple[str, ...]:
    facts, about = one.facts, one.about
    labels = ", ".join(f"{label} {'/'.join(values)}" for label, values in about.get("labels", {}).items())
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in about.get("metrics", {}).items())
    kinds = " + ".join(dict.fromkeys(kind.partition("(")[0] for kind in facts["kinds"]))
    base = facts["base"]["name"] or facts["base"]["class"]
    row = (one.name, kinds, base, labels, metrics, f"{facts['parameters']:,}", one.content[:12])
    return (f"{one.score:+.3f}" if one.score is not None else "", *row) if scored else row


def _show(one: "Entry", sites: Any) -> None:
    """All of a module, for people."""
    from ._say import console, table

    facts, about, out = one.facts, one.about, console()
    base = facts["base"]
    rows = [
        ("content", one.content),
        ("folder", str(one.path)),
        ("computes", "; ".join(facts["kinds"])),
        ("sites", f"{len(sites)}: {', '.join(list(sites)[:6])}{' …' if len(sites) > 6 else ''}"),
        ("parameters", f"{facts['parameters']:,}, {facts['bytes']:,} bytes{', frozen' if facts['frozen'] else ''}"),
        ("base", f"{base['name'] or 'without a name'} ({base['class']}), fingerprint {base['digest']}"),
        *(("made on", facts[key]) for key in ("made_on",) if key in facts),
        *((label, ", ".join(values)) for label, values in about.get("labels", {}).items()),
        *((name, f"{value:.6g}") for name, value in about.get("metrics", {}).items()),
        *(("trained on", ", ".join(f"{k} {v}" for k, v in data.items())) for data in about.get("data", [])),
        *(("made of", parent) for parent in about.get("parents", [])),
        *((key, about[key]) for key in ("licence", "notes") if key in about),
        ("written", f"{facts.get('created', '')} by modbay {facts.get('modbay', '')}"),
    ]
    out.print(table((one.name, ""), rows))
