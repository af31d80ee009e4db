"""Hypernetworks: a module's parameters generated from what is known of an example, and of the place in the network.

Ha, Dai and Le, "HyperNetworks", 2017 (arXiv 1609.09106); Platanios, Sachan, Neubig and Mitchell, "Contextual Parameter
Generation", 2018 (arXiv 1808.08493); Üstün, Bisazza, Bouma and van Noord, "UDapter", 2020 (arXiv 2004.14327); Mahabadi,
Ruder, Dehghani and Henderson, "HyperFormer", 2021 (arXiv 2106.04489); Ansell et al., "MAD-G", 2021; Üstün, Bisazza,
Bouma, van Noord and Ruder, "Hyper-X", 2022 (arXiv 2205.12148); He et al., "HyperPrompt", 2022 (arXiv 2203.00759);
Ivison and Peters, "Hyperdecoders", 2022 (arXiv 2203.08304); Ivison et al., "HINT", 2022 (arXiv 2212.10315); latent
labels: Ponti, Vulić, Cotterell, Parovic, Reichart and Korhonen, 2021 (arXiv 2001.11453); the factor 1/√d: Baziotis,
Artetxe, Cross and Bhosale, "Hyper-adapters", 2022 (arXiv 2205.10835).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..abstract import Context, Generator, Kind, Site
from ..errors import CompositionError, listed
from ..types import Params, System
from ._codes import PLACES, joined, place_codes, pooled, trunk
from ._common import drawn, positive
from ._hypernetworks import HYPERNETWORKS
from ._labels import Label, described, divergence, label_codes, told

STARTS, REST, WEIGHTS, FACTORS, FEATURES = "start/", "rest/", "weight/", "factor/", "features"


class Fixed(tuple):
    """The names of what does not learn: what the inner kind drew, and the features of labels."""

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name.startswith((STARTS, FEATURES))


@dataclass(frozen=True)
class Hyper(Generator):
    """φ = φ₀ + W h / √d, with h = [e_label … ; e_place …], or what a small network makes of that; d = |h|.

        mb.Hyper(mb.Bottleneck(48), "language", ("en", "de", "sw"), size=32)
        mb.Hyper(mb.Bottleneck(48), "language", table={"en": (0, 1, 1), "de": (1, 0, 1)})      # told by features
        mb.Hyper(mb.LoRA(8), ("task", "language"), (("ner", "pos"), ("en", "de")), where=("layer",))
        mb.Hyper(mb.Bottleneck(48), "language", table=modbay.methods.typology(("en", "de", "sw")))   # by URIEL's

    kind: the inner kind, which φ parametrises. label: the keyword of a call, or several, each of which chooses e_label
    (size,) of its `labels`; an index tensor points into them; None or −1: φ₀, for a kind that is neutral. table: by
    name, or by keyword and name, the features t (k,) of a label: e_label = V_t t, or t itself with `raw`. They are
    kept with the parameters. A call may give a tensor of floats (b, k) instead of names: features of what was never
    seen, or an encoding; with `features` k alone there are no names at all.
    where: e_place (size,), of the "site", of its "layer" (the first number in its name), of its "position" (the rest of
    the name); or "input", the mean of x over its positions, padding left out (of a causal model it sees the future).
    hidden: h = relu(V h + v). code: then h = U h + u. norm: then h = LayerNorm(h). These and embeddings are shared by
    all sites, W by those where φ has the same shapes; shared=False: each site its own. rank: W = W' P with P (rank, d),
    one a tensor of φ. only: the names of what is generated; the rest of φ learns at each site as it would without.
    kl: embeddings are z ~ N(μ, σ²) then, drawn in training once a call for all sites, and kl KL(z ‖ N(0, 1)) is a loss.
    φ₀ is what the inner kind drew, fixed, and W starts at zero: a new module is the inner kind's new module. Differs:
    the papers draw W, and have no φ₀. Ha et al. make a weight in slices, by two maps; HyperPrompt's tokens are a task's
    in all layers; HINT's decoder reads the instruction as well; hyper-adapters have one embedding a language, source or
    target, and a deeper network; Ponti et al. have a deeper one, too, which also reads z_task − z_language and
    z_task ⊙ z_language, and draw φ. Raises CompositionError for arguments that do not fit, a kind with a penalty of its
    own, or a site without a layer; LabelError for an unknown label, or none at all.
    """

    tokenwise: ClassVar[bool] = False
    systems: ClassVar[tuple[System, ...]] = HYPERNETWORKS
    kind: Kind
    label: str | tuple[str, ...] | list[str] = ()
    labels: Sequence[Any] = ()
    size: int = 32
    hidden: int | None = None
    code: int | None = None
    norm: bool = False
    where: tuple[str, ...] | list[str] = ("site",)
    shared: bool = True
    rank: int | None = None
    features: int | tuple[int, ...] | list[int] = 0
    raw: bool = False
    only: tuple[str, ...] | list[str] = ()
    kl: float | None = None
    table: InitVar[Mapping[str, Any] | None] = None

    def __post_init__(self, table: Mapping[str, Any] | None):
        label = self.label if isinstance(self.label, str) else tuple(self.label)
        several = described(label, self.labels, self.features, table)
        names, counts = tuple(one.names for one in several), tuple(one.features for one in several)
        single = isinstance(label, str)
        settled = {
            "label": label,
            "labels": names[0] if single else names,
            "where": tuple(self.where),
            "only": tuple(self.only),
        }
        settled |= {"features": counts[0] if single else counts, "told": several}
        for name, value in {**settled, "given": {label: table} if single and table else table}.items():
            object.__setattr__(self, name, value)  # lists, as from JSON, can't be hashed
        positive("Hyper", size=self.size, hidden=self.hidden, code=self.code, rank=self.rank, kl=self.kl)
        if set(self.where) - set(PLACES) or len(set(self.where)) < len(self.where) or not (several or self.where):
            raise CompositionError(
                f"Hyper(label={self.label!r}, where={self.where!r}): labels, or some of {listed(PLACES)}, each once."
            )
        if self.kl is not None and all(counts):
            raise CompositionError(f"Hyper(kl={self.kl}): it is of embeddings, and no label here has one.")
        if isinstance(self.kind, Generator) or not isinstance(self.kind, Kind):
            raise CompositionError(f"Hyper(kind={self.kind!r}): a kind, as mb.LoRA(8), that is no generator.")
        if type(self.kind).penalty is not Kind.penalty:
            raise CompositionError(f"Hyper(kind={self.kind!r}): its penalty is of parameters that are kept, not made.")

    @property
    def neutral(self) -> bool:  # type: ignore[override]
        return self.kind.neutral

    @property
    def enters(self) -> bool:  # type: ignore[override]
        return self.kind.enters

    @property
    def keywords(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*(label.word for label in self.told), *self.kind.keywords)  # type: ignore[attr-defined]

    @property
    def constants(self) -> tuple[str, ...]:  # type: ignore[override]
        return Fixed()

    def init(self, sites: Sequence[Site]) -> dict[str, dict[str, Tensor]]:
        return self._made(sites, self.kind.init(sites), self.given or {})  # type: ignore[attr-defined]

    def restore(self, sites: Sequence[Site], tensors: Mapping[str, Params]) -> dict[str, dict[str, Tensor]]:
        starts = {site: {n.partition("/")[2]: t for n, t in own.items() if n.startswith((STARTS, REST))}
                  for site, own in tensors.items()}  # fmt: skip
        return self._made(sites, self.kind.restore(sites, starts), None)

    def _made(
        self, sites: Sequence[Site], inner: Mapping[str, Params], tables: Mapping[str, Any] | None
    ) -> dict[str, dict[str, Tensor]]:
        labels: list[Label] = self.told  # type: ignore[attr-defined]
        shared: dict[str, Tensor] = {}
        for label in labels:
            shared |= label_codes(sites[0], label, self.size, self.raw, self.kl is not None, tables)
        if self.kl is not None:
            shared["sites"] = torch.tensor(len(sites), device=sites[0].device)
        places = place_codes(sites, self.where, self.size)
        trunks: dict[int, dict[str, Tensor]] = {}
        maps: dict[tuple, dict[str, Tensor]] = {}
        made: dict[str, dict[str, Tensor]] = {}
        for site in sites:
            width = sum(label.features if self.raw and label.features else self.size for label in labels)
            width += sum(site.features("inputs") if what == "input" else self.size for what in self.where)
            if width not in trunks:
                trunks[width] = trunk(site, width, self.hidden, self.code, self.norm)
            d = self.code or self.hidden or width
            made[site.name] = own = {**shared, **places[site.name], **trunks[width]}
            shapes = tuple(sorted((name, tuple(t.shape)) for name, t in inner[site.name].items()))
            if set(self.only) - set(inner[site.name]):
                raise CompositionError(f"Hyper(only={self.only!r}): {self.kind!r} has {listed(inner[site.name])}.")
            for name, start in inner[site.name].items():
                learned = start.is_floating_point() and name not in self.kind.constants
                generated = learned and (not self.only or name in self.only)
                own[(REST if learned and not generated else STARTS) + name] = start
                if generated:
                    key = (name, d, shapes if self.shared else site.name)
                    if key not in maps:
                        maps[key] = self._map(site, name, start, d)
                    own |= maps[key]
        return made

    def _map(self, site: Site, name: str, start: Tensor, d: int) -> dict[str, Tensor]:
        """W (…, d), or W' (…, rank) and P (rank, d)."""
        factor = {} if self.rank is None else {FACTORS + name: drawn(site, self.rank, d)}
        return {WEIGHTS + name: start.new_zeros(*start.shape, self.rank or d), **factor}

    def penalty(self, params: Params) -> Tensor | None:
        """kl · KL(q(z) ‖ N(0, 1)) over all names of all labels; each of n sites adds the nth part."""
        if self.kl is None:
            return None
        own = [label for label in self.told if not label.features]  # type: ignore[attr-defined]
        return sum(divergence(params, label) for label in own) * self.kl / params["sites"]

    def generate(self, params: Params, x: Tensor, c: Context) -> Params:
        starts = {name.partition("/")[2]: t for name, t in params.items() if name.startswith((STARTS, REST))}
        h = self._code(params, x, c)
        made = {}
        for name, start in starts.items():
            made[name] = start.expand(len(h), *start.shape)
            if WEIGHTS + name in params:
                z = F.linear(h, params[FACTORS + name]) if FACTORS + name in params else h
                weight = params[WEIGHTS + name].flatten(0, -2)
                made[name] = made[name] + (z / math.sqrt(z.shape[-1]) @ weight.mT).view(-1, *start.shape)
        return made

    def _code(self, params: Params, x: Tensor, c: Context) -> Tensor:
        """h (b, d), or (1, d) where one holds for all; zero where a label is None."""
        like = next(t for t in params.values() if t.is_floating_point())
        each = [told(params, label, c, like, self.neutral) for label in self.told]  # type: ignore[attr-defined]
        places = [pooled(x, c).to(like.dtype) if what == "input" else params[what].unsqueeze(0) for what in self.where]
        h = joined(params, [code for code, _ in each] + places)
        for _, known in each:
            h = h * known.unsqueeze(-1)
        return h
