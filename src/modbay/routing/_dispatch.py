"""A dispatcher: which of several routers a row is routed by is itself routed.

Rosenbaum, Klinger and Riemer, "Routing Networks", 2018 (arXiv 1711.01239); Rosenbaum, Cases, Riemer and Klinger, 2019
(arXiv 1904.12774), section 3.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..abstract import Context, Router, Routing, Site
from ..errors import CompositionError
from ..types import System

TESTS = "tests/test_hard.py::"


class Dispatch(Router):
    """α = r_j(x, c), j = the choice of the dispatcher: an agent's policy for the rows that are sent to it.

        mb.Dispatch(mb.Policy(by="example"), [mb.Policy(by=None), mb.Policy(by="example")])

    dispatcher: a router of one choice a row, between agents instead of modules. agents: routers of one choice a row,
    by the same rows. log_prob is of both choices, value the agent's; losses are of all. One choice a row means an
    index, as `Policy` gives it by "sample" or "value"; raises CompositionError for anything else.
    """

    systems = (
        System(
            (77,),
            'mb.Dispatch(mb.Policy(), [mb.Policy(by=None), mb.Policy(by="example")])',
            (TESTS + "test_a_dispatcher_sends_rows_to_agents",),
        ),
    )

    def __init__(self, dispatcher: Router, agents: Sequence[Router]):
        super().__init__()
        if not agents:
            raise CompositionError("Dispatch(agents=[]): there must be an agent to send rows to.")
        self.dispatcher, self.agents = dispatcher, nn.ModuleList(agents)
        self.keywords = tuple(dict.fromkeys(k for router in (dispatcher, *agents) for k in router.keywords))

    def arguments(self):
        return {"dispatcher": self.dispatcher, "agents": list(self.agents)}

    def build(self, names: Sequence[str], site: Site) -> None:
        self.dispatcher.build([f"agent {i}" for i in range(len(self.agents))], site)
        for agent in self.agents:
            agent.build(names, site)  # type: ignore[operator]
        self.names = tuple(names)

    def rename(self, old: str, new: str) -> None:
        for agent in self.agents:
            agent.rename(old, new)  # type: ignore[operator]
        self.names = tuple(new if name == old else name for name in self.names)

    def forward(self, x: Tensor, c: Context) -> Routing:
        first = self.dispatcher(x, c)
        several = [agent(x, c) for agent in self.agents]
        for routing in (first, *several):
            if routing.index is None or routing.index.shape[-1] != 1 or routing.sites is not None:
                raise CompositionError("Dispatch: each router gives an index of one choice a row, as mb.Policy() does.")
        agent = first.index[..., 0]  # (…), −1 where the dispatcher sends a row to none
        index = _picked([r.index for r in several], agent, 1)
        index = torch.where(agent.unsqueeze(-1) >= 0, index, -1)
        log_prob = value = None
        if first.log_prob is not None and all(r.log_prob is not None for r in several):
            log_prob = first.log_prob + _picked([r.log_prob for r in several], agent) * (agent >= 0)
        if all(r.value is not None for r in several):
            value = _picked([r.value for r in several], agent, several[0].value.ndim - several[0].axes)
        parts = {"dispatcher": first, **{f"agent {i}": r for i, r in enumerate(several)}}
        losses = {f"{who}.{name}": loss for who, r in parts.items() for name, loss in r.losses.items()}
        return Routing(index=index, log_prob=log_prob, value=value, losses=losses, state={"agent": agent})


def _picked(several: Sequence, agent: Tensor, more: int = 0) -> Tensor:
    """Of what each agent says, (…) and `more` axes, or the same for all rows: what the agent of each row says."""
    stack = torch.stack([t.expand(*agent.shape, *t.shape[t.ndim - more :]) for t in several])
    pick = agent.clamp(min=0).view(1, *agent.shape, *[1] * more)
    return stack.gather(0, pick.expand(1, *stack.shape[1:]))[0]
