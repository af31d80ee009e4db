"""Random numbers that are made again from a seed instead of being stored: the same on every machine and device.

NumPy's legacy generator, whose numbers it promises never to change (NEP 19), is told what is drawn; torch's are not.
"""

import math
import zlib

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

CHUNK = 1 << 20  # numbers drawn at once, in double precision


def generator(*seed: object) -> np.random.RandomState:
    """The generator of a seed: any values, told apart by how they print."""
    return np.random.RandomState(zlib.crc32(repr(seed).encode()))


def normals(random: np.random.RandomState, *shape: int) -> Float[Tensor, "..."]:
    """Standard normal numbers, float32."""
    flat = np.empty(math.prod(shape), dtype=np.float32)
    for start in range(0, len(flat), CHUNK):
        flat[start : start + CHUNK] = random.standard_normal(min(CHUNK, len(flat) - start))
    return torch.from_numpy(flat).view(shape)


def uniforms(random: np.random.RandomState, bound: float, *shape: int) -> Float[Tensor, "..."]:
    """Numbers evenly from −bound to bound, float32."""
    return torch.from_numpy(random.uniform(-bound, bound, shape).astype(np.float32))
