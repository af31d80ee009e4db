"""Sketches: what a module changes in 256 numbers, so that the most alike of thousands are found without reading them.

    s_k = u_kᵀ ΔW v_k over all sites, with signs u_k, v_k drawn by the site's name:   E[s_k s'_k] = ⟨ΔW, ΔW'⟩

Of a low-rank update that is (u_kᵀ B)(A v_k). A cosine is then known to about 0.1: enough to choose whose exact one to
compute. Sketches are kept by content in a cache, FOLDER/.index, which can be deleted.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..abstract import Delta, Site
from ..deltas import LowRank, Sparse
from ..errors import FileError
from ._alike import Changes, site_of
from ._cache import keep, kept
from ._index import Entry

CACHE = Path(".index", "likeness.bin")
SIZE = 256
BYTES = 2 * SIZE  # as float16
FEW = 256  # modules up to which all exact cosines are computed
CHOSEN = 64  # of more

Kept = tuple[str, bytes | memoryview]  # ("deltas" or "parameters", the numbers)
NONE = ("", b"")


def closest(root: Path, several: Sequence[Entry], mine: Changes, read: Callable[[Path], Any]) -> list[Entry]:
    """Those that look most alike; all of them, if they are few."""
    if len(several) <= FEW:
        return list(several)
    known = _cached(root)
    fresh = False
    for one in several:
        if one.content and one.content not in known:
            try:
                known[one.content] = pack(sketch(Changes(read(one.path))))
                fresh = True
            except FileError:  # damaged: `verify` tells
                continue
    if fresh:
        keep(root / CACHE, {"contents": list(known), "of": [of for of, _ in known.values()]},
             b"".join(row for _, row in known.values()))  # fmt: skip
    of, own = sketch(mine)
    same = [one for one in several if known.get(one.content, NONE)[0] == of]
    raw = b"".join(known[one.content][1] for one in same)
    table = np.frombuffer(raw, "<f2").reshape(len(same), SIZE).astype(np.float32)
    score = table @ own.numpy() / np.maximum(np.linalg.norm(table, axis=1), 1e-12)
    return [same[i] for i in np.argsort(-score, kind="stable")[:CHOSEN]]


@torch.no_grad()
def sketch(changes: Changes) -> tuple[str, Tensor]:
    """("deltas" or "parameters", (256,), of length one)."""
    of = "parameters" if changes.deltas is None else "deltas"
    out = torch.zeros(SIZE)
    for name, whats in getattr(changes, of).items():
        site = site_of(changes.file, name)
        for what, pieces in whats.items():
            for piece in pieces:
                out += _one(piece, f"{name} {what}", site, what)
    return of, out / out.norm().clamp(min=1e-12)


def _one(piece: Any, name: str, site: Site, what: str) -> Tensor:
    """u_kᵀ ΔW v_k of one update of one tensor."""
    if isinstance(piece, LowRank) and piece.b.ndim == 2:
        a = piece.a.flatten(1).float()
        u, v = signs(name, piece.b.shape[0], a.shape[1])
        return ((u @ piece.b.float()) * (v @ a.mT)).sum(-1) * piece.s
    turned = site.form == "transposed" and what == "weight"
    if isinstance(piece, Sparse):
        if site.form not in ("linear", "transposed"):
            return torch.zeros(SIZE)  # its file does not tell the weight's shape: only what is exact finds it
        shape = (site.features("outputs"), site.features("inputs"))
        first, second = (t.long() for t in (piece.indices // shape[not turned], piece.indices % shape[not turned]))
        u, v = signs(name, *shape)
        rows, columns = (second, first) if turned else (first, second)
        return (u[:, rows] * v[:, columns]) @ piece.values.float()
    tensor = (piece.dense(site)[0] if isinstance(piece, Delta) else piece).float()
    matrix = tensor.reshape(tensor.shape[0] if tensor.ndim > 1 else 1, -1)
    matrix = matrix.mT if turned else matrix
    u, v = signs(name, *matrix.shape)
    return ((u @ matrix) * v).sum(-1)


@lru_cache(maxsize=512)
def signs(name: str, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """u (256, rows) and v (256, columns) of a site: the same in every process."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
    rng = np.random.default_rng(seed)
    draw = lambda n: torch.from_numpy(rng.integers(0, 2, (SIZE, n), dtype=np.int8)).float() * 2 - 1
    return draw(rows), draw(columns)


def pack(made: tuple[str, Tensor]) -> Kept:
    return made[0], made[1].numpy().astype("<f2").tobytes()


def _cached(root: Path) -> dict[str, Kept]:
    found = kept(root / CACHE)
    if found is None:
        return {}
    head, body = found
    if not len(head.get("contents", ())) == len(head.get("of", ())) == len(body) / BYTES:
        return {}  # of a version that keeps something else
    rows = [body[i : i + BYTES] for i in range(0, len(body), BYTES)]
    return dict(zip(head["contents"], zip(head["of"], rows, strict=True), strict=True))
