"""Scouts: a route that linear experts find before the modules do, because they are too simple to do without it.

Modules that could learn all rows alone have little need of a route, and what a router learns beside them shows it:
Mittal, Bengio and Lajoie, "Is a Modular Architecture Enough?", 2022 (arXiv 2206.02713). So the parts are had from
elsewhere. Competition: Jacobs, Jordan, Nowlan and Hinton, 1991. EM, and a controller that follows it: Kirsch, Kunze and
Barber, 2018 (arXiv 1811.05249). Experts that split and merge: Ueda, Nakano, Ghahramani and Hinton, "SMEM Algorithm for
Mixture Models", 2000.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..abstract import Context, Router, Routing, Site
from ..core import recomputing
from ..errors import CallError, CompositionError, listed
from ..ops import uncompiled
from . import _reading
from ._columns import rearranged, regrown, renamed

DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # guess (…, n, outputs), target (…, 1, outputs)
    "absolute": lambda guess, target: (guess - target).abs().sum(-1),
    "squared": lambda guess, target: (guess - target).square().sum(-1),
    "binary": lambda guess, target: F.binary_cross_entropy_with_logits(
        guess, target.expand_as(guess), reduction="none"
    ).sum(-1),
    "classes": lambda guess, target: -(target * guess.log_softmax(-1)).sum(-1),
}
PER_DEVIATION = {"absolute": 1.0, "squared": 2.0}  # exp(−ℓ/b) of Laplace, exp(−ℓ/2σ²) of Gauss
PACE = 10.0  # by how much a scout's weights count, so that scouts are done while modules still learn
MEMORY, UNUSED = 0.95, 0.6  # of the means of use; the share of an even load below which a scout is moved
NUDGE, TURN = 0.3, 0.03  # how far the copy is from its model: scout and gate, in deviations of its weights


class Scouts(Router):
    """α = the one module arg max_i w_i · x, at weight one, where W follows linear experts that compete for the rows.

    In training alone, with p = softmax(W x), the scouts s_i(x) = V_i x + b_i, and the target y, this loss:

        L = mean Σ_i q_i (ℓ(s_i(x), y) − log p_i),    q_i ∝ p_i exp(−ℓ(s_i(x), y)/τ), without gradient

    which is expectation maximisation of a mixture of linear experts; τ is what makes the errors likeliest, so that
    competition gets harder as they fall. A linear expert can't follow two rules at once, as a module may, so that what
    parts the rows for scouts is what the rows differ by. Modules learn at once, where the route of the day sends rows.

    target: the label of a call that holds y, (b,) or (b, outputs), by token (b, t) or (b, t, outputs). loss:
    "absolute", "squared", "binary" (y of 0 and 1), or "classes" (y a number below `outputs`, (b,) or (b, t); one below
    nought, as −100, teaches nothing). by: "token", x (b, t, d) or (b, d), or "example", x averaged over its positions.
    search: in the first so many calls a scout with less than 0.6/n of the rows becomes, each `every`
    calls, nearly a copy of the one with the largest share of the loss; and what x is made of learns from scouts, too.
    speed: by how much W counts, and so how much faster it learns under Adam; V and b count tenfold.

    Everything here is in fp32, is linear in x, and costs n · outputs · d multiplications a row. Evaluation reads no
    target. The search reads numbers back from the device and breaks the graph of compiled code; several processes move
    scouts alike where they share buffers, as DistributedDataParallel does. Raises CallError for a target of other rows
    or width, LabelError for none in training.
    """

    def __init__(
        self,
        target: str = "target",
        loss: str = "absolute",
        by: str = "token",
        outputs: int = 1,
        search: int = 1000,
        every: int = 100,
        speed: float = 30.0,
    ):
        super().__init__()
        if loss not in DISTANCES:
            raise CompositionError(f"Scouts(loss={loss!r}): it is one of {listed(DISTANCES)}.")
        if outputs < 1 or search < 0 or every < 1 or not speed > 0:
            raise CompositionError(
                f"Scouts(outputs={outputs}, search={search}, every={every}, speed={speed}): all are above 0, and a "
                f"search may be 0."
            )
        self.target, self.loss, self.by = target, loss, _reading.by("Scouts", by)
        self.keywords = (target,)
        self.outputs, self.search, self.every, self.speed = outputs, search, every, speed
        self.axis, self.searching = -1, search > 0
        self.gate: Tensor
        self.scouts: Tensor
        self.bias: Tensor
        self.used: Tensor
        self.blame: Tensor
        self.error: Tensor
        self.calls: Tensor

    def build(self, names: Sequence[str], site: Site) -> None:
        width, n = _reading.width(self, site, getattr(self, "gate", None)), len(names)
        self.axis = site.axis
        empty = lambda *shape: torch.zeros(shape, device=site.device, dtype=torch.float32)
        fresh, first = empty(n, self.outputs, width).normal_(std=width**-0.5 / PACE), not hasattr(self, "gate")
        shares = {"used": empty(n) + 1 / n if n else empty(n), "blame": empty(n)}
        for name, share in shares.items():
            self.register_buffer(name, share if first else rearranged(getattr(self, name), self.names, names, share))
        self.gate = regrown(self, "gate", self.names, names, empty(n, width))
        self.scouts = regrown(self, "scouts", self.names, names, fresh)
        self.bias = regrown(self, "bias", self.names, names, empty(n, self.outputs))
        if first:
            self.register_buffer("error", empty())
            self.register_buffer("calls", torch.zeros((), device=site.device, dtype=torch.long))
        self.names = tuple(names)

    def rename(self, old: str, new: str) -> None:
        self.names = renamed(self.names, old, new)

    def forward(self, x: Tensor, c: Context) -> Routing:
        rows, mask = _reading.rows(self, x, c, self.by, self.axis)
        with torch.autocast(x.device.type, enabled=False):
            read = _reading.full(rows)
            if self.training and self.searching and not recomputing():
                self._search()
            logits = self.speed * _reading.linear(read.detach(), self.gate)
            losses = {"scouts": self._loss(read, logits.log_softmax(-1), mask, c)} if self.training else {}
            return Routing(index=logits.detach().argmax(-1, keepdim=True), losses=losses)

    def _loss(self, read: Tensor, log_p: Tensor, mask: Tensor | None, c: Context) -> Tensor:
        target = self._target(c, read)
        guess = F.linear(read if self.searching else read.detach(), self.scouts.flatten(0, 1), self.bias.flatten())
        each = DISTANCES[self.loss](PACE * guess.unflatten(-1, self.scouts.shape[:2]), target)
        q = self._posterior(each.detach(), log_p.detach(), mask)
        return (q * (each - log_p)).sum()

    def _target(self, c: Context, read: Tensor) -> Tensor:
        """y (…, 1, outputs), of the rows that are read; a class is one-hot."""
        given = torch.as_tensor(c.label(self.target), device=read.device)
        rows, classes = tuple(read.shape[:-1]), self.loss == "classes"
        want = rows if classes else (*rows, self.outputs)
        if tuple(given.shape) not in (want, rows if self.outputs == 1 else want):
            raise CallError(
                f"Scouts(target={self.target!r}, loss={self.loss!r}, outputs={self.outputs}) needs a target {want}, "
                f"but it is {tuple(given.shape)}: give one a row that is routed, say by='example', or other outputs."
            )
        if classes:
            if self.searching and given.numel() and int(given.max()) >= self.outputs:  # it waits for the device anyway
                raise CallError(
                    f"Scouts(loss='classes', outputs={self.outputs}) was given the class {int(given.max())} as "
                    f"{self.target!r}: outputs is the number of classes."
                )
            kinds = torch.arange(self.outputs, device=read.device)
            return (given.unsqueeze(-1) == kinds).to(read.dtype).unsqueeze(-2)
        return given.to(read.dtype).reshape(*rows, 1, self.outputs)

    @torch.no_grad()
    def _posterior(self, each: Tensor, log_p: Tensor, mask: Tensor | None) -> Tensor:
        """q (…, n), times each row's share of the mean; what was used, and who erred, is kept."""
        error = torch.where(self.error > 0, self.error, each.mean())
        scale = PER_DEVIATION.get(self.loss)
        likelihood = -each if scale is None else -each / (scale / self.outputs * error).clamp(min=1e-12)
        q = (log_p + likelihood).softmax(-1)
        if mask is None:
            q = q / q[..., 0].numel()
        else:
            q = q * (mask.to(q.dtype) / mask.sum().clamp(min=1)).unsqueeze(-1)
        if not recomputing():
            flat, wrong = q.flatten(0, -2).sum(0), (q * each).flatten(0, -2).sum(0)
            self.error.copy_(wrong.sum())
            self.used.lerp_(flat, 1 - MEMORY)
            self.blame.lerp_(wrong, 1 - MEMORY)
        return q

    @uncompiled
    @torch.no_grad()
    def _search(self) -> None:
        """Now and then, the scout that is used least becomes nearly a copy of the one that errs most in all."""
        calls = int(self.calls)
        self.searching = calls < self.search
        self.calls += 1
        n = len(self.names)
        if not self.searching or not calls or calls % self.every or self.used.min() >= UNUSED / n:
            return
        least, most = int(self.used.argmin()), int(self.blame.argmax())
        if least == most:
            return
        draw = torch.Generator().manual_seed(calls)  # of the same moves in every process
        spread = float(self.scouts[most].std(correction=0))
        for tensor, far in (
            (self.scouts, NUDGE * spread),
            (self.bias, NUDGE * spread),
            (self.gate, TURN * float(self.gate[most].std(correction=0))),
        ):
            tensor[least] = tensor[most] + far * torch.randn(tensor[most].shape, generator=draw).to(tensor)
        for share in (self.used, self.blame):
            share[[least, most]] = share[most] / 2
