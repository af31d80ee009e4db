"""What adapters has of some families of models and modbay has not, or the other way round: refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import modbay as mb
from modbay.errors import CompositionError, FileError
from test_adapters_files import BEIT, FOLDER, SLIM, SMALL, base, edit, transformers

STRANGE = {  # a checkpoint, what is changed in its config, the base it is loaded onto, and why it is refused
    "a sum that is scaled": ("beit-houlsby", {"original_ln_before": True}, "beit", "scales before it is added"),
    "ALBERT's Compacter": ("albert-houlsby", {"phm_layer": True}, "albert", "reads what goes into the part"),
    "DeBERTa's prefix": ("bert-prefix-flat", {}, "debertav2", "where adapters has them in layers"),
    "DeBERTa's prompt": ("bert-prompt", {}, "debertav2", "multiplied by the mask"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_a_family_has_not_is_refused(name, tmp_path):
    folder, change, kind, why = STRANGE[name]
    shutil.copytree(FOLDER / folder, tmp_path / "case")
    edit(**change)(tmp_path / "case")
    with pytest.raises(FileError, match=why):
        mb.load(base(kind), tmp_path / "case")


@pytest.mark.parametrize(
    ("kind", "kinds", "aggregator", "why"),
    [
        ("beit", {"*.attention.o_proj": mb.Compacter(2, 4)}, None, "layer's scale"),
        ("beit", {"*.attention.o_proj": mb.Bottleneck(4, norm=True)}, None, "layer's scale"),
        ("beit", {"*.mlp.fc2": mb.Bottleneck(4)}, lambda: mb.AdapterFusion(), "layer's scale"),
        ("albert", {"*.attention.dense": mb.Compacter(2, 4)}, None, "goes out of the part"),
        ("llama", {"*.gate_proj": mb.LoRA(2)}, None, "no query, key, value"),
        ("llama", {"*.input_layernorm": mb.Bottleneck(2)}, None, "no end of attention"),
        ("bart", {"model.encoder.layernorm_embedding": mb.Prompt(2)}, None, "no prompts at Bart"),
    ],
)
def test_what_adapters_can_not_hold_of_a_family(kind, kinds, aggregator, why, tmp_path):
    bay = mb.attach(base(kind), modules={"m": kinds}, aggregator=aggregator)
    with pytest.raises(CompositionError, match=why):
        bay.export(tmp_path / "out", format="adapters")
    assert not (tmp_path / "out").exists()


def test_a_prefix_beside_a_bias_that_adapters_does_not_widen(tmp_path):
    config = transformers.BeitConfig(**BEIT, use_relative_position_bias=True)
    bay = mb.attach(transformers.BeitForImageClassification(config).eval(), modules={"m": mb.Prefix(3)})
    with pytest.raises(CompositionError, match="bias of relative positions"):
        bay.export(tmp_path / "out", format="adapters")


def test_several_where_adapters_swaps_input_and_output(tmp_path):
    """ALBERT's attention: what is serial there is parallel in adapters, which has no order."""
    kinds = {"*.attention.dense": mb.Bottleneck(4)}
    bay = mb.attach(base("albert"), modules={"a": kinds, "b": kinds}, aggregator=mb.Sequence())
    with pytest.raises(CompositionError, match="one by one"):
        bay.use("a", "b").export(tmp_path / "out", format="adapters")
    bay.export(tmp_path / "a", "a", format="adapters")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["config"]["is_parallel"]


def test_a_model_that_adapters_changes_is_refused(tmp_path):
    """X-MOD's own adapters are taken out there."""
    config = transformers.XmodConfig(**SLIM, num_labels=3, languages=["en_XX"], default_language="en_XX")
    model = transformers.XmodForSequenceClassification(config).eval()
    with pytest.raises(FileError, match="own adapters"):
        mb.load(model, FOLDER / "roberta-lora")
    bay = mb.attach(model, modules={"m": {"*.query": mb.LoRA(2)}})
    with pytest.raises(CompositionError, match="trained beside them"):
        bay.export(tmp_path / "out", format="adapters")


def test_a_projection_of_all_heads_in_turn_is_refused(tmp_path):
    """DeBERTa's, whose parts adapters takes for one behind the other."""
    config = transformers.DebertaConfig(**SLIM, num_labels=3)
    model = transformers.DebertaForSequenceClassification(config).eval()
    shutil.copytree(FOLDER / "bert-ia3", tmp_path / "case")
    scale = {"deberta.encoder.layer.0.attention.self.in_proj.loras.ia3.lora_B": torch.ones(24, 1)}
    save_file(scale, tmp_path / "case" / "adapter.safetensors")
    with pytest.raises(FileError, match="head by head"):
        mb.load(model, tmp_path / "case")


def test_a_flexible_head_of_another_function_stays_out(tmp_path, caplog):
    """ELECTRA's own has a GELU where BERT's kin have a tanh."""
    for function, own in {"gelu": True, "tanh": False}.items():
        folder = tmp_path / function
        shutil.copytree(FOLDER / "electra-pfeiffer", folder)
        said = json.loads((folder / "head_config.json").read_text())
        config = {"head_type": "classification", "layers": 2, "activation_function": function, "use_pooler": False,
                  "label2id": said["label2id"], "num_labels": 3}  # fmt: skip
        (folder / "head_config.json").write_text(json.dumps({**said, "config": config, "name": "x"}))
        head = load_file(folder / "model_head.safetensors")
        numbers = {"classifier.dense": "heads.x.1", "classifier.out_proj": "heads.x.4"}
        named = {f"{numbers[k.rpartition('.')[0]]}.{k.rpartition('.')[2]}": v for k, v in head.items()}
        save_file(named, folder / "model_head.safetensors")
        bay = mb.load(base("electra"), folder)["adapters"]
        assert any("classifier" in site for site in bay.modulars) == own
    assert "load it onto that class" in caplog.text


def test_other_models(tmp_path):
    """A LoRA is at a projection by name, in any model; what depends on how layers end is refused."""
    small = {**SMALL, "num_key_value_heads": 1, "pad_token_id": 0}
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**small)).eval()
    bay = mb.attach(model, modules={"m": {"*.q_proj": mb.LoRA(2), "*.v_proj": mb.LoRA(2)}})
    bay.export(tmp_path / "m", format="adapters")
    bay.detach()
    mb.load(model, tmp_path / "m")
    keys = load_file(tmp_path / "m" / "adapter.safetensors")
    assert "model.layers.0.self_attn.q_proj.loras.m.lora_A" in keys
    other = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**small)).eval()
    with pytest.raises(FileError, match="no module of this Qwen2"):
        mb.load(other, FOLDER / "bert-lora")
    for name, why in {"bert-prefix": "BERT's kind", "bert-prompt": "end in a norm"}.items():
        with pytest.raises(FileError, match=why):
            mb.load(other, FOLDER / name)
    bay = mb.attach(
        other, modules={"p": mb.Prefix(3), "f": {"*.down_proj": mb.LoRA(2)}, "b": {"*.mlp": mb.Bottleneck(2)}}
    )
    for name, why in {"p": "are not known", "f": "otherwise", "b": "no end of attention"}.items():
        with pytest.raises(CompositionError, match=why):
            bay.export(tmp_path / name, name, format="adapters")
