"""Losses as pure functions of tensors; they know no routers and no modules."""

from ._balance import load_balance as load_balance
from ._balance import z_loss as z_loss
from ._prior import indian_buffet as indian_buffet
from ._superposition import entropy as entropy
from ._superposition import superfluous as superfluous
