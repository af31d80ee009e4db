"""A transformers model with its weights, by the class that its config names; never with code of the model's own."""

import logging
from pathlib import Path
from typing import Any

from torch import nn

from ._say import fail


def weighed(name: str, dtype: str | None = None) -> nn.Module:
    """The model in a folder, or of the hub, in its own dtype unless said."""
    try:
        import transformers
    except ModuleNotFoundError:
        fail(f"MODEL={name!r}: to read a transformers model, pip install 'modbay[hf]'.")
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        fail(f"MODEL={name!r}: the folder has no config.json, so that it holds no transformers model.")
    quiet = logging.getLogger("transformers.modeling_utils")
    level = quiet.level
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        said = [getattr(transformers, said, None) for said in config.architectures or []]
        auto: Any = next((c for c in said if c is not None), transformers.AutoModel)
        quiet.setLevel(logging.ERROR)
        return auto.from_pretrained(name, dtype=dtype or "auto").eval()
    except ImportError as error:
        fail(f"MODEL={name!r}: it needs a package that is not here ({' '.join(str(error).split(chr(10))[0].split())}).")
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        where = "it can't be read" if folder.exists() else "no such folder, and the hub gave no model"
        fail(f"MODEL={name!r}: {where} ({' '.join(str(error).split(chr(10))[0].split())}).")
    finally:
        quiet.setLevel(level)


def named(values: list[str]) -> dict[str, float]:
    """NAME or NAME=WEIGHT, as {name: weight}."""
    out: dict[str, float] = {}
    for one in values:
        name, equals, weight = one.partition("=")
        try:
            out[name] = float(weight) if equals else 1.0
        except ValueError:
            fail(f"--use {one}: NAME or NAME=WEIGHT is wanted, and {weight!r} is no number.")
    return out
