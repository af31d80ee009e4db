"""Training: a run from labelled data to a folder with its modules, and what can be done with such a folder."""

from ._config import Config as Config
from ._config import config as config
from ._config import read_config as read_config
from ._fit import ready as ready
from ._fit import train as train
from ._predict import predict as predict
from ._progress import Progress as Progress
from ._progress import Silent as Silent
from ._run import Run as Run
from ._run import open_run as open_run
