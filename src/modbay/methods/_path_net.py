"""PathNet: paths through a network evolve by tournaments; the winner is frozen, and the next task starts beside it.

Fernando, Banarse, Blundell, Zwols, Ha, Rusu, Pritzel and Wierstra, "PathNet: Evolution Channels Gradient Descent in
Super Neural Networks", 2017 (arXiv 1701.08734).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..attach import Bay
from ..core import Network
from ..errors import BayError, CompositionError
from ..routing import Path


class PathNet:
    """Of two paths, both trained a little, the worse becomes a mutated copy of the better.

        net = methods.PathNet(bay, active=3, population=64)
        net.start("first")
        while best < 0.998:
            best = net.tournament(lambda: train_a_little())   # trains the model with task="first", returns its fitness
        net.finish()                                           # the winner's modules are frozen, all others drawn anew

    bay: routed by one `Path` object, with modules at each site. active: N genes a site, each a module; a module named
    twice counts once. mutation: the probability of each gene, 1/(sites · N) by default, to move by U{−2 … 2} modulo the
    number of modules. Modules that earlier tasks froze are free to be used, and never learn again; drawing anew is
    what `init` of a kind gives, or `reset_parameters` of networks. One process, where the paper has workers that
    compete side by side. Raises BayError for a bay that is routed otherwise, and between `finish` and `start`.
    """

    def __init__(self, bay: Bay, active: int = 3, population: int = 64, mutation: float | None = None):
        router = bay.state.router
        if not isinstance(router, Path):
            raise BayError(f"PathNet(bay): its router is {type(router).__name__}; attach with router=mb.Path(label).")
        if population < 2 or active < 1:
            raise CompositionError(f"PathNet(active={active}, population={population}): two paths compete, of modules.")
        self.bay, self.router, self.active, self.size = bay, router, active, population
        self.mutation = 1 / (len(router.sites) * active) if mutation is None else mutation
        self.task, self.best, self.generation = "", -1, 0
        self.paths: Tensor  # (population, sites, active), numbers of modules

    def start(self, task: str) -> "PathNet":
        """Draw a population for a task, the label's value under which its path will run."""
        shape = (self.size, len(self.router.sites), self.active)
        self.paths = torch.randint(len(self.router.names), shape)
        self.task, self.best, self.generation = task, 0, 0
        self.run(0)
        return self

    def run(self, i: int) -> None:
        """Let the task's label run path i."""
        names = self.router.names
        self.router.set(self.task, [[names[g] for g in genes] for genes in self.paths[i].tolist()])

    def tournament(self, fitness: Callable[[], float]) -> float:
        """Two paths at random, each set, trained and judged by `fitness`; the loser is replaced. The higher fitness."""
        if not self.task:
            raise BayError("PathNet.tournament(): no task is under way; call start(task) first.")
        pair = torch.randperm(self.size)[:2].tolist()
        scores = []
        for i in pair:
            self.run(i)
            scores.append(fitness())
        won = scores[1] > scores[0]
        winner, loser = (pair[1], pair[0]) if won else (pair[0], pair[1])
        self.paths[loser] = self.mutated(self.paths[winner])
        self.best, self.generation = winner, self.generation + 1
        self.run(winner)
        return max(scores)

    def mutated(self, path: Tensor) -> Tensor:
        """A copy, each gene moved by −2 … 2 with the probability of mutation. path: (sites, active)."""
        moves = torch.rand(path.shape) < self.mutation
        return (path + moves * torch.randint(-2, 3, path.shape)) % len(self.router.names)

    def finish(self) -> list[list[str]]:
        """Keep the last winner's path under the task's label, freeze its modules, and draw all that is free anew."""
        self.run(self.best)
        path = self.router.paths[self.task]
        for site, names in zip(self.router.sites, path, strict=True):
            for name in names:
                for p in self._part(site, name).parameters():
                    p.requires_grad_(False)
                    p.grad = None
        for site in self.router.sites:
            for name in self.router.names:
                part = self._part(site, name)
                if any(p.requires_grad for p in part.parameters()):
                    self._reset(site, part)
        self.task = ""
        return path

    def _part(self, site: str, name: str) -> nn.Module:
        return self.bay.modulars[site].parts._modules[name]  # type: ignore[return-value]

    @torch.no_grad()
    def _reset(self, site: str, part) -> None:
        if isinstance(part.kind, Network):
            for module in part.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
            return
        for key, tensor in part.kind.init([self.bay.modulars[site].site])[site].items():
            part.tensors()[key].copy_(tensor)
