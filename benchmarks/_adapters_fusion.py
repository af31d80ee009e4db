"""AdapterFusion as the library adapters has it: its times beside its own bare model, its weights and its outputs.

Run by benchmarks/fusion.py --adapters PYTHON, with the Python of an environment that has adapters 1.3.0.
"""

import json
import sys
import time
from pathlib import Path

import adapters  # type: ignore[import-not-found] (an environment of its own)
import torch
from _measure import interleaved
from adapters.composition import Fuse  # type: ignore[import-not-found]
from safetensors.torch import save_file
from transformers import BertConfig, BertModel


def bert(config: dict) -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(**config), add_pooling_layer=False).eval()


def fused(config: dict, n: int) -> BertModel:
    """n bottlenecks at the output of each layer's last projection, before the residual, and their fusion."""
    model, names = bert(config), [f"m{i}" for i in range(n)]
    adapters.init(model)
    for name in names:
        model.add_adapter(name, config=adapters.SeqBnConfig(reduction_factor=16, original_ln_before=False))
    model.add_adapter_fusion(names)
    model.train_adapter_fusion(Fuse(*names))
    for name, parameter in model.named_parameters():
        if "adapter" in name:
            torch.nn.init.normal_(parameter, std=0.02 if "fusion" in name else 0.05)
    return model.eval()


def step(model: torch.nn.Module, ids: torch.Tensor):
    """One step of what learns: forward, backward, AdamW."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def run() -> None:
        optimiser.zero_grad()
        model(ids).last_hidden_state.square().mean().backward()
        optimiser.step()

    return run


def main(asked: str) -> None:
    torch.set_num_threads(1)
    wanted = json.loads(asked)
    folder, ids, found = Path(wanted["folder"]), torch.tensor(wanted["ids"]), {}
    bare = bert(wanted["config"])
    for n in wanted["modules"]:
        model = fused(wanted["config"], n)
        with torch.no_grad():
            output = model(ids).last_hidden_state
        tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        save_file(tensors | {"output": output}, folder / f"{n}.safetensors")
        with torch.no_grad():
            forward = interleaved(
                {"bare": lambda: bare(ids), "adapters": lambda model=model: model(ids)}, wanted["rounds"],
                time.process_time,
            )  # fmt: skip
        training = interleaved(
            {"full": step(bert(wanted["config"]), ids), "adapters": step(model, ids)}, wanted["rounds"],
            time.process_time,
        )  # fmt: skip
        found[n] = {"forward": forward, "training": training}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
