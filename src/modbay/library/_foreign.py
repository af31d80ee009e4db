"""Modules that other libraries wrote: found in a folder, and read as a kind and its tensors at each site."""

import glob
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from ..abstract import Aggregator, Kind
from ..errors import FileError, MatchError, ModbayError
from ..seams import At, Pairs, at, before, part, places, span
from ..types import Params
from ._read import fill, fits

LOG = logging.getLogger("modbay")


@dataclass(frozen=True, eq=False)
class Foreign:
    """A module of another library. base: the name of the model that it was made on, as far as it says. By site:
    aggregators, where it is no sum; gates, the weight and bias of a scale between 0 and 1; widths, where a module
    does not tell its own."""

    name: str
    path: Path
    format: str
    kinds: Mapping[str, Kind]
    known: Mapping[str, Params]
    base: str | None = None
    aggregators: Mapping[str, Aggregator] = field(default_factory=dict)
    gates: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    widths: Mapping[str, int] = field(default_factory=dict)

    def pairs(self, model: nn.Module) -> Pairs:
        """Each of its sites in this model, with its kind."""
        return [(self._place(model, site), kind) for site, kind in self.kinds.items()]

    def _place(self, model: nn.Module, site: str):
        try:
            (place,) = places(model, _what(site, self.widths.get(site)))
        except MatchError as error:
            raise FileError(f"{self.path}: this model has no {site!r}, at which it has a module ({error}).") from error
        return place

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By "site/parameter"."""
        return {f"{site}/{name}": t for site, own in self.known.items() for name, t in own.items()}

    def fill(self, targets: Mapping[str, Tensor]) -> None:
        """Put its values into a module that was just made, by "site/parameter"; they come frozen."""
        fits(self.path, self.tensors, targets)
        fill(targets, self.tensors, True)
        for tensor in targets.values():
            tensor.requires_grad_(False)

    def tell(self, model: nn.Module) -> None:
        """A foreign file has no fingerprint of its base: say what it names, if that is another model."""
        here = getattr(getattr(model, "config", None), "_name_or_path", None)
        if self.base and here and self.base != here:
            LOG.warning(
                "%s was made on %r, and this model is %r: %s keeps no fingerprint of the base, so that only the names "
                "can be compared.", self.path, self.base, here, self.format,
            )  # fmt: skip


@contextmanager
def together(path: Path, whose: str) -> Iterator[None]:
    """While tensors are read that their file describes: what goes wrong is the file's fault, and a FileError."""
    try:
        yield
    except ModbayError:
        raise
    except (TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError, ArithmeticError) as error:
        raise FileError(
            f"{path}: its contents do not go together as {whose} do ({type(error).__name__}: {str(error)[:200]}). "
            f"It was changed by hand, is damaged, or is of another version."
        ) from error


def _what(site: str, width: int | None) -> At:
    """What `at=` would say of a site: a module, what goes into it, a part of its output, or a span."""
    if (inner := site.removesuffix("[before]")) != site:
        return before(glob.escape(inner), features=width)
    if cut := re.fullmatch(r"(.*)\[(\d+):(\d+)\]", site):
        return part(glob.escape(cut[1]), int(cut[2]), int(cut[3]))
    first, between, last = site.partition(":")
    return span(glob.escape(first), glob.escape(last)) if between else at(glob.escape(site), features=width)
