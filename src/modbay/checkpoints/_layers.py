"""Which layer a tensor is of, for what changes from the first layer to the last."""

from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import ConfigError


class Layers:
    """Stacks of layers, found by names (`model.layers.3.mlp…`) whose numbers are as many as the config says."""

    def __init__(self, names: Iterable[str], config: Mapping[str, Any]) -> None:
        counts = set(_counts(config))
        found: dict[str, set[int]] = {}
        for name in names:
            where = split(name)
            if where is not None:
                found.setdefault(where[0], set()).add(where[1])
        self.stacks = {
            stack: len(numbers)
            for stack, numbers in found.items()
            if numbers == set(range(len(numbers))) and len(numbers) in counts
        }
        if not self.stacks:
            lengths = sorted({len(numbers) for numbers in found.values()})
            raise ConfigError(
                f"parameters: a list of numbers is a gradient over layers, and no layers were found: config.json has "
                f"{sorted(counts) or 'no number'} of them, names of tensors are numbered in stacks of "
                f"{lengths or 'none'}. Use filters instead: [{{filter: .0., value: …}}, {{value: …}}]."
            )

    def depth(self, name: str) -> float:
        """0 in the first layer and outside all, 1 in the last."""
        where = split(name)
        n = self.stacks.get(where[0]) if where is not None else None
        return 0.0 if n is None or where is None else where[1] / (n - 1) if n > 1 else 1.0


def split(name: str) -> tuple[str, int] | None:
    """(what is before the first number in a name, the number)."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[:i]), int(part)
    return None


def _counts(config: Any) -> Iterable[int]:
    """Every number of layers in a config, and in the configs within."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            if isinstance(value, int) and not isinstance(value, bool) and "layer" in key:
                yield value
            yield from _counts(value)
