"""Merging checkpoints against copying them: seconds, and anonymous memory, of the same files on a warm page cache.

    python benchmarks/merging.py [--million 70] [--models 2] [--rounds 3] [--folder DIR]

A copy reads every input and writes one output of their size, both with fsync. Each way runs in a process of its own,
one thread of torch; imports are not counted. Of a merge's CPU seconds, `hash s` go into the SHA-256 of its inputs, in
threads of their own, beside the merge where there are cores for it.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

WAYS = {
    "linear": {},
    "task_arithmetic": {"base": True, "parameters": {"lambda": 0.3}},
    "slerp": {"parameters": {"t": 0.3}, "two": True},
    "ties": {"base": True, "parameters": {"density": 0.2}},
    "dare_linear": {"base": True, "parameters": {"density": 0.2}},
}
CHUNK = 1 << 20


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--million", type=int, default=70, help="parameters of a model, float32")
    asked.add_argument("--models", type=int, default=2)
    asked.add_argument("--rounds", type=int, default=3)
    asked.add_argument("--ways", nargs="*", default=list(WAYS))
    asked.add_argument("--folder", type=Path)
    asked.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = asked.parse_args()
    if given.one:
        print(json.dumps(one(*given.one)))
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        for i in range(given.models + 1):
            write(Path(folder) / f"m{i}", given.million, i)
        heads = "".join(f"{head:>9}" for head in ("copy s", "CPU s", "merge s", "CPU s", "hash s"))
        print(f"{'way':27}{heads} {'MiB':>6}   best of {given.rounds}")
        for way in given.ways:
            n = 2 if WAYS[way].get("two") else given.models
            inputs = [f"m{i}" for i in range(n + bool(WAYS[way].get("base")))]
            copy, merge = (best(verb, folder, inputs, given.rounds) for verb in ("copy", way))
            hashes = best("hash", folder, inputs, given.rounds)
            print(
                f"{way + f', {len(inputs)} inputs':28} {copy['seconds']:8.2f} {copy['cpu']:8.2f} "
                f"{merge['seconds']:8.2f} {merge['cpu']:8.2f} {hashes['cpu']:8.2f} {merge['mib']:6.0f}",
                flush=True,
            )


def best(verb: str, folder: str, inputs: list[str], rounds: int) -> dict[str, float]:
    """The fastest of several processes."""
    command = [sys.executable, __file__, "--one", verb, folder, ",".join(inputs)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = lambda: subprocess.run(command, check=True, capture_output=True, text=True, env=one_thread).stdout
    return min((json.loads(ran()) for _ in range(rounds)), key=lambda said: said["cpu"])


def write(folder: Path, million: int, seed: int) -> None:
    """A model of 12 like layers."""
    torch.manual_seed(seed)
    folder.mkdir()
    side = int((million * 1e6 / 48) ** 0.5)
    made = {f"layers.{i}.{name}.weight": torch.randn(side, side) for i in range(12) for name in "qkvo"}
    save_file(made, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "bench", "num_hidden_layers": 12}))


def one(verb: str, where: str, names: str) -> dict[str, float]:
    """Seconds of one way, and the anonymous memory that it took beyond what the process had."""
    from modbay import checkpoints

    torch.set_num_threads(1)
    folder, inputs = Path(where), [str(Path(where) / name) for name in names.split(",")]
    out = folder / "out"
    before, most = anonymous(), 0.0

    def watch(*_) -> None:
        nonlocal most
        most = max(most, anonymous() - before)

    began, cpu = time.perf_counter(), time.process_time()
    if verb == "copy":
        copy(inputs, folder / "copy")
    elif verb == "hash":
        for name in inputs:
            with open(Path(name) / "model.safetensors", "rb") as file:
                hashlib.file_digest(file, "sha256")
    else:
        way = WAYS[verb]
        models = inputs[1:] if way.get("base") else inputs
        base = inputs[0] if way.get("base") else None
        recipe = checkpoints.Recipe(verb, models, base, way.get("parameters", {}))
        checkpoints.merge(recipe, out, watch=watch)
    took = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu, "mib": most / 2**20}
    shutil.rmtree(out, ignore_errors=True)
    (folder / "copy").unlink(missing_ok=True)
    return took


def copy(inputs: list[str], out: Path) -> None:
    """Every byte of the inputs is read; as many as one of them has are written."""
    buffer = bytearray(CHUNK)
    with open(out, "wb", buffering=0) as made:
        for i, name in enumerate(inputs):
            with open(Path(name) / "model.safetensors", "rb", buffering=0) as file:
                while n := file.readinto(buffer):
                    if i == 0:
                        made.write(memoryview(buffer)[:n])
        os.fsync(made.fileno())


def anonymous() -> float:
    """Bytes."""
    said = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    return float(said[1]) * 1024 if said else 0.0


if __name__ == "__main__":
    main()
