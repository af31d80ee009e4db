"""`modbay methods`: the catalogue, read from the classes themselves."""

import inspect
import json
import re
import sys
from dataclasses import asdict, dataclass
from difflib import get_close_matches

import modbay

from .. import methods as named
from ._say import console, fail, table

TERMS = {
    "parameter composition": modbay.ParameterComposition,
    "input composition": modbay.InputComposition,
    "function composition": modbay.FunctionComposition,
    "replacement": modbay.Replacement,
    "generator": modbay.Generator,
    "router": modbay.Router,
    "aggregator": modbay.Aggregator,
}
HEADINGS = {
    "Kinds (m)": [t for t in TERMS if t not in ("router", "aggregator")],
    "Routers (r)": ["router"],
    "Aggregators (A)": ["aggregator"],
    "Methods of a run": ["method"],
}
ARXIV = re.compile(r"(?<![\d.])\d{4}\.\d{4,5}(?![\d.])")


@dataclass(frozen=True)
class Method:
    """One class: its name, which term of the equation it is, its signature, and what its docstrings say."""

    name: str
    term: str
    signature: str
    summary: str
    arxiv: list[str]
    source: str
    doc: str


def catalogue() -> list[Method]:
    """Every method that modbay exports, in the order of TERMS."""
    public = [value for name, value in vars(modbay).items() if isinstance(value, type) and not name.startswith("_")]
    parts = [method(c, term) for term, base in TERMS.items() for c in public if issubclass(c, base) and c is not base]
    return [*parts, *map(composed, named.METHODS.values())]


def method(cls: type, term: str) -> Method:
    """What a class says of itself; its paper stands in its file's first lines."""
    doc = inspect.cleandoc(cls.__doc__ or "")
    file = inspect.cleandoc(sys.modules[cls.__module__].__doc__ or "")
    paragraphs = [" ".join(paragraph.split()) for paragraph in file.split("\n\n")]
    first = " ".join(doc.split("\n\n")[0].split())
    first = re.sub(r" \(survey section [^)]*\)", "", first)
    summary = re.split(r"(?<=[.:]) (?=[A-Zα-ω(]|mb\.)", first)[0]
    source = " ".join(paragraphs[1:] or paragraphs)
    return Method(cls.__name__, term, signature(cls), summary, ARXIV.findall(file), source, doc)


def composed(one: named.Method) -> Method:
    """A named composition, which `modbay train --method` takes."""
    options = ", ".join(f"{name}={default!r}" for name, default in one.options.items())
    doc = f"{one.title}. {one.summary}\n\nWhen: {one.when}\n\n{inspect.cleandoc(one.make.__doc__ or '')}"
    arxiv = ARXIV.findall(one.source)
    return Method(one.name, "method", f"{one.name}({options})", one.summary, arxiv, one.source, doc)


def signature(cls: type) -> str:
    """`LoRA(rank=8, alpha=None)`: the arguments, which are the config."""
    if cls.__init__ is modbay.Router.__init__ or cls.__init__ is modbay.Aggregator.__init__:
        return f"{cls.__name__}()"
    said = inspect.signature(cls)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in said.parameters.values()]
    return f"{cls.__name__}{said.replace(parameters=bare, return_annotation=inspect.Signature.empty)}"


def run(names: list[str], as_json: bool) -> None:
    """Print all methods, a line each; or those named, in full."""
    methods = catalogue()
    known = {m.name.lower(): m for m in methods}  # a method may be named as a class is, but for its case
    for name in names:
        if name.lower() not in known:
            near = get_close_matches(name.lower(), known, 3)
            said = ", ".join(known[n].name for n in near) or "`modbay methods` lists all of them"
            fail(f"NAME={name!r}: there is no such method. Near: {said}.")
    chosen = [m for name in names for m in methods if m.name.lower() == name.lower()] or methods
    if as_json:
        print(json.dumps([asdict(m) for m in chosen], indent=2, ensure_ascii=False))
        return
    out = console()
    if names:
        for m in chosen:
            out.print(f"{'' if m.term == 'method' else 'mb.'}{m.signature}\n{m.term}\n\n{m.doc}\n\n{m.source}\n")
        return
    for heading, terms in HEADINGS.items():
        rows = [(m.name, m.term, m.summary, ", ".join(m.arxiv)) for m in chosen if m.term in terms]
        kinds = len(terms) > 1
        heads = (heading, "how", "what it computes", "arXiv") if kinds else (heading, "what it computes", "arXiv")
        out.print(table(heads, rows if kinds else [(a, c, d) for a, _, c, d in rows]))
        out.print()
    out.print("`modbay methods NAME` prints one in full: its equation, arguments and source.")
