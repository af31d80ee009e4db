"""`modbay inspect` of what was trained: a run, a folder of modules, one bay or one module, without opening the base."""

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from ..errors import ModbayError
from ._say import console, fail, table

HEADS = "heads"  # the bay of heads, as `training` names it
FEW = 3  # pairs that are shown of each end
WIDE = 12  # modules up to which a routing is shown whole
ABOUT = ("title", "method", "command", "when", "seed", "data", "results", "warnings", "config", "time", "versions")


def kind_of(path: Path) -> str | None:
    """What a folder is: "run", "modules", "bay" or "module"; None if it is none of modbay's."""
    if not path.exists() and path.with_name(f"{path.name}.partial").is_dir():
        return "run"
    if (path / "config.json").is_file() or not path.is_dir():
        return None
    if (path / "run.yaml").is_file() or (path / "network.json").is_file():
        return "run"
    for name in ("bay", "module"):
        if (path / f"{name}.json").is_file():
            return name
    return "modules" if any(path.glob("*/bay.json")) else None


def run(path: Path, what: str, as_json: bool) -> None:
    """Print what there is to know of a folder."""
    try:
        found = facts(path, what)
    except ModbayError as error:
        fail(str(error))
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        show(found)


def facts(path: Path, what: str) -> dict[str, Any]:
    """All of it, for programs: what the files say, and what the run knew that made them."""
    try:
        from .. import metrics
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("modbay."):
            raise
        fail(f"FOLDER={str(path)!r}: to look at modules, pip install 'modbay[train]' ({error}).")
    path = path.resolve()
    home = {"run": path, "modules": path.parent, "bay": path.parent.parent, "module": path.parents[2]}[what]
    if what == "run" and not (path / "network.json").is_file():
        fail(f"{path}: the run is unfinished: `modbay train --resume {str(path).removesuffix('.partial')}` goes on.")
    if what in ("run", "modules"):
        folder = path / "modules" if what == "run" else path
        seen = metrics.saved(folder) if folder.is_dir() else {"bays": [], "base": {}}
    elif what == "bay":
        seen = metrics.saved(path.parent, path.name)
    else:
        seen = metrics.saved(path.parents[1], path.parent.name, path.name)
    known = _known(home)
    bays = {one["bay"]: one["modules"] for one in seen["bays"]}
    out: dict[str, Any] = {"folder": str(path), "is": what, **{key: known[key] for key in ABOUT if key in known}}
    out["base"] = {**known.get("base", {}), **{key: v for key, v in seen["base"].items() if v is not None}}
    out["bays"] = seen["bays"]
    mine = lambda row: (
        row["module"] in bays.get(row["bay"], ()) or (row["bay"] in bays and row["module"] == "(routing)")
    )
    better = {(row["bay"], row["module"]): row for row in known.get("parameters", []) if mine(row)}
    own = {(row["bay"], row["module"]): row for row in seen.get("parameters", [])}
    out["parameters"] = list((own | better).values())
    for key in ("similarity", "routing"):
        told = [row for row in known.get(key, []) if row["modules"] == bays.get(row["bay"]) and what != "module"]
        has = {row["bay"] for row in told}
        out[key] = told + [row for row in seen.get(key, []) if row["bay"] not in has]
    out["pairs"] = [pairs(row) for row in out["similarity"]]
    out["use"], out["collapse"] = [], []
    for bay, modules in bays.items():
        alike = next((row for row in out["similarity"] if row["bay"] == bay), None)
        routing = _whole([row for row in out["routing"] if row["bay"] == bay])
        if bay != HEADS:  # of a newcomer's head it is no fault to be like the one that it began as
            out["collapse"] += metrics.collapse(
                modules, None if routing is None else routing["weights"], alike, bay=bay
            )
        if routing is not None:
            shares = metrics.use(routing["weights"])
            out["use"] += [
                {"bay": bay, "module": m, "share": float(s)} for m, s in zip(routing["modules"], shares, strict=True)
            ]
    return out


def _known(home: Path) -> dict[str, Any]:
    """What the run knew, where the modules lie in the folder of one."""
    if not (home / "network.json").is_file():
        return {}
    try:
        return json.loads((home / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fail(f"{home}/run.json: it can't be read ({error}); the folder is no whole run.")


def pairs(row: dict[str, Any]) -> dict[str, Any]:
    """The closest and the farthest modules of a bay."""
    names, cosine = row["modules"], row["cosine"]
    every = [(cosine[i][j], names[i], names[j]) for i, j in combinations(range(len(names)), 2)]
    every.sort(key=lambda pair: -pair[0])
    as_rows = lambda some: [{"modules": [a, b], "cosine": x} for x, a, b in some]
    return {"bay": row["bay"], "closest": as_rows(every[:FEW]), "farthest": as_rows(every[FEW:][-FEW:][::-1])}


def show(found: dict[str, Any]) -> None:
    """The same, for people."""
    out, base = console(), found["base"]
    when = f", {found['when'][:16].replace('T', ' ')}" if "when" in found else ""
    out.print(f"{found['folder']}: {_is(found)}{when}", soft_wrap=True)
    if "command" in found:
        out.print(f"made by: {found['command']}", soft_wrap=True)
    if base:
        size = f", {base['parameters']:,} parameters" if base.get("parameters") else ""
        out.print(
            f"base: {base.get('name') or 'without a name'}{size}; fingerprint {base.get('digest', 'unknown')} "
            f"({', '.join(base.get('dtypes', []))})",
            soft_wrap=True,
        )
    if found.get("data"):
        rows = [(d["task"], d["split"], f"{d['rows']:,}", d["sha256"][:12], d["path"]) for d in found["data"]]
        out.print()
        out.print(table(("trained on", "split", "rows", "sha256", "path"), rows, right=("rows",)))
    whole = [r for r in found.get("results", []) if not r["label"]]
    if whole:
        rows = [(r["task"], r["metric"], f"{r['estimate']:.3f}", f"{r['low']:.3f} – {r['high']:.3f}") for r in whole]
        out.print()
        out.print(table(("task", "metric", "estimate", "95 % interval"), rows, right=("estimate", "95 % interval")))
    for bay in found["bays"]:
        _show_bay(out, found, bay)
    for line in found["collapse"]:
        out.print(f"\nWarning: {line}", soft_wrap=True)


def _is(found: dict[str, Any]) -> str:
    if found["is"] == "run":
        return f"a run, {found.get('title', 'of modules')}"
    return {"modules": "a folder of modules", "bay": "a bay", "module": "a module"}[found["is"]]


def _show_bay(out: Any, found: dict[str, Any], bay: dict[str, Any]) -> None:
    name, sites = bay["bay"], bay["sites"]
    shown = ", ".join(sites[:4]) + (f" … ({len(sites)} in all)" if len(sites) > 4 else "")
    out.print(f"\nBay {name!r}: {bay['router']} → {bay['aggregator']}\nsites: {shown}", soft_wrap=True)
    of = next((row["of"] for row in found["similarity"] if row["bay"] == name), "parameters")
    mine = [row for row in found["parameters"] if row["bay"] == name]
    share = {row["module"]: f"{100 * row['share']:.1f} %" for row in found["use"] if row["bay"] == name}
    rows = [
        (p["module"], p["kind"], p["sites"], f"{p['parameters']:,}",
         "" if p["norm"] is None else f"{p['norm']:.4g}", share.get(p["module"], ""))
        for p in mine
    ]  # fmt: skip
    out.print(
        table(
            ("module", "kind", "sites", "parameters", "norm", "use"), rows, right=("sites", "parameters", "norm", "use")
        )
    )
    for said in [one for one in found["pairs"] if one["bay"] == name]:
        for word in ("closest", "farthest"):
            told = "; ".join(f"{' and '.join(p['modules'])} {p['cosine']:+.3f}" for p in said[word])
            if told:
                out.print(f"{word}: {told} (cosines of {of})", soft_wrap=True)
    routing = _whole([row for row in found["routing"] if row["bay"] == name])
    if routing is not None:
        _show_routing(out, routing)
    elif found["is"] != "module":
        out.print("routing: it reads the input; modbay evaluate RUN --out FOLDER records it")


def _whole(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The routing of a bay: its one map, or the mean of those of its sites."""
    if len(rows) < 2:
        return rows[0] if rows else None
    alike = [row["weights"] for row in rows if (row["label"], row["values"]) == (rows[0]["label"], rows[0]["values"])]
    mean = [[sum(cells) / len(alike) for cells in zip(*lines, strict=True)] for lines in zip(*alike, strict=True)]
    return {**rows[0], "site": f"{len(alike)} sites, on average", "weights": mean}


def _show_routing(out: Any, row: dict[str, Any]) -> None:
    where = f" at {row['site']}" if row["site"] else ""
    modules, lines = row["modules"], list(zip(row["values"], row["weights"], strict=True))
    if all([m for m, w in zip(modules, line, strict=True) if w] == [value] for value, line in lines):
        out.print(f"routing by {row['label']}{where}: each value has the module of its name, and no other")
        return
    out.print(f"routing by {row['label']}{where}:" if row["label"] else f"routing of all rows{where}:")
    if len(modules) <= WIDE:
        rows = [[value, *[f"{w:.3f}" if w else "" for w in line]] for value, line in lines]
        out.print(table((row["label"], *modules), rows, right=tuple(modules)))
        return
    for value, line in lines:
        best = sorted(zip(line, modules, strict=True), reverse=True)[:FEW]
        out.print(f"  {value}: {', '.join(f'{m} {w:.3f}' for w, m in best if w)}", soft_wrap=True)
