"""Which tokens went where: a sample of positions, of bounded size."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from ._routes import Seen

EACH = 64  # positions of a call
Sample = tuple[list[str], Tensor, Tensor, Tensor]


class Tokens:
    """Of every so many calls, some positions: the token's id, and the module with the most weight at each level.

    most: how many positions are kept. When they are full, every other call is dropped, and half as many are looked at
    from then on, so that what is kept is spread over the whole recording.
    """

    def __init__(self, most: int):
        self.most, self.every, self.calls = most, 1, 0
        self.kept: list[list[Sample]] = []
        self.generator = torch.Generator().manual_seed(0)  # one's own: the model's numbers stay as they were

    def add(self, groups: Sequence[Sequence[Seen]]) -> None:
        """The routings of one call, alike in each group."""
        self.calls += 1
        if not self.most or self.calls % self.every:
            return
        found = [self._of(some) for some in groups if len(some[0].shape) == 3]
        self.kept.append([one for one in found if one is not None])
        while sum(call[0][1].numel() for call in self.kept if call) > self.most and len(self.kept) > 1:
            self.kept, self.every = self.kept[1::2], 2 * self.every

    def _of(self, some: Sequence[Seen]) -> Sample | None:
        """(levels, ids (m,), which are no padding (m,), modules (s, m)); None where the call has no ids of these."""
        first = some[0]
        ids, (b, t) = first.c.arguments.get("input_ids"), first.shape[:2]
        if not isinstance(ids, Tensor) or tuple(ids.shape) != (b, t):
            return None
        places = torch.randint(b * t, (min(EACH, b * t, self.most),), generator=self.generator)
        places = places.to(first.device, non_blocking=True)
        chosen = torch.stack([_most(one).flatten()[places] for one in some])
        mask = first.c.mask
        real = mask.flatten()[places] if mask is not None and mask.shape == ids.shape else torch.ones_like(places)
        return [one.level for one in some], ids.flatten()[places], real, chosen

    def read(self, level: str, modules: Sequence[str]) -> dict[str, Counter[int]]:
        """How often each id went to each module at a level."""
        out: dict[str, Counter[int]] = {name: Counter() for name in modules}
        for call in self.kept:
            for levels, ids, real, chosen in call:
                if level not in levels:
                    continue
                where = chosen[levels.index(level)].tolist()
                for i, ok, module in zip(ids.tolist(), real.tolist(), where, strict=True):
                    if ok and module >= 0:
                        out[modules[int(module)]][i] += 1
        return out


def _most(one: Seen) -> Tensor:
    """The module with the most weight at each position (b, t)."""
    if one.index is None:
        return one.weights.argmax(-1)  # type: ignore[union-attr]
    if one.weights is None or one.shape[-1] == 1:
        return one.index[..., 0]
    return one.index.gather(-1, one.weights.argmax(-1, keepdim=True)).squeeze(-1)
