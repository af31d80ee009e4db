"""How often a task or a label is drawn, and the order in which a run sees its examples: made once, from the seed alone.

Temperature sampling: Arivazhagan et al., "Massively multilingual neural machine translation in the wild", 2019 (arXiv
1907.05019); p ∝ n^(1/T), T = 1 proportional, T → ∞ uniform.
"""

from collections.abc import Hashable, Sequence
from random import Random

POOL = 16  # batches whose examples are drawn together and sorted by length: less padding


def shares(sizes: Sequence[int], sampling: str, temperature: float) -> list[float]:
    """How often each group is drawn, given its size: they sum to 1."""
    power = {"proportional": 1.0, "temperature": 1 / temperature, "uniform": 0.0}[sampling]
    raw = [n**power for n in sizes]
    return [one / sum(raw) for one in raw]


def order(
    groups: Sequence[Hashable],
    lengths: Sequence[int],
    steps: int,
    batch: int,
    *,
    sampling: str = "temperature",
    temperature: float = 2.0,
    seed: int = 0,
) -> list[int]:
    """The places of `steps` × `batch` examples, in order; each batch holds examples of like length.

    groups: of each example, what sampling balances. Proportional sampling goes through the data epoch by epoch, each
    example once an epoch; otherwise groups are drawn with replacement, each going through its own examples so.
    """
    rng, members = Random(f"order-{seed}"), {}
    for place, group in enumerate(groups):
        members.setdefault(group, []).append(place)
    if sampling == "proportional":
        members = {None: list(range(len(groups)))}
    names = list(members)
    weights = shares([len(members[name]) for name in names], sampling, temperature)
    rounds = {name: _rounds(members[name], rng) for name in names}
    out: list[int] = []
    for done in range(0, steps, POOL):
        now = min(POOL, steps - done)
        drawn = [next(rounds[name]) for name in rng.choices(names, weights, k=now * batch)]
        drawn.sort(key=lambda place: lengths[place])
        cut = [drawn[i : i + batch] for i in range(0, len(drawn), batch)]
        out += [place for one in rng.sample(cut, len(cut)) for place in one]
    return out


def _rounds(places: Sequence[int], rng: Random):
    """The places in random order, again and again."""
    while True:
        yield from rng.sample(places, len(places))
