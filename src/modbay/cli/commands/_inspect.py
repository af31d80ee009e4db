"""`modbay inspect`, as it is typed."""

from typing import Annotated

import typer

from .. import _options as options


def inspect(
    model: Annotated[
        str, typer.Argument(help="A model: folder, hub name, package.module:callable. Or a run, bay or module folder.")
    ],
    at: Annotated[
        list[str] | None,
        typer.Option("--at", "-a", help="A name pattern, or a role such as role.ffn; may be given more than once."),
    ] = None,
    json: options.Json = False,
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
    from .._inspect import run

    run(model, at or [], json)
