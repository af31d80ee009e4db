"""What a module is, as one number: a hash over its kinds, sites and tensors, and over nothing else.

Its name, its date, its base and what is said about it are outside: two files that do the same have the same content.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ._fingerprint import octets

CHUNK = 1 << 22  # elements hashed at a time, so that a tensor on a device is copied in pieces


def content(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a module, in hexadecimal.

    record: module.json, or as much of it as "kinds", "sites" and "shared". tensors: by name, shared ones under one or
    all of theirs. Python modules that define kinds are outside, for classes move; so is the order of sites and tensors.
    """
    kinds = [_plain(said) for said in record["kinds"]]
    groups: dict[str, list[str]] = {}
    for alias, key in record["shared"].items():
        groups.setdefault(key, [key]).append(alias)
    said = {
        "sites": {site: {**one, "kind": kinds[one["kind"]]} for site, one in record["sites"].items()},
        "shared": sorted(sorted(group) for group in groups.values()),
        "tensors": {key: _digest(tensor) for key, tensor in tensors.items() if key not in record["shared"]},
    }
    for alias, key in record["shared"].items():
        said["tensors"][alias] = said["tensors"][key]
    return hashlib.sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """A kind as its file tells it, without where its class is defined."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    part = set(value) == {"class", "module", "arguments"}
    return {key: _plain(item) for key, item in value.items() if not (part and key == "module")}


def _digest(t: Tensor) -> str:
    found = hashlib.sha256(f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}".encode())
    for part in t.detach().reshape(-1).split(CHUNK):
        found.update(octets(part))
    return found.hexdigest()
