"""Merging checkpoints: modbay, mergekit and a copy of the same files, in turn, on a warm page cache, one thread.

    python benchmarks/merging.py [--mergekit PYTHON] [--models 2 4 8] [--rounds 5] [--json FILE] [--equal]

PYTHON is an interpreter that has mergekit, which wants other versions: `pip install mergekit==0.1.5` in an environment
of its own. A copy reads every input, read(), and writes one output of their size, write(); a chunked one goes through
a buffer of 1 MiB. Both end with fsync, as modbay does and mergekit does not. Each run is a process of its own, as a
user's is: it begins as a copy of one that has imported all and has merged two small checkpoints, so that no import is
counted.
Last the two commands are run as they are typed.
`hashed`: modbay when it reads all inputs for their SHA-256, as the first merge of a file does; `modbay`: when they are
known. MiB: the peak of anonymous memory beyond what the process had at first. CPU ratios are of the least seconds, wall
ratios of medians. --equal: the largest differences of the two outputs, too; of DARE, whose draws differ, the shares of
entries that moved, and how far.
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
        if given.mergekit:
            print(typed(folder, given.mergekit), flush=True)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


def compare(way: str, n: int, folder: Path, sides: dict, given: argparse.Namespace) -> dict:
    base = way not in ("linear", "slerp")
    call = {"way": way, "inputs": [str(folder / f"m{i}") for i in range(n + base)], "base": base}
    verbs = {
        "copy": "modbay",
        "chunked": "modbay",
        "hashed": "modbay",
        "modbay": "modbay",
    }
    verbs |= {"mergekit": "mergekit"} if "mergekit" in sides else {}
    ran: dict[str, list] = {verb: [] for verb in verbs}
    for _ in range(given.rounds):
        for verb, side in verbs.items():
            if sum(one["seconds"] for one in ran[verb]) < given.patience:
                out = folder / f"out-{verb}"
                shutil.rmtree(out, ignore_errors=True)
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
        outs, base = (folder / "out-modbay", folder / "out-mergekit"), folder / "m0"
        said.append(shares(*outs, base) if "dare" in way else f"largest difference: {difference(*outs)}")
    for verb in verbs:
        shutil.rmtree(folder / f"out-{verb}", ignore_errors=True)
    return {"way": way, "models": n, "ran": ran, "line": f"{way}, {n}: " + "\n    ".join(["", *said])}


def typed(folder: Path, mergekit: str) -> str:
    """The commands as they are typed, an average of two, imports and all: the least CPU seconds of three runs each."""
    import resource

    recipe, out, said = folder / "recipe.yaml", folder / "typed", []
    models = "".join(f"  - model: {folder / one}\n    parameters: {{weight: 1.0}}\n" for one in ("m0", "m1"))
    recipe.write_text(f"merge_method: linear\ndtype: float32\nmodels:\n{models}")
    commands = {
        "modbay merge": [str(Path(sys.executable).with_name("modbay")), "merge", str(recipe), "--out", str(out)],
        "mergekit-yaml": [str(Path(mergekit).with_name("mergekit-yaml")), str(recipe), str(out), "--quiet"],
    }
    for name, command in commands.items():
        took = []
        for _ in range(3):
            shutil.rmtree(out, ignore_errors=True)
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        said.append(f"{name} {min(took):.1f} s")
    return f"as typed, linear of 2: {', '.join(said)} CPU"


class Side:
    """A process that merges when it is asked, and whose memory is watched from here."""

    def __init__(self, python: str, folder: Path) -> None:
        more = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(folder / "cache")}
        command = [python, __file__, "--serve"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | more
        )
        self.said = json.loads(self.process.stdout.readline())

    def ask(self, call: dict) -> dict[str, float]:
        import select

        answers = self.process.stdout
        print(json.dumps(call), file=self.process.stdin, flush=True)
        pid = int(answers.readline())
        own = most = anonymous(pid)
        print(file=self.process.stdin, flush=True)  # go on
        while not select.select([answers], [], [], 0.005)[0]:
            most = max(most, anonymous(pid))
        line = answers.readline()
        if not line.startswith("{"):
            raise RuntimeError(f"{call}: {line or 'its process ended'}")
        return json.loads(line) | {"mib": (most - own) / 2**20}


def anonymous(pid: int) -> float:
    """Bytes."""
    try:
        said = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:  # it has ended
        return 0.0
    return float(said[1]) * 1024 if said else 0.0


def serve() -> None:
    """The other process: a call a line, for each of which it forks; its seconds back."""
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

    with tempfile.TemporaryDirectory() as where:  # what is imported late is imported now
        small = [str(Path(where) / f"s{i}") for i in range(3)]
        for i, folder in enumerate(small):
            write(Path(folder), i, {**CONFIG, "num_hidden_layers": 1, "hidden_size": 48, "intermediate_size": 96})
        for way in WAYS:
            base = way not in ("linear", "slerp")
            merge({"way": way, "inputs": small[: 2 + base], "base": base, "out": str(Path(where) / way)})
    said = {one: version(one) for one in (name, "torch", "safetensors")}
    print(json.dumps(said | {"python": sys.version.split()[0]}), file=answers, flush=True)
    while line := sys.stdin.readline():
        call = json.loads(line)
        run = {"copy": copy, "chunked": chunked}.get(call["verb"], merge)
        if call["verb"] == "hashed":
            shutil.rmtree(Path(os.environ["XDG_CACHE_HOME"]) / "modbay", ignore_errors=True)
        pid = os.fork()
        if pid == 0:
            print(os.getpid(), file=answers, flush=True)
            sys.stdin.readline()
            try:
                began, cpu = time.perf_counter(), time.process_time()
                run(call)
                took = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}
                print(json.dumps(took), file=answers, flush=True)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=answers, flush=True)
            finally:
                os._exit(0)
        os.waitpid(pid, 0)


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
    """Every file is read whole; as many bytes as one of them has are written."""
    out = Path(call["out"])
    out.mkdir(exist_ok=True)
    with open(out / "copy", "wb", buffering=0) as made:
        several = []
        for name in call["inputs"]:
            with open(Path(name) / "model.safetensors", "rb", buffering=0) as file:
                several.append(file.read())
        octets = memoryview(several[0])
        while octets:  # one call writes 2 GiB at most
            octets = octets[made.write(octets) :]
        os.fsync(made.fileno())


def chunked(call: dict) -> None:
    """The same through a buffer that the processor's cache holds."""
    buffer, out = bytearray(CHUNK), Path(call["out"])
    out.mkdir(exist_ok=True)
    with open(out / "copy", "wb", buffering=0) as made:
        for i, name in enumerate(call["inputs"]):
            with open(Path(name) / "model.safetensors", "rb", buffering=0) as file:
                while n := file.readinto(buffer):
                    if i == 0:
                        made.write(memoryview(buffer)[:n])
        os.fsync(made.fileno())


def write(folder: Path, seed: int, config: dict = CONFIG) -> None:
    """A Llama of 70 million numbers, unless told."""
    import torch
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(seed)
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes = {"model.embed_tokens.weight": (v, d), "lm_head.weight": (v, d), "model.norm.weight": (d,)}
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        shapes |= {f"{at}self_attn.{one}_proj.weight": (d, d) for one in "qkvo"}
        shapes |= {f"{at}mlp.gate_proj.weight": (f, d), f"{at}mlp.up_proj.weight": (f, d)}
        shapes |= {f"{at}mlp.down_proj.weight": (d, f)}
        shapes |= {f"{at}{one}_layernorm.weight": (d,) for one in ("input", "post_attention")}
    folder.mkdir()
    made = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    save_file(made, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def loaded(folder: Path) -> dict:
    from safetensors.torch import load_file

    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def difference(one: Path, other: Path) -> str:
    """The largest, and how many differ by more than rounding: TIES may keep another of two that are as large."""
    mine, theirs = loaded(one), loaded(other)
    assert mine.keys() == theirs.keys()
    apart = [(mine[name] - theirs[name]).abs() for name in mine]
    far, n = sum(int((t > 1e-5).sum()) for t in apart), sum(t.numel() for t in apart)
    return f"{max(float(t.max()) for t in apart):.2g}; {far:,} of {n:,} entries differ by more than 1e-5"


def shares(one: Path, other: Path, base: Path) -> str:
    """What share of all entries stayed as the base has them, and how far the rest went: of both outputs."""
    said, start = [], loaded(base)
    for folder in (one, other):
        moved = [(t - start[name]).flatten() for name, t in loaded(folder).items()]
        n, kept = sum(len(t) for t in moved), sum(int(t.count_nonzero()) for t in moved)
        said.append(f"{kept / n:.4f} moved, by {(sum(float(t.double().square().sum()) for t in moved) / n) ** 0.5:.4f}")
    return f"modbay {said[0]}; mergekit {said[1]} (root mean square)"


if __name__ == "__main__":
    main()
