"""`modbay convert`: modules from one library's format to another's."""

import json
import os
import shutil
import uuid
from pathlib import Path

from ..attach import load
from ..errors import ModbayError
from ..library import composed
from ._say import console, fail, table
from ._weights import weighed


def run(
    modules: Path, out: Path, to: str, model: str, name: str | None, rank: int | None, error: float, base: str,
    overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    """Read what is there, onto its base; write it, and tell the errors."""
    if out.exists() and not overwrite:
        fail(f"OUT={out}: that is there already. Choose another name, or --overwrite.")
    net = weighed(model)
    single = to == "gguf" and out.suffix == ".gguf"  # a file, not a folder
    aside = out.with_name(f".{out.name}.{uuid.uuid4().hex[:12]}.tmp{out.suffix if single else ''}")
    errors: dict[str, float] = {}
    try:
        bays = load(net, modules, base=base)
        if to == "modbay":
            for one in bays.values():
                one.save(aside, *([name] if name else []))
        else:
            whole = [one for one in bays.values() if name is None and composed(one.fitting, to)]
            found: list = [(one, None) for one in whole]
            found += [
                (one, own) for one in bays.values() if one not in whole for own in one.names() if name in (None, own)
            ]
            if not found:
                there = ", ".join(own for one in bays.values() for own in one.names())
                fail(f"--name {name}: there is no such module in {modules}; there are {there}.")
            if single and len(found) > 1:
                fail(f"OUT={out}: one file holds one module. Give --name, or a folder. Nothing was written.")
            for one, own in found:
                where = aside if len(found) == 1 or to == "gguf" else aside / (own or one.state.name)
                for site, lost in one.export(where, own, to, rank, error).items():
                    errors[site if len(found) == 1 else f"{own or one.state.name}: {site}"] = lost
        if out.is_dir():
            shutil.rmtree(out)
        os.replace(aside, out)
    except ModbayError as problem:
        fail(f"{problem} Nothing was written.")
    except OSError as problem:
        fail(f"{problem.filename or out}: {problem.strerror or problem}. Nothing was written.")
    finally:
        if single:
            aside.unlink(missing_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
    if as_json:
        print(json.dumps({"folder": str(out), "format": to, "errors": errors}, indent=1, ensure_ascii=False))
        return
    worst = sorted(((lost, site) for site, lost in errors.items() if lost), reverse=True)
    if worst:
        rows = [(site, f"{lost:.2e}") for lost, site in worst[:8]]
        console().print(table(("the largest errors are at", "‖ΔW − B A‖/‖ΔW‖"), rows, right=("‖ΔW − B A‖/‖ΔW‖",)))
    exact = "" if worst or not errors else ", exactly"
    console().print(f"{out}{'' if single else '/'} holds {modules} as {to}{exact}.", soft_wrap=True)
