"""The same weights give what the library adapters gives, for each of its methods: hidden states of a tiny BERT.

The reference is written by benchmarks/_adapters_reference.py (adapters 1.3.0), which is run apart.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

import modbay as mb

REFERENCE = load_file(Path(__file__).parent / "fixtures" / "adapters_alone.safetensors")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
Tensors = dict[str, Tensor]


def bert() -> nn.Module:
    config = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(**config, intermediate_size=24, max_position_embeddings=8)
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    assert not model.load_state_dict(REFERENCE, strict=False).missing_keys
    return model


def theirs(place: str, names: dict[str, str]) -> Tensors:
    """Their tensors below a place, by our names."""
    return {ours: REFERENCE[f"{place}.{name}"] for ours, name in names.items()}


def bottleneck(name: str) -> Callable[[str], Tensors]:
    """Of a module of ours that is one of theirs at the same block."""
    names = {"down": "adapter_down.0.weight", "down_bias": "adapter_down.0.bias"}
    names |= {"up": "adapter_up.weight", "up_bias": "adapter_up.bias"}
    return lambda site: theirs(f"{site.rpartition('.')[0]}.adapters.{name}", names)


def compacter(site: str) -> Tensors:
    """Their x H with H = Σ A_i ⊗ B_i is our x Wᵀ with W = Σ A_iᵀ ⊗ B_iᵀ."""
    block = f"{site.rpartition('.')[0]}.adapters.compacter"
    made = {"A": REFERENCE["shared_parameters.compacter.phm_rule"].mT}
    for ours, name in {"down": "adapter_down.0", "up": "adapter_up"}.items():
        own = theirs(f"{block}.{name}", {"s": "W_right", "t": "W_left", "bias": "b"})
        made |= {f"{ours}_s": own["s"].mT, f"{ours}_t": own["t"].mT, f"{ours}_bias": own["bias"]}
    return made


def invertible(site: str) -> Tensors:
    if site != "embeddings.LayerNorm":
        return bottleneck("invertible")(site)
    ends = {"down": "0.weight", "down_bias": "0.bias", "up": "2.weight", "up_bias": "2.bias"}
    names = {f"{net}_{ours}": f"{net}.{end}" for net in "FG" for ours, end in ends.items()}
    return theirs("invertible_adapters.invertible", names)


def ia3(site: str) -> Tensors:
    return {"l": REFERENCE[f"{site}.loras.ia3.lora_B"].flatten()}


def lora(site: str) -> Tensors:
    return theirs(f"{site}.loras.lora", {"A": "lora_A", "B": "lora_B"})


def prefix(site: str) -> Tensors:
    """Theirs has one network for all layers, and writes the parts of its last map side by side."""
    front = "encoder.layer.0.attention.self.prefix_tuning.pool.prefix_tunings.prefix.self_prefix"
    names = {"tokens": "wte.weight", "down": "control_trans.0.weight", "down_bias": "control_trans.0.bias"}
    last = {ours: REFERENCE[f"{front}.control_trans.2.{end}"] for ours, end in [("up", "weight"), ("up_bias", "bias")]}
    layer = int(site.split(".")[2])
    return theirs(front, names) | {ours: t.unflatten(0, (2, 2, 2, 8))[layer] for ours, t in last.items()}


def prompt(site: str) -> Tensors:
    return {"prompt": REFERENCE["prompt_tuning.prompt_tunings.prompt.prompt_embedding.weight"]}


LAST = "encoder.layer.?.output.dense"
BOTH = [LAST, "*.attention.output.dense"]
FFN = mb.span(mb.role.ffn_in, mb.role.ffn_out)

CASES = {
    # Houlsby et al. have it so. Their activation is swish here, which is silu.
    "houlsby": (BOTH, mb.Bottleneck(reduction=4, activation="silu"), bottleneck("houlsby"), mb.WeightedSum),
    # Pfeiffer et al.: A reads LN(y + x), y of the projection and x of the residual, and is added to y before a second
    # LN, the same one. That is the norm as a site, with the change inside of it.
    "pfeiffer": ("encoder.layer.?.output.LayerNorm", mb.Bottleneck(reduction=4), bottleneck("pfeiffer"),
                 lambda: mb.Again("input")),
    # The same without the first norm: A reads y itself, which is modbay's way at a projection.
    "before": (LAST, mb.Bottleneck(reduction=4), bottleneck("before"), mb.WeightedSum),
    "parallel": (FFN, mb.Bottleneck(reduction=4, placement="parallel"), bottleneck("parallel"), mb.WeightedSum),
    "scaled": (FFN, mb.Bottleneck(reduction=4, placement="parallel", scale=4.0), bottleneck("scaled"), mb.WeightedSum),
    # Deviates from Mahabadi et al.'s code, whose gelu is the one by tanh ("gelu_new").
    "compacter": (BOTH, mb.Compacter(4, reduction=2, activation="gelu"), compacter, mb.WeightedSum),
    # The inverse belongs to an output layer, which this model has not.
    "invertible": (None, {"embeddings.LayerNorm": mb.Invertible(2), LAST: mb.Bottleneck(reduction=4)}, invertible,
                   mb.WeightedSum),
    # Deviates from Liu et al., who scale the feed-forward's hidden features after the non-linear function, as
    # mb.IA3("input") does at the second projection: adapters scales them before it.
    "ia3": (["*.key", "*.value", "*.intermediate.dense"], mb.IA3(), ia3, mb.WeightedSum),
    "lora": (["*.query", "*.value"], mb.LoRA(2, alpha=6), lora, mb.WeightedSum),
    "prefix": (mb.role.attention, mb.Prefix(3, bottleneck=6), prefix, mb.WeightedSum),
}  # fmt: skip


def filled(model: nn.Module, at, kinds, tensors: Callable[[str], Tensors], aggregator) -> mb.Bay:
    """A bay on the model whose module has the tensors of theirs, none left out and none over."""
    bay = mb.attach(model, **({} if at is None else {"at": at}), modules={"m": kinds}, aggregator=aggregator())
    for site, modular in bay.modulars.items():
        part = modular.parts._modules["m"].tensors()
        own = tensors(site.rpartition(":")[2])
        assert own.keys() == part.keys()
        for name, tensor in own.items():
            assert tensor.numel() == part[name].numel()
            part[name].data.copy_(tensor.reshape(part[name].shape))
    return bay


@pytest.mark.parametrize("name", CASES)
def test_the_same_weights_give_the_same_hidden_states(name: str):
    model = bert()
    plain = model(REFERENCE["ids"]).last_hidden_state
    bay = filled(model, *CASES[name]).use("m")
    got = model(REFERENCE["ids"]).last_hidden_state
    assert_close(got, REFERENCE[f"output.{name}"], **CLOSE)
    assert not torch.allclose(got, plain, atol=0.1)
    bay.detach()
    assert torch.equal(model(REFERENCE["ids"]).last_hidden_state, plain)


def test_a_mixed_batch_through_a_norm_with_changes_inside():
    """Rows without a module are the base's, whatever stands beside them; what acts on f's input does not fit there."""
    model, ids = bert(), REFERENCE["ids"]
    plain = model(ids).last_hidden_state
    at, kind, tensors, aggregator = CASES["pfeiffer"]
    filled(model, at, kind, tensors, aggregator)
    mixed = model(ids, modules=["m", None, "m"]).last_hidden_state
    assert_close(mixed[[0, 2]], REFERENCE["output.pfeiffer"][[0, 2]], **CLOSE)
    assert_close(mixed[1], plain[1], **CLOSE)
    with pytest.raises(mb.errors.CompositionError, match=r"Again.*IA3"):
        mb.Modular(nn.Linear(4, 4), {"a": mb.IA3("input")}, mb.Uniform(), mb.Again("input"))
    with pytest.raises(mb.errors.CompositionError, match="start='x'"):
        mb.Again("x")


def test_prompts_stand_behind_the_embeddings_of_adapters():
    """Deviates from Lester et al. at a BERT: the prompts get no positions and no norm of the embeddings, which they do
    where modbay (and peft) put them, in front of the embedded tokens. So they go in front of the layers here."""
    model = bert()
    hidden = model.embeddings(REFERENCE["ids"])
    ours = prompt("")["prompt"].expand(3, -1, -1)
    out = model.encoder(torch.cat([ours, hidden], 1)).last_hidden_state
    assert_close(out, REFERENCE["output.prompt"], **CLOSE)
    bay = filled(model, "embeddings.LayerNorm", mb.Prompt(3), prompt, mb.WeightedSum).use("m")
    assert_close(model.encoder(model.embeddings(REFERENCE["ids"])).last_hidden_state, out, **CLOSE)
    bay.detach()
