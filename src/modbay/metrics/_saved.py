"""Modules that were saved, as numbers, without their base: only the safetensors and JSON of their folder are read."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..abstract import Context, Router, Site
from ..errors import ModbayError
from ..library._format import called
from ..library._read import BayFile, ModuleFile, find_bays, read_bay
from ._routing import rows_of


def saved(folder: str | Path, bay: str | None = None, module: str | None = None) -> dict[str, Any]:
    """The facts of a folder of bays, of one bay, or of one module of it: as those of a run, and what each bay is.

    {bays: [{bay, router, aggregator, sites, modules, created, modbay}], base, parameters, similarity, routing}. Norms
    and cosines are of parameters: what these change is known only with the base. Raises FileError for what is no sound
    folder of modules.
    """
    files = find_bays(folder) if bay is None else [read_bay(folder, bay, only=None if module is None else [module])]
    out: dict[str, Any] = {"bays": [], "base": {}, "parameters": [], "similarity": [], "routing": []}
    for file in files:
        record = file.record
        out["bays"].append(
            {
                "bay": file.name,
                "modules": list(file.modules),
                "router": called(record["router"]),
                "aggregator": called(record["aggregator"]),
                "sites": list(file.sites),
                **{key: record[key] for key in ("created", "modbay") if key in record},
            }
        )
        out["base"] = {key: value for key, value in record["base"].items() if key not in ("tensors", "learned")}
        out["parameters"] += [parameters(file.name, one) for one in file.modules.values()]
        out["similarity"] += [similarity(file)] if len(file.modules) > 1 else []
        out["routing"] += [] if module is not None else routes(file)
    return out


def own(file: ModuleFile) -> dict[str, Tensor]:
    """The learned tensors of a module, each once."""
    return {
        key: tensor
        for key, tensor in file.tensors.items()
        if tensor.is_floating_point() and key not in file.record["shared"]
    }


def parameters(bay: str, file: ModuleFile) -> dict[str, Any]:
    """The row of a module: as `metrics.parameters` has it, but for the norm, which is of the parameters."""
    tensors = own(file).values()
    count = sum(tensor.numel() for tensor in tensors)
    return {
        "bay": bay,
        "module": file.name,
        "kind": " + ".join(dict.fromkeys(called(said) for said in file.record["kinds"])),
        "sites": len(file.sites),
        "parameters": count,
        "learning": 0 if file.record["frozen"] else count,
        "norm": sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5,
    }


def similarity(file: BayFile) -> dict[str, Any]:
    """The cosines of the modules' parameters, over the tensors that have one name and shape in both."""
    n, several = len(file.modules), {}
    for i, module in enumerate(file.modules.values()):
        for key, tensor in own(module).items():
            several.setdefault((key, tensor.shape), []).append((i, tensor.double().flatten()))
    gram = torch.zeros(n, n, dtype=torch.float64)
    for some in several.values():
        where, flat = torch.tensor([i for i, _ in some]), torch.stack([tensor for _, tensor in some])
        gram.index_put_((where[:, None], where), flat @ flat.mT, accumulate=True)
    norm = gram.diagonal().sqrt()
    cosine = gram / (norm[:, None] * norm).clamp(min=torch.finfo(gram.dtype).tiny)
    cosine = cosine.clamp(-1, 1).fill_diagonal_(1.0)
    return {"bay": file.name, "of": "parameters", "modules": list(file.modules), "cosine": cosine.tolist()}


def routes(file: BayFile) -> list[dict[str, Any]]:
    """The weights of each value of the router's label, as `metrics.routes` has them; nothing if rows must be seen."""
    said = file.record["router"]
    if said["per_site"]:
        return []
    try:
        router = file.part("router")
    except ModbayError:  # a class of its owner's, which is not imported here
        return []
    if not isinstance(router, Router) or router.reads_x or len(router.keywords) > 1:
        return []
    names = list(file.record["names"])
    with torch.random.fork_rng(devices=[]):  # its first weights, which the file's replace at once
        router.build(names, Site(""))
    state = {key.removeprefix("router/"): t for key, t in file.tensors.items() if key.startswith("router/")}
    router.load_state_dict(state, strict=False)
    router.eval()
    label = router.keywords[0] if router.keywords else ""
    values = list(getattr(router, "labels", ())) if label else ["all"]
    with torch.no_grad():
        routing = router(None, Context({label: values} if label else {}))
    return rows_of(file.name, names, "", label, values, routing)
