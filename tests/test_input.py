"""Input composition: how prompts start, prompts by hand, encoded and deep ones, prefixes from shared tokens; each
against its formula, and against peft where peft has it."""

import copy
import json
import math
import pickle
from dataclasses import asdict

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import modbay as mb
from modbay.errors import CompositionError
from modbay.modules._encoded_prompt import _recurrent
from tiny import bert, gemma, gpt2, llama, tokenizer, tokens, vit

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
TOKENIZER = tokenizer()
MODELS = {"llama": llama, "gpt2": gpt2, "gemma": gemma, "bert": bert, "vit": vit}


def made(name):
    return MODELS[name]().eval()


# Where a prompt starts


def start(model, kind):
    return mb.attach(model, modules={"p": kind}).parameters("p")[0].detach()


def drawn(kind):
    """The rows of the vocabulary that a new prompt holds."""
    model = llama()
    table, prompt = model.get_input_embeddings().weight.detach(), start(model, kind)
    return [(table == row).all(1).nonzero().item() for row in prompt]


def test_how_a_prompt_starts():
    several = drawn(mb.Prompt(20))
    assert len(set(several)) == 20 and max(several) >= 20  # none twice, from all of the vocabulary
    assert sorted(drawn(mb.Prompt(10, common=10))) == list(range(10))
    assert set(drawn(mb.Prompt(12, common=4))) <= set(range(4))  # there are not enough
    uniform = start(llama(), mb.Prompt(100, "uniform"))
    assert uniform.abs().max() <= 0.5 and 0.27 < uniform.std() < 0.31 and uniform.shape == (100, 32)


def test_a_prompt_starts_from_a_text_or_from_words():
    text = mb.Prompt.of("is this great", TOKENIZER, 5)
    assert text == mb.Prompt(5, (5, 6, 11)) and mb.Prompt.of("is this great", TOKENIZER).length == 3
    model = llama()
    assert_close(start(model, text), model.get_input_embeddings().weight[[5, 6, 11, 5, 6]].detach())
    labels = mb.Prompt.of(["good", "not at all"], TOKENIZER, 8, fill="vocabulary", common=5)
    assert labels.start == ((8,), (13, 14, 15))
    model = llama()
    table, prompt = model.get_input_embeddings().weight.detach(), start(model, labels)
    assert_close(prompt[0], table[8])
    assert_close(prompt[1], table[13:16].mean(0))  # a label of several tokens is their average
    assert all((table[:5] == row).all(1).any() for row in prompt[2:])
    for kind in (text, labels):  # kept as JSON
        assert mb.Prompt(**json.loads(json.dumps(asdict(kind)))) == kind and hash(kind)


def test_peft_starts_from_a_text_alike(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    model = llama()
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=7, prompt_tuning_init="TEXT", prompt_tuning_init_text="is this great",
        tokenizer_name_or_path=str(tmp_path),
    )  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    theirs = next(p for n, p in theirs.named_parameters() if "prompt_encoder" in n).detach()
    ids = tuple(TOKENIZER("is this great")["input_ids"])  # peft keeps special tokens
    assert_close(start(model, mb.Prompt(7, ids)), theirs)


# By hand


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma", "bert"])
def test_a_prompt_by_hand_is_text_in_front(name):
    """The same as the words in the call's own ids, behind [CLS] where there is one, padded or not; nothing learns."""
    model, first = made(name), int(name == "bert")
    kind = mb.Prompt.of("is this great", TOKENIZER, learn=False, after=first)
    ids, mask = tokens(), torch.ones(3, 6, dtype=torch.long)
    mask[1, :2] = 0 if not first else 1
    own = torch.tensor(kind.start).expand(3, -1)
    spelled = torch.cat([ids[:, :first], own, ids[:, first:]], 1)
    whole = torch.cat([mask[:, :first], torch.ones_like(own), mask[:, first:]], 1)
    where = (whole.cumsum(1) - 1).clamp(min=0)
    want = model(spelled, attention_mask=whole, position_ids=where).logits
    want = torch.cat([want[:, :first], want[:, first + 3 :]], 1)
    bay = mb.attach(model, modules={"p": kind}).use("p")
    assert_close(model(ids, attention_mask=mask).logits[mask.bool()], want[mask.bool()], **CLOSE)
    assert bay.parameters() == [] and mb.Prompt.of("great", TOKENIZER).constants == ()


def test_demonstrations_are_concatenated(tmp_path):
    """[demonstrations of the row's task, x], as modules of fixed tokens; kept as files."""
    model, ids = made("llama"), tokens()
    kinds = {
        "one": mb.Prompt.of("is this good ? great", TOKENIZER, learn=False),
        "two": mb.Prompt.of("not good bad", TOKENIZER, learn=False),
    }
    shots = mb.ByLabel("task", {"both": ["one", "two"], "one": ["one"], "none": []})
    bay = mb.attach(model, modules=kinds, router=shots, aggregator=mb.Concatenate())
    labels = ["both", "one", "none"]
    out = model(ids, task=labels).logits
    bay.save(tmp_path)
    bay.detach()
    fronts = [[*kinds["one"].start, *kinds["two"].start], [*kinds["one"].start], []]
    for i, front in enumerate(fronts):
        row = torch.cat([torch.tensor([front], dtype=torch.long), ids[i : i + 1]], 1)
        assert_close(model(row).logits[0, len(front) :], out[i], **CLOSE)
    mb.load(model, tmp_path)
    assert_close(model(ids, task=labels).logits, out)


# Encoded prompts (P-tuning)


def filled(bay, name, tensors):
    """The module's parameters, made equal to these."""
    own = next(iter(bay.modulars.values())).parts._modules[name].tensors()
    assert own.keys() == tensors.keys()
    with torch.no_grad():
        for key, tensor in tensors.items():
            assert own[key].shape == tensor.shape
            own[key].copy_(tensor)


def of_lstm(lstm):
    """Our names for the weights of a torch.nn.LSTM of both directions."""
    params = {}
    for layer in range(lstm.num_layers):
        get = lambda name, layer=layer: [getattr(lstm, f"{name}_l{layer}{side}") for side in ("", "_reverse")]
        params |= {f"input{layer}": torch.stack(get("weight_ih")), f"state{layer}": torch.stack(get("weight_hh"))}
        params[f"bias{layer}"] = torch.stack(get("bias_ih")) + torch.stack(get("bias_hh"))
    return params


def of_maps(head):
    maps = [layer for layer in head if isinstance(layer, nn.Linear)]
    weights = {f"map{i}": layer.weight for i, layer in enumerate(maps)}
    return weights | {f"map{i}_bias": layer.bias for i, layer in enumerate(maps)}


@pytest.mark.parametrize("encoder", ["lstm", "mlp"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_encoded_prompts_equal_peft(name, encoder):
    model, ids = made(name), tokens()
    config = peft.PromptEncoderConfig(
        task_type="TOKEN_CLS" if name == "bert" else "CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=12,
        encoder_reparameterization_type=encoder.upper(), num_transformer_submodules=1,
    )  # fmt: skip
    if name == "bert":
        model = transformers.BertForTokenClassification(model.config).eval()
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    reference = theirs.prompt_encoder["default"]
    bay = mb.attach(model, modules={"p": mb.EncodedPrompt(5, encoder, hidden=12)}).use("p")
    lstm = of_lstm(reference.lstm_head) if encoder == "lstm" else {}
    filled(bay, "p", {"tokens": reference.embedding.weight, **lstm, **of_maps(reference.mlp_head)})
    with torch.no_grad():
        mask = torch.ones_like(ids)
        theirs, ours = theirs(input_ids=ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits
    assert_close(ours, theirs[:, -6:], **CLOSE)


def test_an_encoded_prompt_by_torch():
    """The recurrence equals torch.nn.LSTM, forward and gradients, and a group of modules equals a loop over them."""
    lstm = nn.LSTM(8, 6, num_layers=1, bidirectional=True, batch_first=True)
    x = torch.randn(5, 8, requires_grad=True)
    ours = _recurrent(x, {name[:-1]: tensor for name, tensor in of_lstm(lstm).items()})
    theirs, weight = lstm(x)[0], torch.randn(5, 12)
    assert_close(ours, theirs, **CLOSE)
    learned = [x, *lstm.parameters()]
    for a, b in zip(*(torch.autograd.grad(out, learned, weight) for out in (ours, theirs)), strict=True):
        assert_close(a, b, **CLOSE)
    for kind in (mb.EncodedPrompt(4), mb.EncodedPrompt(4, "mlp", hidden=5)):
        site = mb.Modular(nn.Linear(8, 8)).site
        several = [next(iter(kind.init([site]).values())) for _ in range(3)]
        stack = {name: torch.stack([params[name] for params in several]) for name in several[0]}
        assert_close(kind.extend(stack, mb.Context()), torch.stack([kind.extend(p, mb.Context()) for p in several]))


def test_an_encoded_prompt_is_drawn_as_torch_draws():
    params = next(iter(mb.EncodedPrompt(50).init([mb.Modular(nn.Linear(64, 64)).site]).values()))
    assert params["state0"].shape == (2, 128, 32) and params["map0"].shape == (64, 64)  # the official code's halves
    reference = nn.LSTM(64, 32, 2, bidirectional=True)
    for name, tensor in of_lstm(reference).items():
        assert tensor.shape == params[name].shape
        assert_close(tensor.std(), params[name].std(), rtol=0.1, atol=0)
    assert_close(params["tokens"].std(), torch.tensor(1.0), rtol=0.1, atol=0)


# The laws, for what stands in front of a model's input

FRONTS = {
    "learned": lambda: mb.Prompt(3, "uniform"),
    "fixed": lambda: mb.Prompt(3, (5, 6, 7), learn=False),
    "lstm": lambda: mb.EncodedPrompt(3, hidden=4),
    "mlp": lambda: mb.EncodedPrompt(3, "mlp", hidden=4),
}
FRONT = pytest.mark.parametrize("make", FRONTS.values(), ids=FRONTS)


@FRONT
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_mixed_batch_is_a_loop(name, make):
    model, ids = made(name), tokens(4)
    base = model(ids).logits
    bay = mb.attach(model, modules={"a": make(), "b": mb.Prompt(2), "c": make(), "idle": make()}, name="task")
    labels = ["a", None, "b", "c"]
    mixed = model(ids, task=labels).logits
    weight = torch.randn_like(mixed[:1])
    (mixed * weight).sum().backward()
    assert all(p.grad is None for p in bay.parameters("idle"))
    together = [p.grad.clone() for p in bay.parameters("a", "b", "c")]
    for p in bay.parameters():
        p.grad = None
    assert_close(mixed[1], base[1], **CLOSE)
    for i, label in enumerate(labels):
        alone = model(ids[i : i + 1], task=[label]).logits
        assert_close(alone, mixed[i : i + 1], **CLOSE)
        if alone.requires_grad:
            (alone * weight).sum().backward()
    for one, p in zip(together, bay.parameters("a", "b", "c"), strict=True):
        assert_close(one, p.grad, atol=1e-5, rtol=1e-4)
    bay.detach()
    assert torch.equal(model(ids).logits, base)


@FRONT
def test_the_average_of_one_is_that_one_and_of_two_their_mean(make):
    model, ids = made("llama"), tokens()
    bay = mb.attach(model, "", {"a": make(), "b": make()}, mb.ByLabel("task"), mb.ParameterAverage())
    one = model(ids, task="a").logits
    bay.use({"a": 1.0, "b": 0.0})
    assert_close(model(ids).logits, one, **CLOSE)
    bay.use({"a": 0.25, "b": 0.75})
    both = model(ids).logits
    parts = [next(iter(bay.modulars.values())).parts._modules[name].tensors() for name in "ab"]
    bay.add("c", make()).use("c")
    filled(bay, "c", {name: 0.25 * parts[0][name] + 0.75 * parts[1][name] for name in parts[0]})
    assert_close(model(ids).logits, both, **CLOSE)


@FRONT
def test_files_copies_and_bfloat16(make, tmp_path):
    model, ids, labels = made("llama"), tokens(), ["a", None, "b"]
    bay = mb.attach(model, modules={"a": make(), "b": make()}, name="task")
    out = model(ids, task=labels).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(twin(ids, task=labels).logits, out)
    bay.save(tmp_path)
    bay.detach()
    mb.load(model, tmp_path)
    assert_close(model(ids, task=labels).logits, out, rtol=0, atol=0)
    half = model.to(torch.bfloat16)
    assert_close(half(ids, task=labels).logits.float(), out, atol=0.1, rtol=0.1)


@FRONT
def test_checkpointing_gives_the_same_gradients(make):
    model, ids, labels = llama().train(), tokens(), ["a", None, "b"]
    bay = mb.attach(model, modules={"a": make(), "b": mb.Prompt(2)}, name="task")
    plain = torch.autograd.grad(model(ids, task=labels).logits.square().sum(), bay.parameters())
    model.activation_checkpointing_enable({"use_reentrant": False})
    again = torch.autograd.grad(model(ids, task=labels).logits.square().sum(), bay.parameters())
    for a, b in zip(plain, again, strict=True):
        assert_close(a, b, **CLOSE)


@pytest.mark.slow
@FRONT
def test_compiled(make):
    model, ids = made("llama"), tokens()
    mb.attach(model, modules={"a": make(), "b": make()}, name="task")
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "task": torch.tensor([0, -1, 1])}
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        want = model(**inputs).logits
        assert_close(compiled(**inputs).logits, want, **CLOSE)


# Prefixes


@pytest.mark.parametrize("bottleneck", [None, 12])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_prefixes_equal_peft(name, bottleneck):
    """On decoders and on an encoder (peft knows none that classifies); with the paper's reparametrisation, too."""
    model, ids, n = made(name), tokens(2), 3
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM" if name != "bert" else "FEATURE_EXTRACTION", num_virtual_tokens=n,
        prefix_projection=bottleneck is not None, encoder_hidden_size=bottleneck,
    )  # fmt: skip
    model = model if name != "bert" else model.bert
    reference = peft.get_peft_model(copy.deepcopy(model), config).eval()
    bay = mb.attach(model, mb.role.attention, {"p": mb.Prefix(n, bottleneck=bottleneck)}).use("p")
    encoder = reference.prompt_encoder["default"]
    parts = [modular.parts._modules["p"].tensors() for modular in bay.modulars.values()]
    heads, width = 4, 8
    with torch.no_grad():
        if bottleneck is None:
            tensors = encoder.embedding.weight.view(n, 2, 2, heads, width).unbind(1)
            for own, tensor in zip(parts, tensors, strict=True):
                own["prefix"].copy_(tensor.permute(1, 2, 0, 3))
        else:
            down, _, up = encoder.transform
            for i, own in enumerate(parts):
                own["tokens"].copy_(encoder.embedding.weight)
                own["down"].copy_(down.weight)
                own["down_bias"].copy_(down.bias)
                own["up"].copy_(up.weight.view(2, 2, heads, width, -1)[i])
                own["up_bias"].copy_(up.bias.view(2, 2, heads, width)[i])
        theirs = reference(ids, attention_mask=torch.ones_like(ids))[0]
        ours = model(ids, position_ids=torch.arange(n, n + 6)[None])[0]  # where peft's text starts
    assert_close(ours, theirs, **CLOSE)
    bay.use(None)
    assert not torch.allclose(model(ids)[0], ours, atol=1e-3)


# In a vision transformer


def by_hand(model, pixels, prompts):
    """The official code's order: prompts behind [CLS], those of a layer written over those of the layer before."""
    n = prompts[0].shape[0]
    h = model.vit.embeddings(pixels)
    h = torch.cat([h[:, :1], prompts[0].expand(len(h), -1, -1), h[:, 1:]], 1)
    for i, layer in enumerate(model.vit.layers):
        if 0 < i < len(prompts):
            h = torch.cat([h[:, :1], prompts[i].expand(len(h), -1, -1), h[:, 1 + n :]], 1)
        h = layer(h)
    return model.classifier(model.vit.layernorm(h)[:, 0])


def test_vpt_shallow():
    model, pixels = made("vit"), torch.randn(3, 3, 16, 16)
    bay = mb.attach(model, "*.embeddings", {"p": mb.Prompt(4, after=1)}).use("p")
    prompt = bay.parameters("p")[0].detach()
    bound = math.sqrt(6 / (3 * 8 * 8 + 32))
    assert prompt.abs().max() <= bound and prompt.abs().max() > 0.9 * bound
    out = model(pixels).logits
    bay.detach()
    assert_close(out, by_hand(model, pixels, [prompt]), **CLOSE)


def test_vpt_deep():
    model, pixels = made("vit"), torch.randn(4, 3, 16, 16)
    base = model(pixels).logits
    kinds = {"p": mb.DeepPrompt(4, after=1), "q": mb.DeepPrompt(4, after=1), "long": mb.DeepPrompt(6, after=1)}
    bay = mb.attach(model, mb.role.block, kinds, name="task")
    labels = ["p", None, "long", "q"]  # rows of several lengths, and of none
    mixed = model(pixels, task=labels).logits
    mixed.square().sum().backward()
    assert all(p.grad is not None for p in bay.parameters())
    prompts = {name: [p.detach() for p in bay.parameters(name)] for name in kinds}
    assert [len(several) for several in prompts.values()] == [3, 3, 3]
    bay.detach()
    for i, label in enumerate(labels):
        want = base[i : i + 1] if label is None else by_hand(model, pixels[i : i + 1], prompts[label])
        assert_close(mixed[i : i + 1], want, **CLOSE)


# What is refused


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: mb.Prompt(3, "words"), "mb.Prompt.of"),
        (lambda: mb.Prompt(3, ()), "start from"),
        (lambda: mb.Prompt(3, ((),)), "start from"),
        (lambda: mb.Prompt(3, fill="zeros"), "fill='zeros'"),
        (lambda: mb.Prompt(3, common=0), "common=0"),
        (lambda: mb.EncodedPrompt(0), "length=0"),
        (lambda: mb.EncodedPrompt(3, "gru"), "encoder='gru'"),
        (lambda: mb.DeepPrompt(0), "length=0"),
        (lambda: mb.DeepPrompt(3, after=-1), "after=-1"),
    ],
)
def test_a_bad_argument_is_named(make, message):
    with pytest.raises(CompositionError, match=message):
        make()


def test_what_does_not_fit_raises():
    with pytest.raises(CompositionError, match="no token embeddings"):
        mb.attach(vit(), "*.embeddings", {"p": mb.Prompt(2, (1, 2))})
    model = made("llama")
    mb.attach(model, mb.role.block, {"p": mb.DeepPrompt(2)}).use("p")
    with pytest.raises(CompositionError, match=r"mb\.Prefix"):  # rotary positions were made for the text alone
        model(tokens())
    with pytest.raises(CompositionError, match="no f here"):
        mb.Modular(None, {"p": mb.DeepPrompt(2)}, mb.Uniform(), mb.Mixture(), features=8)(torch.randn(2, 3, 8))
