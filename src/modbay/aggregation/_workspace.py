"""A shared workspace: specialists compete to write to a small memory, which is then told to all of them.

Goyal, Didolkar, Lamb, Badola, Ke, Rahaman, Binas, Blundell, Mozer and Bengio, "Coordination Among Neural Modules
Through a Shared Global Workspace", 2022 (arXiv 2103.01197); norms, gates and start as in the authors' code.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..abstract import Aggregator, Context, InputComposition, Kind, Routing, Site
from ..errors import CompositionError
from ..types import System

TESTS = "tests/test_outputs.py::"


class Workspace(Aggregator):
    """y_i = h_i + softmax_s(Q h_i · K M_s) V M: a specialist's output h_i = m_i(x_i), and what it reads in a memory M.

        specialists = mb.Modular(None, networks, mb.Uniform(), mb.Workspace(slots=4, k=2), features=64)
        c = mb.Context()
        for step in range(10):
            h = specialists(h, context=c)               # h (n, b, …, 64); M stays in c.state["workspace"]

    M (b, …, slots, d), before that: each slot attends over all h_i, A = softmax_i(Q' M_s · K' h_i), of which the k
    largest count, as they are; M' = N(M + A V' h), M'' = N(M' + relu(W M')), and M ← I ⊙ tanh M'' + F ⊙ M, with gates
    I, F = σ(U_s tanh M_s + G mean_i relu(w ⊙ h_i) + b_I,F), b_F = 1 and b_I = 0 at first. A fresh M is the identity,
    cut or filled up with zeros; w is N(0, 1), and the rest is drawn as nn.Linear draws.
    slots: how few all share. k: None, every specialist writes. attention_heads: h of both, scaled by 1/√(d/h).
    Specialists are a first axis of x and y, as for CrossStitch; all run, so that the route must be one for all, whose
    weights are not applied. Their order does not matter. For mb.Modular. Differs: writing and reading have maps of
    their own, as in the paper; the official code shares them, and does not scale.
    Raises CompositionError for another number of modules than streams, or a memory of another shape.
    """

    systems = (
        System(
            (140,), "mb.Workspace(slots=4, k=2)",
            (TESTS + "test_a_workspace_is_written_out",
             TESTS + "test_specialists_learn_of_each_other_by_the_workspace"),
            "shared global workspace",
        ),
    )  # fmt: skip

    def __init__(self, slots: int = 4, k: int | None = None, attention_heads: int = 1):
        super().__init__()
        if slots < 1 or attention_heads < 1 or (k is not None and k < 1):
            raise CompositionError(
                f"Workspace(slots={slots}, k={k}, attention_heads={attention_heads}): positive numbers."
            )
        self.slots, self.k, self.attention_heads = slots, k, attention_heads
        self.built = False

    def build(self, site: Site) -> None:
        if self.built:
            return
        d = site.features("outputs")
        if d % self.attention_heads:
            raise CompositionError(f"Workspace(attention_heads={self.attention_heads}): {d} features do not divide so.")
        self.maps = nn.ModuleDict()
        for name, outputs in {
            "write_query": d, "write_key": d, "write_value": d, "read_query": d, "read_key": d, "read_value": d,
            "hidden": d, "gate": 2 * d,
        }.items():  # fmt: skip
            self.maps[name] = nn.Linear(d, outputs, device=site.device, dtype=site.dtype)
        self.norms = nn.ModuleList(nn.LayerNorm(d, device=site.device, dtype=site.dtype) for _ in range(2))
        self.gate = nn.Parameter(site.empty(self.slots, 2 * d, d).uniform_(-(d**-0.5), d**-0.5))  # U, a slot each
        self.scale = nn.Parameter(site.empty(d).normal_())  # w
        self.bias = nn.Parameter(torch.tensor([0.0, 1.0]).to(self.gate))  # to take, and to keep
        self.built = True

    def admit(self, kind: Kind, site: Site) -> None:
        if site.name or isinstance(kind, InputComposition):
            raise CompositionError(
                f"Workspace at site {site.name!r} with {type(kind).__name__}: specialists are a first axis of what "
                f"goes through mb.Modular, and what is shared is outputs."
            )

    def forward(self, f: Callable | None, x: Tensor, modules: Any, routing: Routing, c: Context) -> Tensor:
        if routing.axes or len(x) != len(modules):
            raise CompositionError(
                f"Workspace got {len(modules)} modules, {len(x)} streams and a route with {routing.axes} axes: it "
                f"wants a stream for each module, and mb.Uniform() as the router."
            )
        h = torch.stack([modules.output(i, f, x[i], c) for i in range(len(modules))], -2)  # (b, …, n, d)
        own = self.bias.dtype
        told = h.to(own)
        memory = self._write(told, self._memory(told, c))
        c.state["workspace"] = memory
        out = self._attend("read", told, memory)
        return (h + out.to(h.dtype)).movedim(-2, 0)

    def _memory(self, h: Tensor, c: Context) -> Tensor:
        """M as it was left, or a fresh one."""
        shape = (*h.shape[:-2], self.slots, h.shape[-1])
        found = c.state.get("workspace")
        if found is None:
            return torch.eye(self.slots, h.shape[-1], device=h.device, dtype=h.dtype).expand(shape)
        if found.shape != shape:
            raise CompositionError(
                f'Workspace: the memory in c.state["workspace"] is {tuple(found.shape)}, and for this input it must be '
                f"{tuple(shape)}. Begin a batch with a context of its own."
            )
        return found.to(h.dtype)

    def _write(self, h: Tensor, memory: Tensor) -> Tensor:
        """M after the specialists h (b, …, n, d) wrote to it."""
        new = self.norms[0](memory + self._attend("write", memory, h, self.k))
        new = self.norms[1](new + torch.relu(self.maps["hidden"](new)))
        told = self.maps["gate"](torch.relu(self.scale * h).mean(-2, keepdim=True))
        gates = (self.gate @ torch.tanh(memory).unsqueeze(-1)).squeeze(-1) + told  # (b, …, slots, 2d)
        gates = gates.unflatten(-1, (2, -1))
        take, keep = torch.sigmoid(gates + self.bias.unsqueeze(-1)).unbind(-2)
        return take * torch.tanh(new) + keep * memory

    def _attend(self, which: str, at: Tensor, over: Tensor, k: int | None = None) -> Tensor:
        """softmax(Q at · K over) V over, in each head; of the weights, only the k largest if k is said."""
        split = lambda name, v: (
            self.maps[f"{which}_{name}"](v).unflatten(-1, (self.attention_heads, -1)).transpose(-2, -3)
        )
        query, key, value = split("query", at), split("key", over), split("value", over)
        shares = torch.softmax(query @ key.mT * key.shape[-1] ** -0.5, -1)
        if k is not None and k < shares.shape[-1]:
            best = shares.topk(k, -1)
            shares = torch.zeros_like(shares).scatter(-1, best.indices, best.values)
        return (shares @ value).transpose(-2, -3).flatten(-2)
