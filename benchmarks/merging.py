"""Merging checkpoints: modbay, mergekit and a copy of the same files, in turn, on a warm page cache, one thread.

    python benchmarks/merging.py [--mergekit PYTHON] [--models 2 4 8] [--rounds 5] [--json FILE] [--equal]

PYTHON is an interpreter that has mergekit, which wants other versions: `pip install mergekit==0.1.5` in an environment
of its own. A copy reads every input and writes one output of their size, with fsync, as modbay does and mergekit does
not. Each side is one process, and imports are not counted. `hashed`: modbay when it reads all inputs for their SHA-256,
as the first merge of a file does; `modbay`: when they are known. MiB: the peak of anonymous memory beyond the process'
own after its imports. CPU ratios are of the least seconds, wall ratios of medians. --equal: the largest differences of
the two outputs, too.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WAYS = {
    "linear": {},
    "task_arithmetic": {"lambda": 0.3},
    "slerp": {"t": 0.3},
    "ties": {"density": 0.2},
    "dare_linear": {"density": 0.2},
}
CHUNK = 1 << 20
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 768, "intermediate_size": 2048,
    "num_attention_heads": 12, "num_key_value_heads": 12, "num_hidden_layers": 8, "vocab_size": 9000,
    "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--mergekit", metavar="PYTHON")
    asked.add_argument("--models", type=int, nargs="*", default=[2, 4, 8])
    asked.add_argument("--rounds", type=int, default=5)
    asked.add_argument("--patience", type=float, default=30, help="seconds, after which one has no more rounds")
    asked.add_argument("--ways", nargs="*", default=list(WAYS))
    asked.add_argument("--folder", type=Path)
    asked.add_argument("--json", type=Path)
    asked.add_argument("--equal", action="store_true")
    asked.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = asked.parse_args()
    if given.serve:
        serve()
        return
    rows = []
    with tempfile.TemporaryDirectory(dir=given.folder) as where:
        folder = Path(where)
        for i in range(max(given.models) + 1):
            write(folder / f"m{i}", i)
        os.sync()
        sides = {"modbay": Side(sys.executable, folder)}
        sides |= {"mergekit": Side(given.mergekit, folder)} if given.mergekit else {}
        print({name: side.said for name, side in sides.items()}, flush=True)
        for way in given.ways:
            for n in given.models:
                if way != "slerp" or n == 2:
                    rows.append(compare(way, n, folder, sides, given))
                    print(rows[-1]["line"], flush=True)
        for side in sides.values():
            side.process.stdin.close()
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


def compare(way: str, n: int, folder: Path, sides: dict, given: argparse.Namespace) -> dict:
    base = way not in ("linear", "slerp")
    call = {"way": way, "inputs": [str(folder / f"m{i}") for i in range(n + base)], "base": base}
    verbs = {"copy": "modbay", "hashed": "modbay", "modbay": "modbay"}  # whose hashes are known then
    verbs |= {"mergekit": "mergekit"} if "mergekit" in sides else {}
    ran: dict[str, list] = {verb: [] for verb in verbs}
    for _ in range(given.rounds):
        for verb, side in verbs.items():
            if sum(one["seconds"] for one in ran[verb]) < given.patience:
                out = folder / f"out-{verb}"
                ran[verb].append(sides[side].ask(call | {"verb": verb, "out": str(out)}))
                if not (given.equal and verb in ("modbay", "mergekit")):
                    shutil.rmtree(out, ignore_errors=True)
    least = {verb: min(one["cpu"] for one in several) for verb, several in ran.items()}
    median = {verb: statistics.median(one["seconds"] for one in several) for verb, several in ran.items()}
    peak = {verb: max(one["mib"] for one in several) for verb, several in ran.items()}
    said = [
        f"{verb} {least[verb]:.2f} s CPU ({least[verb] / least['copy']:.2f} copies; wall {median[verb]:.2f} s, "
        f"{median[verb] / median['copy']:.2f}; {peak[verb]:.0f} MiB; {len(ran[verb])} rounds)"
        for verb in ran
    ]
    if "mergekit" in ran:
        said.append(
            f"mergekit / modbay: {least['mergekit'] / least['modbay']:.1f} CPU, "
            f"{median['mergekit'] / median['modbay']:.1f} wall; hashed {least['mergekit'] / least['hashed']:.1f} CPU"
        )
    if given.equal and "mergekit" in ran:
        said.append("largest difference: " + f"{difference(folder / 'out-modbay', folder / 'out-mergekit'):.2g}")
    for verb in verbs:
        shutil.rmtree(folder / f"out-{verb}", ignore_errors=True)
    return {"way": way, "models": n, "ran": ran, "line": f"{way}, {n}: " + "\n    ".join(["", *said])}


class Side:
    """A process that merges when it is asked, and whose memory is watched from here."""

    def __init__(self, python: str, folder: Path) -> None:
        more = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(folder / "cache")}
        command = [python, __file__, "--serve"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | more
        )
        self.said = json.loads(self.process.stdout.readline())
        self.own = self.anonymous()

    def ask(self, call: dict) -> dict[str, float]:
        import select

        print(json.dumps(call), file=self.process.stdin, flush=True)
        most = 0.0
        while not select.select([self.process.stdout], [], [], 0.005)[0]:
            most = max(most, self.anonymous() - self.own)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{call}: its process ended")
        return json.loads(line) | {"mib": most / 2**20}

    def anonymous(self) -> float:
        said = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())
        return float(said[1]) * 1024 if said else 0.0


def serve() -> None:
    """The other process: a call a line, the seconds of each back."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    import torch

    torch.set_num_threads(1)
    try:
        from modbay import checkpoints

        merge, name = lambda call: by_modbay(checkpoints, call), "modbay"
    except ImportError:
        import mergekit.merge  # type: ignore[import-not-found] # noqa: F401

        merge, name = by_mergekit, "mergekit"
    from importlib.metadata import version

    said = {one: version(one) for one in (name, "torch", "safetensors")}
    print(json.dumps(said | {"python": sys.version.split()[0]}), file=answers, flush=True)
    for line in sys.stdin:
        call = json.loads(line)
        if call["verb"] == "hashed":
            shutil.rmtree(Path(os.environ["XDG_CACHE_HOME"]) / "modbay", ignore_errors=True)
        began, cpu = time.perf_counter(), time.process_time()
        (copy if call["verb"] == "copy" else merge)(call)
        took = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}
        print(json.dumps(took), file=answers, flush=True)


def by_modbay(checkpoints, call: dict) -> None:
    base, models = (call["inputs"][0], call["inputs"][1:]) if call["base"] else (None, call["inputs"])
    checkpoints.merge(checkpoints.Recipe(call["way"], models, base, WAYS[call["way"]]), call["out"])


def by_mergekit(call: dict) -> None:
    from mergekit.config import MergeConfiguration  # type: ignore[import-not-found]
    from mergekit.merge import run_merge  # type: ignore[import-not-found]
    from mergekit.options import MergeOptions  # type: ignore[import-not-found]

    way, inputs = call["way"], call["inputs"]
    own = {"weight": 1.0} | ({"density": 0.2} if "density" in WAYS[way] else {})
    models = [{"model": one, "parameters": own} for one in inputs[call["base"] :]]
    recipe = {"merge_method": way, "dtype": "float32", "models": models}
    whole = {key: value for key, value in WAYS[way].items() if key != "density"}
    if way == "slerp":
        recipe["models"] = [{"model": one} for one in inputs]
    recipe |= {"parameters": whole} if whole else {}
    recipe |= {"base_model": inputs[0]} if call["base"] or way == "slerp" else {}
    options = MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False)
    run_merge(MergeConfiguration.model_validate(recipe), call["out"], options)


def copy(call: dict) -> None:
    """Every byte of the inputs is read; as many as one of them has are written."""
    buffer, out = bytearray(CHUNK), Path(call["out"])
    out.mkdir(exist_ok=True)
    with open(out / "copy", "wb", buffering=0) as made:
        for i, name in enumerate(call["inputs"]):
            with open(Path(name) / "model.safetensors", "rb", buffering=0) as file:
                while n := file.readinto(buffer):
                    if i == 0:
                        made.write(memoryview(buffer)[:n])
        os.fsync(made.fileno())


def write(folder: Path, seed: int) -> None:
    """A Llama of 70 million numbers."""
    import torch
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(seed)
    d, f, v = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    shapes = {"model.embed_tokens.weight": (v, d), "lm_head.weight": (v, d), "model.norm.weight": (d,)}
    for i in range(CONFIG["num_hidden_layers"]):
        at = f"model.layers.{i}."
        shapes |= {f"{at}self_attn.{one}_proj.weight": (d, d) for one in "qkvo"}
        shapes |= {f"{at}mlp.gate_proj.weight": (f, d), f"{at}mlp.up_proj.weight": (f, d)}
        shapes |= {f"{at}mlp.down_proj.weight": (d, f)}
        shapes |= {f"{at}{one}_layernorm.weight": (d,) for one in ("input", "post_attention")}
    folder.mkdir()
    made = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    save_file(made, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))


def difference(one: Path, other: Path) -> float:
    from safetensors.torch import load_file

    load = lambda folder: {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}
    mine, theirs = load(one), load(other)
    assert mine.keys() == theirs.keys()
    return max(float((mine[name] - theirs[name]).abs().max()) for name in mine)


if __name__ == "__main__":
    main()
