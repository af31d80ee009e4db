"""What to expect of a merge, drawn: by layer, by pair of models, by model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ._figures import two

COLOURS = ("#1f6fb4", "#c4501b", "#2e8540", "#7b4ea3", "#a67c00", "#0a8f8f", "#b03060", "#555555")
FORMATS = (".svg", ".png", ".pdf")
Facts = Mapping[str, Any]


def plottable(path: str | Path) -> None:
    """Raise ConfigError for a file that can't be drawn to, and ModuleNotFoundError without matplotlib."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"plot={str(path)!r}: a name that ends in {', '.join(FORMATS)} is wanted.")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"plot={str(path)!r}: there is no folder {path.parent}: make it first.")
    import matplotlib.figure  # noqa: F401, PLC0415 (an optional dependency)


def merge_plot(facts: Facts, path: str | Path) -> None:
    """Draw `checkpoints.explain(…).as_dict()` to an SVG, PNG or PDF; the same figures make the same file.

    Raises what `plottable` raises.
    """
    plottable(path)
    import matplotlib  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415 (not pyplot: no window, and nothing global)

    with matplotlib.rc_context({"svg.hashsalt": "modbay", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(11, 6.4), layout="constrained")
        (changes, signs), (cosines, left) = figure.subplots(2, 2, width_ratios=(1.5, 1))
        _changes(changes, facts)
        if facts["base"] is not None:
            _signs(cosines, facts)
            _left(left, facts)
        else:
            _apart(cosines, facts)
            left.set_axis_off()
        _cosines(signs, facts)
        figure.suptitle(f"{facts['method']}: what to expect, from {facts['base'] or 'the mean of the models'}")
        suffix = Path(path).suffix.lower()
        date = {".svg": {"Date": None, "Creator": None}, ".png": {"Software": None}, ".pdf": {"CreationDate": None}}
        figure.savefig(path, dpi=150, metadata=date[suffix])


def _lines(axes: Any, facts: Facts, lines: Sequence[tuple[str, Sequence[Any], str, str]], title: str) -> None:
    """(name, a share a layer or None, colour, style) over the layers."""
    names = _cut([layer["layer"] for layer in facts["layers"]])
    at = range(len(names))
    for name, shares, colour, style in lines:
        values = [float("nan") if share is None else 100 * share for share in shares]
        axes.plot(at, values, style, color=colour, label=name, markersize=3, linewidth=1.2)
    step = max(1, -(-len(names) // 30))
    axes.set_xticks(list(at)[::step], names[::step], rotation=90, fontsize=6)
    axes.set_xlabel("layer")
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7)


def _changes(axes: Any, facts: Facts) -> None:
    lines = [
        (one["name"], [layer["models"][i]["relative"] for layer in facts["layers"]], _colour(i), "o-")
        for i, one in enumerate(facts["models"])
    ]
    lines.append(("merged", [layer["all"]["relative"] for layer in facts["layers"]], "#000000", "--"))
    _lines(axes, facts, lines, f"change, % of the {'base' if facts['base'] is not None else 'mean'}'s norm, by layer")
    axes.set_ylim(bottom=0)


def _signs(axes: Any, facts: Facts) -> None:
    pairs = facts["pairs"][: len(COLOURS)]
    lines = [
        (" and ".join(one["of"]), [layer["pairs"][i]["mass_differ"] for layer in facts["layers"]], _colour(i), "o-")
        for i, one in enumerate(pairs)
    ]
    axes.axhline(50, color="#999999", linewidth=0.8, linestyle=":", label="unrelated vectors")
    _lines(axes, facts, lines, "signs differ, % of the mass that both change, by layer")
    axes.set_ylim(0, 100)


def _apart(axes: Any, facts: Facts) -> None:
    lines = [
        (" and ".join(one["of"]), [layer["pairs"][i]["apart"] for layer in facts["layers"]], _colour(i), "o-")
        for i, one in enumerate(facts["pairs"][: len(COLOURS)])
    ]
    _lines(axes, facts, lines, "apart, % of the mean's norm, by layer")
    axes.set_ylim(bottom=0)


def _cosines(axes: Any, facts: Facts) -> None:
    """Between task vectors; without a base, between the models themselves."""
    names = [one["name"] for one in facts["models"]]
    key = "cosine" if facts["base"] is not None else "models"
    known = {tuple(sorted(one["of"])): one[key] for one in facts["pairs"]}
    cells = [[1.0 if a == b else known.get(tuple(sorted((a, b)))) for b in names] for a in names]
    values = [[float("nan") if cell is None else cell for cell in row] for row in cells]
    axes.imshow(values, vmin=-1, vmax=1, cmap="RdBu_r")
    axes.spines[:].set_visible(False)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0)
    for i, row in enumerate(cells):
        for j, cell in enumerate(row):
            said = two(cell)
            axes.text(j, i, said, ha="center", va="center", color="white" if abs(cell or 0) > 0.6 else "black")
    axes.set_title("cosines between changes" if key == "cosine" else "cosines between models")


def _left(axes: Any, facts: Facts) -> None:
    """How far the merge goes along each task vector, and what of its mass is lost on the way."""
    columns = {"goes along": "along", "against": "against", "trimmed": "trimmed", "out-voted": "outvoted"}
    shown = {name: key for name, key in columns.items() if any(one[key] is not None for one in facts["models"])}
    width = 0.8 / len(shown)
    for k, (name, key) in enumerate(shown.items()):
        at = [i + (k - (len(shown) - 1) / 2) * width for i in range(len(facts["models"]))]
        heights = [100 * (one[key] or 0) for one in facts["models"]]
        axes.bar(at, heights, width, label=name, color=COLOURS[(2, 1, 4, 3)[k]])
    axes.set_xticks(range(len(facts["models"])), [one["name"] for one in facts["models"]], rotation=45, ha="right")
    axes.axhline(0, color="#000000", linewidth=0.6)
    axes.set_ylim(top=1.25 * axes.get_ylim()[1])
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("the merged change, % of each model's own")
    axes.legend(frameon=False, fontsize=7, ncols=len(shown), loc="upper center")


def _cut(names: list[str]) -> list[str]:
    """Without the parts that the most of them begin with: `3` of `model.layers.3`."""
    stems = [name.rpartition(".")[0] for name in names if name.rpartition(".")[2].isdigit()]
    if len(set(stems)) != 1:
        return names
    return [name.removeprefix(f"{stems[0]}.") if name.startswith(f"{stems[0]}.") else name for name in names]


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]
