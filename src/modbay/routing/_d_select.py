"""DSelect-k: a sparse choice of k modules that is smooth, since the choice is of binary codes.

Hazimeh, Zhao, Chowdhery, Sathiamoorthy, Chen, Mazumder, Hong and Chi, "DSelect-k: Differentiable Selection in the
Mixture of Experts with Applications to Multi-Task Learning", 2021 (arXiv 2106.03760).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..abstract import Context, Router, Routing, Site
from ..errors import CompositionError
from ..ops import smooth_step
from ..types import System
from . import _reading
from ._columns import log, renamed


class DSelect(Router):
    """α = Σ_j softmax(w)_j s(z_j), s_i(z) = Π_b S(z_b) or 1 − S(z_b) as bit b of module i's code is 1 or 0; j ≤ k.

    S is `ops.smooth_step` of width gamma: 0 and 1 beyond ±gamma/2, so that s becomes one module alone.
    by: "all", one α (n,) for every row, with z (k, bits) and w (k,) learned; "example" or "token", linear in x. In the
    paper a task has its gate, or an example: for the first, a router by "all" at a head of each task.
    entropy: the coefficient of Σ_j H(s(z_j)), which training adds, summed over rows; 0 is the authors' default, 1e-6
    what their regulariser has if used. Where n is no power of two, Σ_j 1/Σ_i s_i(z_j) is added, as theirs, so that the
    codes of no module get no weight: until then the weights sum to less than one.
    codes: by name; a module that comes gets the lowest that is free, and those that are there keep theirs. A bit more
    is needed where the codes run out: z gets a column that starts at −gamma/4, where the modules that are there have
    0.84 of their weight.
    z starts as U(±gamma/100), w as U(±0.05). Computed in fp32. Padding counts in no loss. Raises CompositionError for
    two modules with one code.
    """

    systems = (
        System(
            (93,),
            "mb.DSelect(2)",
            (
                "tests/test_experts.py::test_d_select_is_the_paper_s_formula_and_sums_to_one",
                "tests/test_experts.py::test_d_select_becomes_sparse",
            ),
            "DSelect-k",
        ),
    )

    def __init__(
        self,
        k: int = 2,
        by: str = "example",
        gamma: float = 1.0,
        entropy: float = 1e-6,
        codes: Mapping[str, int] | None = None,
    ):
        super().__init__()
        self.k, self.by = k, _reading.by("DSelect", by, ("all", "example", "token"))
        self.gamma, self.entropy = gamma, entropy
        if k < 1 or not gamma > 0:
            raise CompositionError(f"DSelect(k={k}, gamma={gamma}): k modules, at least one, and a width above 0.")
        self.given = dict(codes or {})
        if len(set(self.given.values())) < len(self.given) or any(code < 0 for code in self.given.values()):
            raise CompositionError(f"DSelect(codes={codes!r}): a module's code is a number of its own, from 0.")
        self.axis, self.bits = -1, 0
        self.z: Tensor
        self.w: Tensor
        self.z_of_x: Tensor
        self.w_of_x: Tensor
        self.code: Tensor

    @property
    def codes(self) -> dict[str, int]:
        """The code of each module; before there are any, what was given."""
        return dict(zip(self.names, self.code.tolist(), strict=True)) if self.names else dict(self.given)

    def build(self, names: Sequence[str], site: Site) -> None:
        known = self.codes
        taken = {known[name] for name in names if name in known}
        free = (i for i in range(2 * len(names)) if i not in taken)
        codes = [known[name] if name in known else next(free) for name in names]
        bits = max([1, *(code.bit_length() for code in codes)])
        features = None if self.by == "all" else _reading.width(self, site, getattr(self, "z_of_x", None))
        if self.bits != bits:
            self._resize(bits, features, site.device)
        self.axis, self.names = site.axis, tuple(names)
        self.register_buffer("code", torch.tensor(codes, dtype=torch.long, device=site.device))

    def _resize(self, bits: int, features: int | None, device: torch.device) -> None:
        """Parameters for codes of so many bits; those that there are stay."""
        uniform = lambda most, *shape: nn.Parameter(torch.empty(*shape, device=device).uniform_(-most, most))
        if not self.bits:
            self.z, self.w = uniform(self.gamma / 100, self.k, bits), uniform(0.05, self.k)
            if features is not None:
                self.z_of_x = uniform(self.gamma / 100, self.k, bits, features)
                self.w_of_x = uniform(0.05, self.k, features)
        else:
            log.warning("DSelect.z was made anew for codes of %d bits; an optimiser must be given it.", bits)
            for key, start in (("z", -self.gamma / 4), ("z_of_x", 0.0)):
                old = getattr(self, key, None)
                if old is not None:
                    new = old.new_full((self.k, bits, *old.shape[2:]), start)
                    new[:, : self.bits] = old.detach()[:, :bits]
                    setattr(self, key, nn.Parameter(new, requires_grad=old.requires_grad))
        self.bits = bits

    def rename(self, old: str, new: str) -> None:
        self.names = renamed(self.names, old, new)

    def forward(self, x: Tensor, c: Context) -> Routing:
        rows, mask = (x, None) if self.by == "all" else _reading.rows(self, x, c, self.by, self.axis)
        with torch.autocast(self.z.device.type, enabled=False):
            z, w = _reading.full(self.z), _reading.full(self.w)
            if self.by != "all":
                rows = _reading.full(rows)
                z = _reading.linear(rows, self.z_of_x.flatten(0, 1), z.flatten()).unflatten(-1, z.shape)
                w = _reading.linear(rows, self.w_of_x, w)
            on = smooth_step(z, self.gamma).unsqueeze(-2)  # (…, k, 1, bits)
            bits = (self.code.unsqueeze(-1) >> torch.arange(self.bits, device=self.code.device)) & 1 == 1  # (n, bits)
            chosen = torch.where(bits, on, 1 - on).prod(-1)  # (…, k, n)
            weights = (w.softmax(-1).unsqueeze(-1) * chosen).sum(-2)
            return Routing(weights=weights, losses=self._losses(chosen, mask) if self.training else {})

    def _losses(self, chosen: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """Of each row's selectors (…, k, n), summed over rows as the authors sum them."""
        count = chosen.new_ones(()) if mask is None else mask.to(chosen.dtype)
        losses = {}
        if self.entropy:
            entropy = -(chosen * (chosen + 1e-6).log()).sum((-2, -1))
            losses["entropy"] = self.entropy * (entropy * count).sum()
        if len(self.names) < 2**self.bits:
            reach = (1 / chosen.sum(-1).clamp(min=1e-6)).sum(-1)
            losses["reach"] = (reach * count).sum()
        return losses
