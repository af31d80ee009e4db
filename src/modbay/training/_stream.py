"""Data that is not held: read once to learn what there is in it, and again, as often as the steps need, to train.

What is held of it: the rows to choose and judge by, and a sample of those to learn from, on which the plan, the
features' scale and the linear probe stand.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from random import Random
from typing import Any

from torch.utils.data import IterableDataset

from .. import data
from ..data import Row, Splits
from ..errors import ConfigError
from ._config import Config, Source
from ._encode import Example
from ._sampling import POOL, shares

SAMPLE, HELD = 5_000, 5_000  # rows of a task that stay in memory: to learn from, and to choose and to judge by, each


class Survey:
    """What one pass over a task's rows found: `splits` of rows that are held, `counts` of rows by part, `digest`."""

    def __init__(self, config: Config, name: str, source: Source, what: data.Columns):
        kind, rng = source.kind or "classification", Random(f"stream-{config.seed}-{name}")
        files = {part: given for part in ("validation", "test") if isinstance(given := getattr(source, part), str)}
        kept: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
        self.counts, self.classes = Counter(), Counter()
        self.values: dict[str, set[str]] = {}
        digest = hashlib.sha256()
        for row in data.stream(source.path, what, kind, name):
            part = part_of(row, source, config.seed)
            self.counts[part] += 1
            digest.update(repr((row.text, row.pair, row.target, sorted(row.labels.items()))).encode())
            self._note(row, kind, part)
            most = SAMPLE if part == "train" else HELD
            if len(kept[part]) < most:
                kept[part].append(row)
            elif (place := rng.randrange(self.counts[part])) < most:  # Vitter's reservoir: each row alike
                kept[part][place] = row
        for part, path in files.items():
            kept[part] = data.read(path, what, kind, name, whole=False)
            self.counts[part] = len(kept[part])
            for row in kept[part]:
                self._note(row, kind, part)
        self.digest, self.splits = digest.hexdigest(), Splits(**kept)

    def _note(self, row: Row, kind: str, part: str) -> None:
        for label, value in row.labels.items():
            self.values.setdefault(label, set()).add(value)
        if part == "train" and kind in ("classification", "tagging"):
            self.classes.update(row.target if isinstance(row.target, tuple) else [str(row.target)])


def part_of(row: Row, source: Source, seed: int) -> str:
    """The part of a row, from its group or text alone: the same whenever it is read, and the same for the same text."""
    said = f"{seed}\n{row.normal if row.group is None else row.group}".encode()
    draw = int.from_bytes(hashlib.sha256(said).digest()[:8]) / 2**64
    bound = 0.0
    for part in ("test", "validation"):
        share = getattr(source, part)
        bound += 0.0 if isinstance(share, str) else float(share)
        if draw < bound:
            return part
    return "train"


class Streamed(IterableDataset):
    """A run's examples in the order in which it sees them, read and encoded as they are needed.

    Tasks are drawn as `sampling` says; within one, rows come through a buffer from which they are drawn at random.
    Each time it is begun it gives the same examples, so that a run that was stopped finds its place by passing over.
    """

    def __init__(
        self, config: Config, columns: Mapping[str, data.Columns], sizes: Mapping[str, int], network: Any, steps: int
    ):
        self.config, self.columns, self.sizes, self.network, self.steps = config, columns, sizes, network, steps

    def __len__(self) -> int:
        return self.steps * self.config.batch

    def __iter__(self) -> Iterator[tuple[int, Example]]:
        config, rng, place = self.config, Random(f"streamed-{self.config.seed}"), 0
        names = list(self.sizes)
        weights = shares([self.sizes[name] for name in names], config.sampling, config.temperature)
        rows = {name: self._rows(name, config.sources[name], Random(rng.random())) for name in names}
        for done in range(0, self.steps, POOL):
            now = min(POOL, self.steps - done)
            drawn = [next(rows[name]) for name in rng.choices(names, weights, k=now * config.batch)]
            routes = [self.network.routes.of(row, self.network.keywords) for row in drawn]
            examples = sorted(self.network.encoder.encode(drawn, routes), key=len)
            cut = [examples[i : i + config.batch] for i in range(0, len(examples), config.batch)]
            for batch in rng.sample(cut, len(cut)):
                for example in batch:
                    yield place, example
                    place += 1

    def _rows(self, name: str, source: Source, rng: Random) -> Iterator[Row]:
        """The training rows of a task, again and again, each time through a buffer."""
        buffer: list[Row] = []
        while True:
            for row in data.stream(source.path, self.columns[name], source.kind or "classification", name):
                if part_of(row, source, self.config.seed) != "train":
                    continue
                if len(buffer) < min(self.config.buffer, self.sizes[name]):
                    buffer.append(row)
                    continue
                place = rng.randrange(len(buffer))
                yield buffer[place]
                buffer[place] = row
            if len(buffer) == self.sizes[name]:  # all of it fits: what the buffer holds is the task
                yield from rng.sample(buffer, len(buffer))
                buffer.clear()


def check(config: Config) -> None:
    """Raise ConfigError for what a stream can't do."""
    if config.steps is None and config.method != "probe":
        raise ConfigError("streaming=True: say steps=…, for an epoch's end is not known before it is reached.")
