"""The reference for tests/test_unify.py: MAM and UniPELT as the library adapters has them, on a tiny BERT.

Run apart, since adapters 1.3 needs an older transformers than modbay is tested with:

    pip install adapters==1.3.0 && python benchmarks/_adapters_reference.py tests/fixtures/adapters_mixed.safetensors

The file holds the weights, the input and the outputs of a random model. Adapters are placed on the output of the last
projection, before the residual, for both.
"""

import sys

import adapters  # type: ignore[import-not-found] (an environment of its own)
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel


def main(path: str) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=8,
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    adapters.init(model)
    prefix = adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=6)
    serial = adapters.SeqBnConfig(reduction_factor=4, original_ln_before=False)
    model.add_adapter("mam", config=adapters.MAMConfig(prefix, adapters.ParBnConfig(reduction_factor=4)))
    model.add_adapter("unipelt", config=adapters.UniPELTConfig(prefix, serial, adapters.LoRAConfig(r=2, alpha=2)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    ids = torch.randint(20, (3, 5))
    tensors = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()} | {"ids": ids}
    for name in ("mam", "unipelt"):
        model.set_active_adapters(name)
        with torch.no_grad():
            tensors[f"output.{name}"] = model(ids).last_hidden_state
    save_file(tensors, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
