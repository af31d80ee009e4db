"""`modbay inspect`: where modules can go in a model; and, in `_look`, what was trained."""

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import seams
from ..core import base_type
from ..errors import ModbayError
from ..methods import place
from . import _look
from ._say import console, fail, table

CALLABLE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def run(name: str, patterns: list[str], as_json: bool) -> None:
    """Print the rows of a model, its doubts, and what patterns match; or what was trained, if that is what it is."""
    trained = _look.kind_of(Path(name))
    if trained is not None:
        if patterns:
            fail(f"--at {patterns[0]}: {name} is no model but a {trained}: give the model that its modules go into.")
        _look.run(Path(name), trained, as_json)
        return
    model = opened(name)
    try:
        matched = {pattern: seams.places(model, place(pattern)) for pattern in patterns}
    except ModbayError as error:
        fail(str(error))
    if as_json:
        print(json.dumps(facts(name, model, matched), indent=2, ensure_ascii=False))
        return
    out = console()
    out.print(f"{base_type(model).__name__}, {count(model.parameters()):,} parameters\n")
    if not matched:
        heads = ("name", "type", "shape", "how many", "role")
        rows = seams.describe_roles(model)
        out.print(table(heads, [(r.pattern, r.type, r.shape, r.count, r.roles) for r in rows], right=("how many",)))
        _doubts(out, seams.find_roles(model))
    for pattern, places in matched.items():
        owners = {id(p): p for one in places for p in parameters(one)}.values()
        out.print(f"at={pattern!r}: {len(places)} sites, {count(owners):,} parameters in them")
        heads = ("site", "type", "form", "in", "out", "how many", "parameters each")
        out.print(table(heads, alike(places), right=("in", "out", "how many", "parameters each")))


def _doubts(out: Any, roles: seams.Roles) -> None:
    unsure = {role: said for role, said in roles.doubts.items() if said}
    if unsure:
        out.print("\nIn doubt, so that mb.role refuses them (a name or pattern is never refused):")
        together: dict[str, list[str]] = {}
        for role, said in unsure.items():
            together.setdefault("; ".join(said), []).append(role)
        out.print(table(("role", "why"), [(", ".join(names), why) for why, names in together.items()]))


def facts(name: str, model: nn.Module, matched: dict[str, list[seams.Place]]) -> dict[str, Any]:
    """All of it, for programs."""
    roles = seams.find_roles(model)
    return {
        "model": name,
        "class": base_type(model).__name__,
        "parameters": count(model.parameters()),
        "rows": [vars(row) for row in seams.describe_roles(model)],
        "roles": {role: names for role, names in roles.items() if names},
        "doubts": {role: said for role, said in roles.doubts.items() if said},
        "at": {
            pattern: [
                {"site": one.site.name, "form": one.site.form, "inputs": one.site.inputs, "outputs": one.site.outputs,
                 "parameters": count(parameters(one))}
                for one in places
            ]
            for pattern, places in matched.items()
        },
    }  # fmt: skip


def parameters(one: seams.Place) -> list[nn.Parameter]:
    """A site's own: one parameter, or all of its target."""
    if one.site.bare:
        return [one.site.weight]  # type: ignore[list-item]
    return list(one.target.parameters())


def count(parameters: Any) -> int:
    return sum(p.numel() for p in parameters)


def alike(places: list[seams.Place]) -> list[tuple]:
    """A row for places that differ only in the numbers of their layers."""
    groups: dict[tuple, int] = {}
    for one in places:
        site = one.site
        pattern = next(iter(seams.collapsed([site.name]))) if site.name else "(the model itself)"
        widths = ["" if n is None else n for n in (site.inputs, site.outputs)]
        key = (pattern, base_type(one.target).__name__, site.form, *widths, f"{count(parameters(one)):,}")
        groups[key] = groups.get(key, 0) + 1
    return [(*key[:-1], n, key[-1]) for key, n in groups.items()]


def opened(name: str) -> nn.Module:
    """The model: what a callable returns; or, without weights, what a transformers config says."""
    return called(name) if CALLABLE.fullmatch(name) else configured(name)


def called(name: str) -> nn.Module:
    module, _, path = name.partition(":")
    sys.path.insert(0, "")  # as `python -m` has it: what lies here can be imported
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        fail(f"MODEL={name!r}: {error}. It is imported from here, {Path.cwd()}, or from what is installed.")
    finally:
        sys.path.remove("")
    for part in path.split("."):
        if not hasattr(found, part):
            fail(f"MODEL={name!r}: {module!r} has no {path!r}.")
        found = getattr(found, part)
    try:
        model = found if isinstance(found, nn.Module) else found()
    except TypeError as error:
        fail(f"MODEL={name!r}: it could not be called without arguments ({error}).")
    if not isinstance(model, nn.Module):
        fail(f"MODEL={name!r}: it gave a {type(model).__name__}; a callable that returns an nn.Module is wanted.")
    return model


def configured(name: str) -> nn.Module:
    """A transformers model on the meta device: the class that its config names, or else the bare trunk."""
    try:
        import transformers
    except ModuleNotFoundError:
        fail(f"MODEL={name!r}: to read a transformers model, pip install 'modbay[hf]'.")
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        fail(f"MODEL={name!r}: the folder has no config.json, so that it holds no transformers model.")
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        where = "the config can't be read" if folder.exists() else "no such folder, and the hub gave no config"
        reason = " ".join(str(error).split("\n")[0].split())
        fail(
            f"MODEL={name!r}: {where} ({reason}). Give a folder that has a config.json, a name that the hub has, while "
            f"online, or package.module:callable."
        )
    said = [getattr(transformers, said, None) for said in config.architectures or []]
    build = next((c._from_config for c in said if c is not None), transformers.AutoModel.from_config)
    try:
        with torch.device("meta"):
            return build(config)
    except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
        fail(
            f"MODEL={name!r}: {type(config).__name__} gives no model without weights ({error}). Give "
            f"package.module:callable, which builds it."
        )
