"""`modbay train`, as it is typed."""

from pathlib import Path
from typing import Annotated

import typer

from .. import _options as options


def train(
    data: options.Data = None,
    base: options.Base = None,
    text: options.Text = None,
    target: options.Target = None,
    by: options.By = None,
    kind: options.Kind = None,
    method: Annotated[
        str | None, typer.Option("--method", "-m", help="shared, private, polytropon …: see modbay methods.")
    ] = None,
    module: options.Module = None,
    at: options.At = None,
    steps: options.Steps = None,
    epochs: options.Epochs = None,
    batch: options.Batch = None,
    lr: options.Rate = None,
    layers: options.Layers = None,
    validation: options.Validation = None,
    test: options.Test = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of splits, draws and initialisation [0].")] = None,
    licence: Annotated[str | None, typer.Option("--licence", help="Of the modules: CC-BY-4.0, say.")] = None,
    sets: options.Sets = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The run's folder [runs/TASK-METHOD].")] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", help="Go on with the unfinished run of this folder.")
    ] = None,
    dry: options.Dry = False,
    json: options.Json = False,
) -> None:
    """Train modules on labelled data, and write them to a folder, with a report.

    \b
    modbay train mail.csv --base ./minilm --text body --target intent --by language --dry-run
    modbay train mail.csv --base ./minilm --text body --target intent --by language --method private
    modbay train news=news.csv spam=spam.jsonl --base ./minilm --method polytropon --seed 1
    modbay train run.yaml --out runs/again      everything in a file; a run's own run.yaml reruns it
    modbay train --resume runs/mail-shared      after Ctrl-C or a crash: the same numbers as unbroken

    Rows are split by share unless files are given; the same text never stands on both sides. The base stays as it is:
    what learns is in modules, and a run's folder holds those alone.

    \b
    By --set, or in the YAML, also (python -c "help('modbay.training.Config')" explains each):
    data     group, streaming, buffer, max_length
    method   options, bays                        {skills: 4}; bays spelled out: see modbay methods
    learning router_lr, head_lr, warmup, weight_decay, clip, dropout, accumulate, bf16, checkpointing
    draws    sampling (proportional, temperature, uniform), temperature
    heads    pool (mean, max, first, last), hidden, standardise, probe
    course   evaluate_every, save_every, keep (best, last), revision
    """
    from .._train import run

    flags = {
        "base": base, "text": options.texts(text), "target": target, "by": by or None, "kind": kind, "method": method,
        "module": module, "at": at or None, "steps": steps, "epochs": epochs, "batch": batch, "lr": lr,
        "layers": layers, "validation": options.share(validation), "test": options.share(test), "seed": seed,
        "licence": licence,
    }  # fmt: skip
    run(data or [], flags, sets or [], out, resume, dry, json)
