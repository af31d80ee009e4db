"""The catalogue: every part, and every system of the literature that parts make, read from the code itself.

A class says in `systems` which systems it is, a function in `types.systems`, a method of a run in its own field; what
they compute stands in the first sentence of their docstrings, and their source in the first lines of their files.
"""

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .. import abstract, losses, merging, sparsity
from ..types import System
from ._classes import PLACES, classes
from ._named import METHODS
from ._spec import Method

TERMS: dict[type, tuple[str, str]] = {  # of a class, by its base: the axis, and the survey's section
    abstract.ParameterComposition: ("parameter composition", "3.1"),
    abstract.InputComposition: ("input composition", "3.2"),
    abstract.FunctionComposition: ("function composition", "3.3"),
    abstract.Replacement: ("function composition", "3.3"),
    abstract.Generator: ("hypernetwork", "3.4"),
    abstract.Router: ("routing", "4"),
    abstract.Aggregator: ("aggregation", "5"),
}
AXES = (*dict.fromkeys(axis for axis, _ in TERMS.values()), "composition")
ARXIV = re.compile(r"(?<![\d.])\d{4}\.\d{4,5}(?![\d.])")


@dataclass(frozen=True)
class Entry:
    """One row. systems: the survey's numbers. folds: whether a module goes into the base's weights; None: it is none.

    build: what makes it, as one would type it. tests: what proves it, as pytest names them. part: the class or function
    that it is made by, whose signature and docstring stand beside it.
    """

    name: str
    axis: str
    section: str
    systems: list[int]
    equation: str
    build: str
    folds: bool | None
    source: str
    arxiv: list[str]
    tests: list[str]
    part: str
    signature: str
    doc: str


def catalogue() -> list[Entry]:
    """Every row, in the order of the axes: parts first, then the systems they make, then methods of a run."""
    rows = [row for base in PLACES for cls in classes(base).values() for row in _of_class(cls)]
    rows += [row for function in _functions() for row in _of_function(function)]
    rows += [row for method in METHODS.values() for row in _of_method(method)]
    return sorted(rows, key=lambda row: AXES.index(row.axis))


def _functions() -> Iterator[Callable]:
    """The public functions that say which systems they make, and the one class of merging."""
    for place in (losses, sparsity, merging, sys.modules[str(__package__)]):
        yield from (f for f in vars(place).values() if inspect.isfunction(f) and hasattr(f, "systems"))
    yield merging.RunningMean


def _of_class(cls: type) -> Iterator[Entry]:
    axis, section = next(said for base, said in TERMS.items() if issubclass(cls, base))
    said = inspect.cleandoc(cls.__doc__ or "")
    folds = cls.folds if issubclass(cls, abstract.Kind) else None
    given: tuple[System, ...] = cls.systems  # type: ignore[attr-defined]
    own = [one for one in given if one.name is None] or [System((), f"mb.{signature(cls)}", ())]
    for one in [*own, *(one for one in given if one.name is not None)]:
        yield _entry(one, cls.__name__, axis, section, said, _source(cls), folds, f"mb.{signature(cls)}")


def _of_function(function: Callable) -> Iterator[Entry]:
    said = inspect.cleandoc(function.__doc__ or "")
    shown = f"{function.__name__}{_bare(inspect.signature(function))}"
    axis = "aggregation" if function.__module__.startswith(merging.__name__) else "composition"
    for one in function.systems:  # type: ignore[attr-defined]
        yield _entry(one, function.__name__, axis, "3.5", said, _source(function), None, shown)


def _of_method(method: Method) -> Iterator[Entry]:
    options = ", ".join(f"{name}={default!r}" for name, default in method.options.items())
    doc = f"{method.title}. {method.summary}\n\nWhen: {method.when}\n\n{inspect.cleandoc(method.make.__doc__ or '')}"
    build = f"modbay train --method {method.name}"
    for one in method.systems or (System((), build, (), section="6"),):
        entry = _entry(one, method.name, "composition", "6", doc, method.source, None, f"{method.name}({options})")
        yield Entry(**{**vars(entry), "equation": one.equation or method.summary})


def _entry(
    one: System, part: str, axis: str, section: str, doc: str, source: str, folds: bool | None, shown: str
) -> Entry:  # fmt: skip
    origin = one.source or source
    return Entry(
        name=one.name or part,
        axis=axis,
        section=one.section or section,
        systems=list(one.numbers),
        equation=one.equation or first_sentence(doc),
        build=one.build,
        folds=folds,
        source=origin,
        arxiv=ARXIV.findall(origin),
        tests=list(one.tests),
        part=part,
        signature=shown,
        doc=doc,
    )


def first_sentence(doc: str) -> str:
    """The first sentence of a docstring, which is the equation."""
    first = re.sub(r" \(survey section [^)]*\)", "", " ".join(doc.split("\n\n")[0].split()))
    return re.split(r"(?<=[.:]) (?=[A-Zα-ω(]|mb\.)", first)[0]


def _source(thing: type | Callable) -> str:
    """The paper: what a file's first lines say behind their first paragraph."""
    said = inspect.cleandoc(sys.modules[thing.__module__].__doc__ or "")
    paragraphs = [" ".join(paragraph.split()) for paragraph in said.split("\n\n")]
    return " ".join(paragraphs[1:] or paragraphs)


def signature(cls: type) -> str:
    """`LoRA(rank=8, alpha=None)`: the arguments, which are the config."""
    if cls.__init__ in (abstract.Router.__init__, abstract.Aggregator.__init__):
        return f"{cls.__name__}()"
    return f"{cls.__name__}{_bare(inspect.signature(cls))}"


def _bare(said: inspect.Signature) -> inspect.Signature:
    """Without annotations."""
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in said.parameters.values()]
    return said.replace(parameters=bare, return_annotation=inspect.Signature.empty)
