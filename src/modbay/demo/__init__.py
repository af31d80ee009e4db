"""`modbay demo`: one voice assistant in many languages on a frozen MiniLM, and two languages that arrive later."""

from ._arrivals import Way as Way
from ._data import Utterance as Utterance
from ._data import load as load
from ._run import Results as Results
from ._run import run as run
from ._write import minilm as minilm
from ._write import write as write
