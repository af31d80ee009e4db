"""Hypernetworks: each against its equation by hand; features, several labels, places; what was never seen; files."""

import copy
import importlib.util
import json
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import modbay as mb
from modbay.errors import CompositionError, ConfigError, LabelError, SiteError
from modbay.methods import typology

TABLE = {"en": (0.0, 1.0, 1.0), "de": (1.0, 1.0, 0.0), "sw": (1.0, 0.0, 0.5)}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


class Layers(nn.Module):
    """Two layers of two maps each: layer.0.up, layer.0.down, layer.1.up, layer.1.down."""

    def __init__(self):
        super().__init__()
        self.layer = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 6), "down": nn.Linear(6, 8)}) for _ in range(2))

    def forward(self, x):
        for layer in self.layer:
            x = layer["down"](torch.tanh(layer["up"](x)))
        return x


def attached(kind: mb.Kind, model: nn.Module | None = None, at="*layer.*.*"):
    """(the model, its bay, the parameters by site), something learned."""
    model = model or Layers()
    bay = mb.attach(model, at=at, modules={"h": kind}).use("h")
    for parameter in bay.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model, bay, {site: m.parts._modules["h"].tensors() for site, m in bay.modulars.items()}


def alone(kind: mb.Kind, module: nn.Module | None = None):
    """(a layer of its own with one such module, its parameters), something learned."""
    layer = mb.Modular(module or nn.Linear(8, 6), {"h": kind}, mb.Uniform(), mb.WeightedSum())
    for parameter in layer.parts.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer, layer.parts._modules["h"].tensors()


def lora(p, h: torch.Tensor):
    """A and B that a hypernetwork over LoRA makes of h."""
    return (p[f"start/{n}"] + p[f"weight/{n}"] @ h / math.sqrt(len(h)) for n in "AB")


# The systems


def test_hypernetworks_make_the_weights_of_each_layer_of_its_embedding():
    model, _, p = attached(mb.Hyper(mb.Full(), size=4))
    x = torch.randn(3, 8)
    twin = Layers()
    for site, own in p.items():
        with torch.no_grad():
            for name, tensor in twin.get_submodule(site).named_parameters():
                tensor.copy_(own[f"start/{name}"] + own[f"weight/{name}"] @ own["site"] / 2)
    assert_close(model(x), twin(x), **CLOSE)
    assert p["layer.0.up"]["weight/weight"] is p["layer.1.up"]["weight/weight"]
    assert p["layer.0.up"]["site"] is not p["layer.1.up"]["site"]


def test_contextual_parameters_are_grouped_and_of_low_rank():
    kind = mb.Hyper(mb.LoRA(2), "language", tuple(TABLE), 8, where=(), rank=3)
    model, _, p = attached(kind)
    first, second = p["layer.0.up"], p["layer.1.up"]
    assert first["labels"] is second["labels"] and first["factor/A"].shape == (3, 8)
    assert first["factor/A"] is second["factor/A"]  # W = W' P is shared where φ has the same shapes …
    kind = mb.Hyper(mb.LoRA(2), "language", tuple(TABLE), 8, where=(), rank=3, shared=False)
    model, _, p = attached(kind)
    first, second = p["layer.0.up"], p["layer.1.up"]
    assert first["factor/A"] is not second["factor/A"] and first["weight/A"] is not second["weight/A"]  # … or each own
    x, h = torch.randn(8), first["labels"][1]
    a, b = (first[f"start/{n}"] + first[f"weight/{n}"] @ (first[f"factor/{n}"] @ h) / math.sqrt(3) for n in "AB")
    layer = copy.deepcopy(model).layer[0]["up"]
    plain = F.linear(x, layer.weight, layer.bias)
    model.layer[0]["up"].register_forward_hook(lambda m, args, out: seen.append(out))
    seen = []
    model(x.view(1, 8), language="de")
    assert_close(seen[0][0], plain + b @ (a @ x), **CLOSE)


def test_adapters_of_a_language_are_made_of_its_features():
    kind = mb.Hyper(mb.Bottleneck(3), "language", table=TABLE, raw=True, hidden=6, code=5, where=(), shared=False)
    layer, p = alone(kind)
    assert p["features"].tolist() == list(map(list, TABLE.values())) and not p["features"].requires_grad
    x, labels = torch.randn(4, 2, 8), ["sw", "en", None, "sw"]
    out, y = layer(x, language=labels), layer.f(x)
    for i, label in enumerate(labels):
        if label is None:
            assert torch.equal(out[i], y[i])
            continue
        t = torch.tensor(TABLE[label])
        h = p["code"] @ F.relu(p["project"] @ t + p["project_bias"]) + p["code_bias"]
        made = {
            n: p[f"start/{n}"] + p[f"weight/{n}"] @ h / math.sqrt(5) for n in ("down", "down_bias", "up", "up_bias")
        }
        hidden = F.relu(F.linear(y[i], made["down"], made["down_bias"]))
        assert_close(out[i], y[i] + F.linear(hidden, made["up"], made["up_bias"]), **CLOSE)


def test_features_are_projected_beside_the_embedding_of_the_layer():
    kind = mb.Hyper(mb.LoRA(2), "language", table=TABLE, size=4, where=("layer",))
    model, bay, p = attached(kind)
    assert p["layer.0.up"]["layer"] is p["layer.0.down"]["layer"] is not p["layer.1.up"]["layer"]
    seen = []
    modular = bay.modulars["layer.1.up"]
    model.layer[1]["up"].register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    model(torch.randn(2, 8), language=["en", "de"])
    (x, out), own = seen[0], p["layer.1.up"]
    for i, label in enumerate(("en", "de")):
        a, b = lora(own, torch.cat([own["describe"] @ torch.tensor(TABLE[label]), own["layer"]]))
        weight, bias = modular.site.weight, modular.site.bias
        assert_close(out[i], F.linear(x[i], weight, bias) + b @ (a @ x[i]), **CLOSE)


def test_task_language_and_layer_make_an_adapter_together():
    kind = mb.Hyper(mb.LoRA(2), ("task", "language"), (("ner", "pos"), ("en", "de")), 4, 6, 5, where=("site",))
    layer, p = alone(kind)
    x = torch.randn(4, 8)
    tasks, languages = ["ner", "pos", "pos", None], ["de", "de", None, "en"]
    out, y = layer(x, task=tasks, language=languages), layer.f(x)
    for i in range(2):
        task, language = ("ner", "pos").index(tasks[i]), ("en", "de").index(languages[i])
        e = torch.cat([p["labels/task"][task], p["labels/language"][language], p["site"]])
        a, b = lora(p, p["code"] @ F.relu(p["project"] @ e + p["project_bias"]) + p["code_bias"])
        assert_close(out[i], y[i] + b @ (a @ x[i]), **CLOSE)
    assert torch.equal(out[2:], y[2:])  # where one is None, nothing is added
    numbers = {"task": torch.tensor([0, 1, 1, -1]), "language": torch.tensor([1, 1, -1, 0])}
    assert_close(layer(x, **numbers), out)
    assert_close(layer(x[:2], task="pos", language=["en", "de"])[1], out[1])


def test_one_hypernetwork_serves_all_layers_and_positions_with_conditional_norms():
    kind = mb.Hyper(
        mb.Bottleneck(3, norm="after", activation="gelu_tanh"), "task", ("a", "b"), 4, 6, 5, norm=True,
        where=("layer", "position"),
    )  # fmt: skip
    model = nn.ModuleDict(
        {"layer": nn.ModuleList(nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}) for _ in "12")}
    )
    model.forward = lambda x: [x := layer[k](x) for layer in model.layer for k in "ab"][-1]
    model, bay, p = attached(kind, model)
    own = p["layer.1.a"]
    assert own["layer"] is p["layer.1.b"]["layer"] and own["position"] is p["layer.0.a"]["position"]
    assert own["weight/norm"] is p["layer.0.b"]["weight/norm"]  # one for all
    seen = []
    model.layer[1]["a"].register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    model(torch.randn(2, 8), task="b")
    (x, out), site = seen[0], bay.modulars["layer.1.a"].site
    e = torch.cat([own["labels"][1], own["layer"], own["position"]])
    h = own["code"] @ F.relu(own["project"] @ e + own["project_bias"]) + own["code_bias"]
    h = F.layer_norm(h, (5,), own["norm"], own["norm_bias"], 1e-6)
    m = {
        n.removeprefix("start/"): t + own[f"weight{n[5:]}"] @ h / math.sqrt(5)
        for n, t in own.items()
        if n[:5] == "start"
    }
    y = F.linear(x, site.weight, site.bias)
    hidden = F.gelu(F.linear(y, m["down"], m["down_bias"]), approximate="tanh")
    normed = F.layer_norm(F.linear(hidden, m["up"], m["up_bias"]), (8,), m["norm"], m["norm_bias"])
    assert_close(out, y + normed, **CLOSE)


def test_the_input_makes_its_own_adapter():
    kind = mb.Hyper(mb.Bottleneck(3), size=4, hidden=6, where=("site", "input"))
    layer, p = alone(kind)
    x = torch.randn(2, 5, 8)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    c = mb.Context(arguments={"attention_mask": mask})
    out, y = layer(x, context=c), layer.f(x)
    for i, n in enumerate((3, 5)):
        h = F.relu(p["project"] @ torch.cat([p["site"], x[i, :n].mean(0)]) + p["project_bias"])
        m = {n: p[f"start/{n}"] + p[f"weight/{n}"] @ h / math.sqrt(6) for n in ("down", "down_bias", "up", "up_bias")}
        hidden = F.relu(F.linear(y[i], m["down"], m["down_bias"]))
        assert_close(out[i], y[i] + F.linear(hidden, m["up"], m["up_bias"]), **CLOSE)


def test_the_input_gates_the_blocks_of_a_weight_beside_what_all_share():
    layer, p = alone(mb.Hyper(mb.Grid(3, 2), where=("input",), only=("row",)))
    assert p["rest/column"].requires_grad and "weight/column" not in p and p["weight/row"].shape == (3, 8)
    x = torch.randn(2, 5, 8)
    out = layer(x)
    for i in range(2):
        row = p["weight/row"] @ x[i].mean(0) / math.sqrt(8)
        blocks = 2 * torch.sigmoid(torch.outer(row, p["rest/column"]))
        gate = torch.stack([torch.stack([blocks[o // 2, j // 4] for j in range(8)]) for o in range(6)])
        assert_close(out[i], F.linear(x[i], layer.f.weight * gate, layer.f.bias), **CLOSE)


def test_task_and_language_are_latent_and_their_divergence_is_a_loss():
    words = ("task", "language")
    kind = mb.Hyper(mb.Head(6), words, (("ner", "pos"), ("en", "de")), 4, 6, where=(), kl=0.1)
    layer, p = alone(kind)
    x, given = torch.randn(2, 8), {"task": ["pos", "ner"], "language": "de"}

    def by_hand(z):
        outs = []
        for i, task in enumerate((1, 0)):
            h = F.relu(p["project"] @ torch.cat([z["task"][task], z["language"][1]]) + p["project_bias"])
            weight, bias = (p[f"start/{n}"] + p[f"weight/{n}"] @ h / math.sqrt(6) for n in ("weight", "bias"))
            outs.append(F.linear(x[i], weight, bias))
        return torch.stack(outs)

    mean = {word: p[f"labels/{word}"] for word in words}
    sigma = {word: F.softplus(p[f"spread/{word}"]) for word in words}
    assert_close(layer.eval()(x, **given), by_hand(mean), **CLOSE)
    with torch.no_grad():
        assert_close(layer.train()(x, **given), by_hand(mean), **CLOSE)
    c = mb.Context()
    out = layer(x, context=c, **given)
    z = {word: mean[word] + sigma[word] * c.state[f"{word} (2, 4)"] for word in words}
    assert_close(out, by_hand(z), **CLOSE)
    assert not torch.allclose(out, by_hand(mean))
    (name, loss), prior = c.losses[0], torch.distributions.Normal(0.0, 1.0)
    kl = sum(
        torch.distributions.kl_divergence(torch.distributions.Normal(mean[w], sigma[w]), prior).sum() for w in words
    )
    assert name == "h.Hyper" and len(c.losses) == 1
    assert_close(loss, 0.1 * kl, **CLOSE)


def test_latent_labels_are_drawn_once_a_call_for_all_sites():
    model, bay, p = attached(mb.Hyper(mb.LoRA(2), "task", ("a", "b"), 4, kl=0.1))
    model.train()(torch.randn(2, 8), task=["a", "b"])
    context = model._bay.session.last
    assert list(context.state) == ["task (2, 4)"] and len(context.losses) == 4
    own = p["layer.0.up"]
    assert_close(sum(loss for _, loss in context.losses), 4 * bay.modulars["layer.0.up"].order[0].kind.penalty(own))
    noise = context.state["task (2, 4)"]
    model(torch.randn(2, 8), task=["a", "b"])
    assert not torch.equal(model._bay.session.last.state["task (2, 4)"], noise)


# What was never seen


def test_a_label_never_seen_is_told_by_its_features():
    layer, _ = alone(mb.Hyper(mb.LoRA(2), "language", table=TABLE))
    x = torch.randn(2, 8)
    told = layer(x, language=torch.tensor([TABLE["sw"], TABLE["en"]]))
    assert_close(told, layer(x, language=["sw", "en"]))
    new = torch.tensor([[0.2, 0.1, 0.9], [0.5, 0.5, 0.5]])
    assert not torch.allclose(layer(x, language=new), told)
    with pytest.raises(
        LabelError, match=r"'fi'.*no such label; it has 'en', 'de', 'sw', or takes features: floats \(b, 3\)"
    ):
        layer(x, language=["fi", "en"])
    with pytest.raises(LabelError, match=r"floats of shape \(2, 2\).*features \(b, 3\)"):
        layer(x, language=new[:, :2])
    named, _ = alone(mb.Hyper(mb.LoRA(2), "language", ("en", "de")))
    with pytest.raises(LabelError, match="one of 'en', 'de' an example"):
        named(x, language=new)


def test_functions_of_a_family_are_learned_and_unseen_ones_follow():
    """a·sin(x + b) with features (a, sin b, cos b): trained on 24 pairs, tested on 12 others."""
    torch.manual_seed(3)
    a, b = torch.meshgrid(torch.linspace(0.5, 2.0, 6), torch.linspace(0, 2.5, 6), indexing="ij")
    t = torch.stack([a, b.sin(), b.cos()], -1).flatten(0, 1)
    t = t[torch.randperm(36)]
    kind = mb.Hyper(mb.FeedForward(64, "tanh"), "task", features=3, raw=True, hidden=64, where=())
    net = mb.Modular(None, {"h": kind}, mb.Uniform(), mb.Mixture(), features=1)
    x = torch.linspace(-3, 3, 25).view(1, 25, 1)

    def loss(tasks):
        scale, shift = tasks[:, 0].view(-1, 1, 1), torch.atan2(tasks[:, 1], tasks[:, 2]).view(-1, 1, 1)
        return (net(x.expand(len(tasks), -1, -1), task=tasks) - scale * (x + shift).sin()).square().mean()

    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    before = loss(t[24:]).item()
    for _ in range(100):
        optimiser.zero_grad()
        loss(t[:24]).backward()
        optimiser.step()
    with torch.no_grad():
        seen, unseen = loss(t[:24]).item(), loss(t[24:]).item()
    assert seen < 0.02 < 1 < before and unseen < 0.05


# Typology


def fake(folder):
    """A package laid out as lang2vec: two languages, two features of each part."""
    data = folder / "lang2vec" / "data"
    data.mkdir(parents=True)
    (folder / "lang2vec" / "__init__.py").write_text("raise RuntimeError('none of its code runs')")
    (data / "letter_codes.json").write_text(json.dumps({"en": "eng", "fi": "fin", "xx": "xxx"}))
    feats = np.array(["S_SVO", "S_SOV", "P_VOICE", "P_CODAS", "INV_A", "INV_B"])
    values = np.array([[1, 0, 1, 0, 1, 0], [0, 1, 1, 1, 0, 0]], np.float32)[..., None]
    np.savez(data / "feature_predictions.npz", feats=feats, langs=np.array(["eng", "fin"]), data=values)


def test_the_features_of_languages_are_read_from_where_lang2vec_lies(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "lang2vec", raising=False)
    if importlib.util.find_spec("lang2vec") is None:
        with pytest.raises(ConfigError, match="pip install lang2vec"):
            typology(("en",))
    fake(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert typology(("en", "fin")) == {"en": (1, 0, 1, 0, 1, 0), "fin": (0, 1, 1, 1, 0, 0)}
    assert typology(("fi",), ("inventory", "syntax")) == {"fi": (0, 0, 0, 1)}
    layer, _ = alone(mb.Hyper(mb.LoRA(2), "language", table=typology(("en", "fi"))))
    assert layer(torch.randn(2, 8), language=["fi", None]).shape == (2, 6)
    with pytest.raises(ConfigError, match="does not know 'xx'"):
        typology(("en", "xx"))
    with pytest.raises(ConfigError, match="some of 'syntax'"):
        typology(("en",), ("colour",))


# Prompts and prefixes

transformers = pytest.importorskip("transformers")
SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def bert():
    return transformers.BertModel(transformers.BertConfig(**SMALL, intermediate_size=48)).eval()


def llama():
    config = transformers.LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=2, pad_token_id=0)
    return transformers.LlamaForCausalLM(config).eval()


def t5():
    config = transformers.T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("inner", [mb.Prefix(3), mb.Prefix(3, bottleneck=5)], ids=["prefix", "bottleneck"])
def test_prefixes_of_a_task_and_a_layer_are_made_by_one_hypernetwork(inner: mb.Prefix):
    kind = mb.Hyper(inner, "task", ("a", "b"), 4, hidden=6, where=("layer",))
    model, plain = bert(), bert()
    plain.load_state_dict(model.state_dict())
    model, _, p = attached(kind, model, at=None)
    assert set(p) == {f"encoder.layer.{i}.attention.self" for i in range(2)}
    ids = torch.randint(50, (3, 7))
    got = model(ids, task=["b", "a", "b"]).last_hidden_state
    assert_close(got[1:2], model(ids[1:2], task="a").last_hidden_state, **CLOSE)
    for i, task in enumerate("ab"):
        fixed = mb.attach(plain, modules={task: inner}, name=task, router=mb.Uniform)
        for site, own in p.items():
            part = fixed.modulars[site].parts._modules[task]
            h = F.relu(own["project"] @ torch.cat([own["labels"][i], own["layer"]]) + own["project_bias"])
            for name in part.tensors():
                made = own[f"start/{name}"] + own[f"weight/{name}"] @ h / math.sqrt(6)
                part._parameters[name] = nn.Parameter(made)
        rows = [1] if task == "a" else [0, 2]
        assert_close(got[rows], plain(ids[rows]).last_hidden_state, **CLOSE)
        fixed.detach()


def test_a_new_hyper_prompt_is_the_prompt_that_the_inner_kind_drew():
    model, plain = bert(), bert()
    plain.load_state_dict(model.state_dict())
    made = mb.attach(model, modules={"h": mb.Hyper(mb.Prompt(3), "task", ("a", "b"))}).use("h")
    (prompt,) = mb.attach(plain, modules={"h": mb.Prompt(3)}).use("h").parameters()
    prompt.data.copy_(next(iter(made.modulars.values())).parts._modules["h"].tensors()["start/prompt"])
    ids = torch.randint(50, (2, 5))
    assert_close(model(ids, task=["a", "b"])[0], plain(ids)[0], **CLOSE)


def prefixed(**kinds: mb.Kind):
    """(a model, its bay of a generated prefix and others, calls of five rows)."""
    model = bert()
    bay = mb.attach(model, modules={"h": mb.Hyper(mb.Prefix(2), "task", ("a", "b"), 4), **kinds}, name="which")
    for parameter in bay.parameters():
        nn.init.normal_(parameter)
    return model, bay, torch.randint(50, (5, 6))


NUMBERS = {"which": torch.tensor([0, -1, 1, 0, 1]), "task": torch.tensor([0, 1, 1, 1, 0])}


def test_generated_prefixes_share_a_batch_with_others_and_are_weighed():
    model, bay, ids = prefixed(p=mb.Prefix(2), long=mb.Prefix(4))
    which, tasks = ["h", None, "p", "h", "long"], ["a", None, None, "b", "a"]
    mixed = model(ids, which=which, task=tasks)[0]
    each = [model(ids[i : i + 1], which=[which[i]], task=[tasks[i]])[0] for i in range(5)]
    assert_close(mixed, torch.cat(each), **CLOSE)
    with pytest.raises(LabelError, match="starts with a change of its own"):
        model(ids, which="h", task=tasks)
    bay.use({"h": 0.3, "p": 0.7})
    both = model(ids, task=["a", "b", "a", "b", "a"])[0]
    assert_close(both[1:2], model(ids[1:2], task="b")[0], **CLOSE)


def test_generated_prefixes_are_recomputed_under_their_own_labels():
    model, bay, ids = prefixed(p=mb.Prefix(2))
    leaves = list(bay.parameters())
    other = {name: numbers.flip(0) for name, numbers in NUMBERS.items()}

    def gradients():
        out = model(ids, **NUMBERS)[0].square().sum() - model(ids, **other)[0].sin().sum()
        return torch.autograd.grad(out, leaves, allow_unused=True)

    want = gradients()
    for module in model.train().modules():
        module.p = 0.0 if isinstance(module, nn.Dropout) else getattr(module, "p", None)
    model.activation_checkpointing_enable({"use_reentrant": False})
    for mine, theirs in zip(gradients(), want, strict=True):
        assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_generated_prefixes_compile():
    model, _, ids = prefixed(p=mb.Prefix(2))
    want = model(ids, **NUMBERS)[0]
    torch._dynamo.reset()
    assert_close(torch.compile(model, backend="aot_eager")(ids, **NUMBERS)[0], want, **CLOSE)


def test_generated_prefixes_serve_generation_with_beams():
    model = llama()
    bay = mb.attach(model, modules={"h": mb.Hyper(mb.Prefix(3), "task", ("a", "b"), 4)}).use("h")
    for parameter in bay.parameters():
        nn.init.normal_(parameter)
    ids = torch.randint(1, 50, (2, 5))
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2, "attention_mask": torch.ones_like(ids)}
    out = model.generate(ids, task=["a", "b"], **options)
    options["attention_mask"] = torch.ones(1, 5, dtype=torch.long)
    for i, task in enumerate("ab"):
        alone = model.generate(ids[i : i + 1], task=task, **options)
        assert torch.equal(out[i, : alone.shape[1]], alone[0])


def test_an_encoded_instruction_makes_prefixes_and_adapters():
    model, encoder = bert(), nn.Linear(5, 16)
    kinds = {
        "*.attention.self": mb.Hyper(mb.Prefix(2), "instruction", features=16, size=4),
        "*.output.dense": mb.Hyper(mb.Bottleneck(3), "instruction", features=16, size=4),
    }
    bay = mb.attach(model, modules={"h": kinds}).use("h")
    for parameter in bay.parameters():
        nn.init.normal_(parameter, std=0.3)
    code = encoder(torch.randn(2, 5))  # once an instruction, however many examples have it
    ids = torch.randint(50, (3, 6))
    out = model(ids, instruction=code[[0, 1, 0]])[0]
    assert_close(out[1:2], model(ids[1:2], instruction=code[1:])[0], **CLOSE)
    assert_close(out[2:], model(ids[2:], instruction=code[:1])[0], **CLOSE)
    out.square().sum().backward()
    assert encoder.weight.grad.abs().sum() > 0
    with pytest.raises(LabelError, match=r"no such label.*takes features: floats \(b, 16\)"):
        model(ids, instruction="sum it up")


def test_a_decoder_is_adapted_by_what_its_encoder_read():
    model = t5()
    kind = mb.Hyper(mb.Bottleneck(4), "read", features=32, raw=True, size=5, hidden=8, where=("layer",))
    _, _, p = attached(kind, model, at="decoder.block.*.layer.2")
    assert p["decoder.block.1.layer.2"]["project"].shape == (8, 37)
    ids, said = torch.randint(1, 50, (3, 6)), torch.randint(1, 50, (3, 4))

    def run(rows):
        encoded = model.encoder(ids[rows])
        read = encoded.last_hidden_state.mean(1)
        return model(encoder_outputs=encoded, decoder_input_ids=said[rows], read=read).logits

    mixed = run([0, 1, 2])
    assert_close(mixed, torch.cat([run([i]) for i in range(3)]), **CLOSE)
    assert_close(mixed[[2, 0]], run([2, 0]), **CLOSE)


# Files, and what is refused


def test_features_are_saved_with_the_module_and_come_back(tmp_path):
    kind = mb.Hyper(
        mb.Bottleneck(3), ("task", "language"), (("ner", "pos"), ()), 4, 6, 5, True, ("layer", "position"),
        table={"language": TABLE}, rank=2, kl=0.01,
    )  # fmt: skip
    model, bay, _ = attached(kind)
    twin = Layers().eval()
    twin.load_state_dict(model.eval().state_dict())
    bay.save(tmp_path)
    loaded = mb.load(twin, tmp_path)
    x, given = torch.randn(3, 8), {"task": ["ner", "pos", "ner"], "language": ["sw", "de", None]}
    next(iter(loaded.values())).use("h")
    assert torch.equal(twin(x, **given), model(x, **given))
    again = next(iter(loaded.values())).modulars["layer.0.up"].parts._modules["h"]
    assert again.kind == kind and torch.equal(again.tensors()["features/language"], torch.tensor([*TABLE.values()]))
    with pytest.raises(CompositionError, match="needs the features of each 'language': pass table="):
        again.kind.init([bay.modulars["layer.0.up"].site])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: mb.Hyper(mb.LoRA(2), where=()), "labels, or some of 'site'"),
        (lambda: mb.Hyper(mb.LoRA(2), where=("depth",)), "labels, or some of 'site'"),
        (lambda: mb.Hyper(mb.LoRA(2), "a", table={"b": (1, 0), "c": (1,)}), "have features, as many"),
        (lambda: mb.Hyper(mb.LoRA(2), "a", ("b", "d"), table={"b": (1, 0)}), "each of 'b', 'd' must have features"),
        (lambda: mb.Hyper(mb.LoRA(2), ("a", "b"), (("x",),)), "of these, one each"),
        (lambda: mb.Hyper(mb.LoRA(2), ("a", "b"), (("x",), ())), r"labels=\(\).*'b'"),
        (lambda: mb.Hyper(mb.LoRA(2), ("a",), table={"b": {"x": (1,)}}), "of these, one each"),
        (lambda: mb.Hyper(mb.LoRA(2), "a", ("b",), rank=0), "rank=0"),
        (lambda: alone(mb.Hyper(mb.LoRA(2), only=("C",))), r"only=\('C',\).*has 'A', 'B'"),
        (lambda: mb.Hyper(mb.LoRA(2), "a", features=3, kl=0.1), "kl=0.1.*of embeddings"),
        (lambda: mb.Hyper(mb.AdaLoRA(2), "a", ("b",)), "its penalty is of parameters"),
        (lambda: mb.Grid(0), "rows=0"),
        (lambda: alone(mb.Grid(4, 4)), r"\(6, 8\), has no such blocks"),
        (lambda: alone(mb.Grid(2, 2), nn.Conv2d(2, 2, 3)), "Conv2d.*only the weight of one linear map"),
        (
            lambda: mb.Hyper(mb.LoRA(2), where=("layer",)).init([mb.Modular(nn.Linear(4, 4)).site]),
            "no number of a layer",
        ),
        (lambda: mb.Hyper(mb.LoRA(2), where=("input",)).init([mb.Modular(nn.Embedding(4, 4)).site]), "no features on"),
    ],
)
def test_what_does_not_fit_is_named(make, message: str):
    with pytest.raises(CompositionError, match=message):
        make()


def test_positions_that_are_not_those_of_the_mask_raise():
    layer, _ = alone(mb.Hyper(mb.LoRA(2), where=("input",)))
    with pytest.raises(SiteError, match="5 positions, the attention mask 3"):
        layer(torch.randn(2, 5, 8), context=mb.Context(arguments={"attention_mask": torch.ones(2, 3)}))
