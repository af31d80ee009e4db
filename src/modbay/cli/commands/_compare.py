"""`modbay compare`, as it is typed."""

from pathlib import Path
from typing import Annotated

import typer

from .. import _options as options


def compare(
    data: options.Data = None,
    base: options.Base = None,
    text: options.Text = None,
    target: options.Target = None,
    by: options.By = None,
    kind: options.Kind = None,
    methods: Annotated[
        list[str] | None, typer.Option("--methods", "-m", help="private,tfidf,… [all that the data allow].")
    ] = None,
    seeds: Annotated[
        list[str] | None, typer.Option("--seeds", help="One run of each method a seed: 0,1,2 [0].")
    ] = None,
    reference: Annotated[str | None, typer.Option("--reference", help="Whom differences are to [shared].")] = None,
    module: options.Module = None,
    at: options.At = None,
    steps: options.Steps = None,
    epochs: options.Epochs = None,
    batch: options.Batch = None,
    lr: options.Rate = None,
    layers: options.Layers = None,
    validation: options.Validation = None,
    test: options.Test = None,
    sets: options.Sets = None,
    out: options.Out = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", help="Go on with the unfinished comparison of this folder.")
    ] = None,
    dry: options.Dry = False,
    json: options.Json = False,
) -> None:
    """Run several methods on the same data, splits, steps and seeds, and say which to take, and what is not shown.

    \b
    modbay compare mail.csv --base ./minilm --text body --target intent --by language --dry-run
    modbay compare mail.csv --base ./minilm --text body --target intent --by language --seeds 0,1,2
    modbay compare mail.csv --base ./minilm --methods shared,private,tfidf --out runs/three
    modbay compare compare.yaml --methods shared,wider,tfidf      variants: see below
    modbay compare --resume runs/three      after Ctrl-C or a crash: runs that are finished stay so

    The methods are those of `modbay methods`, and what needs no base: tfidf (one model for all), tfidf-each (one for
    each value of the first label), majority. A YAML file has the arguments of a run and what is a method's own:

    \b
    methods: {shared: {lr: 0.003}, wider: {method: shared, module: {LoRA: {rank: 16, alpha: 32}}}, tfidf: {}}
    seeds: [0, 1, 2]

    Intervals are of draws of test rows, and of seeds where there are several; p is corrected for all pairs.
    """
    from .._compare import run

    flags = {
        "base": base, "text": options.texts(text), "target": target, "by": by or None, "kind": kind, "module": module,
        "at": at or None, "steps": steps, "epochs": epochs, "batch": batch, "lr": lr, "layers": layers,
        "validation": options.share(validation), "test": options.share(test),
    }  # fmt: skip
    run(data or [], flags, sets or [], methods or [], seeds or [], reference, out, resume, dry, json)
