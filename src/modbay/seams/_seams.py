"""Which seam a place needs: decided by the place, and by the kinds that are to be plugged in there."""

from collections.abc import Sequence

from torch import nn

from ..abstract import Kind
from ._match import Place
from ._places import ParameterSeam, SliceSeam, SpanSeam
from ._seat import Seam, Seat


def seam_for(model: nn.Module, place: Place, kinds: Sequence[Kind], seat: Seat) -> Seam:
    if place.entry is not None:
        return SpanSeam(model.get_submodule(place.entry), place.entry)
    if place.features is not None:
        return SliceSeam(place.features.start, place.features.stop)
    if place.site.form == "experts":
        return ParameterSeam()
    return Seam()
