"""`modbay convert`, as it is typed."""

from pathlib import Path
from typing import Annotated

import typer

from .. import _options as options


def convert(
    modules: Annotated[Path, typer.Argument(help="A folder that bay.save wrote, or peft's or adapters' checkpoint.")],
    out: Annotated[Path, typer.Argument(help="The folder that is written.")],
    to: Annotated[str, typer.Option("--to", help="modbay, peft, adapters, lora (plain, for engines) or gguf.")],
    model: Annotated[str, typer.Option("--model", "-m", help="The base: a folder, or its id on the hub.")],
    name: Annotated[str | None, typer.Option("--name", help="Only this module of several.")] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="Of a plain LoRA; the lowest that will do.")] = None,
    error: Annotated[float, typer.Option("--error", help="The most that a plain LoRA may be off, relatively.")] = 0.05,
    any_base: options.AnyBase = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that is there.")] = False,
    json: options.Json = False,
) -> None:
    """Write modules in another library's format: exactly, or with the error told, or not at all.

    \b
    modbay convert my-peft-lora/ modules/ --to modbay --model llama/
    modbay convert modules/ out/ --to peft --model llama/ --name de
    modbay convert modules/ served/ --to lora --model llama/ --rank 16      for vLLM, LoRAX …
    modbay convert modules/ de.gguf --to gguf --model llama/ --name de      for llama.cpp
    """
    from .._convert import run

    run(modules, out, to, model, name, rank, error, "any" if any_base else "same", overwrite, json)
