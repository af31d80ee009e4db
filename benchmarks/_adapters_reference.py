"""The references for tests/test_unify.py and tests/test_adapters.py: the library adapters, on tiny random models.

Run apart, since adapters 1.3 needs an older transformers than modbay is tested with:

    pip install adapters==1.3.0 && python benchmarks/_adapters_reference.py tests/fixtures

adapters_mixed.safetensors has MAM and UniPELT, placed on the output of the last projection, before the residual;
adapters_alone.safetensors each method alone. They hold the weights, the input and the outputs of the models.
"""

import sys
from pathlib import Path

import adapters  # type: ignore[import-not-found] (an environment of its own)
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

SMALL = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
PREFIX = adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=6)
MIXED = {
    "mam": adapters.MAMConfig(PREFIX, adapters.ParBnConfig(reduction_factor=4)),
    "unipelt": adapters.UniPELTConfig(
        PREFIX, adapters.SeqBnConfig(reduction_factor=4, original_ln_before=False), adapters.LoRAConfig(r=2, alpha=2)
    ),
}
ALONE = {
    "houlsby": adapters.DoubleSeqBnConfig(reduction_factor=4),
    "pfeiffer": adapters.SeqBnConfig(reduction_factor=4),
    "before": adapters.SeqBnConfig(reduction_factor=4, original_ln_before=False),
    "parallel": adapters.ParBnConfig(reduction_factor=4, scaling=1.0),
    "scaled": adapters.ParBnConfig(reduction_factor=4),
    "compacter": adapters.CompacterConfig(phm_dim=4, reduction_factor=2),
    "invertible": adapters.SeqBnInvConfig(
        reduction_factor=4, inv_adapter_reduction_factor=2, original_ln_before=False
    ),
    "ia3": adapters.IA3Config(),
    "lora": adapters.LoRAConfig(r=2, alpha=6),
    "prefix": PREFIX,
    "prompt": adapters.PromptTuningConfig(prompt_length=3),
}  # fmt: skip


def bert() -> BertModel:
    return BertModel(BertConfig(**SMALL, max_position_embeddings=8), add_pooling_layer=False)


def outputs(model: torch.nn.Module, kinds: dict) -> dict[str, torch.Tensor]:
    """The weights of a random model with modules of these kinds, an input, and the output with each of them."""
    adapters.init(model.eval())
    for name, config in kinds.items():
        model.add_adapter(name, config=config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    ids = torch.randint(20, (3, 5))
    tensors = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()} | {"ids": ids}
    for name in kinds:
        model.set_active_adapters(name)
        with torch.no_grad():
            tensors[f"output.{name}"] = model(ids).last_hidden_state
    return tensors


def main(folder: str) -> None:
    torch.manual_seed(0)
    save_file(outputs(bert(), MIXED), Path(folder) / "adapters_mixed.safetensors")
    save_file(outputs(bert(), ALONE), Path(folder) / "adapters_alone.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
