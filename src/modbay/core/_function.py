"""f: a site's own function, with everything bound but x."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CompositionError, SiteError


class Function:
    """f(x) for one call of a site: the first tensor of the call is x, the first tensor of what comes back is y.

    `f.under(parameters, x)` is f with other parameters. `f.finish(y)` is the site's whole output, y in its place.
    """

    __slots__ = ("run", "args", "kwargs", "key", "x", "rest", "module")

    def __init__(self, run: Callable, args: tuple, kwargs: dict, module: nn.Module | None = None, name: str = ""):
        self.run, self.args, self.kwargs, self.module, self.rest = run, args, kwargs, module, None
        if args and isinstance(args[0], Tensor):
            self.key: Any = 0
        else:
            positions = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
            keywords = [k for k, a in kwargs.items() if isinstance(a, Tensor)]
            if not positions and not keywords:
                raise SiteError(f"site {name!r} was called without any tensor, so that it has no x.")
            self.key = positions[0] if positions else keywords[0]
        self.x: Tensor = args[self.key] if isinstance(self.key, int) else kwargs[self.key]

    def __call__(self, x: Tensor) -> Tensor:
        return self._first(self.run(*self._args(x), **self._kwargs(x)))

    def under(self, params: Mapping[str, Tensor], x: Tensor, rows: Tensor | None = None) -> Tensor:
        """f(x) with these parameters in the place of the module's own, by name. `rows`: which of the call's x has."""
        if self.module is None:
            raise CompositionError("f has no module of its own here, so that it has no parameters to be exchanged.")
        module, run = self.module, self.run
        saved = {}
        owners = {name: name.rpartition(".") for name in params}
        try:
            for name, tensor in params.items():
                owner = module.get_submodule(owners[name][0])
                saved[name] = owner._parameters[owners[name][2]]
                owner._parameters[owners[name][2]] = tensor  # type: ignore[assignment]
            return self._first(run(*self._args(x), **self._kwargs(x))) if rows is None else self._part(x, rows)
        finally:
            for name, tensor in saved.items():
                module.get_submodule(owners[name][0])._parameters[owners[name][2]] = tensor

    def _part(self, x: Tensor, rows: Tensor) -> Tensor:
        """f(x) for some rows of the call; raises SiteError where what f returns could not be put together again."""
        kwargs = {key: self._pick(argument, rows) for key, argument in self._kwargs(x).items() if key != self.key}
        kwargs |= {} if isinstance(self.key, int) else {self.key: x}
        args = [x if i == self.key else self._pick(argument, rows) for i, argument in enumerate(self._args(x))]
        out = self.run(*args, **kwargs)
        several = [] if isinstance(out, Tensor) else [v for v in getattr(out, "values", lambda: out)() if v is not None]
        if len(several) > 1:
            raise SiteError(
                f"{type(self.module).__name__} returns {len(several)} values, which can't be put together from the "
                f"parts of a mixed batch. Attach at a part that returns one tensor, or use one module for all rows."
            )
        return self._first(out)

    def _pick(self, argument: Any, rows: Tensor) -> Any:
        """These rows of another argument of the call: a mask, rotary positions."""
        if isinstance(argument, Tensor):
            apart = argument.ndim and len(argument) == len(self.x)
            places = argument.ndim == 1 and len(argument) in self.x.shape[1:2]  # of the text, and not of rows
            return argument[rows] if apart and not places else argument
        if isinstance(argument, (tuple, list)):
            items = [self._pick(item, rows) for item in argument]
            return items if isinstance(argument, list) else tuple(items)
        if argument is None or isinstance(argument, (bool, int, float, str, torch.dtype, torch.device)):
            return argument
        raise SiteError(
            f"{type(self.module).__name__} is called with {type(argument).__name__}, which can't be divided among the "
            f"modules of a mixed batch. Pass use_cache=False, attach at a part of it, or use one module for the batch."
        )

    def _args(self, x: Tensor) -> tuple:
        if self.key == 0 and len(self.args) == 1:
            return (x,)
        if isinstance(self.key, int):
            return (*self.args[: self.key], x, *self.args[self.key + 1 :])
        return self.args

    def _kwargs(self, x: Tensor) -> dict:
        return self.kwargs if isinstance(self.key, int) else {**self.kwargs, self.key: x}

    def _first(self, out: Any) -> Tensor:
        if isinstance(out, Tensor):
            return out
        self.rest = out
        return first_tensor(out)

    def finish(self, y: Tensor) -> Any:
        """What the site returns: y, or the last output of f with y in the place of its first tensor."""
        return y if self.rest is None else with_first_tensor(self.rest, y)


def first_tensor(out: Any) -> Tensor:
    """The first tensor of a tuple, list or mapping (a transformers output); raises SiteError if there is none."""
    if isinstance(out, Tensor):
        return out
    values = out.values() if hasattr(out, "values") else out if isinstance(out, (tuple, list)) else ()
    for value in values:
        if isinstance(value, Tensor):
            return value
    raise SiteError(f"a site returned {type(out).__name__} without a tensor in it, so that there is no y.")


def with_first_tensor(out: Any, y: Tensor) -> Any:
    """A copy of the container with y as its first tensor."""
    if isinstance(out, Tensor):
        return y
    if hasattr(out, "values"):
        key = next(k for k, v in out.items() if isinstance(v, Tensor))
        out = out.__copy__() if hasattr(out, "__copy__") else type(out)(out)
        out[key] = y
        return out
    at = next(i for i, v in enumerate(out) if isinstance(v, Tensor))
    items = [*out[:at], y, *out[at + 1 :]]
    return type(out)(*items) if hasattr(out, "_fields") else type(out)(items)
