"""The command line: `modbay`, also `python -m modbay`.

A command is two files: commands/_NAME.py has what is typed, _NAME.py what is then done, which is imported only then,
for it imports what is heavy.
"""

from importlib.metadata import version as installed
from typing import Annotated

import typer

from . import commands
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


for command in (  # in the order of the help
    commands.train,
    commands.inspect,
    commands.methods,
    commands.demo,
    commands.evaluate,
    commands.predict,
    commands.compare,
    commands.adapt,
    commands.extend,
    commands.merge,
    commands.fold,
    commands.convert,
):
    app.command()(command)


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
