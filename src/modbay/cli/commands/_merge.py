"""`modbay merge`, as it is typed."""

from pathlib import Path
from typing import Annotated

import typer

from .. import _options as options


def merge(
    models: Annotated[
        list[str] | None, typer.Argument(help="Folders of checkpoints, ORG/NAME[@REVISION] of the hub, or one YAML.")
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", "-m", help="linear, task_arithmetic, ties, dare_linear, dare_ties, slerp.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", "-b", help="What the models were made from; or where slerp begins.")
    ] = None,
    weight: Annotated[list[str] | None, typer.Option("--weight", "-w", help="One a model: 0.7,0.3 [1 each].")] = None,
    density: Annotated[
        list[str] | None, typer.Option("--density", help="The share kept of each change: ties, dare [1].")
    ] = None,
    t: Annotated[float | None, typer.Option("-t", "--t", help="slerp: 0 is the base, 1 the other model.")] = None,
    scale: Annotated[
        float | None, typer.Option("--lambda", help="How much of the change is added to the base [1].")
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="Any parameter, in YAML: --set normalize=false.")
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option("--keep", help="Tensors that stay as the base has them: a pattern.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="bfloat16, float16, float32, float64 [the base's].")
    ] = None,
    any_tokenizer: Annotated[
        bool, typer.Option("--any-tokenizer", help="Merge row by row though vocabularies differ.")
    ] = False,
    shard: Annotated[str | None, typer.Option("--shard", help="Most bytes a file [5GB].")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of what dare drops [0].")] = None,
    out: options.Out = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder of an earlier merge.")] = False,
    resume: Annotated[
        Path | None, typer.Option("--resume", help="Go on with the unfinished merge of this folder.")
    ] = None,
    dry: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, and stop.")] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Report conflicts and what to expect of the merge, and stop.")
    ] = False,
    plot: Annotated[Path | None, typer.Option("--plot", help="With --explain: draw it, too: FILE.svg or .png.")] = None,
    json: options.Json = False,
) -> None:
    """Make one checkpoint of several, tensor by tensor: models larger than memory are merged, too.

    \b
    modbay merge a/ b/ --weight 0.7,0.3 --out ab/                              a weighted average
    modbay merge a/ b/ --base origin/ -m task_arithmetic --lambda 0.5 -o ab/   what both changed, added
    modbay merge a/ b/ --base origin/ -m ties --density 0.2 -o ab/
    modbay merge a/ b/ -m slerp -t 0.5 -o ab/
    modbay merge recipe.yaml --out ab/ --dry-run       the plan: what is merged how, and what is refused
    modbay merge ab/recipe.yaml --out again/           every output has its recipe
    modbay merge a/ b/ --base origin/ -m ties --explain --plot ab.svg          what to expect, before it is paid for
    modbay merge RUN/modules/language/en RUN/modules/language/de -w 0.7,0.3      modules: one more beside them

    \b
    A recipe is mergekit's YAML, or:
      merge_method: ties
      base_model: origin
      models:
        - {model: a, parameters: {weight: 0.5, density: [1, 0.2]}}       first layer to last
        - {model: b, parameters: {weight: [{filter: mlp, value: 0.7}, {value: 0.3}]}}
      keep: ["*.position_ids"]

    Names, shapes, dtypes, vocabularies and room on the disk are checked before anything is written. The output is there
    when it is whole; killed, the same command goes on. Config and tokenizer are the base's, or the first model's;
    README.md has the recipe and the SHA-256 of every input.
    """
    from .._merge import run
    from .._merge_modules import are_modules
    from .._merge_modules import run as merge_modules
    from .._say import fail

    flags = {
        "merge_method": method, "base_model": base, "dtype": dtype, "keep": keep or None, "seed": seed, "shard": shard,
        "any_tokenizer": any_tokenizer or None,
    }  # fmt: skip
    whole = [f"{name}={value}" for name, value in (("t", t), ("lambda", scale)) if value is not None]
    each = {"weight": weight or [], "density": density or []}
    if are_modules(models or []):
        if explain or plot is not None:
            fail("--explain: it is of checkpoints; these are modules, which merge through their deltas.")
        merge_modules(models or [], flags, each, [*whole, *(sets or [])], out, overwrite, dry, json)
        return
    run(models or [], flags, each, [*whole, *(sets or [])], out, overwrite, resume, dry, json, explain, plot)
