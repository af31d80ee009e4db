"""A network, called with other tensors than its own: what torch.func.functional_call does, for modules as well.

(That one looks parts up as attributes, where a bay's name may be that of a method.)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from ..errors import CompositionError, listed
from ..types import Params


def called_with(model: nn.Module, state: Params) -> Callable:
    """The model, called with these tensors in the place of its own of these names.

    Tied parameters are swapped together, for the first of their names. Buffers are copies, which a call in training may
    change. Raises CompositionError for names that it does not have.
    """

    def run(*args, **kwargs):
        with _swapped(model, state):
            return model(*args, **kwargs)

    return run


@contextmanager
def _swapped(model: nn.Module, state: Params) -> Iterator[None]:
    places: dict[int, list[tuple[dict, str]]] = {}
    by_name = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for store in (module._parameters, module._buffers):
            for key, own in store.items():
                if own is not None:
                    by_name[f"{prefix}.{key}" if prefix else key] = own
                    places.setdefault(id(own), []).append((store, key))
    lost = [name for name in state if name not in by_name]
    if lost:
        raise CompositionError(f"the state's {listed(lost)} are no parameters or buffers of the model.")
    first = {id(by_name[name]): name for name in reversed(list(state))}
    try:
        for own, name in first.items():
            tensor = state[name]
            for store, key in places[own]:
                store[key] = tensor if isinstance(by_name[name], nn.Parameter) else tensor.clone()
        yield
    finally:
        for own, name in first.items():
            for store, key in places[own]:
                store[key] = by_name[name]
