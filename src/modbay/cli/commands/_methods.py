"""`modbay methods`, as it is typed."""

from typing import Annotated

import typer

from .. import _options as options


def methods(
    names: Annotated[list[str] | None, typer.Argument(help="Only these, in full.", metavar="NAME")] = None,
    axis: Annotated[str | None, typer.Option("--axis", help="Only routing, aggregation, hypernetwork …")] = None,
    json: options.Json = False,
    page: Annotated[bool, typer.Option("--page", help="As Markdown, for docs/methods.md.")] = False,
) -> None:
    """Print the catalogue: every kind, router, aggregator and system, what it computes, how to build it, its source.

    \b
    modbay methods                    all of them, a line each
    modbay methods LoRA Skills 39     three, in full: by name, or by the survey's number
    modbay methods --axis routing
    modbay methods --json
    """
    from .._methods import run

    run(names or [], axis, json, page)
