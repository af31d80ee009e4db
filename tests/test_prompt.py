"""Prompts in front of a model's input: against peft, against a loop, in generation, and where they can't be right."""

import copy
import pickle

import pytest
import torch

import modbay as mb
from modbay.errors import CallError, CompositionError

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(cls=transformers.LlamaForCausalLM, **more):
    config = transformers.LlamaConfig(**{**SMALL, **more}, intermediate_size=48, num_key_value_heads=2, pad_token_id=0)
    return quiet(cls(config))


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0, eos_token_id=None
    )
    return quiet(transformers.GPT2LMHeadModel(config))


def bert(cls=transformers.BertForTokenClassification, **more):
    return quiet(cls(transformers.BertConfig(**SMALL, intermediate_size=48, max_position_embeddings=64, **more)))


def roberta():
    config = transformers.RobertaConfig(**SMALL, intermediate_size=48, max_position_embeddings=64, pad_token_id=1)
    return quiet(transformers.RobertaForMaskedLM(config))


def t5():
    config = transformers.T5Config(
        vocab_size=50,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        eos_token_id=None,
    )
    return quiet(transformers.T5ForConditionalGeneration(config))


def quiet(model):
    """In eval mode; generation does not stop early, so that rows stay comparable."""
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    return model.eval()


MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert, "roberta": roberta, "t5": t5}
KINDS = {"a": mb.Prompt(3, "uniform"), "b": mb.Prompt(3)}


def batch(model, rows=3, t=6):
    ids = torch.randint(3, 50, (rows, t))
    if model.config.is_encoder_decoder:
        return {"input_ids": ids, "decoder_input_ids": torch.randint(3, 50, (rows, 4))}
    return {"input_ids": ids}


def row(inputs, i):
    return {name: value[i : i + 1] for name, value in inputs.items()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_equals_peft(name):
    model = MODELS[name]()
    inputs = batch(model)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    kind = {"bert": "TOKEN_CLS", "t5": "SEQ_2_SEQ_LM"}.get(name, "CAUSAL_LM")
    reference = peft.get_peft_model(
        copy.deepcopy(model),
        peft.PromptTuningConfig(task_type=kind, num_virtual_tokens=5, num_transformer_submodules=1),
    ).eval()
    mb.attach(model, modules={"p": mb.Prompt(5)}).use("p")
    prompt = next(p for n, p in reference.named_parameters() if "prompt_encoder" in n)
    with torch.no_grad():
        dict(model.named_parameters())["_bay.bays.modules.parts.p.prompt"].copy_(prompt)
        theirs, ours = reference(**inputs).logits, model(**inputs).logits
    assert ours.shape[1] == (4 if name == "t5" else 6)  # virtual positions are cut
    torch.testing.assert_close(ours, theirs[:, -ours.shape[1] :], **CLOSE)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padded", ["", "left", "right"])
def test_mixed_batch_is_loop(name, padded):
    model = MODELS[name]()
    inputs = batch(model)
    kinds = {**KINDS, "long": mb.Prompt(4)}
    labels = ["a", None, "long"]
    alone = [model(**row(inputs, i)).logits[0] for i in range(3)]
    mask = torch.ones(3, 6, dtype=torch.long)
    if padded:  # the last row is shorter by two
        mask[2, slice(0, 2) if padded == "left" else slice(4, 6)] = 0
        inputs["input_ids"][2] = inputs["input_ids"][2].masked_fill(
            mask[2] == 0, getattr(model.config, "pad_token_id", 0)
        )
        inputs["attention_mask"] = mask
    if name == "t5" and padded == "left":
        pytest.skip(
            "relative positions count padding between the prompt and the text: pad T5 on the right, as it is used"
        )
    bay = mb.attach(model, modules=kinds, name="task")
    mixed = model(**inputs, task=labels).logits
    weight = torch.randn_like(mixed[:, :1])
    keep = torch.ones(3, mixed.shape[1]) if name == "t5" else mask.float()
    (mixed * weight * keep[..., None]).sum().backward()
    together = [p.grad.clone() for p in bay.parameters("a", "long")]
    assert all(p.grad is None for p in bay.parameters("b"))
    for p in bay.parameters():
        p.grad = None
    for i, label in enumerate(labels):
        one = row(inputs, i)
        if padded and i == 2:
            one["input_ids"] = one["input_ids"][:, mask[2].bool()]
            one.pop("attention_mask")
        out = model(**one, task=[label]).logits
        here = mixed[i] if name == "t5" else mixed[i][mask[i].bool()]
        torch.testing.assert_close(out[0], here, **CLOSE)
        if label is None:
            torch.testing.assert_close(here, alone[i], **CLOSE)
        else:
            (out * weight[i]).sum().backward()
    for one, p in zip(together, bay.parameters("a", "long"), strict=True):
        torch.testing.assert_close(one, p.grad, **CLOSE)


class Learned(mb.Router):
    """A route of x, as any learned router has it: dense weights by example."""

    def build(self, names, site):
        super().build(names, site)
        self.gate = torch.nn.Linear(site.features("inputs"), len(names))

    def forward(self, x, c):
        return mb.Routing(weights=self.gate(x.mean(1)).softmax(-1))


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_learned_route(name):
    """Prompts mixed by what the input is, in a forward and in generation."""
    model = MODELS[name]()
    inputs = batch(model)
    bay = mb.attach(model, modules=KINDS, router=Learned())
    mixed = model(**inputs).logits
    for i in range(3):
        torch.testing.assert_close(model(**row(inputs, i)).logits, mixed[i : i + 1], **CLOSE)
    mixed.sum().backward()
    assert all(p.grad is not None for p in [*bay.parameters(), *bay.state.router.parameters()])
    inputs.pop("decoder_input_ids", None)
    out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    alone = model.generate(**row(inputs, 1), max_new_tokens=3, do_sample=False)
    assert out[1].tolist() == alone[0].tolist()


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_loop(name, beams):
    model = MODELS[name]()
    ids, mask = torch.randint(3, 50, (3, 6)), torch.ones(3, 6, dtype=torch.long)
    left = name != "t5"
    mask[1, slice(0, 2) if left else slice(4, 6)] = 0
    ids = ids.masked_fill(mask == 0, 0)
    how = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    labels = ["a", "long", None]
    mb.attach(model, modules={**KINDS, "long": mb.Prompt(5, "uniform")}, name="task")
    mixed = model.generate(input_ids=ids, attention_mask=mask, task=labels, **how)
    again = model.generate(input_ids=ids, attention_mask=mask, task=labels, use_cache=False, **how)
    assert mixed.tolist() == again.tolist()
    for i, label in enumerate(labels):
        own = ids[i : i + 1][:, mask[i].bool()]
        alone = model.generate(own, task=[label], **how)
        assert alone[0, -5:].tolist() == mixed[i, -5:].tolist()


def test_labels_are_cut_with_the_prompt():
    """The first token is told by a prompt, but not where there is none."""
    model = llama()
    inputs = batch(model)
    base = model(**row(inputs, 1), labels=row(inputs, 1)["input_ids"]).loss
    mb.attach(model, modules=KINDS, name="task")
    mixed = model(**inputs, labels=inputs["input_ids"], task=["a", None, "b"]).loss
    losses, tokens = [], [6, 5, 6]
    for i, label in enumerate(["a", None, "b"]):
        losses.append(model(**row(inputs, i), labels=inputs["input_ids"][i : i + 1], task=[label]).loss)
    torch.testing.assert_close(losses[1], base, **CLOSE)
    torch.testing.assert_close(mixed, sum(w * x for w, x in zip(tokens, losses, strict=True)) / 17, **CLOSE)


def test_concatenate():
    """[P_a, P_b, x], for rows with one, two or no prompts of several lengths, whatever stands between."""
    model = llama()
    table = {"both": ["a", "b"], "turned": ["b", "a"], "a": ["a"], "b": ["b"]}
    kinds = {"a": mb.Prompt(2, "uniform"), "b": mb.Prompt(4, "uniform")}
    bay = mb.attach(model, modules=kinds, router=mb.ByLabel("task", table), aggregator=mb.Concatenate())
    inputs = batch(model, 5)
    a, b = (next(iter(bay.parameters(name))).detach() for name in "ab")
    labels = ["both", None, "turned", "a", "b"]
    mixed = model(**inputs, task=labels).logits
    bay.detach()
    fronts = [torch.cat([a, b]), a[:0], torch.cat([b, a]), a, b]
    embed = model.get_input_embeddings()
    for i, front in enumerate(fronts):
        x = torch.cat([front[None], embed(inputs["input_ids"][i : i + 1])], 1)
        torch.testing.assert_close(model(inputs_embeds=x).logits[0, len(front) :], mixed[i], **CLOSE)


def test_weighted_sum_of_prompts():
    model = llama()
    bay = mb.attach(model, modules=KINDS)
    inputs = batch(model)
    bay.use({"a": 0.3, "b": 0.7})
    mixed = model(**inputs).logits
    a, b = (next(iter(bay.parameters(name))).detach() for name in "ab")
    bay.add("c", mb.Prompt(3)).use("c")
    with torch.no_grad():
        next(iter(bay.parameters("c"))).copy_(0.3 * a + 0.7 * b)
    torch.testing.assert_close(model(**inputs).logits, mixed, **CLOSE)
    bay.add("long", mb.Prompt(4)).use("a", "long")
    with pytest.raises(CompositionError, match=r"different lengths.*Concatenate"):
        model(**inputs)


def test_parameter_average_is_the_sum():
    """Of prompts, which are parameters; rows without a module stay the base's."""
    model = llama()
    inputs = batch(model)
    table = {"both": ["a", "b"], "b": ["b"]}
    outs = []
    for aggregator in (mb.WeightedSum(), mb.ParameterAverage()):
        torch.manual_seed(1)
        alike = {name: mb.Prompt(3, "uniform") for name in "ab"}
        bay = mb.attach(model, "", alike, mb.ByLabel("task", table), aggregator)
        outs.append([model(**inputs, task=["both", None, "b"]).logits, model(**inputs, task="both").logits])
        bay.detach()
    torch.testing.assert_close(outs[0], outs[1], **CLOSE)


def test_after_keeps_the_first_token():
    """BERT's pooler reads [CLS], not the prompt; hidden states are cut, attention weights are not."""
    model = bert(transformers.BertModel, attn_implementation="eager")
    inputs = batch(model)
    bay = mb.attach(model, modules={"p": mb.Prompt(3, (5, 6), after=1)}).use("p")
    prompt = bay.parameters("p")[0].detach()
    embed = model.get_input_embeddings().weight
    torch.testing.assert_close(prompt, embed[[5, 6, 5]].detach())
    out = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert [h.shape[1] for h in out.hidden_states] == [6, 6, 6] and out.attentions[0].shape[-1] == 9
    bay.detach()
    x = embed[inputs["input_ids"]]
    x = torch.cat([x[:, :1], prompt.expand(3, -1, -1), x[:, 1:]], 1)
    plain = model(inputs_embeds=x)
    torch.testing.assert_close(out.pooler_output, plain.pooler_output, **CLOSE)
    torch.testing.assert_close(out.last_hidden_state[:, 1:], plain.last_hidden_state[:, 4:], **CLOSE)


def test_vision_transformer():
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8
    )
    model = transformers.ViTForImageClassification(config).eval()
    with pytest.raises(CompositionError, match=r"at='\*.embeddings'"):
        mb.attach(model, modules={"a": mb.Prompt(3)})
    pixels = torch.randn(3, 3, 16, 16)
    base = model(pixels).logits
    kinds = {"a": mb.Prompt(3, after=1), "b": mb.Prompt(3, after=1)}
    bay = mb.attach(model, "*.embeddings", kinds, name="task")
    mixed = model(pixels, task=["a", "b", "a"]).logits
    for i, label in enumerate("aba"):
        torch.testing.assert_close(model(pixels[i : i + 1], task=label).logits, mixed[i : i + 1], **CLOSE)
    assert not torch.allclose(mixed, base)
    with pytest.raises(CallError, match="batches of their own"):
        model(pixels, task=["a", None, "b"])
    bay.detach()
    assert torch.equal(model(pixels).logits, base)


def test_albert(rxnmapper):
    """The prompt is as wide as the embedding, which is not as wide as the model."""
    ids = torch.randint(10, 100, (2, 6))
    base = rxnmapper(ids).logits
    bay = mb.attach(rxnmapper, modules={"p": mb.Prompt(3)}, name="task")
    assert bay.parameters()[0].shape == (3, rxnmapper.config.embedding_size)
    mixed = rxnmapper(ids, task=["p", None]).logits
    assert mixed.shape == base.shape and not torch.allclose(mixed[0], base[0])
    torch.testing.assert_close(mixed[1], base[1], **CLOSE)


def test_copies():
    model = llama()
    inputs = batch(model)
    bay = mb.attach(model, modules=KINDS, name="task")
    out = model(**inputs, task=["a", None, "b"]).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            bay.parameters("a")[0].add_(1)
            torch.testing.assert_close(other(**inputs, task=["a", None, "b"]).logits, out)
            bay.parameters("a")[0].sub_(1)


@pytest.mark.slow
def test_compiled():
    """One graph for all labels that are tensors."""
    model = llama(num_hidden_layers=1)
    mb.attach(model, modules=KINDS, name="task")
    inputs = batch(model)
    inputs["attention_mask"] = torch.ones(3, 6, dtype=torch.long)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for i, labels in enumerate(([0, -1, 1], [1, 1, 0])):
        task = torch.tensor(labels)
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=i > 0):
            plain = model(**inputs, task=task).logits
            torch.testing.assert_close(compiled(**inputs, task=task).logits, plain, **CLOSE)


def test_what_can_not_be_right_raises():
    model = llama()
    mb.attach(model, modules=KINDS).use("a")
    inputs = batch(model)
    with pytest.raises(CallError, match="4D"):
        model(**inputs, attention_mask=torch.ones(3, 1, 6, 6, dtype=torch.bool))
    with pytest.raises(CallError, match="packed"):
        model(**inputs, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
    with pytest.raises(CallError, match="static cache"):
        model.generate(**inputs, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(CallError, match="assistant_model"):
        model.generate(**inputs, assistant_model=llama(), max_new_tokens=2)
    judge = llama(transformers.LlamaForSequenceClassification)
    mb.attach(judge, modules=KINDS).use("a")
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    with pytest.raises(CallError, match="pad on the left"):
        judge(**inputs, attention_mask=mask)
    assert judge(**inputs, attention_mask=mask.flip(1)).logits.shape == (3, 2)
    with pytest.raises(CallError, match="encoder_outputs"):
        small = t5()
        mb.attach(small, modules=KINDS).use("a")
        small(encoder_outputs=(torch.randn(3, 6, 32),), decoder_input_ids=inputs["input_ids"])


def test_compositions_that_do_not_fit_raise():
    bay = mb.attach(llama(), modules={"a": mb.Prompt(3)})
    with pytest.raises(CompositionError, match="opened for prompts"):
        bay.add("b", mb.Bottleneck(4), at="")
    assert bay.names() == ["a"]
    with pytest.raises(CompositionError, match="second bay"):
        mb.attach(llama(), "", {"a": mb.Prompt(3), "b": mb.Bottleneck(4)})
    with pytest.raises(CompositionError, match=r"Concatenate.*WeightedSum"):
        mb.attach(llama(), "*.q_proj", {"a": mb.LoRA(2)}, aggregator=mb.Concatenate())
    with pytest.raises(CompositionError, match="length=0"):
        mb.Prompt(0)
    with pytest.raises(CompositionError, match="start='words'"):
        mb.Prompt(3, "words")
