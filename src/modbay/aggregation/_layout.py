"""Programs as trees: each example says which modules work on what the others gave.

Andreas, Rohrbach, Darrell and Klein, "Neural Module Networks", 2016 (arXiv 1511.02799), and "Learning to Compose Neural
Networks for Question Answering", 2016 (arXiv 1601.01705).
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..abstract import Aggregator, Context, InputComposition, Kind, Routing, Site
from ..errors import CompositionError, LabelError, listed
from ..types import System

TESTS = "tests/test_outputs.py::"


class Layout(Aggregator):
    """y = m_i([y_1, …, y_k]), y_j likewise by the branches of a tree, whose leaves read x: a layout for each example.

        layout = mb.Layout({"is a circle red?": ("is", ("and", "circle", "red")), "is it red?": ("is", "red")})
        net = mb.Modular(None, networks, mb.ByLabel("layout", layout.table()), layout, features=64)
        y = net(x, layout=["is it red?", "is a circle red?", None])

    layouts: by label, nested tuples of names: ("and", a, b) is module "and" of the outputs of a and b, side by side on
    the last axis; "red" alone is that module of x, as ("red", None) is; None is x itself, so that ("is", None, a) sees
    x, too. label: the keyword that says each row's layout, as the router's; None gives f(x), or zeros without f.
    Rows of one layout run together, and what occurs twice in it runs once. Where f is there, an adapter in the tree
    gives f(v) + Δ. The weights of the route are not applied. For mb.Modular, or sites whose output can be their input.
    Raises CompositionError for a layout that is no such tree, or names no module of the bay; the router does so when it
    is built, where its table is layout.table().
    """

    systems = (
        System(
            (147,), 'mb.Layout({"is a circle red?": ("is", ("and", "circle", "red"))})',
            (TESTS + "test_a_layout_is_a_tree_of_modules", TESTS + "test_rows_of_several_layouts_share_a_batch",
             TESTS + "test_a_layout_that_is_no_tree_raises"),
            "neural module networks, layouts",
        ),
    )  # fmt: skip

    def __init__(self, layouts: Mapping[str, Any], label: str = "layout"):
        super().__init__()
        self.layouts = {name: _tree(program, name) for name, program in layouts.items()}
        self.label = label

    def table(self) -> dict[str, list[str]]:
        """The modules of each layout, in the order in which they first run: what mb.ByLabel takes."""
        return {name: list(dict.fromkeys(_modules(program))) for name, program in self.layouts.items()}

    def admit(self, kind: Kind, site: Site) -> None:
        if isinstance(kind, InputComposition):
            raise CompositionError(f"Layout at site {site.name!r}: {type(kind).__name__} has no output of its own.")

    def forward(self, f: Callable | None, x: Tensor, modules: Any, routing: Routing, c: Context) -> Tensor:
        given = c.label(self.label)
        if isinstance(given, str):
            return self._run(given, f, x, modules, c)
        names = list(self.layouts)
        if isinstance(given, Tensor):
            given = [names[i] if i >= 0 else None for i in given.tolist()]
        if len(given) != len(x):
            raise LabelError(f"{self.label}={len(given)} layouts for {len(x)} rows: give one a row.")
        apart: dict[str | None, list[int]] = {}
        for row, name in enumerate(given):
            apart.setdefault(name, []).append(row)
        if len(apart) == 1 and None not in apart:
            return self._run(given[0], f, x, modules, c)  # type: ignore[arg-type]
        rows = {name: torch.tensor(several, device=x.device) for name, several in apart.items()}
        outs = {name: self._run(name, f, x[at], modules, c.at(at)) for name, at in rows.items() if name is not None}
        if None in rows:
            there = x[rows[None]]
            shape = next(iter(outs.values()), x).shape[1:]
            outs[None] = f(there) if f is not None else x.new_zeros(len(there), *shape)  # type: ignore[index]
        if len({out.shape[1:] for out in outs.values()}) > 1:
            said = ", ".join(f"{name!r}: {tuple(out.shape[1:])}" for name, out in outs.items())
            raise CompositionError(f"Layout: the rows of a batch have outputs of different shapes ({said}).")
        order = torch.cat([rows[name] for name in outs])
        return torch.cat(list(outs.values()))[order.argsort()]

    def _run(self, name: str, f: Callable | None, x: Tensor, modules: Any, c: Context) -> Tensor:
        """One layout on all rows of x."""
        if name not in self.layouts:
            raise LabelError(f"{self.label}={name!r}: no such layout; there are {listed(self.layouts)}.")
        known: dict[str, Tensor] = {}

        def value(program: Any) -> Tensor:
            if program is None:
                return x
            key = repr(program)
            if key not in known:
                which, *branches = program
                if which not in modules.names:
                    raise CompositionError(f"layout {name!r} runs {which!r}; the modules are {listed(modules.names)}.")
                given = [value(branch) for branch in branches]
                v = given[0] if len(given) == 1 else torch.cat(given, -1)
                known[key] = modules.output(modules.names.index(which), f, v, c)
            return known[key]

        return value(self.layouts[name])


def _tree(program: Any, name: str) -> list | None:
    """The program as lists, a module of x as [module, None]; raises CompositionError where it is none."""
    if isinstance(program, str):
        return [program, None]
    tuples = isinstance(program, (tuple, list))
    if not tuples or not program or not isinstance(program[0], str):
        raise CompositionError(
            f"Layout: {name!r} has {program!r} in it, which is no name, nor a tuple of a module's name and what it is "
            f"to work on, as ('and', 'red', 'circle')."
        )
    return [program[0], *(None if p is None else _tree(p, name) for p in program[1:])] + [None] * (len(program) == 1)


def _modules(program: Any) -> Iterator[str]:
    """The names in a tree, branches first."""
    if program is not None:
        for branch in program[1:]:
            yield from _modules(branch)
        yield program[0]
