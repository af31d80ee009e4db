"""Routes of a run as rows come: what routers chose that are not known before they see a call."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from .. import recording
from ..abstract import Router
from ..attach import bays
from ..data import Row
from ..metrics import Recorder
from ._routes import HEADS

POSITIONS = 4096  # of which is looked at which tokens went where


def reads(router: Router | None) -> bool:
    """Whether routes are known only when rows come: a router that reads x, or two labels, or one for each site."""
    return router is None or router.reads_x or len(router.keywords) > 1


def _learns(router: Any) -> bool:
    return router is not None and any(True for _ in router.parameters())


@contextmanager
def watched(model: nn.Module, when: str = "evaluation") -> Iterator[Recorder]:
    """Record the bays whose routes are known only when rows come; in training those that learn, too."""
    with ExitStack() as stack:
        found = {}
        for name, bay in bays(model).items():
            routers = [bay.state.router, *(modular.router for modular in bay.modulars.values())]
            learns = when == "training" and any(map(_learns, routers))
            if name != HEADS and (reads(bay.state.router) or learns):
                tokens = 0 if when == "training" else POSITIONS
                found[name] = stack.enter_context(bay.record(when=when, tokens=tokens))
        yield Recorder(found)


def telling(recorder: Recorder, labels: Sequence[str]) -> Callable[[Sequence[Row]], object]:
    """What tells a recording the labels of each batch."""
    mine = [label for label in labels if label != "task"]
    return lambda batch: recorder.label(**{label: [row.labels.get(label) for row in batch] for label in mine})


def told(recorder: Recorder, labels: Sequence[str], tokenizer: Any = None) -> dict[str, list[Any]]:
    """What was recorded, as facts: by label, or of all rows where there is none."""
    decode = getattr(tokenizer, "convert_ids_to_tokens", str)
    shown = [label for label in labels if label != "task"] or [""]
    return recording.facts(list(recorder.bays.values()), shown, decode)
