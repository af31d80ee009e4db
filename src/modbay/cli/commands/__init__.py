"""What is typed: one function a command, whose arguments are its options and whose docstring is its help."""

from ._adapt import adapt as adapt
from ._compare import compare as compare
from ._convert import convert as convert
from ._demo import demo as demo
from ._evaluate import evaluate as evaluate
from ._extend import extend as extend
from ._fold import fold as fold
from ._inspect import inspect as inspect
from ._merge import merge as merge
from ._methods import methods as methods
from ._predict import predict as predict
from ._train import train as train
