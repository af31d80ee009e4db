"""The facts of a run, as run.json keeps them and the report shows them."""

import os
import platform
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType
from typing import Any

import torch

from .. import metrics
from ..attach import bays
from ..metrics import Record
from ._plan import parameters
from ._routes import HEADS

PACKAGES = ("modbay", "torch", "transformers", "datasets", "accelerate", "scikit-learn")


def facts(
    run: Any, records: Sequence[Record], curve: Sequence[dict], command: str, seconds: dict[str, float],
    seen: Mapping[str, list[Any]] = MappingProxyType({}),
) -> dict[str, Any]:  # fmt: skip
    """All of them, after training: `run` is what was ready before; seen: of routes that are known when rows come."""
    config, network, tasks = run.config, run.network, run.tasks
    method = config.method or ("bays" if config.bays is not None else "shared")
    rows = metrics.table(records, tasks.kinds, list(config.by)) if records else []
    return {
        "title": f"{', '.join(tasks.kinds)}: {method}",
        "command": command,
        "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **machine(),
        "seed": config.seed,
        "method": method,
        "base": {"name": config.base, "revision": config.revision, "layers": config.layers,
                 "parameters": base_size(network)},
        "data": tasks.files,
        "warnings": run.plan["warnings"],
        "config": config.dump(),
        "results": [asdict(cell) for cell in rows],
        "curve": list(curve),
        **joined(instruments(network), seen),
        "time": {name: round(value, 2) for name, value in seconds.items()},
        "seconds": round(seconds.get("all", 0.0), 1),
        "memory": {"peak_mib": peak()},
    }  # fmt: skip


def joined(first: Mapping[str, Any], second: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Facts of both."""
    return {**first, **{key: [*first.get(key, []), *several] for key, several in second.items()}}


def instruments(network: Any) -> dict[str, Any]:
    """What the modules and their routing are like; a router that reads its input is looked at where it runs."""
    out: dict[str, Any] = {
        "parameters": parameters(network),
        "similarity": [],
        "routing": [],
        "use": [],
        "collapse": [],
    }
    for name, bay in bays(network.model).items():
        if name == HEADS:
            continue
        alike = metrics.similarity(bay) if len(bay.names()) > 1 else None
        out["similarity"] += [] if alike is None else [alike]
        out["collapse"] += metrics.collapse(bay.names(), similarity=alike, bay=name)
        router = bay.state.router
        if router is not None and not router.reads_x and len(router.keywords) < 2:
            routing = metrics.routes(bay)
            out["routing"] += routing
            for row in routing[:1]:
                shares = metrics.use(row["weights"])
                out["use"] += [
                    {"bay": name, "module": m, "share": float(s)} for m, s in zip(row["modules"], shares, strict=True)
                ]
    return out


def base_size(network: Any) -> int:
    """Parameters that are no module's."""
    return sum(p.numel() for name, p in network.model.named_parameters() if "_bay" not in name.split("."))


def machine() -> dict[str, Any]:
    """Versions, and what the run ran on."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "versions": versions,
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": card,
        },
    }


def peak() -> int:
    """MiB that this process has held at most."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(used / (2**20 if platform.system() == "Darwin" else 2**10))
