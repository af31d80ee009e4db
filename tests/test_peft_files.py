"""Checkpoints of peft, in and out: logits agree both ways, and what can't be held is refused."""

import copy
import json
import warnings
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import modbay as mb
from modbay.errors import BayError, CallError, CompositionError, FileError

transformers = pytest.importorskip("transformers")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore:The following .*_pattern keys:RuntimeWarning"
)
IDS = torch.tensor([[3, 8, 1, 40, 7, 9], [11, 2, 30, 4, 6, 5]])
SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def llama():
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, pad_token_id=0)
    return transformers.LlamaForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=1
    )
    return transformers.GPT2LMHeadModel(config)


def bert():
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL))


def roberta():
    return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**SMALL, pad_token_id=0))


def distilbert():
    config = transformers.DistilBertConfig(vocab_size=50, dim=32, n_layers=2, n_heads=4, hidden_dim=48)
    return transformers.DistilBertForSequenceClassification(config)


def opt():
    config = transformers.OPTConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32
    )
    return transformers.OPTForCausalLM(config)


def t5(layers=2):
    config = transformers.T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=layers, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


BOTH = {"encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}  # fmt: skip


def bart():
    config = transformers.BartConfig(vocab_size=50, d_model=32, max_position_embeddings=40, **BOTH)
    return transformers.BartForConditionalGeneration(config)


def mixtral():
    config = transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=3, pad_token_id=0)
    return transformers.MixtralForCausalLM(config)


def causal(kind, **more):
    """A small model of an architecture."""
    config = transformers.AutoConfig.for_model(kind, **SMALL | {"pad_token_id": 0, "num_key_value_heads": 2} | more)
    return transformers.AutoModelForCausalLM.from_config(config)


def deepseek():
    config = transformers.DeepseekV3Config(
        **SMALL, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        kv_lora_rank=8, q_lora_rank=8, v_head_dim=8, qk_rope_head_dim=8, qk_nope_head_dim=8, first_k_dense_replace=1,
        num_key_value_heads=4, pad_token_id=0,
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config)


class Picture(nn.Module):
    """Two convolutions and a head; a call like those of the others."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 8, 3, stride=2, groups=1)
        self.head = nn.Linear(8, 4)

    def forward(self, input_ids):
        x = torch.tanh(self.first(input_ids.float().view(2, 1, 2, 3).repeat(1, 1, 4, 4) / 50))
        return self.head(self.second(x).mean((2, 3)))


class Grouped(Picture):
    """Its second convolution has groups, with inputs of their own."""

    def __init__(self):
        super().__init__()
        self.second = nn.Conv2d(6, 8, 3, stride=2, groups=2)


QV, HEAD = ["query", "value"], {"task_type": "SEQ_CLS"}
LORA, PROMPT = {"r": 4, "lora_alpha": 6}, {"num_virtual_tokens": 5}
CONV = {"target_modules": ["first", "second"]}
CASES = {
    "lora": (llama, lambda: peft.LoraConfig(**LORA, target_modules=["q_proj", "v_proj"])),
    "rslora, patterns": (
        llama,
        lambda: peft.LoraConfig(
            **LORA, use_rslora=True, target_modules="all-linear", rank_pattern={"q_proj": 2},
            alpha_pattern={"layers.0.mlp.up_proj": 3},
        ),
    ),
    "dora": (llama, lambda: peft.LoraConfig(**LORA, use_dora=True, target_modules=["q_proj", "v_proj"])),
    "rs-dora": (llama, lambda: peft.LoraConfig(**LORA, use_dora=True, use_rslora=True, target_modules=["q_proj"])),
    "lora at Conv1D": (gpt2, lambda: peft.LoraConfig(**LORA, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "dora at Conv1D": (
        gpt2,
        lambda: peft.LoraConfig(**LORA, use_dora=True, target_modules=["c_attn"], fan_in_fan_out=True),
    ),
    "lora with biases": (
        gpt2,
        lambda: peft.LoraConfig(**LORA, lora_bias=True, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
    ),
    "lora and head": (bert, lambda: peft.LoraConfig(**LORA, **HEAD, target_modules=QV)),
    "lora and two heads": (distilbert, lambda: peft.LoraConfig(**LORA, **HEAD, target_modules=["q_lin", "v_lin"])),
    "lora, modules_to_save": (
        bert,
        lambda: peft.LoraConfig(**LORA, target_modules=QV, modules_to_save=["pooler", "classifier"]),
    ),
    "lora, all biases": (bert, lambda: peft.LoraConfig(**LORA, **HEAD, bias="all", target_modules=QV)),
    "lora, its biases": (bert, lambda: peft.LoraConfig(**LORA, bias="lora_only", target_modules=QV)),
    "lora at an embedding": (llama, lambda: peft.LoraConfig(**LORA, target_modules=["embed_tokens", "q_proj"])),
    "lora at an embedding that scales": (
        partial(causal, "gemma", head_dim=8),
        lambda: peft.LoraConfig(**LORA, target_modules=["embed_tokens", "q_proj"]),
    ),
    "lora, all biases, where not all have one": (
        partial(causal, "qwen2"),
        lambda: peft.LoraConfig(**LORA, bias="all", target_modules="all-linear"),
    ),
    "lora, all biases, those of a head's layers": (
        roberta,
        lambda: peft.LoraConfig(**LORA, **HEAD, bias="all", target_modules=QV),
    ),
    "lora, words that stay tied": (
        partial(causal, "gemma", head_dim=8),
        lambda: peft.LoraConfig(
            **LORA, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
        ),
    ),
    "lora at layers' weights": (
        llama,
        lambda: peft.LoraConfig(
            **LORA, target_modules=["k_proj"], target_parameters=["q_proj.weight", "embed_tokens.weight"]
        ),
    ),
    "lora at Conv2d": (Picture, lambda: peft.LoraConfig(**LORA, **CONV, modules_to_save=["head"])),
    "lora at experts": (
        mixtral,
        lambda: peft.LoraConfig(
            **LORA, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
        ),
    ),
    "lora at experts and gates": (mixtral, lambda: peft.LoraConfig(**LORA, target_modules="all-linear")),
    "(IA)³": (
        bert,
        lambda: peft.IA3Config(
            **HEAD, target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]
        ),
    ),
    "(IA)³ at Conv1D": (
        gpt2,
        lambda: peft.IA3Config(
            target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True
        ),
    ),
    "(IA)³ at Conv2d": (Picture, lambda: peft.IA3Config(**CONV, feedforward_modules=["second"])),
    "(IA)³ at groups": (Grouped, lambda: peft.IA3Config(**CONV, feedforward_modules=["second"])),
    "layer norms": (bert, lambda: peft.LNTuningConfig(**HEAD, target_modules=["LayerNorm"])),
    "RMS norms": (llama, lambda: peft.LNTuningConfig(target_modules=["input_layernorm"])),
    "layer norms at others": (Picture, lambda: peft.LNTuningConfig(target_modules=["first", "head"])),
    "adalora": (
        bert,
        lambda: peft.AdaLoraConfig(**HEAD, init_r=5, target_r=3, lora_alpha=6, total_step=100, target_modules=QV),
    ),
    "adalora at Conv2d": (Picture, lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=100, **CONV)),
    "vera": (bert, lambda: peft.VeraConfig(**HEAD, r=8, target_modules=QV)),
    "vera at Conv1D": (gpt2, lambda: peft.VeraConfig(r=8, target_modules=["c_attn", "mlp.c_fc"], fan_in_fan_out=True)),
    "loha": (bert, lambda: peft.LoHaConfig(**HEAD, r=3, alpha=5, target_modules=QV)),
    "loha at Conv2d": (Picture, lambda: peft.LoHaConfig(r=3, alpha=5, **CONV)),
    "loha at groups": (Grouped, lambda: peft.LoHaConfig(r=3, alpha=5, **CONV)),
    "lokr": (bert, lambda: peft.LoKrConfig(**HEAD, r=3, alpha=5, target_modules=[*QV, "intermediate.dense"])),
    "lokr of two factors": (
        bert,
        lambda: peft.LoKrConfig(**HEAD, r=2, alpha=9, decompose_both=True, decompose_factor=8, target_modules=QV),
    ),
    "lokr at Conv2d": (Picture, lambda: peft.LoKrConfig(r=3, alpha=5, **CONV)),
    "lokr of two factors at Conv2d": (Picture, lambda: peft.LoKrConfig(r=1, decompose_factor=2, **CONV)),
    "lokr at groups": (Grouped, lambda: peft.LoKrConfig(r=1, decompose_factor=2, **CONV)),
    "prompt": (llama, lambda: peft.PromptTuningConfig(**PROMPT, task_type="CAUSAL_LM")),
    "prompt and head": (bert, lambda: peft.PromptTuningConfig(**PROMPT, **HEAD)),
    "prompt at T5": (t5, lambda: peft.PromptTuningConfig(**PROMPT, task_type="SEQ_2_SEQ_LM")),
    "p-tuning": (llama, lambda: peft.PromptEncoderConfig(**PROMPT, task_type="CAUSAL_LM", encoder_hidden_size=16)),
    "prefix": (llama, lambda: peft.PrefixTuningConfig(**PROMPT, task_type="CAUSAL_LM")),
    "prefix at GPT-2": (gpt2, lambda: peft.PrefixTuningConfig(**PROMPT, task_type="CAUSAL_LM")),
    "prefix, projected": (
        llama,
        lambda: peft.PrefixTuningConfig(**PROMPT, task_type="CAUSAL_LM", prefix_projection=True, encoder_hidden_size=8),
    ),
}  # fmt: skip
TURNED = {  # by how keys are turned by their positions
    "neighbours": ("cohere", {}),
    "some features": ("phi", {"num_key_value_heads": 4}),
    "as the layer says": ("gemma3_text", {"head_dim": 8}),
    "each wave once": ("gpt_oss", {"head_dim": 8, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "scaled": ("qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4,
                                             "original_max_position_embeddings": 16}}),
    "by name": ("gptj", {"num_key_value_heads": 4, "rotary_dim": 4}),
}  # fmt: skip
CASES |= {
    f"prefix at {kind}": (
        partial(causal, kind, **more),
        lambda: peft.PrefixTuningConfig(**PROMPT, task_type="CAUSAL_LM"),
    )
    for kind, more in TURNED.values()
}
WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
SPEAKS = {"task_type": "SEQ_2_SEQ_LM"}  # peft needs the decoder's layers; with an even number two have one prefix
CASES |= {
    "prefix at OPT": (opt, lambda: peft.PrefixTuningConfig(**PROMPT, task_type="CAUSAL_LM")),
    "prefix under a window": (
        partial(causal, "mistral", sliding_window=6),
        lambda: peft.PrefixTuningConfig(**PROMPT, task_type="CAUSAL_LM"),
    ),
    "prefix under a window in some layers": (
        partial(causal, "gemma3_text", head_dim=8, **WINDOW),
        lambda: peft.PrefixTuningConfig(**PROMPT, task_type="CAUSAL_LM"),
    ),
    "prefix at T5": (t5, lambda: peft.PrefixTuningConfig(**PROMPT, **SPEAKS)),
    "prefix at T5, three layers": (partial(t5, 3), lambda: peft.PrefixTuningConfig(**PROMPT, **SPEAKS)),
    "prefix at BART": (bart, lambda: peft.PrefixTuningConfig(**PROMPT, **SPEAKS, num_layers=3)),
}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def trained(name, folder):
    """(the base, a checkpoint of peft's on it, what it computes)."""
    torch.manual_seed(0)
    make, config = CASES[name]
    base = make().eval()
    theirs = peft.get_peft_model(copy.deepcopy(base), config()).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    theirs.save_pretrained(folder)
    return base, run(theirs)


def run(model):
    bare = _bare(model)
    more = {} if isinstance(bare, Picture) else {"attention_mask": torch.ones_like(IDS)}
    if getattr(getattr(bare, "config", None), "is_encoder_decoder", False):
        more["decoder_input_ids"] = IDS
    with torch.no_grad():
        out = model(input_ids=IDS, **more)
    logits = out if isinstance(out, torch.Tensor) else out.logits
    return logits[:, -IDS.shape[1] :] if logits.ndim == 3 else logits


def _bare(model):
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


@pytest.mark.parametrize("name", CASES)
def test_there_and_back(name, tmp_path):
    """peft → modbay → peft → modbay: the same logits at each step, and not the base's."""
    base, wanted = trained(name, tmp_path / "theirs")
    ours = copy.deepcopy(base)
    bay = mb.load(ours, tmp_path / "theirs")["peft"]
    assert bay.names() == ["theirs"]
    torch.testing.assert_close(run(ours), wanted, **CLOSE)
    assert (run(base) - wanted).abs().max() > 1e-4
    bay.export(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    torch.testing.assert_close(run(again), wanted, **CLOSE)
    last = copy.deepcopy(base)
    mb.load(last, tmp_path / "ours")
    torch.testing.assert_close(run(last), wanted, **CLOSE)
    bay.detach()
    assert torch.equal(run(ours), run(base))


OURS = {
    "pissa": {"*.q_proj": mb.LoRA(3, start="pissa")},
    "olora": {"*.q_proj": mb.LoRA(3, alpha=6, start="olora")},
    "vera": {"*.q_proj": mb.VeRA(6), "*.v_proj": mb.VeRA(6)},
    "ranks": {"*.q_proj": mb.LoRA(3), "*.v_proj": mb.LoRA(5, alpha=2, stable=True)},
    "copies": {"*.q_proj": mb.LoRA(3), "lm_head": mb.Full()},
    "norms": {"*.input_layernorm": mb.Norm()},
}


@pytest.mark.parametrize("name", OURS)
def test_what_modbay_trained_in_peft(name, tmp_path):
    torch.manual_seed(0)
    base = llama().eval()
    ours = copy.deepcopy(base)
    bay = mb.attach(ours, modules={"m": OURS[name]}).use("m")
    with torch.no_grad():
        for p in bay.parameters():
            p.add_(0.3 * torch.randn_like(p))
    bay.export(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(run(theirs), run(ours), **CLOSE)
    twin = copy.deepcopy(base)
    mb.load(twin, tmp_path)
    torch.testing.assert_close(run(twin), run(ours), **CLOSE)


def test_several_of_one_folder_in_a_mixed_batch(tmp_path):
    """peft keeps its adapters in folders of a folder; a batch may have another one in each row."""
    torch.manual_seed(0)
    base = llama().eval()
    config = peft.LoraConfig(**LORA, target_modules=["q_proj"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config, adapter_name="en").eval()
    theirs.add_adapter("de", peft.LoraConfig(r=2, target_modules=["v_proj"]))
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if "lora_" in n:
                p.add_(0.3 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path)
    bay = mb.load(base, tmp_path, name="language")["language"]
    assert bay.names() == ["de", "en"] and not any(p.requires_grad for p in bay.parameters())
    with torch.no_grad():
        mixed = base(IDS, language=["de", "en"]).logits
        for i, name in enumerate(("de", "en")):
            theirs.set_adapter(name)
            torch.testing.assert_close(mixed[i], theirs(input_ids=IDS).logits[i], **CLOSE)


def test_a_file_that_begins_as_a_pickle_does(tmp_path):
    """The length of a safetensors header may be 0x0280, which are a pickle's first bytes."""
    base, wanted = trained("lora", tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    for n in range(0, 1 << 9, 8):
        save_file(load_file(path), path, {"note": "x" * n})
        if path.read_bytes()[0] == 0x80:
            break
    assert path.read_bytes()[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    mb.load(base, tmp_path)
    torch.testing.assert_close(run(base), wanted, **CLOSE)


def test_a_convolution_with_groups_is_refused(tmp_path):
    base = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=["0"])).save_pretrained(tmp_path)
    with pytest.raises(FileError, match="mixes the groups"):
        mb.load(base, tmp_path)
    bay = mb.attach(base, at="0", modules={"m": mb.LoRA(4)})
    with pytest.raises(CompositionError, match="groups"):
        bay.export(tmp_path / "out")


def test_a_headless_base_and_one_with_a_head(tmp_path):
    """What was trained on a bare encoder goes onto one with a head."""
    torch.manual_seed(0)
    whole = bert().eval()
    theirs = peft.get_peft_model(copy.deepcopy(whole.bert), peft.LoraConfig(**LORA, target_modules=QV)).eval()
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if "lora_" in n:
                p.add_(0.3 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path)
    mb.load(whole, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(whole.bert(IDS)[0], theirs(IDS)[0], **CLOSE)


def test_a_module_of_peft_in_a_bay_that_is_there(tmp_path):
    base, wanted = trained("lora", tmp_path / "guest")
    bay = mb.attach(base, at=["*.q_proj", "*.v_proj"], modules={"own": mb.LoRA(2)}, name="task")
    bay.load(tmp_path / "guest", add=True).use("guest")
    torch.testing.assert_close(run(base), wanted, **CLOSE)
    assert bay.names() == ["own", "guest"]
    with pytest.raises(BayError, match="guest"):
        bay.load(tmp_path / "guest", add=True)
    other = mb.attach(base, at="*.k_proj", modules={"own": mb.LoRA(2)}, name="other")
    with pytest.raises(BayError, match="q_proj"):
        other.load(tmp_path / "guest", add=True)
    assert other.names() == ["own"]


@pytest.mark.parametrize(
    ("kinds", "why"),
    [
        ({"*.q_proj": mb.LoRA(2), "*.v_proj": mb.DoRA(2)}, "elsewhere the other"),
        ({"*.q_proj": mb.LoRA(2), "*.v_proj": mb.IA3()}, "hold one"),
        ({"*.mlp": mb.Bottleneck(2)}, "none of peft's"),
        ({"*.q_proj": mb.LoRA(2, bias=True)}, "layer has none"),
        ({mb.part("*.q_proj", 0, 8): mb.LoRA(2)}, "part of a layer"),
    ],
)
def test_what_peft_can_not_hold(kinds, why, tmp_path):
    bay = mb.attach(llama(), modules={"m": kinds})
    with pytest.raises(CompositionError, match=why):
        bay.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_layer_that_is_never_called(tmp_path, caplog):
    """T5 gives its embeddings to both sides, and never calls `shared`: peft's LoRA does nothing there."""
    torch.manual_seed(0)
    base = t5().eval()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**LORA, target_modules=["q", "shared"])).eval()
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if "lora_" in n:
                p.add_(0.3 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path / "theirs")
    bay = mb.load(base, tmp_path / "theirs")["peft"]
    torch.testing.assert_close(run(base), run(theirs), **CLOSE)
    assert "'shared'" in caplog.text and "never fired" in caplog.text
    bay.save(tmp_path / "own")
    bay.detach()
    mb.load(base, tmp_path / "own")["peft"].use("theirs")
    torch.testing.assert_close(run(base), run(theirs), **CLOSE)


def test_a_layer_that_peft_takes_for_the_experts(tmp_path):
    """It would rename the target, and load the rest without a word."""
    torch.manual_seed(0)
    base = deepseek().eval()
    bay = mb.attach(base, "*.mlp.up_proj", {"m": mb.LoRA(2)})
    with pytest.raises(CompositionError, match="takes for the experts'"):
        bay.export(tmp_path / "peft")
    bay.export(tmp_path / "served", format="lora", rank=2)  # engines go by paths
    assert any("mlp.up_proj" in key for key in load_file(tmp_path / "served" / "adapter_model.safetensors"))


def test_export_is_told_what(tmp_path):
    bay = mb.attach(llama(), at="*.q_proj", modules={"a": mb.LoRA(2), "b": mb.LoRA(2)})
    with pytest.raises(BayError, match="say which"):
        bay.export(tmp_path)
    with pytest.raises(BayError, match="'c'"):
        bay.export(tmp_path, "c")
    with pytest.raises(BayError, match="'gguff'"):
        bay.export(tmp_path, "a", "gguff")


def edit(**fields):
    def change(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def tensors(change):
    def run_it(folder):
        path = folder / "adapter_model.safetensors"
        save_file(dict(change(load_file(path))), path)

    return run_it


def pickled(folder):
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


BAD = {
    "an unknown method": (edit(peft_type="LILY"), "LILY"),
    "no method": (edit(peft_type=None), "peft_type"),
    "an alpha of words": (edit(lora_alpha="much"), "lora_alpha"),
    "a broken pattern": (edit(alpha_pattern={"(": 1}), "alpha_pattern"),
    "a base that was changed": (edit(init_lora_weights="pissa_niter_4"), "taken a part out"),
    "another function": (edit(use_qalora=True), "QA-LoRA"),
    "half a LoRA": (tensors(lambda t: {k: v for k, v in t.items() if "lora_B" not in k}), "lora_B"),
    "another model's": (tensors(lambda t: {k.replace("layers.1", "layers.7"): v for k, v in t.items()}), "layers.7"),
    "another width": (tensors(lambda t: {k: v[:, :-1].contiguous() for k, v in t.items()}), "shapes"),
    "not a number": (tensors(lambda t: {k: v * float("nan") for k, v in t.items()}), "NaN"),
    "what nobody knows": (tensors(lambda t: {**t, "base_model.model.lora_C": torch.ones(2)}), "lora_C"),
    "a pickle": (pickled, "pickle"),
    "no tensors": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "missing"),
    "no JSON": (lambda folder: (folder / "adapter_config.json").write_text("{"), "not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(name, tmp_path):
    change, why = BAD[name]
    base, _ = trained("lora", tmp_path)
    before = run(base)
    change(tmp_path)
    with pytest.raises(FileError, match=why):
        mb.load(base, tmp_path)
    assert not mb.bays(base) and torch.equal(run(base), before)


def test_a_prefix_that_has_no_equal(tmp_path):
    """M2M100 finds its positions in its own way, and peft's text begins at another one."""
    torch.manual_seed(0)
    base = transformers.M2M100ForConditionalGeneration(transformers.M2M100Config(vocab_size=50, d_model=32, **BOTH))
    config = peft.PrefixTuningConfig(**PROMPT, **SPEAKS, num_layers=3)
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path)
    with pytest.raises(FileError, match=r"begins at position 5.*can't be shifted"):
        mb.load(base, tmp_path)
    bay = mb.attach(gpt2(), mb.role.attention, {"de": mb.Prefix(3)})
    with pytest.raises(CompositionError, match=r"mb\.Shift\(3\)"):
        bay.export(tmp_path / "out")


@pytest.mark.parametrize(("make", "why"), [(llama, "has not relative=None"), (t5, "same prefix as at another layer")])
def test_prefixes_that_peft_can_not_have(make, why, tmp_path):
    how = {"relative": "front"}
    bay = mb.attach(
        make(), mb.role.attention if make is llama else "decoder*SelfAttention", {"de": mb.Prefix(3, **how)}
    )
    with pytest.raises(CompositionError, match=why):
        bay.export(tmp_path / "out")


@pytest.mark.parametrize(
    "name",
    [
        "prefix at OPT",
        "prefix at T5",
        "prefix at BART",
        "prefix under a window",
        "prefix under a window in some layers",
    ],
)
def test_prefixes_by_example(name, tmp_path):
    """Positions that a class of its own finds, a bias of relative ones, a window: in generation too."""
    base, wanted = trained(name, tmp_path / "long")
    bare, config = run(base), CASES[name][1]()
    config.num_virtual_tokens = 2
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    theirs.save_pretrained(tmp_path / "short")
    bay = mb.load(base, tmp_path / "long")["peft"]
    bay.load(tmp_path / "short", add=True)
    text = {"input_ids": IDS[[0, 1, 0]], "attention_mask": torch.ones(3, 6, dtype=torch.long)}
    more = {"decoder_input_ids": IDS[[0, 1, 0]]} if base.config.is_encoder_decoder else {}
    each = {"peft": ["long", "short", None]}
    with torch.no_grad():
        mixed = base(**text, **more, **each).logits
    torch.testing.assert_close(mixed, torch.stack([wanted[0], run(theirs)[1], bare[0]]), **CLOSE)
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    together = base.generate(**text, **each, **how)
    assert torch.equal(together, base.generate(**text, **each, **how, use_cache=False))
    for i, one in enumerate(each["peft"]):
        alone = {key: tensor[i : i + 1] for key, tensor in text.items()}
        assert torch.equal(together[i : i + 1], base.generate(**alone, peft=[one], **how))


def test_positions_are_shifted_by_example(tmp_path):
    base, wanted = trained("prefix at GPT-2", tmp_path / "guest")
    with torch.no_grad():
        bare = base(IDS).logits
        mb.load(base, tmp_path / "guest")["peft"].use(["guest", None])
        rows = torch.arange(IDS.shape[1]).expand_as(IDS)
        for given in ({}, {"position_ids": rows[:1]}, {"position_ids": rows}):
            torch.testing.assert_close(base(IDS, **given).logits, torch.stack([wanted[0], bare[1]]), **CLOSE)
        mb.bays(base)["peft"].save(tmp_path / "own")
        mb.bays(base)["peft"].detach()
        mb.load(base, tmp_path / "own")["peft"].use("guest")
        torch.testing.assert_close(base(IDS).logits, wanted, **CLOSE)
        generated = base.generate(IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
        for n in range(IDS.shape[1], generated.shape[1]):  # what is cached does not move the text
            assert base(generated[:, :n]).logits[0, -1].argmax() == generated[0, n]


TABLES = {  # models, and where their positions are learned
    "GPT-2": (gpt2, "*wpe"),
    "BERT": (bert, "*position_embeddings"),
}


@pytest.mark.parametrize("name", TABLES)
def test_positions_that_come_once_are_shifted_by_example(name):
    """Models look positions up once for all examples, (1, t)."""
    make, at = TABLES[name]
    torch.manual_seed(0)
    model = make().eval()
    places = torch.arange(IDS.shape[1])
    shift = {"a": 3, "b": 5, None: 0}
    with torch.no_grad():
        alone = {label: model(IDS, position_ids=(places + n)[None]).logits for label, n in shift.items()}
        mb.attach(model, at, {"a": mb.Shift(3), "b": mb.Shift(5), "other": mb.LoRA(2)}, mb.ByLabel("voice"))
        for labels in (["a", "b"], ["b", None], ["a", "a"], [None, "a"]):
            got = model(IDS, voice=labels).logits
            torch.testing.assert_close(got, torch.stack([alone[one][i] for i, one in enumerate(labels)]))
        got = model(IDS, voice=["a", "other"]).logits  # a LoRA beside it, which is new
        torch.testing.assert_close(got, torch.stack([alone["a"][0], alone[None][1]]))


def test_shifted_positions_in_generation_by_example():
    """In batches, padded on the left, with beams, and without a cache."""
    torch.manual_seed(0)
    model = gpt2().eval()
    mb.attach(model, "*wpe", {"a": mb.Shift(3), "b": mb.Shift(20)}, mb.ByLabel("voice"))
    mask = torch.ones_like(IDS)
    mask[1, :2] = 0
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for more in ({}, {"num_beams": 3}, {"use_cache": False}):
        both = model.generate(IDS, attention_mask=mask, voice=["a", "b"], **how, **more)
        one = model.generate(IDS[:1], voice="a", **how, **more)
        other = model.generate(IDS[1:, 2:], voice="b", **how, **more)
        assert torch.equal(both[:1], one) and torch.equal(both[1:, 2:], other)


class Plain(nn.Module):
    """Positions without a row: nanoGPT's, DETR's."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(50, 8), nn.Embedding(20, 8)

    def forward(self, ids):
        return torch.tanh(self.words(ids) + self.places(torch.arange(ids.shape[1])))


def test_shifted_positions_compiled():
    torch.manual_seed(0)
    model = Plain().eval()
    bay = mb.attach(model, "places", {"a": mb.Shift(3), "b": mb.Shift(5)}, mb.ByLabel("voice"))
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        for rows in ([0, 1], [1, -1]):  # −1: the base alone
            wanted = model(IDS, voice=[None if i < 0 else bay.names()[i] for i in rows])
            torch.testing.assert_close(compiled(IDS, voice=torch.tensor(rows)), wanted)


@pytest.mark.parametrize("length", [2, 6])
def test_positions_without_a_row(length):
    """Of as many examples as positions, too: x is positions, never examples."""
    torch.manual_seed(0)
    model, ids = Plain(), IDS[:, :length]
    wanted = torch.tanh(model.words(ids) + model.places(torch.arange(length) + torch.tensor([[3], [0]])))
    weights = torch.randn_like(wanted)
    (gradient,) = torch.autograd.grad(wanted, model.places.weight, weights)
    mb.attach(model, "places", {"a": mb.Shift(3)}, mb.ByLabel("voice"), freeze=False)
    got = model(ids, voice=["a", None])
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(torch.autograd.grad(got, model.places.weight, weights)[0], gradient)


def test_padding_keeps_its_position():
    """RoBERTa's has one of its own."""
    torch.manual_seed(0)
    model = transformers.RobertaModel(transformers.RobertaConfig(**SMALL, pad_token_id=1)).eval()
    ids = torch.tensor([[3, 8, 9, 4], [5, 6, 1, 1]])
    mask = (ids != 1).long()
    places = torch.where(ids == 1, 1, torch.arange(2, 6) + 3)
    with torch.no_grad():
        wanted = model(ids, mask, position_ids=places).last_hidden_state
        mb.attach(model, "*position_embeddings", {"de": mb.Shift(3)}).use("de")
        torch.testing.assert_close(model(ids, mask).last_hidden_state, wanted)


def test_a_shifted_text_that_does_not_fit():
    model = gpt2().eval()
    with pytest.raises(CompositionError, match="64 positions"):
        mb.attach(gpt2(), "*wpe", {"de": mb.Shift(64)})
    with pytest.raises(CompositionError, match="LayerNorm"):
        mb.attach(gpt2(), "*ln_f", {"de": mb.Shift(2)})
    bay = mb.attach(model, "*wpe", {"de": mb.Shift(60)}).use("de")
    with torch.no_grad(), pytest.raises(CallError, match="cut it at 4"):
        model(IDS)
    with torch.no_grad():
        shifted = model(IDS[:, :4]).logits
        bay.detach()
        torch.testing.assert_close(shifted, model(IDS[:, :4], position_ids=torch.arange(60, 64)[None]).logits)


def test_another_base_is_told(tmp_path, caplog):
    base, _ = trained("lora", tmp_path)
    edit(base_model_name_or_path="org/that-model")(tmp_path)
    base.config._name_or_path = "org/this-model"
    mb.load(base, tmp_path)
    assert "org/that-model" in caplog.text and "fingerprint" in caplog.text


# Plain LoRA, for engines

PLAIN = {
    "lora": ({"*.q_proj": mb.LoRA(3, alpha=5, stable=True), "*.v_proj": mb.LoRA(5)}, None, 0.05),
    "dora": ({"*.q_proj": mb.DoRA(3)}, None, 1e-4),
    "loha": ({"*.q_proj": mb.LoHa(3)}, None, 1e-4),
    "scales": ({"*.q_proj": mb.IA3(), "*.down_proj": mb.IA3("input")}, None, 1e-5),
    "a copy": ({"*.q_proj": mb.Full()}, None, 1e-5),
    "sparse": ({"*.q_proj": mb.SparseDelta(0.02)}, None, 1e-5),
    "dora, cut": ({"*.q_proj": mb.DoRA(3)}, 8, 0.9),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_lora(name, tmp_path):
    torch.manual_seed(0)
    kinds, rank, most = PLAIN[name]
    base = llama().eval()
    ours = copy.deepcopy(base)
    bay = mb.attach(ours, modules={"m": kinds}).use("m")
    with torch.no_grad():
        for p in bay.parameters():
            p.add_(0.1 * torch.randn_like(p))
    errors = bay.export(tmp_path, format="lora", rank=rank, error=most)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] and not config["alpha_pattern"] and not config["rank_pattern"]
    assert all(
        t.shape[0 if "lora_A" in k else 1] == config["r"]
        for k, t in load_file(tmp_path / "adapter_model.safetensors").items()
    )
    assert max(errors.values()) <= most and (config["r"] == rank or rank is None)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    for site, error in errors.items():
        part, place = bay.modulars[site].parts._modules["m"], bay.fitting.places[site]
        layer = theirs.get_base_model().get_submodule(site)
        if isinstance(part.kind, mb.Full):
            wanted = part.tensors()["weight"] - place.site.weight
        else:
            wanted = part.kind.delta(part.tensors(), place.site).dense(place.site)[0]
        lost = (layer.get_delta_weight("default") - wanted).norm() / wanted.norm()
        assert lost.item() == pytest.approx(error, abs=1e-5)
    if rank is None:
        torch.testing.assert_close(run(theirs), run(ours), atol=1e-4, rtol=1e-4)


def test_what_plain_lora_is_not(tmp_path):
    kinds = {
        "offset": {"*.query": mb.BitFit()},
        "function": {"*.output": mb.Bottleneck(2)},
        "norm": {"*.LayerNorm": mb.Norm()},
        "rank": {"*.query": mb.DenseDelta()},
        "head": {"*.query": mb.LoRA(2), "classifier": mb.Full()},
    }
    reasons = {"offset": "moves the bias", "function": "no weight", "norm": "no weight", "rank": "is off by"}
    bay = mb.attach(bert(), modules=kinds)
    with torch.no_grad():
        for p in bay.parameters():
            p.add_(0.1 * torch.randn_like(p))
    for name, why in reasons.items():
        with pytest.raises(CompositionError, match=why):
            bay.export(tmp_path / name, name, format="lora", rank=2)
        assert not (tmp_path / name).exists()
    bay.export(tmp_path / "head", "head", format="lora")
    assert set(load_file(tmp_path / "head" / "heads.safetensors")) == {"classifier.weight", "classifier.bias"}
    assert "modules_to_save" not in json.loads((tmp_path / "head" / "adapter_config.json").read_text())
