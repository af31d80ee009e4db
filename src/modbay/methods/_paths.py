"""Fixed routes along a tree: a family of languages, its branch, and the language itself.

Stacked, from the root: Faisal and Anastasopoulos, "Phylogeny-Inspired Adaptation of Multilingual Models to New
Languages", 2022 (arXiv 2205.09634). Averaged: Chronopoulou, Peters and Dodge, "Efficient Hierarchical Domain Adaptation
for Pretrained Language Models", 2022 (arXiv 2112.08786).
"""

from collections.abc import Mapping

from ..errors import LabelError
from ..types import System, systems


@systems(
    System(
        (71,),
        'router=mb.ByLabel("language", methods.paths({"de": "germanic", "nl": "germanic"}))',
        (
            "tests/test_tasks.py::test_paths_lead_from_the_root",
            "tests/test_tasks.py::test_modules_along_a_path_add_up_or_stack",
        ),
        "hierarchical fixed routing",
        "α = Σ_{i on the path to label} e_i, as a sum, a mean or a sequence",
        section="4.1",
    )
)
def paths(parents: Mapping[str, str], mean: bool = False) -> dict[str, list[str]] | dict[str, dict[str, float]]:
    """α_label = the modules on the path from the root to the label's node: a table for `mb.ByLabel`.

        mb.ByLabel("language", methods.paths({"de": "germanic", "nl": "germanic", "germanic": "indo-european"}))

    parents: the node above each node but the roots. Every node is a label, so that a language without a module of its
    own may take its family's. mean: each of a path's modules weighs one over their number, as for domains; without it
    they count in full, in order: added up, or stacked by mb.Sequence("routed"). Raises LabelError for a circle.
    """
    table = {}
    for node in dict.fromkeys([*parents, *parents.values()]):
        path = [node]
        while path[-1] in parents:
            path.append(parents[path[-1]])
            if path[-1] in path[:-1]:
                raise LabelError(f"paths: {' < '.join(map(repr, path))} is a circle, and leads to no root.")
        table[node] = path[::-1]
    return {node: dict.fromkeys(path, 1 / len(path)) for node, path in table.items()} if mean else table
