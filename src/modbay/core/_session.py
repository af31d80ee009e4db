"""The session of a model: what its sites share between the door (the root's forward) and the end of a call.

Labels enter at the door, are checked there, and become routes that every site reads. A call's context outlives it until
its backward pass has begun, so that a recomputed block (gradient checkpointing) sees the labels of its own forward.
"""

import logging
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..abstract import Aggregator, Context, Router, Routing
from ..errors import CallError, LabelError, SiteError, listed
from ..types import Labels
from ._modular import Inventory


def recomputing() -> bool:
    """Whether a backward pass is under way, so that a forward can only be a recomputation."""
    task = getattr(torch._C, "_current_graph_task_id", None)  # private to torch: the tests say when it goes
    return task is not None and not torch.compiler.is_compiling() and task() != -1


LOG = logging.getLogger("modbay")


@dataclass(eq=False)
class BayState:
    """One bay, as the sites and the door see it."""

    name: str
    inventory: Inventory
    router: Router | None = None  # shared by all sites; None if each has its own
    aggregator: Aggregator | None = None  # likewise
    keywords: tuple[str, ...] = ()  # the labels that the router reads
    read: tuple[str, ...] = ()  # those that modules read
    seats: dict[str, nn.Module] = field(default_factory=dict)
    chosen: Routing | Mapping[str, Labels] | None = None  # what `use` set
    enabled: bool = True
    sometimes: bool = False
    guest: bool = False  # another library's: that a site never fires is told, and as it is there
    add_losses: bool = True
    folded: Any = None  # what `fold` needs to undo itself, while the base's weights hold the modules
    foreign: dict[str, str] = field(default_factory=dict)  # modules loaded onto another base than theirs: its digest
    about: dict[str, dict[str, Any]] = field(default_factory=dict)  # what the files of modules say of them


class Session:
    """What all sites of one model share."""

    def __init__(self):
        self.bays: dict[str, BayState] = {}
        self.handles: dict[str, Any] = {}  # what the user holds of each bay
        self.context: Context | None = None
        self.last: Context | None = None  # the context of the last call, for a recomputation
        self.backward: Context | None = None  # the context whose backward pass has begun
        self.held: dict[str, Labels] | None = None  # labels for all calls inside a generate
        self.owner: int | None = None
        self.depth = 0
        self.unchecked: set[str] = set()  # bays whose sites have not all been seen to fire
        self.shown = False  # whether modules appear in the model's state dict

    def __getstate__(self):
        """A copy starts between two calls: contexts hold tensors of a graph, which can't be copied, nor should be."""
        return {
            **self.__dict__,
            "context": None,
            "last": None,
            "backward": None,
            "held": None,
            "owner": None,
            "depth": 0,
        }

    @property
    def keywords(self) -> dict[str, str]:
        """A bay that reads it, by label keyword."""
        return {keyword: bay.name for bay in self.bays.values() for keyword in (*bay.keywords, *bay.read)}

    def now(self) -> Context:
        """The context of this site's call."""
        if recomputing():
            found = self.backward or self.last
            if found is not None:
                return found
        if self.context is not None:
            return self.context
        return self.make(self._set(), {}, None)  # a part of the model was called by itself: only `use` can route it

    def _set(self) -> dict[str, Labels]:
        """The labels that `use` set."""
        mappings = [bay.chosen for bay in self.bays.values() if bay.enabled and isinstance(bay.chosen, Mapping)]
        return {keyword: label for mapping in mappings for keyword, label in mapping.items()}

    def make(
        self, labels: Mapping[str, Labels], arguments: Mapping[str, Any], x: Any, rows: int | None = None
    ) -> Context:
        """The context of a new call, each shared route computed."""
        context = Context(labels, arguments, grad=torch.is_grad_enabled(), recomputing=recomputing)
        for bay in self.bays.values():
            if not bay.enabled:
                self._refuse_folded(bay, labels)
                continue
            routing = self.route(bay, context, x, rows)
            if routing is not None:
                context.routes[bay.name] = routing
        return context

    def _refuse_folded(self, bay: BayState, labels: Mapping[str, Labels]) -> None:
        """Raise LabelError for a label that only a folded bay reads: the weights hold one route for all."""
        if bay.folded is None:
            return
        given = [keyword for keyword in bay.keywords if keyword in labels]
        heard = {keyword for other in self.bays.values() if other.enabled for keyword in other.keywords}
        if not heard.issuperset(given):
            raise LabelError(
                f"{given[0]}=…: bay {bay.name!r} is folded into the base's weights ({listed(bay.folded.weights)}), "
                f"which are the same for all inputs. Call bay.unfold() first, or give no label."
            )

    def route(self, bay: BayState, context: Context, x: Any, rows: int | None) -> Routing | None:
        """The bay's route for the whole call; None if each site has a router of its own and nothing was set."""
        given = any(keyword in context.labels for keyword in bay.keywords)
        if not given and isinstance(bay.chosen, Routing):
            return bay.chosen
        if bay.router is None:
            return None
        if self.held is not None and self.context is not None and bay.router.reads_x:
            kept = self.context.routes.get(bay.name)  # a generation is routed by its input, not by each new token
            if kept is not None and kept.axes == 1 and rows:
                return kept.repeated(rows // len(kept.dense(len(bay.inventory.names))))
        value = x() if callable(x) and bay.router.reads_x else None
        routing = bay.router(value, context)
        for name, loss in routing.losses.items():
            context.add_loss(f"{bay.name}.{name}", loss)
        return routing

    # The door

    def enter(self, given: dict[str, Labels], arguments: Mapping[str, Any], rows: int | None, x: Any) -> Context | None:
        """Begin a call of the root; returns the context to be restored by `leave`."""
        if not torch.compiler.is_compiling():
            thread = threading.get_ident()
            if self.depth and self.owner != thread:
                raise CallError(
                    "a second thread called the model while a call was under way: the labels of one call would route "
                    "the other. Call one model from one thread at a time, or give each thread a deepcopy."
                )
            self.owner = thread
        self.depth += 1
        before = self.context
        try:
            labels = {**self._set(), **(self.held or {}), **given}
            labels = {k: self._fit(k, v, rows, k not in given or self.held is not None) for k, v in labels.items()}
            self.context = self.make(labels, arguments, x, rows)
        except BaseException:
            self.depth -= 1
            raise
        return before

    def _fit(self, keyword: str, label: Labels, rows: int | None, repeats: bool) -> Labels:
        """A label for each row of the call; within generate, repeated as generate repeats its inputs."""
        if isinstance(label, str) or rows is None or (isinstance(label, Tensor) and label.ndim == 0):
            return label
        n = len(label)
        if n == rows:
            return label
        if repeats and n and rows % n == 0:
            k = rows // n
            return label.repeat_interleave(k) if isinstance(label, Tensor) else [i for i in label for _ in range(k)]
        raise LabelError(
            f"{keyword}={n} labels for a batch of {rows} examples: too {'few' if n < rows else 'many'}. Give one label "
            f"an example (None for the base alone), or a single name for all."
        )

    def leave(self, before: Context | None, out: Any) -> None:
        """End a call that went well: check that sites fired, and know its context again when its backward begins."""
        context = self.context
        self.abandon(before)
        if torch.compiler.is_compiling():
            return
        if not recomputing():
            self.last, self.backward = context, None
        if self.unchecked and not self.depth and self.held is None:
            self._check()
        if context is not None and context.grad:
            for tensor in tensors(out):
                if tensor.requires_grad:
                    tensor.register_hook(partial(self._begin_backward, context))

    def abandon(self, before: Context | None) -> None:
        """End a call, however it went."""
        self.depth -= 1
        self.context = before

    def _begin_backward(self, context: Context, gradient: Tensor) -> None:
        self.backward = context

    def _check(self) -> None:
        for name in list(self.unchecked):
            bay = self.bays[name]
            silent = [site for site, seat in bay.seats.items() if not seat.fired]
            if silent and not bay.sometimes:
                raise SiteError(
                    f"bay {name!r}: {len(silent)} of {len(bay.seats)} sites never fired in the first pass: "
                    f"{listed(silent)}. Their modules would never learn or act. The module may be called by another "
                    f"name (a shared embedding), or through its weight only; choose another site (modbay inspect shows "
                    f"them), or pass sometimes=True to mb.attach if it runs for some inputs only."
                )
            if silent and bay.guest:
                LOG.warning(
                    "bay %r: %d of %d sites never fired in the first pass: %s. Their modules did nothing, as in the "
                    "library that they are from: the model does not call what they are at.",
                    name, len(silent), len(bay.seats), listed(silent),
                )  # fmt: skip
            self.unchecked.discard(name)


def tensors(out: Any) -> Iterable[Tensor]:
    """The tensors of an output: itself, or those of its first levels."""
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, Mapping) or hasattr(out, "values"):
        for value in out.values():
            yield from tensors(value)
    elif isinstance(out, (tuple, list)):
        for value in out:
            yield from tensors(value)
