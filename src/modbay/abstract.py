"""The contracts: what a kind, a delta, a router and an aggregator are, and nothing of how they are run.

    y = A(f, x, {m_1 … m_n}, r(x, c), c)

Pfeiffer, Ruder, Vulić and Ponti, "Modular Deep Learning", 2023 (arXiv 2302.11529), Algorithm 1.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .errors import CallError, CompositionError, LabelError
from .types import Labels, Params, System


@dataclass(frozen=True, eq=False)
class Site:
    """A place in a network, as a kind sees it: f(x) = module(x), of which only shapes are told.

    form: how the weight acts: "linear" y = xWᵀ, "transposed" y = xW (GPT-2's Conv1D), "convolution", "embedding",
    "experts" (a fused parameter, (E, …)), or "other" (no single weight). parameter: the weight's name. bare: the
    site is that parameter itself, which its module reads in a way of its own (fused experts, their gates).
    """

    name: str
    form: str = "other"
    inputs: int | None = None
    outputs: int | None = None
    axis: int = -1
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    module: nn.Module | None = None
    parameter: str = "weight"
    bare: bool = False

    @property
    def weight(self) -> Tensor:
        return getattr(self.module, self.parameter)

    @property
    def bias(self) -> Tensor | None:
        bias = None if self.bare else getattr(self.module, "bias", None)
        return bias() if isinstance(bias, MethodType) else bias  # of torch's own quantised layers

    @property
    def shape(self) -> torch.Size:
        """The weight's, as it acts: a quantised linear layer packs it, and may have none of that name."""
        sides = [getattr(self.module, side, None) for side in ("out_features", "in_features")]
        told = self.form == "linear" and not self.bare and all(isinstance(n, int) for n in sides)
        return torch.Size(sides) if told else self.weight.shape  # type: ignore[arg-type]

    def features(self, side: str) -> int:
        """The number of features at the site's "inputs" or "outputs"; raises CompositionError if it can't be told."""
        n = getattr(self, side)
        if n is None:
            raise CompositionError(
                f"site {self.name!r} ({type(self.module).__name__}): its {side} have no width that can be read from "
                f"the module. Attach at a Linear inside it, or say the width: mb.at({self.name!r}, features=…)."
            )
        return n

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(*shape, device=self.device, dtype=self.dtype)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, device=self.device, dtype=self.dtype)


@dataclass(eq=False)
class Context:
    """c: what a call carries beside x: labels by keyword, the call's own arguments, named activations, losses."""

    labels: Mapping[str, Labels] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    taps: dict[str, Tensor] = field(default_factory=dict)
    losses: list[tuple[str, Tensor]] = field(default_factory=list)
    routes: dict[str, "Routing"] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    rows: Tensor | None = None
    grad: bool = False  # whether gradients were on where the call began
    training: bool = False  # whether the site of a generator that runs is in training mode
    decodes: bool = False  # whether the x in sight is of the decoder of an encoder–decoder
    recomputing: Callable[[], bool] = lambda: False

    @property
    def mask(self) -> Tensor | None:
        """The call's padding mask (b, t) of the x in sight, 1 where there is text; None if it has none."""
        mask = self.arguments.get("decoder_attention_mask" if self.decodes else "attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        return mask if mask is None or self.rows is None else mask[self.rows]

    def label(self, name: str) -> Labels:
        """The labels given under `name`, of the rows in sight; raises LabelError if there are none."""
        given = self.labels.get(name)
        if given is None:
            raise LabelError(
                f"no label {name!r} for this call: pass {name}=… to the model (a name, a list with one an example, or "
                f"an index tensor), or set the module for all calls with bay.use(…)."
            )
        if self.rows is None or isinstance(given, str):
            return given
        return given[self.rows] if isinstance(given, Tensor) else [given[i] for i in self.rows.tolist()]

    def at(self, rows: Tensor | None) -> "Context":
        """This context with only some examples in sight."""
        return self if rows is None else replace(self, rows=rows if self.rows is None else self.rows[rows])

    def add_loss(self, name: str, value: Tensor) -> None:
        """Keep an auxiliary loss. It must always be computed, and is kept once, however often a block is recomputed."""
        if self.grad and not torch.is_grad_enabled():
            raise CallError(
                f"the loss {name!r} was computed without gradients in a call that has them: reentrant checkpointing "
                f"loses auxiliary losses. Use gradient_checkpointing_kwargs={{'use_reentrant': False}}."
            )
        if not self.recomputing():
            self.losses.append((name, value))


@dataclass(frozen=True)
class Kind(ABC):
    """A computation function: a pure function of its parameters, and a small frozen dataclass of its hyper-parameters.

    A final kind derives from one of the four compositions below. Its code is written for one module. With `batched` it
    promises to accept parameters (g, …) with x (g, …) as well; without, the engine vectorises it with `vmap`.
    """

    batched: ClassVar[bool] = False  # accepts a leading group axis as it is
    tokenwise: ClassVar[bool] = True  # treats each position alone, so that tokens may be routed apart
    tied: ClassVar[bool] = False  # ties the examples of a batch together (batch statistics)
    enters: ClassVar[bool] = False  # its delta acts on x before f, which must be affine
    neutral: ClassVar[bool] = True  # claims to change nothing when it is new
    folds: ClassVar[bool] = False  # its change can go into the base's weights
    replaces: ClassVar[bool] = False  # stands instead of f
    place: ClassVar[str] = ""  # of what is put in front of an input: "input" or "attention"
    positions: ClassVar[bool] = False  # its x is places in a text, which may come once for all examples
    constants: ClassVar[tuple[str, ...]] = ()  # names in the parameters that are not learned; integers never are
    remade: ClassVar[tuple[str, ...]] = ()  # of the constants, those that follow from fields and sites: files lack them
    reads_weight: ClassVar[bool] = False  # its delta depends on the base's weight
    keywords: ClassVar[tuple[str, ...]] = ()  # the labels of a call that it reads
    systems: ClassVar[tuple[System, ...]] = ()  # of the literature, that it is or can be

    @abstractmethod
    def init(self, sites: Sequence[Site]) -> dict[str, dict[str, Tensor]]:
        """The parameters of a new module, by site. One tensor given to several sites is shared by them."""

    def restore(self, sites: Sequence[Site], tensors: Mapping[str, Params]) -> dict[str, dict[str, Tensor]]:
        """As `init`, for a module whose tensors are known, by site (a file's): a kind whose shapes are not told by its
        fields alone overrides it. The values are filled in afterwards."""
        return self.init(sites)

    def penalty(self, params: Params) -> Tensor | None:
        """A loss that the module adds to training (sparsity, orthogonality); None for most."""
        return None


class ParameterComposition(Kind):
    """f_{θ ⊕ φ}(x): the module changes f's parameters by a delta (survey section 3.1)."""

    folds: ClassVar[bool] = True

    @abstractmethod
    def delta(self, params: Params, site: Site) -> "Delta":
        """The change of the site's parameters."""


class InputComposition(Kind):
    """f_θ([φ, x]): the module is put in front of the input (section 3.2).

    place: "input", in front of an embedded sequence; or "attention", in front of an attention's keys and values.
    """

    tokenwise: ClassVar[bool] = False
    neutral: ClassVar[bool] = False
    place: ClassVar[str] = "input"

    @abstractmethod
    def extend(self, params: Params, c: Context) -> Tensor:
        """What is put in front: (n, d) at an embedding, (2, heads, n, d) in attention; (g, …) for a group."""


class FunctionComposition(Kind):
    """f_θ(x) + Δ: the module adds to the output, seeing x and y = f_θ(x): serial, parallel, rescaling (section 3.3)."""

    @abstractmethod
    def change(self, params: Params, x: Tensor, y: Tensor, c: Context) -> Tensor:
        """Δ, shaped like y."""

    def factors(self, params: Params, x: Tensor, y: Tensor, c: Context) -> "Factors | None":
        """Δ in factors, if it is linear in a small code and has its features last; here: None. Parameters may have a
        group axis, x and y never have one: all modules see the same rows."""
        return None


class Replacement(Kind):
    """f_φ(x) instead of f: an expert, a head, a trainable copy of the site."""

    replaces: ClassVar[bool] = True
    neutral: ClassVar[bool] = False

    @abstractmethod
    def forward(self, params: Params, x: Tensor, f: Callable | None, c: Context) -> Tensor:
        """The output. `f.under(parameters, x)` runs the site's own function with other parameters."""


class Generator(Kind):
    """A kind whose parameters are generated an example: φ_i = g_η(x_i, c_i), for another kind to use (section 3.4)."""

    kind: Kind

    @property
    def replaces(self) -> bool:  # type: ignore[override]
        return self.kind.replaces

    @property
    def place(self) -> str:  # type: ignore[override]
        return self.kind.place

    @abstractmethod
    def generate(self, params: Params, x: Tensor, c: Context) -> Params:
        """The parameters of `kind`, (b, …): one set an example in sight; or (1, …), where all have the same."""


@dataclass(frozen=True, eq=False)
class Factors:
    """Δ = U a + b, linear in a small code a (…, m): U (d, m), and b (d,) or None; (g, …) each for a group."""

    code: Tensor
    out: Tensor
    offset: Tensor | None = None


class Delta(ABC):
    """An update of the parameters of f: φ in f_{θ ⊕ φ}. Its tensors may all carry a leading group axis."""

    reads_output: ClassVar[bool] = True  # whether `apply` reads the values of y

    @abstractmethod
    def apply(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        """f_{θ ⊕ φ}(x) − f_θ(x), given y = f_θ(x); of a kind that enters, what is to be added to x."""

    def onto(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        """y with the update: y + apply(x, y, site), in one product where a representation can."""
        return y + self.apply(x, y, site)

    def factors(self, x: Tensor, y: Tensor, site: Site) -> Factors | None:
        """`apply` in factors, if it is linear in a small code; here: None. The update's tensors may have a group axis,
        x and y never have one: all modules see the same rows."""
        return None

    @abstractmethod
    def scale(self, factor: Tensor | float) -> "Delta":
        """This update times a factor: a number, or (g,) for a group."""

    @abstractmethod
    def dense(self, site: Site) -> tuple[Tensor, Tensor | None]:
        """(ΔW, Δb), materialised in the layout of the site's weight."""


@dataclass(eq=False)
class Routing:
    """α = r_ρ(x, c): which modules count, and how much. Granularity is a shape.

    Dense: weights (n,) for all, (b, n) an example, (b, t, n) a token. Sparse: index (…, k) into the modules, −1 for
    none, with weights (…, k), or None for ones. A whole path has a leading axis more, one entry for each of `sites`.
    heads (…, h, n): weights of h equal parts of the modules' parameters, each part averaged by its own (multi-head
    routing), of which `weights` is the mean.
    What learning needs travels along: log-probability and value (…), losses by name, and the router's state.
    """

    weights: Tensor | None = None
    index: Tensor | None = None
    log_prob: Tensor | None = None
    value: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    state: Any = None
    sites: tuple[str, ...] | None = None
    heads: Tensor | None = None
    host: tuple[tuple[int, ...], ...] | None = None  # index as Python integers, where it was born on the host
    cache: dict = field(default_factory=dict, repr=False)  # plans, made once a routing

    def __post_init__(self):
        if self.weights is None and self.index is None:
            raise CompositionError("Routing(weights=None, index=None): a routing needs weights, an index, or both.")
        small = self.index is not None and self.index.ndim == 1 and self.index.device.type == "cpu"
        if small and self.host is None and not torch.compiler.is_compiling():
            self.host = (tuple(i for i in self.index.tolist() if i >= 0),)  # type: ignore[union-attr]

    def at(self, site: str) -> "Routing":
        """The route at one site: this one, or its entry of a whole path."""
        if self.sites is None:
            return self
        if site not in self.cache:
            i = self.sites.index(site)
            weights, index, heads = (None if t is None else t[i] for t in (self.weights, self.index, self.heads))
            self.cache[site] = replace(self, weights=weights, index=index, heads=heads, sites=None, host=None, cache={})
        return self.cache[site]

    def on(self, device: torch.device) -> "Routing":
        """This routing with its tensors on a device; moved once, however many sites ask."""
        if all(tensor is None or tensor.device == device for tensor in (self.weights, self.index)):
            return self
        key = ("on", device)
        if key not in self.cache:
            weights, index, heads = (
                None if t is None else t.to(device, non_blocking=True) for t in (self.weights, self.index, self.heads)
            )
            self.cache[key] = replace(self, weights=weights, index=index, heads=heads, cache={})
        return self.cache[key]

    def repeated(self, k: int) -> "Routing":
        """The routing of examples, each repeated k times in a row (beams)."""
        if k == 1:
            return self
        several = (self.weights, self.index, self.heads)
        weights, index, heads = (None if t is None else t.repeat_interleave(k, 0) for t in several)
        host = None if self.host is None else tuple(ids for ids in self.host for _ in range(k))
        return replace(self, weights=weights, index=index, heads=heads, host=host, cache={})

    @property
    def axes(self) -> int:
        """0: one routing for all; 1: one an example; 2: one a token."""
        return (self.weights if self.index is None else self.index).ndim - 1  # type: ignore[union-attr]

    def dense(self, n: int) -> Tensor:
        """The weights of all n modules, (…, n)."""
        if self.index is None:
            return self.weights  # type: ignore[return-value]
        weights = torch.ones_like(self.index, dtype=torch.float32) if self.weights is None else self.weights
        full = torch.zeros(*self.index.shape[:-1], n + 1, device=weights.device, dtype=weights.dtype)
        return full.scatter_add(-1, self.index % (n + 1), weights)[..., :n]  # −1 falls into the last column, cut off


class Router(nn.Module, ABC):
    """r: which modules count for x. One object given to many sites is one route for all of them."""

    keywords: tuple[str, ...] = ()  # the labels that it reads
    reads_x: ClassVar[bool] = True  # False: labels alone decide
    systems: ClassVar[tuple[System, ...]] = ()  # of the literature, that it is or can be
    names: tuple[str, ...] = ()  # the modules between which it chooses
    sites: tuple[str, ...] = ()  # of a router that is shared: where, in order

    def build(self, names: Sequence[str], site: Site) -> None:
        """Make, or remake, what depends on the modules; what was learned for a name is kept. Here: nothing depends."""
        self.names = tuple(names)

    def rename(self, old: str, new: str) -> None:
        """A module has another name; what was learned for it stays. `build` follows. Here: nothing is kept by name."""

    def arguments(self) -> dict[str, Any]:
        """The arguments that make an equal router, for files; each is kept as an attribute of its own name."""
        return _arguments(self)

    @abstractmethod
    def forward(self, x: Tensor, c: Context) -> Routing:
        """x: (b, …, d), the site's input, or the call's embedded input for a router that is shared."""


class Aggregator(nn.Module, ABC):
    """A: how the active modules become one output."""

    systems: ClassVar[tuple[System, ...]] = ()  # of the literature, that it is or can be
    heads: ClassVar[bool] = False  # whether it takes weights of parts of the parameters

    def build(self, site: Site) -> None:
        """Make the parameters that depend on the site. Here: none."""

    def admit(self, kind: Kind, site: Site) -> None:
        """Raise CompositionError if this kind can't be aggregated so at this site. Here: any that has an output."""
        if kind.place and type(self).extend is Aggregator.extend:
            raise CompositionError(
                f"{type(self).__name__} at site {site.name!r}: it aggregates outputs, and {type(kind).__name__} has "
                f"none of its own. Use WeightedSum or Concatenate for input compositions."
            )

    def extend(self, modules: Any, routing: Routing, x: Tensor, c: Context) -> tuple[Tensor, Tensor | None] | None:
        """What input compositions put in front of each row of x, (b, …, n, d), and which of n places it has, (b, n).

        None instead of the places: each row has all; None instead of both: there is nothing. Here: it can't be done.
        """
        raise CompositionError(
            f"{type(self).__name__} at site {modules.site.name!r}: it aggregates outputs, and a prompt or prefix has "
            f"none. Use WeightedSum or Concatenate for input compositions."
        )

    def arguments(self) -> dict[str, Any]:
        """The arguments that make an equal aggregator, for files; each is kept as an attribute of its own name."""
        return _arguments(self)

    @abstractmethod
    def forward(self, f: Callable | None, x: Tensor, modules: Any, routing: Routing, c: Context) -> Tensor:
        """The output. `modules` runs them, grouped; `modules.route(x, c)` asks the router again."""


def _arguments(part: nn.Module) -> dict[str, Any]:
    """What a router or aggregator was made with: the signature is the config."""
    made = type(part).__init__
    names = [] if made is nn.Module.__init__ else list(inspect.signature(made).parameters)[1:]
    lost = [name for name in names if not hasattr(part, name)]
    if lost:
        raise CompositionError(
            f"{type(part).__name__} does not keep its arguments {lost} as attributes of these names, so that it can't "
            f"be saved: keep them, or define arguments()."
        )
    return {name: getattr(part, name) for name in names}
