"""The seat: what sits in a target as `_bay`, holds its bays in order, and is the door if the target is the root."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..abstract import Context
from ..core import BayState, Function, Modular, Session, recomputing
from ..errors import LabelError, SiteError


class Seam:
    """How x and y are taken from a target's call: here, the first tensor in, and the first tensor out."""

    prepares = False  # whether it takes part in `generate` of the root, by a method of that name
    place = ""  # of a seam for input compositions: theirs
    outermost = False  # whether it goes around the target's other bays, whenever it was attached

    def through(
        self,
        modular: Modular,
        run: Callable,
        target: nn.Module,
        args: tuple,
        kwargs: dict,
        c: Context,
        route: Any,
        aggregator: Any,
    ) -> Any:
        """Call `run` with the modules of one bay at work."""
        f = Function(run, args, kwargs, target, modular.site.name)
        return f.finish(modular.run(f, f.x, c, route, aggregator))

    def undo(self) -> None:
        """Take back what the seam changed in the model beside the seat. Here: nothing."""


class Seat(nn.Module):
    """The bays of one target, first attached innermost. Hidden from the base's state dict."""

    def __init__(self, session: Session):
        super().__init__()
        self.session = session
        self.bays = nn.Module()
        self.seams: dict[str, Seam] = {}
        self.owners: dict[str, str] = {}  # the bay of each: a bay may sit here more than once, at slices of the output
        self.shared = nn.Module()  # at the root: routers and aggregators of many sites
        self.is_root = False
        self.add_to_loss = True
        self.fired = False
        self.decodes = False  # whether x here is of the decoder of an encoder–decoder
        self.register_load_state_dict_post_hook(_forget_missing)

    def forward(self, *args, **kwargs):
        raise SiteError(
            "a module that runs all its children in turn ran modbay's seat, which is none of them: attach to the "
            "children, or to a parent that calls them by name."
        )

    def put(self, name: str, modular: Modular, seam: Seam) -> None:
        """Add a bay here, outside those that are here already."""
        key, n = name, 0
        while key in self.owners:
            n += 1
            key = f"{name}[{n}]"
        self.bays._modules[key], self.seams[key], self.owners[key] = modular, seam, name
        for around in [key for key, other in self.seams.items() if other.outermost]:
            self.bays._modules[around] = self.bays._modules.pop(around)
        modular.train(self.training)

    def take(self, name: str) -> None:
        """Take a bay away; one that is not here is not missed."""
        self.shared._modules.pop(name, None)
        for key in [key for key, owner in self.owners.items() if owner == name]:
            del self.bays._modules[key], self.owners[key]
            self.seams.pop(key).undo()

    def call(self, target: nn.Module, inner: Callable, args: tuple, kwargs: dict) -> Any:
        return self.door(target, inner, args, kwargs) if self.is_root else self.through(target, inner, args, kwargs)

    def through(self, target: nn.Module, inner: Callable, args: tuple, kwargs: dict) -> Any:
        """The target's call through its bays."""
        if not torch.compiler.is_compiling() and not self.fired:
            self.fired = True
        bays: Any = self.bays._modules
        if not bays:
            return inner(*args, **kwargs)
        session = self.session
        c = replace(session.now(), decodes=True) if self.decodes else session.now()
        run = inner
        for name, modular in bays.items():
            state = session.bays[self.owners[name]]
            if state.enabled:
                run = partial(self._bay, self.seams[name], modular, run, target, c, state)
        return run(*args, **kwargs)

    def _bay(
        self, seam: Seam, modular: Modular, run: Callable, target: nn.Module, c: Context, state: BayState, *args, **kw
    ):
        route = c.routes.get(state.name)
        route = route if route is None or route.sites is None else route.at(modular.site.name)
        return seam.through(modular, run, target, args, kw, c, route, state.aggregator)

    def door(self, target: nn.Module, inner: Callable, args: tuple, kwargs: dict) -> Any:
        """A call of the root: labels are taken from the keywords, and hold until it returns."""
        session = self.session
        given = {k: kwargs.pop(k) for k in session.keywords if k in kwargs}
        given = {k: v for k, v in given.items() if v is not None}
        if recomputing():
            return self.through(target, inner, args, kwargs)
        arguments = {**dict(zip(type(target)._arguments, args, strict=False)), **kwargs}  # type: ignore[attr-defined]
        rows = next((v.shape[0] for v in arguments.values() if isinstance(v, Tensor) and v.ndim), None)
        before = session.enter(given, arguments, rows, lambda: embedded(target, arguments))
        try:
            out = self.through(target, inner, args, kwargs)
            out = self.with_losses(target, out)
        except BaseException:
            session.abandon(before)
            raise
        session.leave(before, out)
        return out

    def with_losses(self, target: nn.Module, out: Any) -> Any:
        """The output, the auxiliary losses of the call added to its `.loss` in training."""
        context = self.session.context
        if not target.training or context is None or not context.losses:
            return out
        if not isinstance(getattr(out, "loss", None), Tensor):
            return out
        quiet = tuple(f"{bay.name}." for bay in self.session.bays.values() if not bay.add_losses)
        extra = [value for name, value in context.losses if not quiet or not name.startswith(quiet)]
        if extra:
            out.loss = out.loss + sum(extra)
        return out

    def generate(self, target: nn.Module, inner: Callable, args: tuple, kwargs: dict) -> Any:
        """Generation: the labels hold for all the calls inside, repeated as generate repeats its inputs."""
        session = self.session
        given = {k: v for k in session.keywords if (v := kwargs.pop(k, None)) is not None}
        prepares = any(seam.prepares for seam in self.seams.values())
        settled = all(bay.chosen is not None or bay.router is None for bay in session.bays.values())
        if not given and settled and not prepares:
            return inner(*args, **kwargs)
        arguments = {**dict(zip(("inputs",), args, strict=False)), **kwargs}
        rows = next((len(v) for v in arguments.values() if isinstance(v, Tensor) and v.ndim), None)
        before, held = session.enter(given, kwargs, rows, lambda: embedded(target, arguments)), session.held
        session.held = {**(held or {}), **given}
        try:
            return self._prepared(target, inner)(*args, **kwargs) if prepares else inner(*args, **kwargs)
        finally:
            session.held = held
            session.abandon(before)

    def _prepared(self, target: nn.Module, inner: Callable) -> Callable:
        """`generate` through the seams that take part in it."""
        c = self.session.now()
        for name, modular in self.bays._modules.items():
            state, seam = self.session.bays[self.owners[name]], self.seams[name]
            if state.enabled and seam.prepares:
                inner = partial(seam.generate, modular, inner, target, c, c.routes.get(state.name), state.aggregator)  # type: ignore[attr-defined]
        return inner

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        if destination is not None and not self.session.shown:
            return destination  # a parent asks: the base's keys stay as they were
        return super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)  # type: ignore


def _forget_missing(seat: nn.Module, incompatible: Any) -> None:
    """A checkpoint of the base has none of our keys, and misses nothing."""
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if "._bay." not in f".{key}"]


def embeddings(model: nn.Module) -> Any:
    """A transformers model's token embeddings; None if it has none, as one of images."""
    try:
        return getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:
        return None


def embedded(target: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
    """The call's input for a shared router: embeddings as given, token ids embedded, or the first tensor of floats."""
    if isinstance(arguments.get("inputs_embeds"), Tensor):
        return arguments["inputs_embeds"]
    named = [arguments[k] for k in ("input_ids", "inputs") if isinstance(arguments.get(k), Tensor)]
    ids = next((v for v in (*named, *arguments.values()) if isinstance(v, Tensor)), None)
    if ids is None:
        raise LabelError("a shared router that reads x has no tensor to read in this call.")
    if ids.is_floating_point():
        return ids
    embed = embeddings(target)
    if embed is None:
        embed = next((m for m in target.modules() if isinstance(m, nn.Embedding)), None)
    if embed is None:
        raise LabelError("a shared router that reads x found no embedding for the call's token ids.")
    return torch.nn.functional.embedding(ids, embed.weight)
