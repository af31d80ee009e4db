"""Round trips of checkpoints with peft and adapters: the largest error of logits, for each method that both have.

    python benchmarks/interop.py [--adapters PYTHON] [--out docs/interop.md]

peft writes, modbay reads; modbay writes, peft reads; modbay reads its own again: each against what peft computed at
first, in float32, on tiny random models whose modules are far from where they start. The cases are those of
tests/test_peft_files.py and tests/test_poly_files.py; benchmarks/peft_families.py has those by architecture. PYTHON is
one with adapters 1.3 (and its older transformers): it loads what modbay writes of the checkpoints in
tests/fixtures/adapters, which adapters wrote before (benchmarks/_adapters_files.py).
"""

import argparse
import copy
import json
import platform
import subprocess
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

import peft_families
import torch

import modbay as mb

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import test_adapters_files as strange
import test_poly_files as several
from test_peft_files import CASES, peft, run, trained

HEAD = """# Checkpoints of other libraries

`mb.load(model, FOLDER)` reads a checkpoint of [peft](https://github.com/huggingface/peft) as it reads its own; its
modules come frozen, in one bay, and one that is alone is at work at once. `bay.load(FOLDER, add=True)` adds it to a
bay that is there, for mixed batches. `bay.export(FOLDER, NAME)` writes what peft loads. From the shell: `modbay
convert`.

```python
guest = mb.load(model, "their-lora/")["peft"]  # or name="…"
guest.export("ours/")  # peft's format again
guest.export("served/", format="lora", rank=16)  # plain LoRA, for engines that serve it; returns the error by site
guest.export("served/own.gguf", format="gguf")  # the same for llama.cpp (pip install 'modbay[gguf]')
```

What a format can't hold is refused before anything is written. `format="lora"` is exact for updates of low rank
(scales are folded in, ranks filled up with zeros to one for all layers), else the nearest of a rank, or of the lowest
whose error ‖ΔW − B A‖/‖ΔW‖ is at most `error`; task heads go to `heads.safetensors` beside it.
`format="gguf"` writes the same updates under llama.cpp's names of the weights, rows in its order where it turns
neighbouring features by rotary positions; what llama.cpp passes over or can't load (heads, biases, tied embeddings,
fused experts, models whose weights it reshapes) is refused. Of Llama, Mistral, Qwen2 and Qwen3, llama.cpp itself tells
the same log-probabilities as modbay to 5e-6 with such a file (`python benchmarks/llama_cpp.py PYTHON`).

Modules act on bases that bitsandbytes, torchao, GPTQ or AWQ quantised, as transformers loads them. What needs the
weight in floats is refused there unless it is asked for: `bay.fold(NAME, dequantise=True)`, `modbay fold --dequantise`
and `mb.dequantise(model)` make a Linear of what each layer does, and tell by how much it acts otherwise.

## Round trips with peft

The largest absolute difference of logits from peft's own: peft → modbay, → peft, → modbay. `changed`: how far the
module moves the base's logits. Written by `python benchmarks/interop.py`; {where}.

| method | peft → modbay | → peft | → modbay | changed | as |
| --- | --- | --- | --- | --- | --- |
"""
TAIL = """
Some things differ in how they are kept. peft's prefixes have the text begin behind them: under rotary positions keys
are turned back, by the model's own rule, which is the same; where positions are looked up (GPT-2, OPT, BART) `mb.Shift`
at their table does it; under T5's bias of relative positions, and under a sliding window, which peft's prefix is left
behind by, they are `mb.Prefix(relative="front")`. Of an encoder-decoder peft passes every other row of its table on, so
that with an even number of layers two have the same prefix: others are not written. Models that find their positions in
their own way (M2M100) are refused. peft itself has no prefixes at encoders that classify (BERT) with transformers 5.
VeRA's matrices are peft's own draw, so that the products are kept, as LoRA. P-tuning's encoder is not in peft's file:
what it gave is a prompt.

The same by architecture, at every linear layer, or in front of the text (`python benchmarks/peft_families.py`, which
also says why something is refused): the largest error as a share of peft's largest logit. "–": peft has none.

{families}

A matrix that is no layer's, the gate of a mixture of experts, is a site of modbay's by itself, as fused experts are.
In mixtures of experts whose experts were layers before transformers 5 (DeepSeek), peft loads no LoRA at dense layers of
the experts' names: it is refused on the way out. Where a model never calls a layer, or reads its weight alone (Mamba's
`dt_proj`, T5's `shared`), peft's adapters do nothing, and neither do they here: the first call says so.

peft's own tests run unchanged on modbay's modules (`python benchmarks/peft_tests.py`): peft makes each adapter,
modbay reads it, and its first output is compared with peft's. Of the 38 in `test_mixed.py` (LoRA, LoHa, LoKr and
AdaLoRA mixed, in any order, merged, disabled, deleted, kept and loaded) 29 pass. Of the others one is skipped by peft
itself, one needs the hub, two use OFT or trainable tokens, three look inside peft's layers, and two want a refusal of
what modbay can do. Of each 17th test of `test_custom_models.py` (1,147 of 19,485) 284 pass, 59 are skipped by peft, and
804 do not apply: 683 use kinds that modbay has not, 60 options; 11 are LoRA at convolutions with groups; the other 50
look inside peft's layers, write pickles, want empty weights, torch's first FSDP or a refusal, or put biases of the base
beside DoRA or AdaLoRA. Of the 745 in `test_low_level_api.py`, `test_lora_variants.py`, `test_target_parameters.py`,
`test_vera.py` and `test_initialization.py` 56 pass, and 304 need the hub.
"""


ADAPTERS = """
## Round trips with adapters

The same with [adapters](https://github.com/adapter-hub/adapters) 1.3.0: adapters → modbay, → adapters, → modbay, each
against what adapters computed when it wrote the checkpoint. Heads come along, and setups (`adapter_setup.json`):
AdapterFusion and stacks in and out, averages in, one bay for all of a folder. Prefixes, MAM and UniPELT are written by
adapters as `.bin` alone, which modbay reads by a loader that runs nothing, and writes as safetensors (`load_adapter(…,
use_safetensors=True)`). Bottlenecks and prefixes go to BERT and its kin (ELECTRA, DeBERTa-v2, ALBERT), GPT-2, Llama,
Mistral, T5, BART (mBART, PLBART), ViT and BEiT, LoRA and (IA)³ also to other models. Where BEiT scales what a part
adds, bottlenecks take the scale into their weights; at ALBERT's attention, where adapters takes the part's input for
its output, they are parallel. Under T5's bias of relative positions keys count from adapters' prefixes on, as
`mb.Prefix(relative="keys")` has it. Prefixes at GPT-2, Llama, Mistral and BART's decoder equal those of adapters under
eager attention: under "sdpa", the default, adapters 1.3 lets each prefix hide as many of a token's nearest ones, or, in
a padded batch or under a window, do nothing (BART's is right there). Gates of UniPELT average over padding there, and
not here. An invertible adapter of a `BertAdapterModel` or its like, or from before adapters 1.0, is undone before a
head that gives words, as it was there (`…lm, inverse`), and written as one of theirs; one of adapters'
`BertForMaskedLM` and its like, which leave the inverse out, is read so. Refused are: DoRA, which adapters lets rescale
biases; ReFT; bottlenecks and prefixes at other models; all at X-MOD, whose own adapters are taken out there; LoRA and
(IA)³ of DeBERTa's one projection, whose parts adapters counts otherwise; prefixes and prompts at DeBERTa-v2, whose
attention has no place for them; norms, sums and Compacter in front of BEiT's scale, and Compacter at ALBERT's
attention; prefixes of T5 with a layer left out, behind which adapters has no bias; and gates of (IA)³, which scale the
output itself. Of setups `Parallel`, `BatchSplit` and `Split`, which say how one call is made, are not written, nor is
`Average`: adapters 1.3's divides by the number of modules once more than it says, which modbay's does not.

| checkpoint | adapters → modbay | → adapters | → modbay | changed | as |
| --- | --- | --- | --- | --- | --- |
"""


def with_adapters(python: str) -> list[str]:
    """A row a checkpoint: what modbay makes of it, what adapters itself makes of that, and modbay again."""
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in strange.READ:
            kind, _, short = name.partition("-")
            model, wanted = strange.base(kind), strange.TENSORS[kind][f"logits.{short}"]
            bay = mb.load(model, strange.FOLDER / name)["adapters"]
            parts = [part for modular in bay.modulars.values() for part in modular.order if part is not None]
            kinds = ", ".join(dict.fromkeys(type(part.kind).__name__ for part in parts))
            first = strange.run(kind, model)[0]
            plain = strange.TENSORS[kind]["logits."]
            changed = f"{float((first - plain).abs().max()):.2g}" if first.shape == plain.shape else "another head"
            rows[name] = [f"{float((first - wanted).abs().max()):.0e}", "–", "–", changed, kinds]
            if name != "bert-average":
                bay.export(Path(folder) / name, format="adapters")
                again = strange.base(kind)
                mb.load(again, Path(folder) / name)
                rows[name][2] = f"{float((strange.run(kind, again)[0] - wanted).abs().max()):.0e}"
        command = [python, str(Path(__file__).with_name("_adapters_files.py")), "--load", str(strange.FOLDER), folder]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()
    for name, found in json.loads(said[-1]).items():
        lost = found.get("missing_keys", []) + found.get("unexpected_keys", [])
        rows[name][1] = f"{found['error']:.0e}" + (f" (and {len(lost)} keys that do not fit)" if lost else "")
    return [f"| {name.replace('-', ', ', 1)} | {' | '.join(cells)} |" for name, cells in rows.items()]


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--out", type=Path, help="a Markdown file for the table")
    asked.add_argument("--adapters", metavar="PYTHON", help="one with adapters 1.3, for its part of the table")
    given = asked.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row(name, Path(folder)))
            print(rows[-1], flush=True)
    for name in several.CASES:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row_of_tasks(name, Path(folder)))
            print(rows[-1], flush=True)
    families, _ = peft_families.rows()
    others = with_adapters(given.adapters) if given.adapters else []
    print(*others, sep="\n", flush=True)
    if given.out:
        names = ("modbay", "peft", "transformers", "torch")
        where = f"{platform.machine()}, {', '.join(f'{one} {version(one)}' for one in names)}"
        more = ADAPTERS + "\n".join(others) + "\n" if others else ""
        tail = TAIL.format(families="\n".join(families))
        given.out.write_text(HEAD.format(where=where) + "\n".join(rows) + "\n" + tail + more, encoding="utf-8")


def row(name: str, folder: Path) -> str:
    base, wanted = trained(name, folder / "theirs")
    ours, last = copy.deepcopy(base), copy.deepcopy(base)
    bay = mb.load(ours, folder / "theirs")["peft"]
    bay.export(folder / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder / "ours").eval()
    mb.load(last, folder / "ours")
    parts = [part for modular in bay.modulars.values() for part in modular.order if part is not None]
    kinds = dict.fromkeys(type(part.kind).__name__ for part in parts)
    errors = [float((run(model) - wanted).abs().max()) for model in (ours, again, last, base)]
    return f"| {name} | {' | '.join(f'{e:.0e}' for e in errors[:3])} | {errors[3]:.2g} | {', '.join(kinds)} |"


def row_of_tasks(name: str, folder: Path) -> str:
    """Several modules and a router, in a batch of several tasks."""
    wanted = several.theirs(several.CASES[name](), folder / "theirs")
    ours, last = several.base(), several.base()
    bay = mb.load(ours, folder / "theirs")["peft"]
    bay.export(folder / "ours")
    again = peft.PeftModel.from_pretrained(several.base(), folder / "ours").eval()
    mb.load(last, folder / "ours")
    with torch.no_grad():
        changed = float((several.base()(input_ids=several.IDS).logits - wanted).abs().max())
    errors = [float((several.logits(model) - wanted).abs().max()) for model in (ours, again, last)]
    kinds = dict.fromkeys(type(p.kind).__name__ for one in bay.modulars.values() for p in one.order if p is not None)
    return f"| {name} | {' | '.join(f'{e:.0e}' for e in errors)} | {changed:.2g} | {', '.join(kinds)} |"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
