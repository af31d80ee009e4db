"""Routing as it happens: what routers chose, by site, label and time, kept on the device; and what that says."""

from ._alarms import alarms as alarms
from ._facts import facts as facts
from ._measures import LITTLE as LITTLE
from ._measures import adaptation as adaptation
from ._measures import alignment as alignment
from ._measures import collapse_average as collapse_average
from ._measures import collapse_worst as collapse_worst
from ._measures import effective_modules as effective_modules
from ._measures import entropy as entropy
from ._measures import gini as gini
from ._measures import interference as interference
from ._measures import inverse_mutual_information as inverse_mutual_information
from ._measures import joint as joint
from ._measures import matching as matching
from ._measures import mutual_information as mutual_information
from ._measures import overlap as overlap
from ._measures import selection_entropies as selection_entropies
from ._measures import specialise_reuse as specialise_reuse
from ._measures import transfer as transfer
from ._measures import use as use
from ._measures import utilisation as utilisation
from ._recording import Recording as Recording
from ._recording import record as record
from ._table import Table as Table
