"""Systems of whole networks: streams, sharing, AdapterDrop, side networks, X-MOD, T-Few; each against its formula."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import modbay as mb
from modbay import core, losses, methods


def close(ours, theirs):
    assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def randomise(parameters, std: float = 0.3) -> None:
    for parameter in parameters:
        nn.init.normal_(parameter, std=std)


# Streams


class Layer(nn.Linear):
    def forward(self, x):
        return torch.tanh(super().forward(x))


def networks(tasks: str = "ab", depth: int = 2, width: int = 4) -> dict[str, list[nn.Module]]:
    return {task: [Layer(width, width) for _ in range(depth)] for task in tasks}


def test_cross_stitch_units_mix_streams():
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    layer = mb.Modular(None, {"a": a, "b": b}, mb.Uniform(), mb.CrossStitch(2), features=4)
    x = torch.randn(2, 3, 4)
    close(layer(x), torch.stack([0.9 * a(x[0]) + 0.1 * b(x[1]), 0.1 * a(x[0]) + 0.9 * b(x[1])]))
    convs = [nn.Conv2d(4, 4, 1) for _ in range(3)]
    unit = mb.CrossStitch(3, channels=True, axis=-3)
    layer = mb.Modular(None, dict(zip("abc", convs, strict=True)), mb.Uniform(), unit, features=4)
    assert layer.aggregator.alpha.shape == (3, 3, 4) and torch.allclose(unit.alpha[0, 1], torch.tensor(0.05))
    randomise([unit.alpha])
    x = torch.randn(3, 2, 4, 5, 5)
    outs = torch.stack([conv(v) for conv, v in zip(convs, x, strict=True)])
    close(layer(x), torch.einsum("stc,tbchw->sbchw", unit.alpha, outs))


def test_subspaces_of_streams_are_mixed_apart():
    a, b = nn.Linear(4, 6), nn.Linear(4, 6)
    unit = mb.CrossStitch(2, subspaces=2, start=0.25)
    layer = mb.Modular(None, {"a": a, "b": b}, mb.Uniform(), unit, features=4)
    assert torch.equal(unit.alpha, torch.full((4, 4), 0.25))
    randomise([unit.alpha])
    x = torch.randn(2, 3, 4)
    parts = [a(x[0])[:, :3], a(x[0])[:, 3:], b(x[1])[:, :3], b(x[1])[:, 3:]]
    mixed = [sum(unit.alpha[s, t] * parts[t] for t in range(4)) for s in range(4)]
    close(layer(x), torch.stack([torch.cat(mixed[:2], -1), torch.cat(mixed[2:], -1)]))


def test_what_is_no_stream_is_refused():
    layer = mb.Modular(None, {"a": nn.Linear(4, 4)}, mb.Uniform(), mb.CrossStitch(2), features=4)
    with pytest.raises(mb.errors.CompositionError, match="1 modules, 2 streams"):
        layer(torch.randn(2, 3, 4))
    odd = mb.Modular(None, {"a": nn.Linear(4, 5), "b": nn.Linear(4, 5)}, mb.Uniform(), mb.CrossStitch(2, 2))
    with pytest.raises(mb.errors.CompositionError, match="5 features do not divide"):
        odd(torch.randn(2, 3, 4))
    with pytest.raises(mb.errors.CompositionError, match="nothing to mix"):
        mb.CrossStitch(1)
    with pytest.raises(mb.errors.CompositionError, match=r"methods\.cross_stitch"):
        mb.attach(nn.Sequential(nn.Linear(4, 4)), "0", {"a": mb.LoRA(2)}, mb.Uniform(), mb.CrossStitch(2))
    with pytest.raises(mb.errors.CompositionError, match="as many layers"):
        methods.cross_stitch({"a": [nn.Linear(4, 4)], "b": []})


def test_a_cross_stitch_network_is_written_out():
    layers = networks()
    model, x = methods.cross_stitch(layers), torch.randn(3, 4)
    randomise(model.alphas())
    one, two = model.alphas()
    a, b = layers["a"][0](x), layers["b"][0](x)
    a, b = one[0, 0] * a + one[0, 1] * b, one[1, 0] * a + one[1, 1] * b
    a, b = layers["a"][1](a), layers["b"][1](b)
    out = model(x)
    assert list(out) == ["a", "b"] and len(list(model.parameters())) == 2 * 4 + 2
    close(out["a"], two[0, 0] * a + two[0, 1] * b)
    close(out["b"], two[1, 0] * a + two[1, 1] * b)


def test_a_sluice_network_is_written_out():
    layers = networks()
    model, x = methods.sluice(layers), torch.randn(3, 4)
    assert all(torch.equal(alpha, torch.full((4, 4), 0.25)) for alpha in model.alphas())
    assert torch.equal(model.betas, torch.full((2, 2), 0.5))
    randomise([*model.alphas(), model.betas])
    h, every = [x, x], []
    for k, alpha in enumerate(model.alphas()):
        parts = [part for task, v in zip("ab", h, strict=True) for part in layers[task][k](v).chunk(2, -1)]
        mixed = [sum(alpha[s, t] * parts[t] for t in range(4)) for s in range(4)]
        h = [torch.cat(mixed[:2], -1), torch.cat(mixed[2:], -1)]
        every.append(h)
    for t, task in enumerate("ab"):
        close(model(x)[task], model.betas[t, 0] * every[0][t] + model.betas[t, 1] * every[1][t])
    weights = [layer.weight for several in layers.values() for layer in several]
    close(model.penalty(), sum((w[:2].T @ w[2:]).square().sum() for w in weights))


# Sharing


def test_hard_sharing_trains_the_trunk_by_all_tasks():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    mb.attach(model, "2", {"pos": mb.Head(3), "ner": mb.Head(5)}, name="task", freeze=False)
    x = torch.randn(4, 8)
    gradients = []
    for task in (["pos"] * 4, ["ner"] * 4, ["pos", "ner", "ner", "pos"]):
        model.zero_grad()
        out = model(x, task=task)
        out[out.isfinite()].square().sum().backward()
        gradients.append(model[0].weight.grad.clone())
        assert gradients[-1].abs().sum() > 0
    close(model(x, task=["pos", "ner", "ner", "pos"])[1, :5], model(x, task="ner")[1])


def test_the_losses_of_soft_sharing_are_written_out():
    several = [torch.randn(3, 4) for _ in range(3)]
    a, b, c = several
    close(losses.distance(several), (a - b).square().sum() + (a - c).square().sum() + (b - c).square().sum())
    stack = torch.stack(several)
    last = torch.linalg.svdvals(stack.flatten(1)).sum()
    close(losses.trace_norm(several), last)
    others = [torch.linalg.svdvals(stack.permute(order).flatten(1)).sum() for order in ((1, 0, 2), (2, 0, 1))]
    close(losses.trace_norm(several, "tucker"), last + sum(others))
    w = torch.randn(6, 4)
    close(losses.orthogonality(w), (w[:3].T @ w[3:]).square().sum())
    close(
        losses.orthogonality(w, 3),
        sum((w[i : i + 2].T @ w[j : j + 2]).square().sum() for i, j in ((0, 2), (0, 4), (2, 4))),
    )


@pytest.mark.parametrize("near", [losses.distance, losses.trace_norm], ids=["distance", "trace-norm"])
def test_soft_sharing_keeps_the_networks_of_two_tasks_near(near):
    """Two networks on two tasks of one kind: with the loss they end nearer, or as combinations of fewer."""
    x = torch.randn(64, 8)
    truth = torch.randn(1, 8).expand(2, -1) + 0.3 * torch.randn(2, 8)
    ends = {}
    for coefficient in (0.0, 0.1):
        torch.manual_seed(1)
        tasks = [nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1)) for _ in range(2)]
        optimiser = torch.optim.Adam([p for net in tasks for p in net.parameters()], 0.02)
        for _ in range(60):
            fit = sum((net(x)[:, 0] - x @ w).square().mean() for net, w in zip(tasks, truth, strict=True))
            shared = sum(near(pair) for pair in zip(*(net.parameters() for net in tasks), strict=True))
            optimiser.zero_grad()
            (fit + coefficient * shared).backward()
            optimiser.step()
        ends[coefficient] = shared.item()
    assert ends[0.1] < 0.7 * ends[0.0]


# AdapterDrop


class Deep(nn.Module):
    """Layers that each have two sites, and one before them."""

    def __init__(self, depth: int = 4):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"attention": nn.Linear(8, 8), "output": nn.Linear(8, 8)}) for _ in range(depth)
        )

    def forward(self, x):
        x = torch.tanh(self.first(x))
        for layer in self.layers:
            x = x + torch.tanh(layer["output"](layer["attention"](x)))
        return x


def dropping(drop: int = 0, robust: bool = True):
    """(model, bay, the same with modules everywhere), all with one set of parameters."""
    model = Deep()
    bay = mb.attach(model, nn.Linear, dict.fromkeys("ab", mb.LoRA(2)), mb.Drop("task", drop=drop, robust=robust))
    randomise(bay.parameters())
    return model, bay


def upper(model, bay, task, n: int, x):
    """What comes out with modules in the layers from n on alone, and before all layers."""
    kept = {name: part for name, m in bay.modulars.items() for part in [m.parts._modules[task].tensors()]}
    plain = copy.deepcopy(model)
    mb.bays(plain)["modules"].detach()
    with torch.no_grad():
        for name, p in kept.items():
            if name == "first" or int(name.split(".")[1]) >= n:
                plain.get_submodule(name).weight += p["B"] @ p["A"]
    return plain(x)


def test_adapter_drop_leaves_the_lowest_layers_out(tmp_path):
    model, bay = dropping(drop=3)
    x, tasks = torch.randn(4, 8), ["b", "a", None, "b"]
    model.eval()
    for n in (3, 0, 4):
        bay.state.router.drop = n
        out = model(x, task=tasks)
        close(out[[0, 3]], upper(model, bay, "b", n, x)[[0, 3]])
        close(out[1], upper(model, bay, "a", n, x)[1])
        close(model(x, task="a"), upper(model, bay, "a", n, x))
    bay.state.router.drop = 2
    want = model(x, task=tasks)
    bay.rename("a", "c")
    bay.save(tmp_path)
    bay.detach()
    bay = mb.load(model, tmp_path)["modules"]
    close(model(x, task=["b", "c", None, "b"]), want)
    assert bay.state.router.drop == 2


def test_adapter_drop_draws_how_many_layers_in_training():
    model, bay = dropping()
    x = torch.randn(4, 8)
    each = [upper(model, bay, "a", n, x) for n in range(4)]
    seen = []
    for _ in range(60):
        out = model.train()(x, task="a")
        seen.append(next(n for n, want in enumerate(each) if torch.allclose(out, want, atol=1e-5)))
    assert {seen.count(n) > 5 for n in range(4)} == {True}
    out.square().sum().backward()
    low = [p for name, m in bay.modulars.items() for p in m.parts._modules["a"].parameters()]
    assert any(p.grad is not None for p in low)
    close(model.eval()(x, task="a"), each[0])
    fixed, bay = dropping(drop=2, robust=False)
    close(fixed.train()(x, task="a"), upper(fixed, bay, "a", 2, x))


def test_adapter_drop_runs_nothing_where_it_drops(monkeypatch):
    model, bay = dropping(drop=4)
    parts = {id(m.parts._modules["a"]): name for name, m in bay.modulars.items()}
    touched, real = set(), core.Part.tensors
    monkeypatch.setattr(core.Part, "tensors", lambda self: touched.add(parts.get(id(self))) or real(self))
    model.eval()(torch.randn(2, 8), task=["a", "a"])
    assert touched == {"first"}


def test_adapter_drop_wants_one_route_for_all_sites():
    with pytest.raises(mb.errors.CompositionError, match="one object"):
        mb.attach(Deep(), nn.Linear, {"a": mb.LoRA(2)}, lambda: mb.Drop("task"))
    with pytest.raises(mb.errors.CompositionError, match=r"drop=5.*4 layers"):
        mb.attach(Deep(), nn.Linear, {"a": mb.LoRA(2)}, mb.Drop("task", drop=5))
    with pytest.raises(mb.errors.CompositionError, match="drop=-1"):
        mb.Drop("task", drop=-1)


# Side networks


def test_side_tuning_mixes_the_base_and_a_side_network():
    base, side, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 8), torch.randn(5, 8)
    want, other = base(x), side(x)
    bay = mb.attach(base, at="", **methods.side_tuning({"side": side}))
    close(base(x), 0.5 * want + 0.5 * other)
    weight = bay.state.router.w
    with torch.no_grad():
        weight.fill_(0.3)
    close(base(x), 0.7 * want + 0.3 * other)
    base(x).square().sum().backward()
    assert weight.grad is not None and side.weight.grad is not None and base[0].weight.grad is None
    bay.detach()
    bay = mb.attach(base, at="", **methods.side_tuning({"copy": mb.Full(), "other": mb.Full()}, 0.6, learned=False))
    close(base(x), want)
    randomise(bay.parameters("copy"))
    own = {name.replace("/", "."): p for name, p in bay.modulars[""].parts._modules["copy"].tensors().items()}
    close(base(x), 0.7 * want + 0.3 * torch.tanh(F.linear(x, own["0.weight"], own["0.bias"])))


# X-MOD


@pytest.fixture
def xmod():
    """(transformers' X-MOD of two languages, and a RoBERTa of the same weights with our bay), random."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 24, "max_position_embeddings": 40, "pad_token_id": 1}
    theirs = transformers.XmodModel(transformers.XmodConfig(**sizes, languages=("en", "de"), ln_before_adapter=True))
    randomise(p for name, p in theirs.named_parameters() if "LayerNorm" not in name)
    ours = transformers.XLMRobertaModel(transformers.XLMRobertaConfig(**sizes))
    weights = {name: w for name, w in theirs.state_dict().items() if "adapter" not in name}
    assert not ours.load_state_dict(weights, strict=False).unexpected_keys
    bay = mb.attach(ours, "*.layer.?.output.LayerNorm", **methods.x_mod(("en", "de")))
    for name, modular in bay.modulars.items():
        for language in ("en", "de"):
            adapter = theirs.get_submodule(name.replace("LayerNorm", f"adapter_modules.{language}"))
            down, up = adapter.dense1, adapter.dense2
            given = {"down": down.weight, "down_bias": down.bias, "up": up.weight, "up_bias": up.bias}
            for key, tensor in modular.parts._modules[language].tensors().items():
                tensor.data.copy_(given[key])
    return theirs.eval(), ours.eval(), bay


def test_x_mod_is_the_model_of_transformers(xmod):
    theirs, ours, _ = xmod
    ids, mask = torch.randint(2, 60, (4, 7)), torch.ones(4, 7, dtype=torch.long)
    mask[1, 5:] = 0
    want = theirs(ids, attention_mask=mask, lang_ids=torch.tensor([1, 0, 0, 1])).last_hidden_state
    close(ours(ids, attention_mask=mask, language=["de", "en", "en", "de"]).last_hidden_state, want)
    assert not torch.allclose(want, ours(ids, attention_mask=mask, language="en").last_hidden_state, atol=0.01)


def test_x_mod_trains_the_trunk_and_the_languages_of_a_batch(xmod):
    _, ours, bay = xmod
    ids = torch.randint(2, 60, (4, 7))
    ours(ids, language="en").last_hidden_state.square().sum().backward()
    assert ours.embeddings.word_embeddings.weight.grad is not None
    assert all(p.grad is not None for p in bay.parameters("en"))
    assert all(p.grad is None for p in bay.parameters("de"))
    before = ours(ids, language="de").last_hidden_state
    bay.add("sw", mb.Bottleneck(reduction=2, activation="gelu", std=0.02))
    close(ours(ids, language=["de", "sw", "de", "de"]).last_hidden_state[[0, 2, 3]], before[[0, 2, 3]])


def test_a_norm_that_is_used_again():
    norm, x = nn.LayerNorm(8), torch.randn(4, 8)
    randomise(norm.parameters())
    layer = mb.Modular(norm, {"a": mb.Bottleneck(3)}, mb.ByLabel("task"), mb.Again())
    randomise(layer.parts.parameters())
    p = layer.parts._modules["a"].tensors()
    y = norm(x)
    want = norm(y + F.relu(y @ p["down"].T + p["down_bias"]) @ p["up"].T + p["up_bias"])
    close(layer(x, task=["a", None, "a", "a"])[[0, 2, 3]], want[[0, 2, 3]])
    close(layer(x, task=["a", None, "a", "a"])[1], norm(y)[1])
    with pytest.raises(mb.errors.CompositionError, match="input of the site"):
        mb.Modular(nn.Linear(8, 6), {"a": mb.Bottleneck(3)}, mb.ByLabel("task"), mb.Again())


# T-Few


def test_the_losses_of_t_few_are_written_out():
    logits, right = torch.randn(2, 3, 4, 7), torch.tensor([2, 0])
    targets = torch.randint(7, (2, 3, 4))
    for example, answer, length in ((0, 0, 2), (0, 2, 3), (1, 1, 1)):
        targets[example, answer, length:] = -100
    said = [
        [
            [float(logits[b, n, t].softmax(-1)[targets[b, n, t]]) for t in range(4) if targets[b, n, t] >= 0]
            for n in range(3)
        ]
        for b in range(2)
    ]
    log = lambda values: torch.tensor(values).log()
    good = [p for b in range(2) for p in said[b][right[b]]]
    bad = [p for b in range(2) for n in range(3) if n != right[b] for p in said[b][n]]
    lm, ul = -log(good).mean(), -(1 - torch.tensor(bad) + 1e-2).log().mean()
    beta = torch.stack([torch.stack([log(said[b][n]).mean() for n in range(3)]) for b in range(2)])
    ln = -beta.log_softmax(-1)[range(2), right].mean()
    close(losses.likelihood(logits, targets, right), lm)
    close(losses.unlikelihood(logits, targets, right), ul)
    close(losses.length_normalised(logits, targets, right), ln)
    close(losses.t_few(logits, targets, right), lm + ul + ln)


def test_t_few_is_ia3_and_three_losses():
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 40}
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, decoder_start_token_id=0, dropout_rate=0.0)
    )
    bay = mb.attach(model, modules={"cb": methods.t_few()}).use("cb")
    at = {name.rpartition(".")[2] for name in bay.modulars}
    assert (
        at == {"k", "v", "wo"} and len(bay.parameters()) == 2 * 3 + 2 * 5
    )  # in the decoder, twice the keys and values
    ids, answers = torch.randint(2, 40, (3, 5)), torch.randint(2, 40, (3, 2, 4))
    right, ends = torch.tensor([0, 1, 1]), []
    optimiser = torch.optim.Adam(bay.parameters(), 0.05)
    for _ in range(12):
        logits = model(ids.repeat_interleave(2, 0), labels=answers.flatten(0, 1)).logits.unflatten(0, (3, 2))
        loss = losses.t_few(logits, answers, right)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        ends.append(loss.item())
    assert ends[-1] < 0.9 * ends[0]
