"""Losses as pure functions of tensors; they know no routers and no modules."""

from ._balance import balancing_bias as balancing_bias
from ._balance import cv_squared as cv_squared
from ._balance import importance as importance
from ._balance import in_top_k as in_top_k
from ._balance import load as load
from ._balance import load_balance as load_balance
from ._balance import z_loss as z_loss
from ._choices import length_normalised as length_normalised
from ._choices import likelihood as likelihood
from ._choices import t_few as t_few
from ._choices import unlikelihood as unlikelihood
from ._competition import competition as competition
from ._marginal import marginal_sequence as marginal_sequence
from ._marginal import marginal_tokens as marginal_tokens
from ._orthogonal import difference as difference
from ._orthogonal import orthogonal as orthogonal
from ._prior import indian_buffet as indian_buffet
from ._sharing import distance as distance
from ._sharing import orthogonality as orthogonality
from ._sharing import trace_norm as trace_norm
from ._superposition import entropy as entropy
from ._superposition import superfluous as superfluous
