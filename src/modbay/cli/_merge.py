"""`modbay merge`: one checkpoint of several."""

import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml

from .. import checkpoints
from ..errors import ConfigError, ModbayError
from ._explain import explained
from ._progress import Shown
from ._say import console, fail, table

MIB = 1 << 20


def run(
    models: list[str], flags: dict[str, Any], each: dict[str, list[str]], sets: list[str], out: Path | None,
    overwrite: bool, resume: Path | None, dry: bool, as_json: bool, explain: bool = False, plot: Path | None = None,
) -> None:  # fmt: skip
    """Merge, or print the plan, or what to expect."""
    try:
        recipe, named = resumed(resume) if resume is not None else asked_for(models, flags, each, sets)
        if plot is not None and not explain:
            raise ConfigError(f"--plot {plot}: it draws what --explain tells: give both.")
        if explain:
            explained(recipe, plot, as_json)
            return
        out = resume or out or named
        if out is None and not dry:
            raise ConfigError("--out is wanted: the folder that is written. --dry-run goes without.")
        plan = checkpoints.prepare(recipe) if out is None else checkpoints.ready(recipe, out, overwrite)
        if dry:
            show_plan(plan, as_json)
            return
        assert out is not None
        if as_json:
            done = checkpoints.merge(recipe, out, overwrite, None, shlex.join(["modbay", *sys.argv[1:]]), plan)
        else:
            done = merged(plan, out, overwrite)
    except KeyboardInterrupt:
        print(f"modbay: stopped. {more(out)}", file=sys.stderr)
        raise SystemExit(130) from None
    except ModbayError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or out}: {error.strerror or error}. {more(out)}")
    if as_json:
        print(json.dumps({"folder": str(done.folder), **done.facts}, indent=1, ensure_ascii=False))
        return
    console().print(
        f"{done.folder}/ holds the merged checkpoint, {plan.size / 1e6:,.1f} MB; README.md says of what.",
        soft_wrap=True,
    )


def more(out: Path | None) -> str:
    """What can be done after it has stopped."""
    if out is None or not checkpoints.unfinished(out).exists():
        return "Nothing was written."
    return f"Files that were whole are kept. To go on: modbay merge --resume {out}"


def merged(plan: checkpoints.Plan, out: Path, overwrite: bool) -> checkpoints.Merged:
    """Merge, with a bar of megabytes."""
    shown = Shown()
    for note in plan.notes:
        shown.say(f"note: {note}")
    with shown.stage(f"{plan.recipe.method}, MB", math.ceil(plan.size / 1e6)) as bar:
        watch = lambda size, name: bar.step(math.ceil(size / 1e6), name[-48:])
        done = checkpoints.merge(plan.recipe, out, overwrite, watch, shlex.join(["modbay", *sys.argv[1:]]), plan)
        bar.step(math.ceil(plan.size / 1e6), f"{len(plan.steps):,} tensors")
    return done


def resumed(out: Path) -> tuple[checkpoints.Recipe, None]:
    """The recipe of an unfinished merge."""
    path = checkpoints.unfinished(out) / "recipe.yaml"
    if not path.is_file():
        why = "that merge is finished" if out.exists() else f"there is no {path}, so no merge of that name was begun"
        raise ConfigError(f"--resume {out}: {why}.")
    return checkpoints.recipe(checkpoints.read_recipe(path), str(path)), None


def asked_for(
    models: list[str], flags: dict[str, Any], each: dict[str, list[str]], sets: list[str]
) -> tuple[checkpoints.Recipe, Path | None]:
    """(the recipe of a file and flags, each going before the last; the output that the file names)."""
    files = [one for one in models if one.endswith((".yaml", ".yml"))]
    if files and len(models) > 1:
        raise ConfigError(f"MODELS={models}: one YAML file with the whole recipe, or folders; not both.")
    where = files[0] if files else "the command line"
    said: dict[str, Any] = checkpoints.read_recipe(files[0]) if files else {}
    named = said.pop("out", None)
    if not files:
        if not models:
            raise ConfigError("MODELS: folders of checkpoints are wanted, or one YAML file with a recipe.")
        own = {name: spread(name, values, len(models)) for name, values in each.items() if values}
        said["models"] = [
            {"model": model, "parameters": {name: values[i] for name, values in own.items()}}
            for i, model in enumerate(models)
        ]
    elif any(each.values()):
        raise ConfigError(f"{where}: weights and densities stand in the recipe; --set weight=0.5 sets all models'.")
    given = {name: value for name, value in flags.items() if value is not None}
    for name, others in (("merge_method", ("method",)), ("base_model", ("base",)), ("dtype", ("out_dtype",))):
        if name in given:
            said = {key: value for key, value in said.items() if key not in others}
    said |= {"merge_method": "linear"} if not files and "merge_method" not in given else {}
    said |= given
    parameters = dict(said.get("parameters") or {})
    for one in sets:
        name, equals, value = one.partition("=")
        if not equals:
            raise ConfigError(f"--set {one}: NAME=VALUE is wanted, the value in YAML; --set normalize=false")
        parameters[name] = yaml.safe_load(value)
    if parameters:
        said["parameters"] = parameters
    return checkpoints.recipe(said, where), Path(named) if named is not None else None


def spread(name: str, values: list[str], n: int) -> list[Any]:
    """One value a model: given one by one, between commas, or once for all."""
    cells = [yaml.safe_load(cell) for one in values for cell in one.split(",")]
    if len(cells) not in (1, n):
        raise ConfigError(f"--{name} {','.join(values)}: {len(cells)} values for {n} models: give one each, or one.")
    return cells * n if len(cells) == 1 else cells


def show_plan(plan: checkpoints.Plan, as_json: bool) -> None:
    """Everything that will happen, before it does."""
    said = plan.as_dict()
    if as_json:
        print(json.dumps(said, indent=1, ensure_ascii=False))
        return
    out = console()
    rows = [
        (one["model"], "base" if one["model"] == said["base"] else "", one["tensors"], one["files"])
        for one in said["models"]
    ]
    out.print(table(("model", "", "tensors", "files"), rows, right=("tensors", "files")))
    out.print(f"\n{plan.recipe.method}: {said['merged']:,} tensors are merged, {len(said['kept']):,} kept as they are.")
    out.print(
        table(
            ("tensors", "numbers", "parameters of each model", "of all", "from"),
            grouped(said["parameters"]),
            right=("tensors", "numbers"),
        )
    )
    for note in plan.notes:
        out.print(f"note: {note}", soft_wrap=True)
    files = ", ".join(f"{name} ({size / 1e6:,.1f} MB)" for name, size in said["files"].items() if size > 1e5)
    out.print(f"\nWritten: {files}; config and tokenizer of {plan.donor.name}.", soft_wrap=True)


def grouped(groups: list[dict[str, Any]], most: int = 16) -> list[tuple]:
    """Rows of tensors with the same parameters."""
    text = lambda given: ", ".join(f"{name} {value:.4g}" for name, value in given.items() if name != "int8_mask")
    rows = [
        (f"{g['tensors']:,}", f"{g['numbers']:,}", "; ".join(map(text, g["models"])), text(g["all"]), g["first"])
        for g in groups
    ]
    return rows if len(rows) <= most else [*rows[:most], (f"… {len(rows) - most} more", "", "", "", "")]
