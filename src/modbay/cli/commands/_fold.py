"""`modbay fold`, as it is typed."""

from pathlib import Path
from typing import Annotated

import typer

from .. import _options as options


def fold(
    model: Annotated[str, typer.Argument(help="The base: a folder with a transformers model, or its id on the hub.")],
    modules: Annotated[Path, typer.Argument(help="A folder that bay.save wrote, or peft's or adapters' checkpoint.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder that is written.")],
    use: Annotated[
        list[str] | None, typer.Option("--use", help="NAME or NAME=WEIGHT of a module; may be given again.")
    ] = None,
    bay: Annotated[str | None, typer.Option("--bay", help="Only this bay of several.")] = None,
    any_base: options.AnyBase = False,
    untie: Annotated[bool, typer.Option("--untie", help="Give a weight that two layers share a copy at each.")] = False,
    dequantise: Annotated[
        bool, typer.Option("--dequantise", help="Write a quantised base in floats, and say what that changes.")
    ] = False,
    dtype: Annotated[str | None, typer.Option("--dtype", help="Of the model; its own, unless told.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is there.")] = False,
    json: options.Json = False,
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
    from .._fold import run

    run(model, modules, out, use or [], bay, "any" if any_base else "same", untie, dtype, overwrite, dequantise, json)
