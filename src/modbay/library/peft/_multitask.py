"""peft's multitask prompts, in and out: one prompt for all tasks, and a column and a row of each task's own.

peft keeps prompt_embeddings P (n, d), prefix_task_cols (tasks, n, r) and prefix_task_rows (tasks, r, d); a task's
prompt is P ⊙ U_t V_t. A task is its number, as `task_ids` says it.
"""

from typing import Any

import torch

from ...aggregation import PromptProduct
from ...errors import FileError
from ...modules import FactoredPrompt, Prompt
from ...routing import ByLabel
from ...seams import Fitting
from .._composition import Composition
from .._foreign import Foreign
from ._draft import Draft
from ._poly import LABEL
from ._source import TENSORS, Source

SHARED, COLUMNS, ROWS = "shared", "prefix_task_cols", "prefix_task_rows"


def multitask(source: Source) -> Composition:
    """A bay of prompts: call it with task_ids=…, numbers of tasks as a tensor, or "0", "1" …"""
    lost = [key for key in ("prompt_embeddings", COLUMNS, ROWS) if key not in source.tensors]
    if lost:
        raise FileError(f"{source.path}/{TENSORS} has no {', '.join(lost)}: not all of it was saved.")
    table, u, v = (source.tensors.pop(key) for key in ("prompt_embeddings", COLUMNS, ROWS))
    length = int(source.number("num_virtual_tokens", len(table)))
    if table.ndim != 2 or len(table) != length:
        raise FileError(
            f"{source.path}: a prompt {tuple(table.shape)} for {length} virtual tokens: one for the encoder and one "
            f"for the decoder, and modbay's is the encoder's alone. Train it with num_transformer_submodules=1."
        )
    tasks, _, rank = u.shape
    if u.shape[1] != length or v.shape != (tasks, rank, table.shape[1]):
        raise FileError(f"{source.path}/{TENSORS}: {COLUMNS} {tuple(u.shape)} and {ROWS} {tuple(v.shape)} do not fit.")
    base = source.get("base_model_name_or_path", str)
    own = [(SHARED, Prompt(length), {"prompt": table})]
    kind = FactoredPrompt(length, rank)
    own += [(f"task{t}", kind, {"U": u[t].contiguous(), "V": v[t].contiguous()}) for t in range(tasks)]
    files = [Foreign(name, source.path, "peft", {"": kind}, {"": tensors}, base) for name, kind, tensors in own]
    router = ByLabel(LABEL, {str(t): f"task{t}" for t in range(tasks)})
    return Composition(source.path, "peft", files, router, PromptProduct(SHARED))


def write_multitask(fitting: Fitting) -> Draft:
    """The draft of a bay of prompts, one shared and one factored for each task, in the order of its modules."""
    state: Any = fitting.state
    draft = Draft(state.name, fitting.model, fitting.places, {"": Prompt(1)}, {})
    (modular,) = fitting.modulars.values()
    parts: dict[str, Any] = dict(zip(state.inventory.names, modular.order, strict=True))
    shared = parts.pop(state.aggregator.shared)
    kinds = {(type(part.kind), getattr(part.kind, "rank", 0), part.kind.after) for part in parts.values()}
    method, rank, after = kinds.pop() if len(kinds) == 1 else (None, 0, 0)
    plain = type(shared.kind) is Prompt and not shared.kind.after
    if list(fitting.modulars) != [""] or method is not FactoredPrompt or after or not plain:
        raise draft.refuse("", "it is not one Prompt and FactoredPrompts of one rank in front of the whole input")
    table = shared.tensors()["prompt"].detach()
    tasks = [part.tensors() for part in parts.values()]
    draft.tensors |= {
        "prompt_embeddings": table,
        COLUMNS: torch.stack([own["U"].detach() for own in tasks]),
        ROWS: torch.stack([own["V"].detach() for own in tasks]),
    }
    draft.config |= {"peft_type": "MULTITASK_PROMPT_TUNING", "num_virtual_tokens": len(table),
                     "token_dim": table.shape[1], "num_transformer_submodules": 1, "num_attention_heads": 1,
                     "num_layers": 1, "prompt_tuning_init": "RANDOM", "num_tasks": len(tasks),
                     "num_ranks": rank}  # fmt: skip
    return draft


def is_multitask(fitting: Fitting) -> bool:
    """Whether a bay is prompts that are multiplied by a shared one."""
    return isinstance(fitting.state.aggregator, PromptProduct)
