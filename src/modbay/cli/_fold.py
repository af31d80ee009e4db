"""`modbay fold`: a plain checkpoint, of a base and the modules that are folded into it."""

import json
import os
import shutil
import uuid
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..attach import load
from ..dequantise import dequantise as unpacked
from ..errors import ModbayError
from ._say import console, fail
from ._weights import named, weighed

TOKENIZER = (
    "tokenizer", "special_tokens", "vocab", "merges", "spiece", "sentencepiece", "added_tokens", "chat_template",
)  # fmt: skip
TEXTS = (".json", ".txt", ".model", ".jinja")
CARD = """---
tags: [modbay]
---
# {name}

`{model}` with modules of `{modules}` folded into its weights by modbay {version}: {said}. It needs no modbay.
"""


def run(
    model: str, modules: Path, out: Path, use: list[str], bay: str | None, base: str, untie: bool, dtype: str | None,
    overwrite: bool, dequantise: bool, as_json: bool,
) -> None:  # fmt: skip
    """Load, fold, write beside, and give it its name."""
    if out.exists() and not overwrite:
        fail(f"--out {out}: that is there already. Choose another name, or --overwrite.")
    if overwrite and out.exists() and not (out / "config.json").is_file():
        fail(f"--out {out}: it is no checkpoint (it has no config.json): delete it yourself.")
    for given in (Path(model), modules):
        if given.exists() and (out.resolve() == given.resolve() or out.resolve() in given.resolve().parents):
            fail(f"--out {out}: that is where {given} is: choose another folder.")
    net: Any = weighed(model, dtype)
    done: dict[str, dict[str, float]] = {}
    try:
        bays = load(net, modules, base=base)
        if bay is not None and bay not in bays:
            fail(f"--bay {bay}: {modules} has no bay of that name; there are {', '.join(bays)}.")
        chosen = [one for name, one in bays.items() if bay in (None, name)]
        for one in reversed([one for name, one in bays.items() if bay not in (None, name)]):
            one.detach()
        wanted = named(use)
        for one in chosen:
            own = (
                {name: w for name, w in wanted.items() if name in one.names()}
                if use
                else dict.fromkeys(one.names(), 1.0)
            )
            if not use and len(own) > 1:
                fail(
                    f"bay {one.state.name!r} has modules {', '.join(own)}: say which, --use NAME or --use NAME=WEIGHT."
                )
            done[one.state.name] = own
        lost = [name for name in wanted if not any(name in own for own in done.values())]
        if lost:
            there = ", ".join(name for one in chosen for name in one.names())
            fail(f"--use {lost[0]}: there is no such module in {modules}; there are {there}.")
        errors = unpacked(net) if dequantise else {}
        for one in chosen:
            if done[one.state.name]:
                one.fold(done[one.state.name], untie=untie)
        for one in reversed(chosen):
            one.detach(keep=bool(done[one.state.name]))
        written(net, model, modules, out, done, errors)
    except ModbayError as error:
        way = " Here that is --dequantise, which makes the whole checkpoint one of floats."
        fail(str(error) + (way if "dequantise=True" in str(error) else ""))
    except OSError as error:
        fail(f"{error.filename or out}: {error.strerror or error}. Nothing was written.")
    if as_json:
        facts = {"folder": str(out), "model": model, "modules": str(modules), "folded": done}
        print(json.dumps(facts | ({"dequantised": errors} if dequantise else {}), indent=1))
        return
    if dequantise:
        console().print(lost_by(errors) or "No layer of the base was quantised.", soft_wrap=True)
    said = told(done)
    console().print(f"{out}/ holds {type(net).__name__} with {said} folded in; it needs no modbay.", soft_wrap=True)


def told(done: dict[str, dict[str, float]]) -> str:
    """What was folded, in words."""
    return "; ".join(f"{name}: {', '.join(f'{w:g} × {m}' for m, w in own.items())}" for name, own in done.items())


def lost_by(errors: dict[str, float]) -> str:
    """What dequantising costs, in words; nothing where nothing was quantised."""
    if not errors:
        return ""
    worst = max(errors, key=lambda name: errors[name])
    return (
        f"{len(errors)} quantised layers became floats, and act otherwise by a relative {errors[worst]:.1e} at most "
        f"({worst})."
    )


def written(
    net: Any, model: str, modules: Path, out: Path, done: dict[str, dict[str, float]], errors: dict[str, float]
) -> None:
    """All of it beside, then its name."""
    aside = out.with_name(f".{out.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        net.save_pretrained(aside)
        folder = Path(model)
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            if (
                path.is_file()
                and path.name.startswith(TOKENIZER)
                and path.suffix in (".json", ".txt", ".model", ".jinja")
            ):
                shutil.copyfile(path, aside / path.name)
        card = CARD.format(name=out.name, model=model, modules=modules, version=version("modbay"), said=told(done))
        card += f"\n{lost_by(errors)}\n" if errors else ""
        (aside / "README.md").write_text(card, encoding="utf-8")
        if out.exists():
            old = out.with_name(f".{out.name}.{uuid.uuid4().hex[:12]}.old")
            os.rename(out, old)
            os.rename(aside, out)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
