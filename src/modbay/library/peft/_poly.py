"""peft's Poly, in and out: skills of LoRA, and at each layer a router of tasks, whose splits are Skills' heads.

At a layer peft keeps poly_lora_A (splits, skills, i/splits, r), poly_lora_B (splits, skills, r, o/splits), whose
product it divides by r, and poly_router.module_logits (tasks, splits · skills). A task is its number,
as `task_ids` says it.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...aggregation import ParameterAverage
from ...errors import FileError
from ...modules import LoRA
from ...routing import Skills
from ...seams import Fitting
from ...types import Params
from .._composition import Composition
from .._foreign import Foreign
from ._draft import Draft
from ._source import TENSORS, Source

A, B, LOGITS = "poly_lora_A", "poly_lora_B", "poly_router.module_logits"
LABEL = "task_ids"  # as peft's calls have it


def poly(source: Source) -> Composition:
    """A bay of skills: call it with task_ids=…, numbers of tasks as a tensor, or "0", "1" …"""
    if source.get("poly_type", str, "poly") != "poly":
        raise FileError(f"{source.path}: poly_type {source.config['poly_type']!r} is none that modbay has.")
    found: list[dict[str, Params]] = []
    state: dict[str, Tensor] = {}
    kind, sizes = LoRA(1), (0, 0, 0, 0)
    for path, own in source.by_path((A, B, LOGITS)).items():
        a, b, logits = source.needs(path, own, A, B, LOGITS)
        splits, skills, _, rank = a.shape
        here = (splits, skills, rank, len(logits))
        if b.shape[:3] != (splits, skills, rank) or logits.shape[1] != splits * skills or (found and here != sizes):
            raise FileError(
                f"{source.path}/{TENSORS}: at {path!r} A is {tuple(a.shape)}, B {tuple(b.shape)}, and the logits "
                f"{tuple(logits.shape)}: they are not of as many splits, skills and tasks, here or as elsewhere."
            )
        if splits > 1 and rank >= splits * min(a.shape[2], b.shape[3]):  # heads cut along a parameter's longest axis
            raise FileError(f"{source.path}: rank {rank} at {path!r} is too large for {splits} heads of its features.")
        kind, sizes, site = LoRA(rank, alpha=1.0), here, source.site(path)
        found = found or [{} for _ in range(skills)]
        for i, skill in enumerate(found):
            skill[site] = {
                "A": a[:, i].flatten(0, 1).mT.contiguous(),  # the splits lie side by side along the inputs
                "B": b[:, i].movedim(1, 0).flatten(1).mT.contiguous(),  # and along the outputs
            }
        state[f"router/{site}/logits"] = logits if splits == 1 else logits.unflatten(1, (splits, skills))
    if not found:
        raise FileError(f"{source.path}: it holds no tensors of POLY.")
    base = source.get("base_model_name_or_path", str)
    files = [
        Foreign(f"skill{i}", source.path, "peft", dict.fromkeys(skill, kind), skill, base)
        for i, skill in enumerate(found)
    ]
    router = partial(Skills, LABEL, tuple(map(str, range(sizes[3]))), heads=sizes[0])
    return Composition(source.path, "peft", files, router, ParameterAverage(), state)


def write_poly(fitting: Fitting) -> Draft:
    """The draft of a bay that is Polytropon, or MHR, of LoRA. Raises CompositionError for any other."""
    names, state = fitting.state.inventory.names, fitting.state
    draft = Draft(state.name, fitting.model, fitting.places, {}, {})
    common: set[tuple] = set()
    for site, modular in fitting.modulars.items():
        router: Any = modular.router or state.router
        kinds = {None if part is None else part.kind for part in modular.order}
        kind = kinds.pop()
        if kinds or type(kind) is not LoRA or kind.bias:
            raise draft.refuse(site, "the modules are not all LoRA, of one rank and scale and without a bias")
        if fitting.places[site].site.form != "linear":
            raise draft.refuse(site, "there is no Linear, and peft's Poly is at nothing else")
        if router.mode not in ("gumbel", "sigmoid"):
            raise draft.refuse(site, f"the gates are Skills(mode={router.mode!r}), and peft's are sigmoids")
        h, r = router.heads, kind.rank
        parts = [part.tensors() for part in modular.order]  # type: ignore[union-attr]
        a = torch.stack([own["A"].detach() for own in parts])  # (skills, r, i)
        b = torch.stack([own["B"].detach() for own in parts]) * (kind.factor * r)  # (skills, o, r)
        if a.shape[2] % h or b.shape[1] % h or (h > 1 and r >= min(a.shape[2], b.shape[1])):
            raise draft.refuse(site, f"{h} heads do not part its features evenly, as peft's splits do")
        draft.tensors |= {
            f"{site}.{A}": a.unflatten(2, (h, -1)).permute(2, 0, 3, 1),
            f"{site}.{B}": b.unflatten(1, (h, -1)).permute(1, 0, 3, 2),
            f"{site}.{LOGITS}": router.logits.detach().flatten(1) / router.temperature,
        }
        draft.kinds[site] = kind
        common.add((r, len(router.labels), h))
    draft.whole(draft.kinds)
    if len(common) > 1:
        raise draft.refuse("", "ranks, tasks or heads are not the same everywhere, as peft's are")
    r, tasks, h = common.pop()
    draft.config |= {"peft_type": "POLY", "r": r, "n_tasks": tasks, "n_skills": len(names), "n_splits": h,
                     "poly_type": "poly", "target_modules": draft.target(draft.kinds), "modules_to_save": None,
                     "task_type": None}  # fmt: skip
    return draft


def is_poly(fitting: Fitting) -> bool:
    """Whether a bay is skills of tasks, averaged."""
    routers = [modular.router or fitting.state.router for modular in fitting.modulars.values()]
    aggregators = [modular.aggregator or fitting.state.aggregator for modular in fitting.modulars.values()]
    return (
        bool(routers)
        and all(isinstance(router, Skills) for router in routers)
        and all(isinstance(one, ParameterAverage) and one.of == "parameters" for one in aggregators)
    )
