"""That old rows are answered as before: a print of each row's logits, so that millions of bits fit in memory."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...data import Row
from .._build import Network
from .._predict import all_logits
from .._progress import Progress

CHUNK, TEXT_CHUNK = 2048, 64  # rows whose logits are held at once; those of language models are large


def prints(network: Network, rows: Sequence[Row], progress: Progress, what: str) -> list[bytes]:
    """The SHA-256 of each row's logits, in batches that depend on the rows alone."""
    size = TEXT_CHUNK if network.encoder.kind in ("causal", "masked", "seq2seq") else CHUNK
    out: list[bytes] = []
    with progress.stage(what, len(rows)) as bar:
        for at in range(0, len(rows), size):
            out += [_print(one) for one in all_logits(network, rows[at : at + size])]
            bar.step(len(out))
    return out


def _print(logits: Tensor) -> bytes:
    """Of all bits, but for columns of −inf at the end, which are other heads' classes."""
    real = (logits != float("-inf")).flatten(0, -2).any(0) if logits.ndim > 1 else logits != float("-inf")
    width = int(real.nonzero().max()) + 1 if real.any() else 0
    whole = logits[..., :width].contiguous()
    said = f"{whole.dtype} {tuple(whole.shape)}".encode()
    return hashlib.sha256(said + whole.view(torch.uint8).numpy().tobytes()).digest()


def proof(before: Sequence[bytes], after: Sequence[bytes], run: str) -> dict[str, Any]:
    """As run.json keeps it."""
    changed = sum(one != other for one, other in zip(before, after, strict=True))
    what = f"logits of the test rows of {run}, before and after, in the same batches, bit by bit"
    return {"what": what, "rows": len(before), "changed": changed}


def sentence(said: dict[str, Any]) -> str:
    """The proof in words."""
    rows, changed = said["rows"], said["changed"]
    if changed:
        return f"{changed:,} of {rows:,} rows are answered with other logits than before"
    return f"Proved: the logits of all {rows:,} test rows of the run are, bit for bit, what they were before."
