"""AdapterFusion over N modules: how much slower than the bare model, and how much a training step costs?

BERT-like, 6 layers of 512, 4 × 64 tokens; bottlenecks of reduction 16 at the output of each layer's last projection,
before the residual, and a fusion at each; forward without gradients, and a step of the fusion's parameters beside one
of full fine-tuning. Mixed: the kinds of a row in equal shares. "cold": as in training, and whenever something changed,
nothing is kept from the call before. Of CPU seconds, "of medians" and "of minima". With --adapters PYTHON, an
environment that has adapters 1.3.0: its times, over its own bare model, and its outputs from the same weights.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from _measure import arguments, finish, interleaved, ratios, table
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertModel

import modbay as mb

CONFIG = {
    "vocab_size": 1000, "hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 2048,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
LAST = "encoder.layer.?.output.dense"
MODULES = (2, 4, 8, 16)
BOTTLENECK = mb.Bottleneck(reduction=16, std=0.05)
MIXES = {
    "bottleneck, LoRA": (BOTTLENECK, mb.LoRA(8)),
    "bottleneck, LoRA, Compacter": (BOTTLENECK, mb.LoRA(8), mb.Compacter(4, reduction=16)),
    "bottleneck, LoRA, (IA)³": (BOTTLENECK, mb.LoRA(8), mb.IA3()),
    "(IA)³": (mb.IA3(),),
}


def bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(**CONFIG), add_pooling_layer=False).eval()


def fused(n: int, kinds=(BOTTLENECK,)) -> tuple[nn.Module, mb.Bay]:
    """The model with n modules of these kinds in turn, all attended over; only the fusion learns."""
    model = bert()
    modules = {f"m{i}": kinds[i % len(kinds)] for i in range(n)}
    bay = mb.attach(model, LAST, modules, mb.Uniform(), mb.AdapterFusion, name="task")
    bay.freeze()
    for parameter in bay.parameters():
        if not parameter.requires_grad:
            nn.init.normal_(parameter, std=0.05)
    return model.eval(), bay


def forget(bay: mb.Bay) -> None:
    """Nothing is kept from the call before."""
    for modular in bay.modulars.values():
        modular.aggregator._kept.clear()


def step(model: nn.Module, ids: torch.Tensor):
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def run() -> None:
        optimiser.zero_grad()
        model(ids).last_hidden_state.square().mean().backward()
        optimiser.step()

    return run


def row(title: dict, times: dict[str, list[float]]) -> dict:
    """Medians over the first contender's, and minima."""
    first, *others = times
    low = min(times[first])
    return title | {k: v for k, v in ratios(times).items() if k != first} | {
        f"{name}, minima": min(times[name]) / low for name in others
    }  # fmt: skip


def theirs(python: str, ids: torch.Tensor, rounds: int, folder: str) -> dict[str, dict]:
    """The times of adapters, by number of modules; its weights and outputs go into the folder."""
    asked = {"config": CONFIG, "ids": ids.tolist(), "modules": MODULES, "rounds": rounds, "folder": folder}
    script = Path(__file__).with_name("_adapters_fusion.py")
    return json.loads(subprocess.check_output([python, str(script), json.dumps(asked)], text=True).splitlines()[-1])


def difference(n: int, file: Path, ids: torch.Tensor) -> float:
    """How far our output is from theirs, with their weights: the largest difference."""
    tensors = load_file(file)
    model, bay = fused(n)
    model.load_state_dict(tensors, strict=False)
    names = {"down": "adapter_down.0.weight", "down_bias": "adapter_down.0.bias"}
    names |= {"up": "adapter_up.weight", "up_bias": "adapter_up.bias"}
    with torch.no_grad():
        for site, modular in bay.modulars.items():
            block = site.rpartition(":")[2].rpartition(".")[0]
            fusion = f"{block}.adapter_fusion_layer.{','.join(bay.names())}."
            for name, parameter in modular.aggregator.named_parameters():
                parameter.copy_(tensors[fusion + name])
            for module, part in modular.parts._modules.items():
                for name, end in names.items():
                    part.tensors()[name].copy_(tensors[f"{block}.adapters.{module}.{end}"])
        found = [(model(ids).last_hidden_state - tensors["output"]).abs().max().item() for _ in range(3)]
    return max(found)


def main() -> None:
    chosen = arguments(__doc__ or "", {"--adapters": "the Python of an environment that has adapters 1.3.0"})
    ids, bare, rows, raw = torch.randint(0, 1000, (4, 64)), bert(), [], []
    with tempfile.TemporaryDirectory() as folder:
        peer = theirs(chosen.adapters, ids, chosen.rounds, folder) if chosen.adapters else {}
        for n, kinds, name in [
            *((n, (BOTTLENECK,), "bottleneck") for n in MODULES), *((8, k, name) for name, k in MIXES.items()),
        ]:  # fmt: skip
            (model, _), (other, bay) = fused(n, kinds), fused(n, kinds)
            contenders = {
                "bare": lambda: bare(ids),
                "modbay": lambda model=model: model(ids),
                "cold": lambda other=other, bay=bay: (forget(bay), other(ids)),
            }
            with torch.no_grad():
                model(ids)  # what is kept is kept from the second call
                forward = interleaved(contenders, chosen.rounds, time.process_time)
            training = interleaved(
                {"full": step(bert(), ids), "modbay": step(model, ids)}, chosen.rounds, time.process_time
            )
            found = row({"kinds": name, "N": n}, forward)
            found["step"] = min(training["modbay"]) / min(training["full"])
            if name == "bottleneck" and peer:
                own = peer[str(n)]
                low = row({}, own["forward"])
                found |= {"adapters": low["adapters"], "adapters, minima": low["adapters, minima"]}
                found["adapters' step"] = min(own["training"]["adapters"]) / min(own["training"]["full"])
                found["difference"] = f"{difference(n, Path(folder) / f'{n}.safetensors', ids):.0e}"
            rows.append(found)
            raw.append({"forward": forward, "training": training})
            print(*(f"{k} {v:.2f}" if isinstance(v, float) else v for k, v in found.items()), file=sys.stderr)
    table("AdapterFusion: CPU time of a forward over the bare model's, of a step over full fine-tuning's", rows)
    finish(chosen, rows, {"modbay": raw, "adapters": peer})


if __name__ == "__main__":
    main()
