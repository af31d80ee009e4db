"""Attaching by the class: a target keeps its identity, its state-dict keys and its parameters, and gains a forward.

The class of the target is swapped for a subclass of the same name with one method. Nothing is wrapped or replaced, so
that `isinstance`, names, checkpoints and `generate` stay what they were, and detaching is setting the class back.
"""

import functools
import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..errors import BayError

_classes: dict[tuple[type, tuple[str, ...] | None], type] = {}


class Swapped:
    """Marks a swapped class; the class itself holds the one it was made from as `_base`."""


def swap(target: nn.Module, labels: Sequence[str] | None = None) -> None:
    """Give the target a class whose forward goes through its seat, `_bay`; `labels` are the keywords of a root.

    A forward that another library left on the instance (accelerate's hooks) is moved inside, and called as f.
    """
    if any(base.__name__ == "FSDPModule" for base in type(target).__mro__):
        raise BayError(
            f"{type(target).__name__} is sharded already: parameters added now would stay whole, their gradients "
            f"unreduced. Call mb.attach before fully_shard."
        )
    if "_base" in type(target).__dict__:
        base = type(target)._base  # type: ignore[attr-defined]
    else:
        base = type(target)
        if "forward" in target.__dict__:
            target.__dict__["_bay_inner"] = target.__dict__.pop("forward")
    target.__class__ = swapped(base, None if labels is None else tuple(labels))


def unswap(target: nn.Module) -> None:
    """Set the class back; raises BayError if ours is not on top any more."""
    if "_base" not in type(target).__dict__:
        raise BayError(
            f"{type(target).__name__} changed its class after modbay was attached (parametrize, fully_shard …): undo "
            f"that first, then detach."
        )
    if "forward" in target.__dict__:
        raise BayError(
            f"{type(target).__name__} has a forward of its own, put there after modbay was attached (accelerate's "
            f"add_hook_to_module): remove that hook first, then detach."
        )
    target.__class__ = type(target)._base  # type: ignore[attr-defined]
    if "_bay_inner" in target.__dict__:
        target.__dict__["forward"] = target.__dict__.pop("_bay_inner")


def swapped(base: type, labels: tuple[str, ...] | None) -> type:
    """The swapped class of `base`, made once."""
    if (base, labels) not in _classes:

        def forward(self, *args, **kwargs):
            inner = self.__dict__.get("_bay_inner") or functools.partial(base.forward, self)
            return self._modules["_bay"].call(self, inner, args, kwargs)

        forward.__signature__ = _with_labels(inspect.signature(base.forward), labels or ())  # type: ignore[attr-defined]
        members: dict[str, Any] = {
            "forward": forward, "_base": base, "__reduce_ex__": functools.partialmethod(_reduce, base, labels),
            "_arguments": _positional(base.forward),
            "__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__,
        }  # fmt: skip
        if labels is not None and hasattr(base, "generate"):

            def generate(self, *args, **kwargs):
                inner = functools.partial(base.generate, self)
                return self._modules["_bay"].generate(self, inner, args, kwargs)

            generate.__signature__ = _with_labels(inspect.signature(base.generate), labels)  # type: ignore[attr-defined]
            members["generate"] = generate
        if issubclass(base, nn.Sequential):  # it runs all its children in turn, and ours is none of them
            members["__iter__"] = lambda self: iter([m for name, m in self._modules.items() if name != "_bay"])
            members["__len__"] = lambda self: len(self._modules) - ("_bay" in self._modules)
        _classes[base, labels] = type(base.__name__, (Swapped, base), members)
    return _classes[base, labels]


def _positional(forward: Any) -> tuple[str, ...]:
    """The names of the arguments that may be given by position, without self."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in inspect.signature(forward).parameters.values() if p.kind in kinds)[1:]


def _with_labels(signature: inspect.Signature, labels: Sequence[str]) -> inspect.Signature:
    """The signature with the labels as keywords, so that Trainer, pipelines and generate let them through."""
    parameters = list(signature.parameters.values())
    new = [inspect.Parameter(label, inspect.Parameter.KEYWORD_ONLY, default=None) for label in labels]
    at = len(parameters) - (bool(parameters) and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    return signature.replace(parameters=[*parameters[:at], *new, *parameters[at:]])


def _reduce(self, base: type, labels: tuple[str, ...] | None, protocol: int = 2):
    """Pickle and deepcopy by the base class: the swapped one is made again where the copy lives."""
    _, _, *rest = object.__reduce_ex__(self, protocol)
    return (_rebuild, (base, labels), *rest)


def _rebuild(base: type, labels: tuple[str, ...] | None) -> nn.Module:
    cls: Any = swapped(base, labels)
    return cls.__new__(cls)
