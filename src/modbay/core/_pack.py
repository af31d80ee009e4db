"""Packing: the frozen modules of a site in one tensor each name, so that a batch slices them, and copies nothing.

A module that is packed does not learn. `torch.compile` takes a packed bay without stacking it in every call.
"""

from collections import Counter
from collections.abc import Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from ..abstract import Kind
from ..errors import BayError
from ._engine import Part
from ._modular import Modular, NetworkPart


class Pool(nn.Module):
    """The tensors (n, …) of n modules of one kind at one site, and whether each of them was learning.

    whole: every module of the site is here, in order, so that nobody has to look where each one is.
    """

    def __init__(self, parts: Sequence[Part], whole: bool):
        super().__init__()
        self.whole = whole
        self.learning = [{name: tensor.requires_grad for name, tensor in part.tensors().items()} for part in parts]
        for name in parts[0].tensors():
            self.register_buffer(name, _long(torch.stack([part.tensors()[name].detach() for part in parts])))
        self.size = parts[0].size

    def rows(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The tensors of some modules: a view where they stand side by side, else one copy."""
        first, last = rows[0], rows[-1]
        if last - first == len(rows) - 1 and tuple(rows) == tuple(range(first, last + 1)):
            return {name: tensor[first : last + 1] for name, tensor in self._buffers.items()}  # type: ignore[index]
        index = torch.tensor(rows, device=next(iter(self._buffers.values())).device)  # type: ignore[union-attr]
        return {name: _taken(tensor, index) for name, tensor in self._buffers.items()}  # type: ignore[arg-type]


def _long(tensor: Tensor) -> Tensor:
    """The same matrices, with their longer axis contiguous: thin ones are read faster so in batched products."""
    return tensor.mT.contiguous().mT if tensor.ndim == 3 and tensor.shape[-2] > tensor.shape[-1] else tensor


def _taken(tensor: Tensor, index: Tensor) -> Tensor:
    """Some rows of a pool, laid out as they are there."""
    return tensor.index_select(0, index) if tensor.is_contiguous() else tensor.mT.index_select(0, index).mT


class Packed(Part):
    """The part of a module that is packed: a row of its site's pool, which the pool owns."""

    def __init__(self, kind: Kind, pool: Pool, row: int):
        super().__init__(kind, {})
        self.__dict__["pool"] = pool  # not a submodule: its tensors would be found once a module
        self.row, self.size = row, pool.size

    def tensors(self) -> dict[str, Any]:
        pool: Any = self.__dict__["pool"]
        return {name: tensor[self.row] for name, tensor in pool._buffers.items()}

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        if destination is not None:  # a parent finds them in the pool
            return destination
        return {name: tensor for name, tensor in self.tensors().items() if name not in self.kind.remade}


def pack(modulars: Sequence[Modular], names: Sequence[str]) -> None:
    """Pack these modules at each site, those of one kind together. What shares its tensors, with another module or with
    itself at another site, stays as it is."""
    parts = [part for modular in modulars for part in modular.order if part is not None]
    owners = Counter(id(tensor) for part in parts if not isinstance(part, Packed) for tensor in part.tensors().values())
    for modular in modulars:
        _pack(modular, names, {key for key, n in owners.items() if n > 1})


def _pack(modular: Modular, names: Sequence[str], kept: Set[int]) -> None:
    alike: dict[int, list[int]] = {}
    for i, name in enumerate(modular.inventory.names):
        part = modular.order[i]
        if name not in names or part is None or isinstance(part, (Packed, NetworkPart)) or not part.tensors():
            continue
        if any(id(tensor) in kept for tensor in part.tensors().values()):
            continue
        alike.setdefault(modular.numbers[i], []).append(i)
    for ids in alike.values():
        parts = [modular.order[i] for i in ids]
        pool = Pool(parts, whole=ids == list(range(len(modular.order))))  # type: ignore[arg-type]
        modular.pools.append(pool)
        for row, i in enumerate(ids):
            _exchange(modular, i, Packed(parts[row].kind, pool, row))  # type: ignore[union-attr]


def unpack(modular: Modular) -> None:
    """Give every module at one site parameters of its own again, learning as it was."""
    for i, part in enumerate(modular.order):
        if isinstance(part, Packed):
            learning = part.__dict__["pool"].learning[part.row]
            tensors = {name: tensor.clone() for name, tensor in part.tensors().items()}
            kept = part.kind.constants
            learned = [k for k, t in tensors.items() if t.is_floating_point() and k not in kept]
            new = {k: nn.Parameter(t, learning[k]) if k in learned else t for k, t in tensors.items()}
            _exchange(modular, i, Part(part.kind, new))
    modular.pools = nn.ModuleList()


def _exchange(modular: Modular, i: int, part: Part) -> None:
    part.train(modular.training)
    modular.order[i] = modular.parts._modules[modular.inventory.names[i]] = part


def refuse_packed(parts: Any, verb: str, bay: str) -> None:
    """Raise BayError if one of the parts is packed, and so can't learn."""
    if any(isinstance(part, Packed) for part in parts):
        raise BayError(f"{verb}: modules of bay {bay!r} are packed, and can't learn: call bay.unpack() first.")
