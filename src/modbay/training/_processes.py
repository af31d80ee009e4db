"""Several processes: one of them reads, prepares and writes first; the others find what it wrote."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import accelerate
import torch


def several() -> bool:
    """Whether this process is one of several, as torchrun starts them."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def first() -> bool:
    """Whether this process is the one that writes."""
    return int(os.environ.get("RANK", "0")) == 0


def on_cpu() -> bool:
    """Whether there is nothing else to run on."""
    return not torch.accelerator.is_available()


def wait() -> None:
    """Until all processes are here."""
    if several():
        _state().wait_for_everyone()


@contextmanager
def one_first() -> Iterator[None]:
    """The first process runs the body before the others do."""
    if several():
        with _state().main_process_first():
            yield
    else:
        yield


def _state() -> accelerate.PartialState:
    return accelerate.PartialState(cpu=on_cpu())
