"""Hierarchical mixtures of experts: a tree of gates, whose leaves are the modules.

Jordan and Jacobs, "Hierarchical Mixtures of Experts and the EM Algorithm", Neural Computation 6, 1994.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..abstract import Context, Router, Routing, Site
from ..errors import CompositionError, listed
from ..types import System
from . import _reading
from ._columns import regrown, renamed

Branch = Mapping[str, Any] | Sequence[str]


class Tree(Router):
    """α_leaf = Π softmax_children(V x + b) along the path from the root: each inner node has a gate over its children.

        mb.Tree({"left": ["a", "b"], "right": ["c", "d"]})      # α_a = p(left | x) p(a | left, x)

    tree: children by the name of each inner node, or a list of modules where all children are leaves. Names are all
    different; a module that the tree lacks has weight nought, one that is removed leaves the tree, and a node without
    children leaves, too. by: "token", or "example", the mean of x without padding.
    V (edges, d) and b start at N(0, 1/d) and nought. It learns by gradient; the authors' EM weighs each module's own
    gradient by its posterior, which is what the gradient of their likelihood does, too. The gates run in float32.
    Raises CompositionError for names that occur twice, or none.
    """

    systems = (
        System(
            (99,),
            'mb.Tree({"left": ["a", "b"], "right": ["c", "d"]})',
            (
                "tests/test_tasks.py::test_a_tree_of_gates_is_nested_mixtures",
                "tests/test_tasks.py::test_a_tree_learns_by_the_posterior_of_its_leaves",
            ),
        ),
    )

    def __init__(self, tree: Branch, by: str = "token"):
        super().__init__()
        self.tree, self.by = _copied(tree), _reading.by("Tree", by)
        edges = [child for _, children in _nodes(self.tree) for child in children]
        if not edges or len(set(edges)) != len(edges):
            raise CompositionError(f"Tree({tree!r}): the names of nodes and modules are all different, and some.")
        self.axis, self.edges = -1, ()
        self.gate: Tensor
        self.bias: Tensor
        self.paths: Tensor
        self.inside: Tensor

    def build(self, names: Sequence[str], site: Site) -> None:
        old = getattr(self, "gate", None)
        width, self.axis = _reading.width(self, site, old), site.axis
        gone = set(self.names).difference(names)
        self.tree = _without(self.tree, gone) if gone else self.tree
        nodes = list(_nodes(self.tree))
        leaves = {child for _, children in nodes for child in children} - {node for node, _ in nodes}
        if leaves.difference(names):
            raise CompositionError(f"Tree: the bay lacks the modules {listed(leaves.difference(names))}.")
        edges = tuple(child for _, children in nodes for child in children)
        new = torch.empty(len(edges), width, device=site.device, dtype=torch.float32).normal_(std=width**-0.5)
        self.gate = regrown(self, "gate", self.edges, edges, new)
        self.bias = regrown(self, "bias", self.edges, edges, new.new_zeros(len(edges)))
        self.sizes = [len(children) for _, children in nodes]
        above = {child: node for node, children in nodes for child in children}
        paths = torch.zeros(len(edges), len(names))
        for i, name in enumerate(names):
            step = name if name in above else ""
            while step:
                paths[edges.index(step), i] = 1.0
                step = above[step]
        self.register_buffer("paths", paths.to(site.device), persistent=False)
        self.register_buffer("inside", self.paths.any(0), persistent=False)
        self.names, self.edges = tuple(names), edges

    def rename(self, old: str, new: str) -> None:
        self.names, self.edges = renamed(self.names, old, new), renamed(self.edges, old, new)
        self.tree = _renamed(self.tree, old, new)

    def forward(self, x: Tensor, c: Context) -> Routing:
        with torch.autocast(x.device.type, enabled=False):
            seen = _reading.full(_reading.rows(self, x, c, self.by, self.axis)[0])
            logits = _reading.linear(seen, self.gate, self.bias)
            logs = [F.log_softmax(part, -1) for part in logits.split(self.sizes, -1)]
            weights = torch.exp(torch.cat(logs, -1) @ self.paths.to(logits.dtype)) * self.inside
        return Routing(weights=weights)


def _nodes(tree: Branch, name: str = "") -> Iterator[tuple[str, list[str]]]:
    """(inner node, its children), from the root, which has no name."""
    yield name, list(tree)
    if isinstance(tree, Mapping):
        for child, below in tree.items():
            yield from _nodes(below, child)


def _copied(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {name: _copied(below) for name, below in tree.items()}
    if isinstance(tree, str) or not all(isinstance(name, str) for name in tree):
        raise CompositionError(f"Tree: {tree!r} is no list of modules; inner nodes have names, in a mapping.")
    return list(tree)


def _without(tree: Any, gone: set[str]) -> Any:
    """The tree without some modules, and without the nodes that they leave empty."""
    if not isinstance(tree, Mapping):
        return [name for name in tree if name not in gone]
    below = {name: _without(branch, gone) for name, branch in tree.items()}
    return {name: branch for name, branch in below.items() if branch}


def _renamed(tree: Any, old: str, new: str) -> Any:
    if not isinstance(tree, Mapping):
        return [new if name == old else name for name in tree]
    return {name: _renamed(branch, old, new) for name, branch in tree.items()}
