"""Which seam a place needs: decided by the place, and by the kinds that are to be plugged in there."""

from collections.abc import Sequence

from torch import nn

from ..abstract import Kind
from ..errors import CompositionError
from ._match import Place
from ._places import BeforeSeam, ParameterSeam, SliceSeam, SpanSeam
from ._prefix import PrefixSeam, biased
from ._prompt import InsertSeam, PromptSeam
from ._seat import Seam, Seat


def seam_for(model: nn.Module, place: Place, kinds: Sequence[Kind], seat: Seat) -> Seam:
    composed = [kind for kind in kinds if isinstance(kind, Kind) and kind.place]
    if composed:
        return _of_input(model, place, kinds, composed, seat)
    if place.before:
        return BeforeSeam()
    if place.entry is not None:
        return SpanSeam(model.get_submodule(place.entry), place.entry)
    if place.features is not None:
        return SliceSeam(place.features.start, place.features.stop)
    if place.site.bare:
        return ParameterSeam()
    return Seam()


def _of_input(model: nn.Module, place: Place, kinds: Sequence[Kind], composed: Sequence[Kind], seat: Seat) -> Seam:
    """The seam of prompts or prefixes, which must be alone at their place."""
    where = {kind.place for kind in composed}
    if len(composed) < len(kinds) or len(where) > 1:
        several = ", ".join(dict.fromkeys(type(kind).__name__ for kind in kinds))
        raise CompositionError(
            f"site {place.site.name!r} has {several} in one bay: input is composed apart from all else. Put the "
            f"prompts, or prefixes, into a second bay of their own (mb.attach(…, name=…))."
        )
    if not place.whole or place.site.bare:
        raise CompositionError(
            f"site {place.site.name!r}: a slice, span or parameter, or what goes into a layer, has no input to compose."
        )
    if where == {"attention"}:
        return PrefixSeam(place.target, seat, biased(model, place.target))
    return PromptSeam(place.target) if place.target is model else InsertSeam()
