"""Prefixes before keys and values: against attention by hand, peft, a loop, in generation; nothing else changes."""

import copy
import pickle

import pytest
import torch

import modbay as mb
from modbay.errors import CompositionError

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
KINDS = {"a": mb.Prefix(3), "b": mb.Prefix(2), "c": mb.Prefix(3)}


def llama(**more):
    config = transformers.LlamaConfig(**{**SMALL, **more}, intermediate_size=48, num_key_value_heads=2, pad_token_id=0)
    return transformers.LlamaForCausalLM(config)


def gpt2(**more):
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0, **more
    )
    return transformers.GPT2LMHeadModel(config)


def bert(**more):
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, **more, intermediate_size=48))


def t5(**more):
    config = transformers.T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, **more
    )
    return transformers.T5ForConditionalGeneration(config)


def vit(**more):
    config = transformers.ViTConfig(**SMALL, **more, intermediate_size=48, image_size=16, patch_size=8)
    return transformers.ViTForImageClassification(config)


MODELS = {
    "llama": (llama, "*.self_attn"),
    "gpt2": (gpt2, "*.attn"),
    "bert": (bert, "*.attention.self"),
    "t5": (t5, ["*.SelfAttention", "*.EncDecAttention"]),
    "vit": (vit, "*.attention"),
}


def made(name, kernel="sdpa"):
    make, at = MODELS[name]
    model = make(attn_implementation=kernel).eval()
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    return model, at


def batch(name, rows=4, t=6):
    if name == "vit":
        return {"pixel_values": torch.randn(rows, 3, 16, 16)}
    inputs = {"input_ids": torch.randint(3, 50, (rows, t))}
    return inputs | ({"decoder_input_ids": torch.randint(3, 50, (rows, 5))} if name == "t5" else {})


def row(inputs, i):
    return {name: value[i : i + 1] for name, value in inputs.items()}


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_mixed_batch_is_loop(name, kernel):
    model, at = made(name, kernel)
    inputs, labels = batch(name), ["a", None, "b", "c"]
    base = model(**inputs).logits
    kind, before = type(model), {n: getattr(m, "config", None) for n, m in model.named_modules()}
    bay = mb.attach(model, at, {**KINDS, "idle": mb.Prefix(4)}, name="task")
    mixed = model(**inputs, task=labels).logits
    weight = torch.randn_like(mixed[:1])
    (mixed * weight).sum().backward()
    assert all(p.grad is None for p in bay.parameters("idle"))
    together = [p.grad.clone() for p in bay.parameters(*KINDS)]
    for p in bay.parameters():
        p.grad = None
    for i, label in enumerate(labels):
        alone = model(**row(inputs, i), task=[label]).logits
        torch.testing.assert_close(alone, mixed[i : i + 1], **CLOSE)
        if label is None:
            torch.testing.assert_close(alone, base[i : i + 1], **CLOSE)
        else:
            assert not torch.allclose(alone, base[i : i + 1], atol=1e-4)
            (alone * weight).sum().backward()
    for one, p in zip(together, bay.parameters(*KINDS), strict=True):
        torch.testing.assert_close(one, p.grad, atol=1e-5, rtol=1e-4)
    assert isinstance(model, kind) and type(model).__name__ == kind.__name__
    assert model.config is before[""]
    bay.detach()
    assert torch.equal(model(**inputs).logits, base)
    assert all(getattr(m, "config", None) is before[n] for n, m in model.named_modules())


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", [False, True])
def test_equals_attention_by_hand(kernel, padding):
    """One BERT attention, all of it written out."""
    model, _ = made("bert", kernel)
    attention = model.bert.encoder.layer[0].attention.self
    bay = mb.attach(model, "bert.encoder.layer.0.attention.self", {"a": mb.Prefix(3)}).use("a")
    ids, mask = torch.randint(3, 50, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    if padding:
        mask[1, 4:] = 0
    seen = {}
    attention.register_forward_hook(lambda m, args, kwargs, out: seen.update(x=args[0], y=out[0]), with_kwargs=True)
    with torch.no_grad():
        model(ids, attention_mask=mask)
        split = lambda v: v.unflatten(-1, (4, 8)).transpose(1, 2)
        q, k, v = (split(f(seen["x"])) for f in (attention.query, attention.key, attention.value))
        front = bay.parameters()[0].unsqueeze(1).expand(-1, 2, -1, -1, -1)
        k, v = torch.cat([front[0], k], 2), torch.cat([front[1], v], 2)
        scores = q @ k.mT / 8**0.5
        hidden = torch.cat([torch.ones(2, 3), mask], 1)[:, None, None] == 0
        y = (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(seen["y"], y, **CLOSE)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_equals_peft_from_its_positions(name):
    """peft's text starts at n; with position_ids + n both are equal, and differ without."""
    model, at = made(name)
    ids = torch.randint(3, 50, (2, 6))
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    reference = peft.get_peft_model(copy.deepcopy(model), config).eval()
    tensor = next(p for n, p in reference.named_parameters() if "prompt_encoder" in n)  # (n, 2 L heads d)
    bay = mb.attach(model, at, {"p": mb.Prefix(3)}).use("p")
    layers = bay.parameters()
    heads, width = layers[0].shape[1], layers[0].shape[3]
    with torch.no_grad():
        for layer, part in zip(layers, tensor.view(3, len(layers), 2, heads, width).unbind(1), strict=True):
            layer.copy_(part.permute(1, 2, 0, 3))
        theirs = reference(ids).logits
        torch.testing.assert_close(model(ids, position_ids=torch.arange(3, 9)[None]).logits, theirs, **CLOSE)
        assert not torch.allclose(model(ids).logits, theirs, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_loop(name, beams):
    model, at = made(name)
    ids, mask = torch.randint(3, 50, (3, 6)), torch.ones(3, 6, dtype=torch.long)
    mask[1, slice(4, 6) if name == "t5" else slice(0, 2)] = 0
    ids = ids.masked_fill(mask == 0, 0)
    how = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    labels = ["a", "b", None]
    mb.attach(model, at, KINDS, name="task")
    mixed = model.generate(input_ids=ids, attention_mask=mask, task=labels, **how)
    again = model.generate(input_ids=ids, attention_mask=mask, task=labels, use_cache=False, **how)
    assert mixed.tolist() == again.tolist()
    if name == "llama" and beams == 1:
        static = model.generate(
            input_ids=ids, attention_mask=mask, task=labels, cache_implementation="static", disable_compile=True, **how
        )
        assert mixed.tolist() == static.tolist()
    for i, label in enumerate(labels):
        alone = model.generate(ids[i : i + 1][:, mask[i].bool()], task=[label], **how)
        assert alone[0, -5:].tolist() == mixed[i, -5:].tolist()


def test_albert(rxnmapper):
    """One set of weights, run twelve times: one prefix for all twelve."""
    ids = torch.randint(10, 100, (2, 6))
    base = rxnmapper(ids).logits
    bay = mb.attach(rxnmapper, "*.attention", {"p": mb.Prefix(3)}, name="task")
    assert len(bay.parameters()) == 1
    mixed = rxnmapper(ids, task=["p", None]).logits
    torch.testing.assert_close(mixed[1], base[1], **CLOSE)
    alone = rxnmapper(ids[:1], task=["p"]).logits[0]
    torch.testing.assert_close(alone, mixed[0], rtol=1e-5, atol=5e-5)  # a batch of one rounds otherwise, twelve times
    assert not torch.allclose(mixed[0], base[0], atol=1e-3)


def test_two_bays_stand_side_by_side():
    """The bay attached first is nearest to the text: the same as one prefix of both."""
    model, at = made("llama")
    inputs = batch("llama")
    first = mb.attach(model, at, {"a": mb.Prefix(2)}, name="one").use("a")
    second = mb.attach(model, at, {"b": mb.Prefix(3)}, name="two").use("b")
    both = model(**inputs).logits
    parts = [torch.cat(pair, 2) for pair in zip(second.parameters(), first.parameters(), strict=True)]
    second.detach()
    first.detach()
    bay = mb.attach(model, at, {"c": mb.Prefix(5)}).use("c")
    with torch.no_grad():
        for parameter, part in zip(bay.parameters(), parts, strict=True):
            parameter.copy_(part)
    torch.testing.assert_close(model(**inputs).logits, both, **CLOSE)


def test_concatenate_and_reparametrised():
    """Rows with one, two or no prefixes of several lengths, all made from tokens that the sites share."""
    model, _ = made("llama")
    inputs = batch("llama")
    kinds = {"a": mb.Prefix(2, bottleneck=8), "b": mb.Prefix(3, bottleneck=8)}
    table = {"both": ["a", "b"], "a": ["a"], "b": ["b"]}
    bay = mb.attach(model, modules=kinds, router=mb.ByLabel("task", table), aggregator=mb.Concatenate())
    assert list(bay.modulars) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]  # attention, unless said
    assert len(bay.parameters("a")) == 3 + 2 * 2  # tokens, down and its bias are shared; up is a site's
    labels = ["both", None, "b", "a"]
    mixed = model(**inputs, task=labels).logits
    for i, label in enumerate(labels):
        torch.testing.assert_close(model(**row(inputs, i), task=[label]).logits, mixed[i : i + 1], **CLOSE)


def test_copies_and_checkpointing():
    model, at = made("llama")
    inputs, labels = batch("llama"), ["a", None, "b", "c"]
    bay = mb.attach(model, at, KINDS, name="task")
    out = model(**inputs, task=labels).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            bay.parameters("a")[0].add_(1)
            torch.testing.assert_close(other(**inputs, task=labels).logits, out)
            bay.parameters("a")[0].sub_(1)
        mb.bays(other)["task"].detach()
        assert other.model.layers[0].self_attn.config is other.config
    (out**2).sum().backward()
    plain = [p.grad for p in bay.parameters()]
    for p in bay.parameters():
        p.grad = None
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    (model(**inputs, task=labels).logits ** 2).sum().backward()
    for one, p in zip(plain, bay.parameters(), strict=True):
        torch.testing.assert_close(one, p.grad, **CLOSE)


@pytest.mark.slow
def test_compiled():
    """One graph for all labels that are tensors."""
    model = llama(num_hidden_layers=1).eval()
    mb.attach(model, "*.self_attn", {"a": mb.Prefix(3), "b": mb.Prefix(3)}, name="task")
    inputs = batch("llama", 3)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for i, labels in enumerate(([0, -1, 1], [1, 1, 0])):
        task = torch.tensor(labels)
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=i > 0):
            plain = model(**inputs, task=task).logits
            torch.testing.assert_close(compiled(**inputs, task=task).logits, plain, **CLOSE)


def test_the_kernel_follows_the_model():
    """set_attn_implementation after attaching still counts."""
    model, at = made("llama")
    inputs = batch("llama")
    mb.attach(model, at, KINDS).use("a")
    out = model(**inputs).logits
    model.set_attn_implementation("eager")
    heard = model(**inputs, output_attentions=True)
    torch.testing.assert_close(heard.logits, out, **CLOSE)
    assert heard.attentions[0].shape == (4, 4, 6, 9)


def test_what_does_not_fit_raises():
    with pytest.raises(CompositionError, match="attention interface"):
        mb.attach(llama(), "*.mlp", {"a": mb.Prefix(2, heads=2, head_dim=8)})
    model = llama()
    with pytest.raises(CompositionError, match="second bay"):
        mb.attach(model, "*.self_attn", {"a": mb.Prefix(2), "b": mb.Bottleneck(4)})
    assert all(layer.self_attn.config is model.config for layer in model.model.layers)
    mb.attach(model, "*.self_attn", {"a": mb.Prefix(2, heads=3)}).use("a")
    with pytest.raises(CompositionError, match="heads=2, head_dim=8"):
        model(**batch("llama"))
    with pytest.raises(CompositionError, match="length=0"):
        mb.Prefix(0)
