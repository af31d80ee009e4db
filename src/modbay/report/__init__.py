"""A run's facts as one HTML file: it loads nothing, runs no script, and reads well on a phone, a desk and on paper."""

from ._merge import merge_plot as merge_plot
from ._merge import plottable as plottable
from ._page import html as html
from ._page import routing as routing
from ._page import write as write
