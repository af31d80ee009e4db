"""The fingerprint of a base: a digest for each tensor of its trunk, so that no module is put on another base unnoticed.

Two columns: the bytes as they are, and the bytes of the values in bfloat16, which a float32 model and its bfloat16 copy
share. Sampling misses a single changed weight, and float16 rounds differently, so neither is used.
"""

import hashlib
import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from ..core import base_type, quantised
from ..errors import BaseMismatch, FileError, listed
from ._packed import Packed, packed

LOG = logging.getLogger("modbay")

CHUNK = 1 << 20  # elements hashed at a time: a whole tensor cast to bfloat16 is slower, and doubles the memory
LENGTH = 16  # hexadecimal digits kept of each SHA-256


def octets(t: Tensor) -> Any:
    """The bytes of a flat tensor on the host."""
    return t.contiguous().cpu().view(torch.uint8).numpy()


def digests(t: Tensor, chunk: int = CHUNK) -> tuple[str, str]:
    """(SHA-256 of dtype, shape and bytes; SHA-256 of shape and the values as bfloat16), shortened."""
    raw, canonical = hashlib.sha256(f"{t.dtype}{tuple(t.shape)}".encode()), hashlib.sha256(f"{tuple(t.shape)}".encode())
    for part in t.detach().reshape(-1).split(chunk):
        raw.update(octets(part))
        canonical.update(octets(part.to(torch.bfloat16)))
    return raw.hexdigest()[:LENGTH], canonical.hexdigest()[:LENGTH]


def checksum(t: Tensor) -> int:
    """The sum of the bits, read as integers: ten times faster than a digest, and changed by any one changed weight."""
    octets = t.detach().contiguous().view(-1).view(torch.uint8)
    octets = octets.clone() if octets.storage_offset() % 8 else octets  # a part of a larger tensor
    cut = octets.numel() // 8 * 8
    return int(octets[:cut].view(torch.int64).sum()) + int(octets[cut:].sum())


def entry(name: str, t: Tensor | Packed) -> str:
    """The line of one tensor, "dtype raw bfloat16"; remembered with the tensor for as long as it stays the same.

    A packed weight is "packed", and has one digest of all its tensors, twice. `_version` misses what is written through
    `.data`, so that a checksum is part of what must not have changed.
    """
    if isinstance(t, Packed):
        whole = hashlib.sha256("\n".join(entry(name, part) for part in t).encode()).hexdigest()[:LENGTH]
        return f"packed {whole} {whole}"
    if t.device.type == "meta":
        raise FileError(
            f"the base's {name!r} is on the meta device: it has no values to compare. Load its weights first."
        )
    key = (t.data_ptr(), t._version, t.dtype, tuple(t.shape), checksum(t))
    known = t.__dict__.get("_modbay_digest")
    if known is None or known[0] != key:
        known = (key, " ".join((str(t.dtype).removeprefix("torch."), *digests(t))))
        t._modbay_digest = known  # type: ignore[attr-defined]
    return known[1]


def trunk(model: nn.Module) -> dict[str, nn.Parameter | Packed]:
    """The base's own parameters, under names without `base_model_prefix`: heads are outside, for they are often new."""
    body = getattr(model, getattr(model, "base_model_prefix", "") or "", None)
    body = body if isinstance(body, nn.Module) else model
    own: dict[str, nn.Parameter | Packed] = {n: p for n, p in body.named_parameters() if "_bay" not in n.split(".")}
    return own | packed(body)


def lines(parameters: Mapping[str, Tensor | Packed], names: Iterable[str]) -> dict[str, str]:
    names = list(names)
    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter's lock
        return dict(zip(names, pool.map(lambda name: entry(name, parameters[name]), names), strict=True))


def combined(table: Mapping[str, str]) -> dict[str, Any]:
    """A whole table in short: its dtypes, and one digest a column."""
    rows = [(name, *table[name].split()) for name in sorted(table)]
    short = lambda lines: hashlib.sha256("\n".join(lines).encode()).hexdigest()[:LENGTH]
    return {
        "dtypes": sorted({dtype for _, dtype, _, _ in rows}),
        "digest": short(f"{name} {raw}" for name, _, raw, _ in rows),
        "canonical": short(f"{name} {bf16}" for name, _, _, bf16 in rows),
    }


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """What files say of the base: class, name, revision, and the digests of the trunk's frozen tensors.

    What is being trained is outside: it is named in `learned`, and the base's own checkpoint must carry it.
    """
    parameters, config = trunk(model), getattr(model, "config", None)
    table = lines(parameters, [name for name, p in parameters.items() if not p.requires_grad])
    return {
        "class": base_type(model).__name__,
        "name": getattr(config, "_name_or_path", None) or None,
        "revision": getattr(config, "_commit_hash", None),
        "learned": [name for name, p in parameters.items() if p.requires_grad],
        **combined(table),
        "tensors": table,
    }


Columns = tuple[list[str], str, str]  # dtypes, raw, canonical

PLAIN = {"float64", "float32", "bfloat16", "float16"}


def compare(theirs: Mapping[str, Any], model: nn.Module, what: str) -> None:
    """Raise BaseMismatch, naming the tensors, if the model is not the base that a file was made on.

    Same dtype: the bytes must be the same. Another: the values in bfloat16 must be; float16 can't be compared. A tensor
    that is quantised on one side only can't either, nor can one that two kernels pack differently: then the name and
    the revision of the base must be the same, and a warning is logged.
    A file without a table of tensors (a module alone) has one digest for all, which can't name the tensors.
    """
    parameters = trunk(model)
    table, learned = theirs.get("tensors"), set(theirs["learned"])
    ours = lines(parameters, [name for name in parameters if name not in learned])
    if table is None:
        found = {_whole(theirs, combined(ours)): ["one digest for all"]}
    else:
        found = {
            "missing": [name for name in table if name not in ours],
            "new": [name for name in ours if name not in table],
        }
        for name in (name for name in ours if name in table):
            found.setdefault(_verdict(_columns(table[name]), _columns(ours[name])), []).append(name)
    texts = {"other": "tensors differ", "missing": "tensors are missing here", "new": "tensors are new here"}
    wrong = [f"{text}: {listed(found[key])}" for key, text in texts.items() if found.get(key)]
    if wrong:
        raise BaseMismatch(_message(what, theirs, model, "; ".join(wrong)))
    if found.get("half"):
        why = f"one of the two is in float16, whose rounding can't be checked ({listed(found['half'], 3)})"
        way = " Or load the base in float32 or bfloat16, load the modules, then call .half()."
        raise BaseMismatch(_message(what, theirs, model, why) + way)
    for why in ("packed", "repacked"):
        if found.get(why):
            _by_name(theirs, model, what, found[why], why == "repacked")


def _whole(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    a, b = ((said["dtypes"], said["digest"], said["canonical"]) for said in (theirs, ours))
    return _verdict(a, b)


def _columns(line: str) -> Columns:
    dtype, raw, canonical = line.split()
    return [dtype], raw, canonical


def _verdict(theirs: Columns, ours: Columns) -> str:
    """What the two columns of two tensors say: "same", "other", or why they can't be compared."""
    (a, raw_a, bf16_a), (b, raw_b, bf16_b) = theirs, ours
    if a == b:
        different = "other" if {*a} <= PLAIN else "repacked"
        return "same" if raw_a == raw_b else different
    if not {*a, *b} <= PLAIN:
        return "packed"
    if "float16" in {*a, *b}:
        return "half"
    return "same" if bf16_a == bf16_b else "other"


def _by_name(
    theirs: Mapping[str, Any], model: nn.Module, what: str, tensors: list[str], repacked: bool
) -> None:  # fmt: skip
    """A quantised base has other numbers: its name and revision must do; between two, the revision must be known."""
    config = getattr(model, "config", None)
    made = (theirs["name"], theirs["revision"])
    ours = (getattr(config, "_name_or_path", None) or None, getattr(config, "_commit_hash", None))
    here = any(quantised(module) for module in model.modules())
    sides = "quantised here, and floats in the file" if here else "floats here, and quantised in the file"
    said = f"{len(tensors)} tensors are {'quantised otherwise' if repacked else sides} ({listed(tensors, 3)})"
    if ours[0] is None or ours != made or (repacked and ours[1] is None):
        known = "known and the same" if repacked else "the same"
        why = (
            f"{said}, and can't be compared by value. Then the base's name and revision must be {known}, which are "
            f"{made} in the file and {ours} here"
        )
        raise BaseMismatch(_message(what, theirs, model, why))
    LOG.warning("%s: %s. Name and revision are the same, %s, so that it is taken for the same base; its outputs differ "
                "by what quantising costs.", what, said, made)  # fmt: skip


def _message(what: str, theirs: Mapping[str, Any], model: nn.Module, why: str) -> str:
    made = f"{theirs['class']} {theirs['name'] or ''}".strip()
    return (
        f"{what} was made on another base ({made}) than this {base_type(model).__name__}: {why}. Load the base that it "
        f'was made on; or, if you know that the difference does not matter, pass base="any".'
    )
