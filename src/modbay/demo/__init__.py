"""`modbay demo`: one voice assistant in many languages on a frozen MiniLM, and two languages that arrive later."""

from pathlib import Path

from ._files import ask as ask
from ._files import assistant as assistant
from ._report import show, terminal
from ._run import FULL, SMOKE, Results, course


def run(smoke: bool = False, out: Path = Path("modbay-demo"), seed: int = 0) -> Results:
    """Train, let two languages arrive, write the modules to `out`, print the tables; returns what was found.

    **Arguments:** `smoke`: a few steps on a little data, by the same code; `seed`: of data, draws and training.
    """
    out = Path(out)
    console = terminal()
    results = course(SMOKE if smoke else FULL, out, seed, console)
    show(results, out, console)
    return results
