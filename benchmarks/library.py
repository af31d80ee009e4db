"""A library of many modules: how long its index, list, search and show take.

    python benchmarks/library.py                # 10,000 LoRAs of rank 2 at four sites
    python benchmarks/library.py --modules 1000

Seconds of the processor, which other work on the machine does not lengthen, and of the clock. The first list reads
every record; later ones only ask the file system for what has changed.
"""

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import nn

import modbay as mb
from modbay.library import Library, content

LANGUAGES = ("en", "de", "fr", "pt", "sw", "fi", "tr", "zh")


def write(folder: Path, count: int) -> None:
    """`count` modules of one bay, each with tensors, labels, a metric and an embedding of its own."""
    net = nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)])
    bay = mb.attach(net, at="[0-9]", modules={"one": mb.LoRA(2)}, name="many")
    bay.save(folder / ".one")
    record = json.loads((folder / ".one/many/one/module.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / ".one/many/one/module.safetensors")
    rng = random.Random(0)
    for k in range(count):
        tensors = {key: torch.randn_like(tensor) for key, tensor in tensors.items()}
        raw = save(tensors, {"format": "pt"})
        about = {
            "labels": {"language": [LANGUAGES[k % len(LANGUAGES)]]}, "metrics": {"accuracy": round(rng.random(), 4)},
            "notes": f"Module {k} of the benchmark.", "embedding": [round(rng.gauss(0, 1), 4) for _ in range(32)],
        }  # fmt: skip
        digest = hashlib.sha256(raw).hexdigest()
        said = {**record, "module": f"m{k}", "content": content(record, tensors), "about": about, "sha256": digest}
        path = folder / "many" / f"m{k:05d}"
        path.mkdir(parents=True)
        (path / "module.safetensors").write_bytes(raw)
        (path / "module.json").write_text(json.dumps(said), encoding="utf-8")


def timed(what: str, work: Callable[[], Any], repeats: int = 3) -> Any:
    """Do it, and print the shortest time."""
    spent = []
    for _ in range(repeats):
        began = time.process_time(), time.perf_counter()
        out = work()
        spent.append((time.process_time() - began[0], time.perf_counter() - began[1]))
    processor, clock = min(spent)
    print(f"| {what} | {processor:.2f} | {clock:.2f} |", flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", type=int, default=10_000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "library"
        write(folder, given.modules)
        print(f"{given.modules:,} modules\n\n| | processor s | clock s |\n| --- | ---: | ---: |")
        several = timed("index: the first list", lambda: Library(folder).entries(), 1)
        assert len(several) == given.modules
        timed("list", lambda: Library(folder).entries())
        timed("list, one of them new since", lambda: (touch(folder), Library(folder).entries()))
        found = timed(
            "search by label and metric", lambda: Library(folder).search(labels=["en"], metrics=["accuracy>0.9"])
        )
        assert found
        timed("search by words", lambda: Library(folder).search("benchmark 77"))
        timed("search by embeddings", lambda: Library(folder).search(near=[1.0] * 32, limit=10))
        alike = lambda: Library(folder).search(like="m00077", limit=10)
        timed("search by what modules change, the first: sketches are made", alike, 1)
        assert timed("search by what modules change", alike)[0].name == "many/m00077"
        timed("show", lambda: (lib := Library(folder)).read(lib.find("many/m00077").path))
        timed("verify", lambda: Library(folder).verify(), 1)
        timed("gc", lambda: Library(folder).gc(), 1)
        command = [sys.executable, "-m", "modbay", "library", "list", "--json", "--library", str(folder)]
        alone = [sys.executable, "-c", "import modbay.cli"]
        for what, run in (("`modbay library list --json`", command), ("of which: import modbay", alone)):
            began = time.perf_counter()
            subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
            print(f"| {what} | | {time.perf_counter() - began:.2f} |")


def touch(folder: Path) -> None:
    """One record written anew."""
    path = folder / "many/m00000/module.json"
    path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
