"""What goes into a layer as a site, mb.before; and there the inverse of an invertible adapter, before the words."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.testing import assert_close

import modbay as mb
from modbay.errors import CompositionError, FileError, MatchError
from modbay.methods import dump, parse_bays

CLOSE = {"atol": 1e-6, "rtol": 1e-5}
LABELS = ["de", None, "sw"]
IDS = torch.randint(2, 20, (3, 5), generator=torch.Generator().manual_seed(0))
SMALL = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
ENDS = ("*.embeddings.LayerNorm", mb.before(mb.role.head))


def shake(parameters, std: float = 0.4) -> None:
    for parameter in parameters:
        nn.init.normal_(parameter, std=std)


def bert(cls=transformers.BertForMaskedLM):
    torch.manual_seed(0)
    model = cls(transformers.BertConfig(**SMALL, max_position_embeddings=10)).eval()
    shake(model.parameters())
    return model


def language():
    return {ENDS: mb.Invertible(activation="gelu"), mb.role.ffn_out: mb.Bottleneck(reduction=2)}


def attached(model, **options):
    bay = mb.attach(model, modules={"de": language(), "sw": language()}, name="language", **options)
    shake(bay.parameters())
    return bay


def logits(model, labels=LABELS):
    return model(IDS, language=labels).logits


# What goes into a layer


class Keyed(nn.Module):
    """A layer that is called by keywords, and gives several things."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, *, x, scale: float = 1.0):
        return self.linear(x) * scale, "more"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.keyed = nn.Linear(4, 4), Keyed()

    def forward(self, x):
        out, more = self.keyed(x=self.first(x).relu(), scale=2.0)
        assert more == "more"
        return out


def test_a_module_before_a_layer_changes_what_goes_in():
    torch.manual_seed(0)
    net, x = Net(), torch.randn(3, 4)
    plain = net(x)
    bay = mb.attach(net, at=mb.before("keyed"), modules={"de": mb.Bottleneck(2), "sw": mb.Bottleneck(2)}, name="l")
    (modular,) = bay.modulars.values()
    assert modular.site.name == "keyed[before]" and (modular.site.inputs, modular.site.outputs) == (4, 4)
    assert torch.equal(net(x, l=LABELS), plain)
    shake(bay.parameters())
    p = modular.parts._modules["sw"].tensors()
    h = net.first(x).relu()
    h = h + F.relu(h @ p["down"].T + p["down_bias"]) @ p["up"].T + p["up_bias"]
    assert_close(net(x, l=["sw"] * 3), 2 * (h @ net.keyed.linear.weight.T + net.keyed.linear.bias))
    mixed = net(x, l=LABELS)
    for i, label in enumerate(LABELS):
        assert_close(mixed[i], net(x, l=[label] * 3)[i])
    bay.detach()
    assert torch.equal(net(x), plain) and type(net.keyed) is Keyed


@pytest.mark.parametrize("first", ["before", "weight"])
def test_a_bay_at_the_layer_itself_sees_what_goes_in(first):
    """Whichever was attached first."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4)
    make = {
        "before": lambda: mb.attach(net, at=mb.before("0"), modules={"a": mb.Bottleneck(2)}, name="b").use("a"),
        "weight": lambda: mb.attach(net, at="0", modules={"a": mb.LoRA(2)}, name="w").use("a"),
    }
    bays = {name: make[name]() for name in sorted(make, key=lambda name: name != first)}
    for bay in bays.values():
        shake(bay.parameters())
    p, q = (next(iter(bays[name].modulars.values())).parts._modules["a"].tensors() for name in ("before", "weight"))
    h = x + F.relu(x @ p["down"].T + p["down_bias"]) @ p["up"].T + p["up_bias"]
    wanted = h @ (net[0].weight + q["B"] @ q["A"]).T + net[0].bias
    assert_close(net(x), wanted)
    bays["weight"].fold("a")
    assert_close(net(x), wanted)
    bays["weight"].unfold()
    for bay in reversed(bays.values()):
        bay.detach()
    assert type(net[0]) is nn.Linear


def test_one_bay_before_a_layer_and_at_it():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(3, 4)
    bay = mb.attach(net, modules={"a": {mb.before("0"): mb.Bottleneck(2), "0": mb.LoRA(2)}}).use("a")
    shake(bay.parameters())
    p, q = (bay.modulars[site].parts._modules["a"].tensors() for site in ("0[before]", "0"))
    h = x + F.relu(x @ p["down"].T + p["down_bias"]) @ p["up"].T + p["up_bias"]
    assert_close(net(x), h @ (net[0].weight + q["B"] @ q["A"]).T + net[0].bias)
    with pytest.raises(CompositionError, match="Bottleneck is no change of f's parameters"):
        bay.fold("a")


def test_what_does_not_fit_before_a_layer():
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    with pytest.raises(MatchError, match=r"mb\.before\('0'\): Embedding there takes token ids"):
        mb.attach(net, at=mb.before("0"), modules={"a": mb.Bottleneck(2)})
    for kind in (mb.IA3(), mb.BitFit(), mb.Hyper(mb.IA3(), label="task", labels=["x"])):
        with pytest.raises(CompositionError, match="what goes into a layer has none"):
            mb.attach(net, at=mb.before("1"), modules={"a": kind})
    for kind in (mb.LoRA(2), mb.Full()):
        with pytest.raises(CompositionError, match=r"1\[before\]"):
            mb.attach(net, at=mb.before("1"), modules={"a": kind})
    with pytest.raises(CompositionError, match="or what goes into a layer, has no input"):
        mb.attach(net, at=mb.before("1"), modules={"a": mb.Prefix(2)})
    assert not mb.bays(net) and type(net[1]) is nn.Linear


def test_a_place_before_a_layer_in_yaml():
    (bay,) = parse_bays([{"name": "a", "at": {"before": "role.head"}, "count": 1, "kind": {"Bottleneck": {"size": 2}}}])
    assert bay.at == mb.before(mb.role.head)
    assert dump(parse_bays(dump([bay]))) == dump([bay])


def test_the_width_of_an_input_may_be_said(tmp_path):
    net, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh()), torch.randn(3, 4)
    bay = mb.attach(net, at=mb.before("1", features=6), modules={"a": mb.Bottleneck(2)}).use("a")
    shake(bay.parameters())
    wanted = net(x)
    bay.save(tmp_path)
    bay.detach()
    mb.load(net, tmp_path)["modules"].use("a")
    assert torch.equal(net(x), wanted)


# The inverse before the words


def by_hand(model, parts):
    """What hooks make of the plain model: F and G behind the embeddings, undone before the decoder; the bottleneck."""
    p, q = parts
    run = lambda n, v: F.gelu(v @ p[f"{n}_down"].T + p[f"{n}_down_bias"]) @ p[f"{n}_up"].T + p[f"{n}_up_bias"]

    def there(module, args, out):
        first, second = out.chunk(2, -1)
        first = first + run("F", second)
        return torch.cat([first, second + run("G", first)], -1)

    def back(module, args):
        first, second = args[0].chunk(2, -1)
        second = second - run("G", first)
        return (torch.cat([first - run("F", second), second], -1),)

    def behind(module, args, out):
        return out + F.relu(out @ q["down"].T + q["down_bias"]) @ q["up"].T + q["up_bias"]

    hooks = [
        model.bert.embeddings.LayerNorm.register_forward_hook(there),
        model.bert.encoder.layer[0].output.dense.register_forward_hook(behind),
        model.cls.predictions.decoder.register_forward_pre_hook(back),
    ]
    out = model(IDS).logits
    for hook in hooks:
        hook.remove()
    return out


def test_language_adapters_are_the_formula_and_learn_from_both_uses():
    """Logits, and gradients of the eight tensors of F and G, which both ends reach."""
    model = bert()
    bay = attached(model)
    first, last = (bay.modulars[name] for name in ("bert.embeddings.LayerNorm", "cls.predictions.decoder[before]"))
    own, shared = (one.parts._modules["de"].tensors() for one in (first, last))
    assert all(shared[f"inverse/{name}"] is tensor for name, tensor in own.items())
    assert len(bay.parameters("de")) == 12
    dense = bay.modulars["bert.encoder.layer.0.output.dense"].parts._modules["de"].tensors()
    copies = [{k: t.detach().clone().requires_grad_() for k, t in some.items()} for some in (own, dense)]
    wanted = by_hand(bert(), copies)
    out = logits(model, ["de"] * 3)
    assert_close(out, wanted, **CLOSE)
    weight = torch.randn(out.shape)
    (out * weight).sum().backward()
    (wanted * weight).sum().backward()
    for ours, theirs in zip((own, dense), copies, strict=True):
        for name, tensor in ours.items():
            assert_close(tensor.grad, theirs[name].grad, atol=1e-4, rtol=1e-4)
    assert all(p.grad is None for p in bay.parameters("sw"))
    assert all(p.grad is None for n, p in model.named_parameters() if "_bay" not in n)


def test_a_new_language_changes_nothing_and_what_was_undone_comes_back():
    model = bert()
    plain = model(IDS)
    bay = mb.attach(model, modules={"de": language()}, name="language")
    assert torch.equal(model(IDS, language="de").logits, plain.logits)
    bay.add("sw", language())
    assert len(bay.parameters("sw")) == 12
    shake(bay.parameters())
    mixed = logits(model)
    for i, label in enumerate(LABELS):
        assert_close(mixed[i], logits(model, [label] * 3)[i], **CLOSE)
    assert torch.equal(mixed[1], plain.logits[1])
    de = logits(model, ["de"] * 3)
    bay.remove("sw")
    assert torch.equal(logits(model, ["de"] * 3), de)
    with pytest.raises(CompositionError, match="no change of f's parameters"):
        bay.fold("de")
    bay.detach()
    assert torch.equal(model(IDS).logits, plain.logits)


def test_equal_kinds_of_a_module_are_one(tmp_path):
    """Said in one place or in two: it is one module, in the model as in its file."""
    model = bert()
    kinds = {ENDS[0]: mb.Invertible(), ENDS[1]: mb.Invertible(), mb.role.query: mb.Invertible(3)}
    bay = mb.attach(model, modules={"de": kinds}).use("de")
    assert len(bay.parameters()) == 16
    shake(bay.parameters())
    wanted = model(IDS).logits
    bay.save(tmp_path)
    other = bert()
    assert len(mb.load(other, tmp_path)["modules"].use("de").parameters()) == 16
    assert torch.equal(other(IDS).logits, wanted)


def test_it_is_saved_once_and_loaded_and_copied(tmp_path):
    model = bert()
    bay = attached(model)
    wanted = logits(model)
    bay.save(tmp_path)
    for other in (bert(), copy.deepcopy(model)):
        again = mb.load(other, tmp_path)["language"] if not mb.bays(other) else mb.bays(other)["language"]
        assert torch.equal(logits(other), wanted)
        assert len(again.parameters("de")) == 12
    bay.pack()
    assert_close(logits(model), wanted, **CLOSE)
    bay.unpack()
    report = bay.merge("both", {"de": 1.0, "sw": 0.0}, of="parameters")
    assert report and torch.equal(logits(model, ["both"] * 3), logits(model, ["de"] * 3))
    assert len(bay.parameters("both")) == 12


def test_compiled():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    kinds = {name: {("0", mb.before("2")): mb.Invertible()} for name in ("de", "sw")}
    bay = mb.attach(model, modules=kinds, name="language")
    shake(bay.parameters(), 1.0)
    x, labels = torch.randn(3, 8), torch.tensor([0, -1, 1])
    wanted = model(x, language=["de", None, "sw"])
    assert_close(torch.compile(model, backend="aot_eager")(x, language=labels), wanted, **CLOSE)


def test_checkpointed_and_in_half_precision():
    model = bert().train()
    bay = attached(model, freeze=False)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    wanted = logits(model)
    wanted.square().sum().backward()
    grads = [p.grad.clone() for p in bay.parameters()]
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": False})
    logits(model).square().sum().backward()
    for p, grad in zip(bay.parameters(), grads, strict=True):
        assert_close(p.grad, grad, atol=1e-4, rtol=1e-4)
    half = logits(model.bfloat16())
    assert half.dtype is torch.bfloat16 and torch.isfinite(half).all()


def test_generation_with_languages():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_inner=12, n_positions=20)
    model = transformers.GPT2LMHeadModel(config).eval()
    shake(model.parameters())
    at = [mb.at("transformer.drop", features=8), mb.before(mb.role.head)]
    bay = mb.attach(model, at=at, modules={"de": mb.Invertible(), "sw": mb.Invertible()}, name="language")
    shake(bay.parameters(), 1.0)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(IDS)}
    mixed = model.generate(IDS, language=LABELS, **options)
    alone = [model.generate(IDS, language=[label] * 3, **options)[i] for i, label in enumerate(LABELS)]
    assert torch.equal(mixed, torch.stack(alone))
    assert not torch.equal(mixed, model.generate(IDS, language=[None] * 3, **options))


def test_the_inverse_of_a_vector_before_the_words_of_adapters_alone(tmp_path):
    """What adapters has no place for is said, with the place that it has."""
    for where, why in {
        "cls.predictions.transform": r"mb\.before\('cls\.predictions\.decoder'\) is the place",
        mb.before("cls.predictions.transform"): "is the place",
    }.items():
        model = bert()
        kinds = {("bert.embeddings.LayerNorm", where): mb.Invertible()}
        bay = mb.attach(model, modules={"de": kinds})
        with pytest.raises(CompositionError, match=why):
            bay.export(tmp_path / "out", format="adapters")
    model = bert(transformers.BertForSequenceClassification)
    bay = mb.attach(model, modules={"de": {("bert.embeddings.LayerNorm", mb.before("classifier")): mb.Invertible()}})
    with pytest.raises(CompositionError, match="this model has none"):
        bay.export(tmp_path / "out", format="adapters")
    assert not (tmp_path / "out").exists()


def test_from_words_to_another_task(tmp_path, caplog):
    """A language's module goes to a model without words as it is, but for the inverse, which has nothing of its own."""
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(vocab_size=20, dim=8, n_layers=1, n_heads=2, hidden_dim=12)
    word = transformers.DistilBertForMaskedLM(config).eval()
    task = transformers.DistilBertForSequenceClassification(config).eval()
    task.distilbert.load_state_dict(word.distilbert.state_dict())
    attached(word).save(tmp_path)
    hidden = word(IDS, language=LABELS, output_hidden_states=True).hidden_states[-1]
    bay = mb.load(task, tmp_path)["language"]
    assert "has no 'vocab_projector'" in caplog.text
    assert len(bay.parameters("de")) == 12 and not any(site.endswith("[before]") for site in bay.modulars)
    answer = task(IDS, language=LABELS, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(answer, hidden)
    bay.load(tmp_path)  # again, into a bay that is there
    bay.remove("sw").load(tmp_path, "sw", add=True)
    assert torch.equal(task(IDS, language=LABELS, output_hidden_states=True).hidden_states[-1], hidden)
    bay.detach()
    other = mb.attach(task, modules={"a": {mb.before("classifier"): mb.Bottleneck(2)}}, name="head")
    other.save(tmp_path / "own")
    with pytest.raises(FileError, match=r"no site 'classifier\[before\]'"):
        mb.load(transformers.DistilBertModel(config), tmp_path / "own", base="any")


def test_from_words_to_another_task_by_adapters(tmp_path):
    """A classifier has no words to undo it before: it takes what is behind the embeddings, and the bottlenecks."""
    model = bert()
    bay = mb.attach(model, modules={"de": {ENDS: mb.Invertible(std=0.3), "*.output.dense": mb.Bottleneck(reduction=2)}})
    shake(bay.parameters())
    hidden = bay.use("de").model.bert(IDS)[0]
    bay.export(tmp_path / "de", format="adapters")
    other = bert(transformers.BertForSequenceClassification)
    other.bert.load_state_dict({k: v for k, v in model.bert.state_dict().items() if "_bay" not in k}, strict=False)
    guest = mb.load(other, tmp_path / "de")["adapters"]
    assert not any(site.endswith("[before]") for site in guest.modulars)
    assert_close(other.bert(IDS)[0], hidden, **CLOSE)
    with pytest.raises(FileError):
        mb.load(bert(transformers.BertForQuestionAnswering), tmp_path / "nothing")
