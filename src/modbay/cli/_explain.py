"""`modbay merge --explain`: what to expect of a merge, as tables, sentences and a plot."""

import json
from pathlib import Path
from typing import Any

from .. import checkpoints
from ._progress import Shown
from ._say import console, table

WIDE = 6  # models that have a column each in the table of layers
LEGEND = (
    "goes along: how far the merged change goes in a model's direction, 1 is all the way; distance: from the merged "
    "model, 1 is the base's; the rest: shares of a model's mass, Σ |change|, that the merge is against, or loses."
)


def explained(recipe: checkpoints.Recipe, plot: Path | None, as_json: bool) -> None:
    """Read the models, and print what their merge would do."""
    if plot is not None:
        from ..report import merge_plot, plottable

        plottable(plot)  # before the models are read
    if as_json:
        e = checkpoints.explain(recipe)
        print(json.dumps(e.as_dict(), indent=1, ensure_ascii=False))
    else:
        with Shown().stage(f"{recipe.method}, explained, %", 100) as bar:
            e = checkpoints.explain(recipe, watch=lambda done, name: bar.step(int(100 * done), name[-48:]))
            bar.step(100, f"{e.tensors:,} tensors")
        show(e)
    if plot is not None:
        merge_plot(e.as_dict(), plot)
        if not as_json:
            console().print(f"\n{plot} shows it by layer.", soft_wrap=True)


def show(e: checkpoints.Explanation) -> None:
    """Tables of pairs, models and layers, and what they mean."""
    out, said = console(), e.figures(e.every)
    start = f"the base, {e.base}" if e.base is not None else "the mean of the models"
    kept = f"; {e.kept:,} more stay as the base has them" if e.kept else ""
    out.print(f"{e.method}: {e.tensors:,} tensors, {said['all']['numbers']:,.0f} numbers{kept}.", soft_wrap=True)
    out.print(f"Changes are from {start}.\n", soft_wrap=True)
    out.print(models(e, said))
    out.print(f"{LEGEND}\n" if e.base is not None else "", soft_wrap=True)
    for made in (pairs(e, said), layers(e)):
        if made is not None:
            out.print(made)
            out.print()
    for line in [*e.words(), *(f"note: {note}" for note in e.notes)]:
        out.print(f"- {line}", soft_wrap=True)


def models(e: checkpoints.Explanation, said: dict[str, Any]) -> Any:
    """Each task vector, and what is left of it in the merge."""
    of = "of the base" if e.base is not None else "of the mean"
    columns = {"change": ("norm", plain), of: ("relative", share), "entries": ("changed", share)}
    if e.base is not None:
        columns |= {
            "weight": ("weight", two), "goes along": ("along", two), "cosine": ("cosine", two),
            "distance": ("distance", two), "against": ("against", share), "untouched": ("still", share),
            "trimmed": ("trimmed", share), "out-voted": ("outvoted", share),
        }  # fmt: skip
    shown = {head: one for head, one in columns.items() if any(row[one[0]] is not None for row in said["models"])}
    if e.method in ("ties", "dare_ties"):
        shown.pop("weight", None)  # entries without a rival go all the way
    rows = [[row["name"], *(form(row[key]) for key, form in shown.values())] for row in said["models"]]
    merged = {"change": plain(said["all"]["norm"]), of: share(said["all"]["relative"])}
    rows.append(["merged", *(merged.get(head, "") for head in shown)])
    return table(("model", *shown), rows, right=tuple(shown))


def pairs(e: checkpoints.Explanation, said: dict[str, Any]) -> Any:
    """Each two task vectors, and all together."""
    if not said["pairs"]:
        return None
    if e.base is None:
        heads = ("models", "apart", "cosine of the models")
        return table(heads, [(and_(row), share(row["apart"]), four(row["models"])) for row in said["pairs"]], heads[1:])
    heads = ("models", "cosine", "signs differ, entries", "signs differ, mass", "both change")
    keys = ("differ", "mass_differ", "both")
    rows = [(and_(row), two(row["cosine"]), *(share(row[key]) for key in keys)) for row in said["pairs"]]
    if len(said["models"]) > 2:
        rows.append(("any two", "", share(said["all"]["differ"]), share(said["all"]["mass_differ"]), ""))
    return table(heads, rows, heads[1:])


def layers(e: checkpoints.Explanation) -> Any:
    """How much each changed by layer, relative to the base there, and where signs differ."""
    every = [(name, e.figures(one)) for name, one in e.layers.items()]
    few = len(e.models) <= WIDE
    names = tuple(e.short) if few else ("least", "most")
    signs = ("signs differ, mass",) if e.base is not None and len(e.models) > 1 else ()
    rows = []
    for name, said in every:
        changes = [row["relative"] for row in said["models"]]
        known = [change for change in changes if change is not None]
        told = changes if few else [min(known, default=None), max(known, default=None)]
        conflict = [share(said["all"]["mass_differ"])] if signs else []
        whole = said["all"]
        rows.append((name, f"{whole['numbers']:,.0f}", *conflict, *map(share, told), share(whole["relative"])))
    of = "of the base's norm" if e.base is not None else "of the mean's norm"
    heads = ("layer", "numbers", *signs, *names, "merged")
    made = table(heads, rows, right=heads[1:])
    made.title, made.title_justify, made.title_style = f"changes, {of}", "left", ""
    return made


def and_(row: dict[str, Any]) -> str:
    return " and ".join(row["of"])


def share(x: float | None) -> str:
    return checkpoints.per_cent(x)


def two(x: float | None) -> str:
    return checkpoints.two(x)


def four(x: float | None) -> str:
    return "–" if x is None else f"{x:.4f}".replace("-", "−")


def plain(x: float | None) -> str:
    return "–" if x is None else f"{x:.4g}"
