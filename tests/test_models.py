"""Real architectures: identity, mixed batch = loop, deepcopy and detach on each, and the traps of some of them."""

import copy

import pytest
import torch
import transformers
from torch import nn

import modbay as mb

LABELS = ["en", "de", None, "en"]
SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4))


def llama():
    config = transformers.LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config)


def bert():
    return transformers.BertModel(transformers.BertConfig(**SMALL, intermediate_size=48))


def t5():
    config = transformers.T5Config(
        vocab_size=99, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def vit():
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8
    )
    return transformers.ViTModel(config)


def mixtral():
    config = transformers.MixtralConfig(**SMALL, intermediate_size=48, num_key_value_heads=2, num_local_experts=4)
    return transformers.MixtralForCausalLM(config)


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.Flatten(),
        nn.Linear(8 * 7 * 7, 5),
    )  # fmt: skip


def encoder():
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def text(b=4):
    return {"input_ids": torch.randint(5, 99, (b, 6))}


def pairs(b=4):
    return {"input_ids": torch.randint(5, 99, (b, 6)), "decoder_input_ids": torch.randint(5, 99, (b, 3))}


def pixels(b=4):
    return {"pixel_values": torch.randn(b, 3, 16, 16)}


def images(b=4):
    return {"input": torch.randn(b, 3, 16, 16)}


def vectors(b=4):
    return {"src": torch.randn(b, 6, 32)}


MODELS = {
    "gpt2": (gpt2, text, "*.c_attn", mb.LoRA(4)),
    "gpt2-slice": (gpt2, text, mb.part("*.c_attn", 64, 96), mb.LoRA(4)),
    "gpt2-before": (gpt2, text, mb.before("lm_head"), mb.Bottleneck(4)),
    "llama": (llama, text, ["*.q_proj", "*.v_proj", "*.down_proj"], mb.LoRA(4)),
    "llama-block": (llama, text, "model.layers.?", mb.Bottleneck(4)),
    "llama-ia3": (llama, text, ["*.k_proj", "*.v_proj"], mb.IA3()),
    "llama-full": (llama, text, "model.layers.1.mlp", mb.Full()),
    "bert": (bert, text, "*.value", mb.LoRA(4)),
    "bert-output": (bert, text, "*[0-9].output", mb.Bottleneck(4)),
    "bert-span": (bert, text, mb.span("*.intermediate.dense", "*[0-9].output.dense"), mb.Bottleneck(4)),
    "bert-embedding": (bert, text, "embeddings.word_embeddings", mb.LoRA(4)),
    "t5": (t5, pairs, ["*.q", "*.v"], mb.LoRA(4)),
    "t5-before": (t5, pairs, mb.before("*.wo"), mb.Bottleneck(4)),
    "t5-ff": (t5, pairs, "*.DenseReluDense", mb.Bottleneck(4)),
    "vit": (vit, pixels, "*.layer*.attention.*", mb.LoRA(4)),
    "mixtral": (mixtral, text, "*.self_attn.q_proj", mb.LoRA(4)),
    "convolutional": (convolutional, images, [nn.Conv2d, nn.Linear], mb.LoRA(2)),
    "encoder": (encoder, vectors, "*.linear?", mb.LoRA(4)),
    "encoder-attention": (encoder, vectors, nn.MultiheadAttention, mb.Bottleneck(4)),
}


def first(out):
    return out if isinstance(out, torch.Tensor) else out[0]


def run(model, inputs, **labels):
    return first(model(**inputs, **labels))


def rows(inputs, i):
    return {key: value[i : i + 1] for key, value in inputs.items()}


def attached(case, **options):
    make, inputs, at, kind = MODELS[case]
    model = make().eval()
    if case == "vit":
        at = [n for n, m in model.named_modules() if "attention" in n and isinstance(m, nn.Linear)]
    options = {"name": "language", **options}
    return model, inputs(), lambda: mb.attach(model, at, {"en": kind, "de": kind}, **options)


def randomise(bay):
    with torch.no_grad():
        for parameter in bay.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)


@pytest.mark.parametrize("case", MODELS)
def test_a_mixed_batch_on_a_real_model(case):
    model, inputs, attach = attached(case)
    keys, base = list(model.state_dict()), run(model, inputs)
    bay = attach()
    assert list(model.state_dict()) == keys and isinstance(model, type(model))
    torch.testing.assert_close(run(model, inputs, language=LABELS), base, rtol=1e-5, atol=1e-5)

    randomise(bay)
    mixed = run(model, inputs, language=LABELS)
    alone = torch.cat([run(model, rows(inputs, i), language=[label]) for i, label in enumerate(LABELS)])
    torch.testing.assert_close(mixed, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[2], base[2], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mixed[0], base[0], atol=1e-4)

    mixed.square().sum().backward()
    assert all(p.grad is not None for p in bay.parameters())
    assert all(p.grad is None for n, p in model.named_parameters() if "_bay" not in n)

    twin = copy.deepcopy(model)
    torch.testing.assert_close(run(twin, inputs, language=LABELS), mixed, rtol=0, atol=1e-6)
    bay.detach()
    assert torch.equal(run(model, inputs), base) and list(model.state_dict()) == keys
    torch.testing.assert_close(run(twin, inputs, language=LABELS), mixed, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", ["llama", "gpt2", "t5"])
@pytest.mark.filterwarnings("ignore:.*attention mask.*")
def test_generation_with_mixed_labels_beams_and_left_padding(case):
    model, inputs, attach = attached(case)
    randomise(attach())
    model.generation_config.pad_token_id = 0
    ids, mask = inputs["input_ids"], torch.ones(4, 6, dtype=torch.long)
    mask[0, :2] = mask[3, :3] = 0
    ids = ids.masked_fill(mask == 0, 0)
    options = {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2, "do_sample": False, "min_new_tokens": 5}
    mixed = model.generate(input_ids=ids, attention_mask=mask, language=LABELS, **options)
    for i, label in enumerate(LABELS):
        skip = 0 if case == "t5" else int((mask[i] == 0).sum())
        row, seen = ids[i : i + 1, int((mask[i] == 0).sum()) :], mask[i : i + 1, int((mask[i] == 0).sum()) :]
        alone = model.generate(input_ids=row, attention_mask=seen, language=[label], **options)
        assert torch.equal(mixed[2 * i : 2 * i + 2, skip:], alone)


@pytest.mark.parametrize("case", ["llama", "t5"])
@pytest.mark.filterwarnings("ignore:.*attention mask.*")
def test_generation_holds_what_use_set_and_what_its_input_was_routed_to(case):
    model, inputs, attach = attached(case, router=mb.TopK(1, by="example"))
    randomise(attach())
    model.generation_config.pad_token_id = 0
    options = {
        "max_new_tokens": 4,
        "min_new_tokens": 4,
        "num_beams": 2,
        "do_sample": False,
        "input_ids": inputs["input_ids"],
    }
    routed = model.generate(**options)
    route = (
        mb.bays(model)["language"]
        .session.bays["language"]
        .router(model.get_input_embeddings()(inputs["input_ids"]), mb.Context())
    )
    names = [["en", "de"][i] for i in route.index[:, 0].tolist()]
    for i, name in enumerate(names):
        mb.bays(model)["language"].use({name: route.weights[i, 0].item()})
        alone = model.generate(**{**options, "input_ids": inputs["input_ids"][i : i + 1]})
        assert torch.equal(routed[i : i + 1], alone)


@pytest.mark.filterwarnings("ignore:.*attention mask.*")
def test_a_list_that_use_set_is_repeated_for_beams():
    model, inputs, attach = attached("llama")
    bay = attach()
    randomise(bay)
    model.generation_config.pad_token_id = 0
    options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False, "input_ids": inputs["input_ids"]}
    given = model.generate(**options, language=LABELS)
    bay.use(LABELS)
    assert torch.equal(model.generate(**options), given)


def test_shared_layers_are_one_site(rxnmapper):
    ids = torch.randint(20, 500, (4, 9))
    base = rxnmapper(ids).logits
    bay = mb.attach(rxnmapper, "*.value", {"a": mb.LoRA(4), "b": mb.LoRA(4)}, name="reaction")
    assert len(bay.modulars) == 1  # used twelve times
    randomise(bay)
    labels = ["a", "b", None, "a"]
    mixed = rxnmapper(ids, reaction=labels).logits
    alone = torch.cat([rxnmapper(ids[i : i + 1], reaction=[label]).logits for i, label in enumerate(labels)])
    torch.testing.assert_close(mixed, alone, rtol=1e-4, atol=1e-4)
    bay.detach()
    assert torch.equal(rxnmapper(ids).logits, base)


def test_minilm(minilm, minilm_tokenizer):
    batch = minilm_tokenizer(["turn on the light", "licht an", "ciao", "wake me up"], padding=True, return_tensors="pt")
    with torch.no_grad():
        base = minilm(**batch)[0]
        bay = mb.attach(minilm, mb.role.attention.value, {"en": mb.LoRA(8), "de": mb.LoRA(8)}, name="language")
        randomise(bay)
        mixed = minilm(**batch, language=LABELS)[0]
        for i, label in enumerate(LABELS):
            torch.testing.assert_close(mixed[i], minilm(**rows(batch, i), language=[label])[0][0], rtol=1e-4, atol=1e-4)
        bay.detach()
        assert torch.equal(minilm(**batch)[0], base)


def test_a_site_that_cannot_fire_raises():
    model = encoder().eval()
    mb.attach(model, "*.out_proj", {"a": mb.LoRA(2)}, name="task")
    with pytest.raises(mb.errors.SiteError, match=r"2 of 2 sites never fired.*out_proj.*sometimes=True"):
        model(torch.randn(2, 3, 32), task="a")


def test_a_shared_embedding_that_is_never_called_raises():
    model = t5().eval()
    mb.attach(model, "shared", {"a": mb.LoRA(2)}, name="task")
    with pytest.raises(mb.errors.SiteError, match="'shared'"):
        model(**pairs(), task="a")


def test_fused_experts():
    model, inputs = mixtral().eval(), text()
    base = run(model, inputs)
    bay = mb.attach(model, "*.experts.*_proj", {"en": mb.LoRA(2), "de": mb.LoRA(2)}, name="language")
    torch.testing.assert_close(run(model, inputs, language="en"), base)
    randomise(bay)
    alone = run(model, inputs, language="de")
    torch.testing.assert_close(run(model, inputs, language=["de"] * 4), alone)
    assert not torch.allclose(alone, base)
    with pytest.raises(mb.errors.SiteError, match="shared by all rows"):
        run(model, inputs, language=LABELS)
    bay.detach()
    assert torch.equal(run(model, inputs), base)


def test_rows_that_are_not_the_batch_raise():
    model, inputs = mixtral().eval(), text()
    mb.attach(model, mb.at("*.mlp.gate", features=4), {"en": mb.Bottleneck(2), "de": mb.Bottleneck(2)}, name="language")
    with pytest.raises(mb.errors.SiteError, match=r"rows \(24,\).*\(4,\)"):
        run(model, inputs, language=LABELS)


def test_a_model_dispatched_by_hooks():
    accelerate = pytest.importorskip("accelerate")
    model, inputs = llama().eval(), text()
    accelerate.hooks.add_hook_to_module(model.model.layers[0].self_attn.q_proj, accelerate.hooks.ModelHook())
    base = run(model, inputs)
    bay = mb.attach(model, "*.q_proj", {"en": mb.LoRA(2), "de": mb.LoRA(2)}, name="language")
    randomise(bay)
    mixed = run(model, inputs, language=LABELS)
    alone = torch.cat([run(model, rows(inputs, i), language=[label]) for i, label in enumerate(LABELS)])
    torch.testing.assert_close(mixed, alone)
    bay.detach()
    assert torch.equal(run(model, inputs), base) and "forward" in model.model.layers[0].self_attn.q_proj.__dict__


def test_modules_in_the_state_dict_on_request():
    model, _, attach = attached("llama")
    keys = list(model.state_dict())
    bay = attach().in_state_dict()
    shown = {key: value.clone() for key, value in model.state_dict().items()}
    assert sum("_bay" in key for key in shown) == len(bay.parameters())
    randomise(bay)
    model.load_state_dict(shown)
    assert all(torch.equal(value, shown[key]) for key, value in model.state_dict().items())
    assert list(bay.in_state_dict(False).model.state_dict()) == keys
