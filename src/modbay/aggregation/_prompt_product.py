"""One prompt for all tasks, each entry of it scaled by the task's own.

Wang, Panda, Karlinsky, Feris, Sun and Kim, "Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning",
2023 (arXiv 2303.02861).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..abstract import Aggregator, Context, Generator, Kind, Routing, Site
from ..core import extension
from ..errors import CompositionError, listed
from ..types import System

TESTS = "tests/test_shared_prompts.py::"


class PromptProduct(Aggregator):
    """f([P ⊙ Σ_t α_t W_t, x]), with P (n, d) the prompt of the module `shared`, and W_t what the routed modules give.

        modules = {"shared": mb.Prompt(100), **dict.fromkeys(["mnli", "squad"], mb.FactoredPrompt(100))}
        bay = mb.attach(t5, modules=modules, aggregator=mb.PromptProduct("shared"), name="task")
        t5(**batch, task=["mnli", "squad"])               # P learns from both, U_t V_t from its own
        bay.add("rte", mb.FactoredPrompt(100))            # a new task, of one column and one row

    P takes part in every row that has a module; where `shared` is routed to, its W is 1. A row without any module is
    f(x). The paper learns from prompts of the source tasks first: it adds λ times losses.distillation(logits, teacher)
    and the squared difference of hidden states, the teacher being the same model under such a prompt. It gives P and
    the tasks' factors learning rates of their own, and starts a new task at the mean of the sources' factors.
    Raises CompositionError for what is no prompt, other lengths than P's, or a bay without `shared`.
    """

    systems = (
        System(
            (143,), 'mb.PromptProduct("shared")',
            (TESTS + "test_a_prompt_is_shared_and_scaled_by_its_tasks", TESTS + "test_multitask_prompts_are_peft_s",
             TESTS + "test_a_shared_prompt_learns_from_all_and_is_kept", TESTS + "test_distillation_is_written_out"),
            "multitask prompt tuning (MPT)", "f([P ⊙ (u_t v_tᵀ), x])",
        ),
    )  # fmt: skip

    def __init__(self, shared: str):
        super().__init__()
        self.shared = shared

    def admit(self, kind: Kind, site: Site) -> None:
        if kind.place != "input" or isinstance(kind, Generator):
            raise CompositionError(
                f"PromptProduct at site {site.name!r}: {type(kind).__name__} is no prompt, whose entries could be "
                f"multiplied. Use mb.Prompt and mb.FactoredPrompt, or another aggregator."
            )

    def forward(self, f: Callable | None, x: Tensor, modules: Any, routing: Routing, c: Context) -> Tensor:
        raise CompositionError(
            f"PromptProduct at site {modules.site.name!r}: here is no input that can be composed; a prompt goes to the "
            f"model itself (at='')."
        )

    def extend(self, modules: Any, routing: Routing, x: Tensor, c: Context) -> tuple[Tensor, Tensor | None] | None:
        if self.shared not in modules.names:
            raise CompositionError(
                f"PromptProduct({self.shared!r}): the bay has no such module; there are {listed(modules.names)}."
            )
        own = list(modules.names).index(self.shared)
        part = modules.parts[own]
        p = part.kind.extend(part.tensors(), c)  # (n, d)
        routed = own in modules.active(routing)
        made = extension(modules, _without(routing, own) if routed else routing, x, c)
        if made is None and not routed:
            return None
        w, has = (p.new_zeros(len(x), *p.shape), x.new_zeros(len(x), len(p)) > 0) if made is None else made
        if w.shape[-2] != len(p):
            raise CompositionError(
                f"PromptProduct({self.shared!r}): it has {len(p)} places, and a module of the row {w.shape[-2]}: give "
                f"them one length."
            )
        if routed:  # its own W is 1
            alpha = routing.dense(len(modules))[..., own].to(w).expand(len(w))
            w = w + alpha.view(-1, 1, 1)
            has = None if has is None else has | (alpha != 0).unsqueeze(-1)
        return w * p.to(w.dtype), has


def _without(routing: Routing, own: int) -> Routing:
    """The routing without one module."""
    if routing.index is None:
        kept = torch.arange(routing.weights.shape[-1], device=routing.weights.device) != own  # type: ignore[union-attr]
        return replace(routing, weights=routing.weights * kept, cache={})  # type: ignore[operator]
    host = routing.host and tuple(tuple(-1 if i == own else i for i in ids) for ids in routing.host)
    return replace(routing, index=torch.where(routing.index == own, -1, routing.index), host=host, cache={})
