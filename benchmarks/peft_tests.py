"""peft's own tests on modbay's modules: how many pass, and why the rest do not apply.

    pip install parameterized attrs
    python benchmarks/peft_tests.py [--every 20] [--sdist FOLDER] [FILE …]

They are in peft's source distribution, which is downloaded (of the version that is installed) and unpacked. They run
unchanged, under benchmarks/_peft_shim.py, which puts modbay's verbs under peft's names: an adapter is made by peft,
read by modbay, and its first output alone compared with peft's own. A test counts as passed only if it gave modbay a
module; "of peft alone" are those that pass and gave it none. `--every N` runs each n-th test of a file:
tests/test_custom_models.py has 19,485. Failures that no reason below explains are listed one by one, to be looked at.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
FILES = ("mixed", "custom_models", "low_level_api", "lora_variants", "target_parameters", "initialization", "vera")
VERDICTS = ("passed", "skipped by peft", "of peft alone", "not applicable", "failed")
SKIPPED = (
    (r"n/a: (\w+) is not one of modbay's kinds", "a kind that modbay has not: {}"),
    (r"n/a: needs the hub", "needs the hub"),
    (r"n/a: pickled", "writes pickles"),
    (r"n/a: add_weighted_adapter\('(\w+)'\)", "merges by a formula of peft's own"),
    (r"use_effective_conv2d", "an option that modbay has not: use_effective_conv2d"),
    (r"n/a: FOLDER/adapter_config.json: (\w+)=", "an option that modbay has not: {}"),
    (r"(velora)_embed", "an option that modbay has not: {}"),
    (r"trainable_tokens|token_adapter", "an option that modbay has not: trainable tokens"),
    (r"no stack of experts", "LoRA at a parameter that is no stack of experts'"),
    (r"out_proj", "sites inside torch's MultiheadAttention"),
    (r"mixes the groups", "LoRA at convolutions with groups, which is another function in peft"),
    (r"beside DoRA", "DoRA with the base's biases"),
    (r"init_lora_weights=", "starts that change the base (PiSSA, OLoRA, CorDA)"),
    (r"n/a: (.{,60})", "refused by modbay in words: {}"),
)
FAILED = (
    (r"connect to|OfflineMode|LocalEntryNotFound|on the Hub|TRANSFORMERS_CACHE", "needs the hub"),
    (r'"meta" in \{', "wants empty weights on the meta device (low_cpu_mem_usage)"),
    (r"p\.dtype == expected_dtype", "wants adapters cast to float32 on a half precision base"),
    (r"test_.*(with_bias|modules_to_save.*|prng|targets_lora_layer|target_parameters)_raises|test_modules_to_save:|"
     r"incompatible_|rejects_shared_state|higher_rank|low_cpu_mem_usage\[.*VeRA|merging_adapters_raises",
     "wants a refusal of what modbay can do (several biases or copies of a layer, VeRAs of any draw, any mixture)"),
    (r"otswap", "swaps tensors inside peft's layers"),
    (r"irregular_state", "switches single layers off"),
    (r"test_disable_adapters.*AdaLoRA|corda_|mica_|trainable_parameters|hasattr\(module|with_bias_argument",
     "reaches into peft's layers"),
    (r"is_gradient_checkpointing", "stumbles over a warning of transformers'"),
    (r"fsdp_wrapped", "torch's first FSDP (modbay: FSDP2 and DDP)"),
    (r"targeting_lora_to_embedding|save_embedding", "saves the base's embeddings beside the adapter"),
    (r"\('base_model\.model|ranknum|trainable_params|assert wrappers|isinstance\(|dict-like|dangling",
     "counts or names parts of peft's layers"),
    (r"(AttributeError|KeyError): .*(has no attribute|^KeyError)", "reaches into peft's layers"),
    (r"DID NOT WARN", "wants a warning of peft's"),
    (r"Regex pattern did not match", "wants peft's wording of an error"),
)  # fmt: skip


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("files", nargs="*", default=[f"tests/test_{name}.py" for name in FILES])
    asked.add_argument("--every", type=int, default=1, help="each n-th test of a file")
    asked.add_argument("--sdist", type=Path, help="a folder for peft's source distribution, which may be there already")
    given = asked.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        source = sdist(given.sdist or Path(temporary))
        print(f"| file | run | {' | '.join(VERDICTS)} |\n{'| --- ' * (len(VERDICTS) + 2)}|", flush=True)
        reasons, open_questions = Counter(), []
        for file in given.files:
            rows = run(source, file, given.every)
            what = [verdict(row) for row in rows]
            count = Counter(kind for kind, _ in what)
            reasons.update(why for kind, why in what if kind == "not applicable")
            open_questions += [(row, why) for row, (kind, why) in zip(rows, what, strict=True) if kind == "failed"]
            print(f"| {file} | {len(rows)} | {' | '.join(str(count[one]) for one in VERDICTS)} |", flush=True)
    print("\nNot applicable:")
    for why, n in reasons.most_common():
        print(f"{n:6} {why}")
    for row, why in open_questions:
        print(f"\nFAILED {row['test']}\n    {why:.300}\n    {row['where']:.300}")


def sdist(folder: Path) -> Path:
    """peft's source distribution, unpacked."""
    name = f"peft-{version('peft')}"
    source = folder / name
    if not source.exists():
        asked = ["download", "--no-deps", "--no-build-isolation", "--no-binary", ":all:", "-d", str(folder)]
        subprocess.run([sys.executable, "-m", "pip", *asked, name.replace("-", "==")], check=True, capture_output=True)
        with tarfile.open(folder / f"{name}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    (source / "tests" / "__init__.py").touch()
    return source


def run(source: Path, file: str, every: int) -> list[dict]:
    """What each test gave."""
    with tempfile.TemporaryDirectory() as temporary:
        record = Path(temporary) / "record.jsonl"
        path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        plain = ["-q", "-p", "_peft_shim", "-p", "no:cacheprovider", "-o", "addopts=", "--tb=no"]
        chosen = ["--record", str(record), "--every", str(every), file]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *plain, *chosen],
            cwd=source,
            env=environment,
            capture_output=True,
            text=True,
        )
        if not record.exists():
            raise SystemExit(f"{file} did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]


def verdict(row: dict) -> tuple[str, str]:
    """(the column, why)."""
    if row["outcome"] == "passed":
        return ("passed" if row["loads"] else "of peft alone"), ""
    if row["outcome"] == "skipped":
        if "n/a: " not in row["said"]:
            return "skipped by peft", ""
        return "not applicable", reason(SKIPPED, row["said"])
    text = f"{row['test'].rpartition('::')[2]}: {row['said']} | {row['where']}"
    why = reason(FAILED, text)
    return ("not applicable", why) if why else ("failed", row["said"])


def reason(table: tuple, text: str) -> str:
    for pattern, words in table:
        found = re.search(pattern, text, re.DOTALL)
        if found:
            return words.format(*found.groups())
    return ""


if __name__ == "__main__":
    main()
