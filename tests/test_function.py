"""Function composition: each kind against its formula written out, and against peft where it has it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import modbay as mb
from helpers import SITES, context, function, site_of, trained
from modbay import methods
from modbay.core._engine import apply


def parts(kind: mb.Kind, place: str, rows: int = 3):
    """(the site's output, f(x), x, parameters, module), after something was learned."""
    module, site = site_of(place)
    return run(kind, module, site, SITES[place].example(rows))


def run(kind: mb.Kind, module: nn.Module, site: mb.Site, x: torch.Tensor):
    params, f = trained(kind, site), function(module, x)
    if isinstance(kind, mb.Replacement):
        return apply(kind, params, f, x, None, context(), site, False), module(x), x, params, module
    y = f(x)
    return y + apply(kind, params, f, x, y, context(), site, False), y, x, params, module


def close(ours, theirs):
    assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def randomise(parameters, std: float = 0.3) -> None:
    for parameter in parameters:
        nn.init.normal_(parameter, std=std)


# Norms


def test_norm_scales_what_is_normalised_and_moves_the_shift():
    out, _, x, p, norm = parts(mb.Norm(), "norm")
    close(out, F.layer_norm(x, (8,), norm.weight * (1 + p["gain"]), norm.bias + p["bias"]))
    norm, x = nn.BatchNorm2d(4), torch.randn(5, 4, 3, 3)
    randomise(norm.parameters())
    for training in (True, False):  # its statistics are the batch's, or those that it keeps
        norm.train(training)
        out, _, _, p, _ = run(mb.Norm(), norm, mb.Modular(norm).site, x)
        mean, var = (
            (x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)) if training else (norm.running_mean, norm.running_var)
        )
        n = (x - mean.view(4, 1, 1)) / (var.view(4, 1, 1) + norm.eps).sqrt()
        gain, shift = norm.weight * (1 + p["gain"]), norm.bias + p["bias"]
        close(out, gain.view(4, 1, 1) * n + shift.view(4, 1, 1))


def test_norm_has_a_bias_where_the_norm_has_one_or_where_it_is_asked_for():
    rms = nn.RMSNorm(8)
    assert mb.Norm().init([mb.Modular(rms).site])[""].keys() == {"gain"}
    out, _, x, p, _ = run(mb.Norm(bias=True), rms, mb.Modular(rms).site, torch.randn(3, 8))
    close(out, F.rms_norm(x, (8,), rms.weight * (1 + p["gain"])) + p["bias"])
    out, _, x, p, norm = run(mb.Norm(bias=False), nn.LayerNorm(8), mb.Modular(nn.LayerNorm(8)).site, torch.randn(3, 8))
    close(out, F.layer_norm(x, (8,), norm.weight * (1 + p["gain"]), norm.bias))


@pytest.mark.parametrize("shape", [(4,), (4, 4), (4, 4, 4)], ids=["vector", "sequence", "map"])
def test_the_features_of_a_group_norm_are_on_its_second_axis(shape: tuple[int, ...]):
    norm, x = nn.GroupNorm(2, 4), torch.randn(6, *shape)
    layer = mb.Modular(norm, {"a": mb.Norm(), "b": mb.Norm()}, mb.ByLabel("task"), mb.WeightedSum())
    randomise(layer.parts.parameters())
    a, b = (layer.parts._modules[name].tensors() for name in "ab")
    want = [F.group_norm(x, 2, norm.weight * (1 + p["gain"]), norm.bias + p["bias"]) for p in (a, b)]
    out = layer(x, task=["a", "b", "b", "a", None, "a"])
    close(out, torch.stack([want[0][0], want[1][1], want[1][2], want[0][3], norm(x)[4], want[0][5]]))
    with pytest.raises(mb.errors.CompositionError, match="known"):
        mb.Bottleneck(2).init([layer.site])


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_norm_is_pefts_layer_norm_tuning():
    """Where γ is 1, relative to which it is learned, the same outputs after some steps of gradient descent."""
    peft = pytest.importorskip("peft")
    net = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    nn.init.normal_(net[1].bias)
    theirs = peft.get_peft_model(copy.deepcopy(net), peft.LNTuningConfig(target_modules=["1"]))
    bay = mb.attach(net, at="1", modules={"a": mb.Norm()}).use("a")
    x, want = torch.randn(16, 8), torch.randn(16, 4)
    before = net(x)
    for model in (net, theirs):
        optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(5):
            optimiser.zero_grad()
            (model(x) - want).square().mean().backward()
            optimiser.step()
    assert sum(p.numel() for p in bay.parameters()) == 16 and not torch.allclose(net(x), before, atol=0.1)
    close(net(x), theirs(x))


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(4), nn.RMSNorm((4,)), nn.GroupNorm(2, 4)], ids=["batch", "rms", "group"]
)
def test_norm_folds_into_norms_of_other_kinds(norm: nn.Module):
    net, x = nn.Sequential(norm), torch.randn(5, 4, 4, 4)
    randomise(norm.parameters())
    bay = mb.attach(net, at="0", modules={"a": mb.Norm(), "b": mb.Norm()})
    randomise(bay.parameters())
    want, before = bay.use("a", "b") and net(x), norm.weight.clone()
    bay.fold("a", "b")
    close(net(x), want)
    bay.unfold()
    assert torch.equal(norm.weight, before)


@pytest.mark.parametrize("place", ["norm", "conv2d"])
def test_film_is_a_norm_that_a_hypernetwork_generates(place: str):
    module, site = site_of(place)
    kind = mb.Hyper(mb.Norm(bias=True), "label", ("a", "b"), size=4)
    p, x = trained(kind, site), SITES[place].example(3)
    c = mb.Context(labels={"label": ["b", None, "a"]})
    y = module(x)
    out = y + apply(kind, p, function(module, x), x, y, c, site, False)
    own = module.bias.view(-1, 1, 1) if place == "conv2d" else module.bias
    made = kind.generate(p, x, c)
    assert not torch.allclose(made["gain"][0], made["gain"][2], atol=0.01)
    for i in (0, 2):
        gain, shift = made["gain"][i], made["bias"][i]
        gain, shift = (t.view(-1, 1, 1) if place == "conv2d" else t for t in (gain, shift))
        close(out[i], (1 + gain) * (y[i] - own) + own + shift)
    close(out[1], y[1])


# Invertible adapters


def coupling(p, v, prefix=""):
    return {
        name: F.relu(v[name] @ p[f"{prefix}{name}_down"].T + p[f"{prefix}{name}_down_bias"]) @ p[f"{prefix}{name}_up"].T
        + p[f"{prefix}{name}_up_bias"]
        for name in v
    }


@pytest.mark.parametrize("width", [8, 7])
def test_an_invertible_adapter_is_the_nice_coupling_and_its_inverse(width: int):
    net = nn.Sequential(nn.Embedding(11, width), nn.LayerNorm(width))
    bay = mb.attach(net, at=["0", "1"], modules={"a": mb.Invertible()}).use("a")
    randomise(bay.parameters())
    first, last = (modular.parts._modules["a"].tensors() for modular in bay.modulars.values())
    assert first["F_down"].shape == ((width - width // 2) // 2, width - width // 2)
    e, half = net[0].weight, width // 2
    o1 = e[:, :half] + coupling(first, {"F": e[:, half:]})["F"]
    o = torch.cat([o1, e[:, half:] + coupling(first, {"G": o1})["G"]], -1)
    ids = torch.arange(11)
    with torch.no_grad():
        close(net[0](ids), o)
        y = F.layer_norm(o, (width,), net[1].weight, net[1].bias)
        e2 = y[:, half:] - coupling(last, {"G": y[:, :half]}, "inverse/")["G"]
        close(net[1](o), torch.cat([y[:, :half] - coupling(last, {"F": e2}, "inverse/")["F"], e2], -1))


def test_the_inverse_of_an_invertible_adapter_shares_its_tensors(tmp_path, rxnmapper):
    model, where = rxnmapper, ["albert.embeddings.LayerNorm", "predictions.LayerNorm"]
    bay = mb.attach(model, at=where, modules={"a": mb.Invertible(), "b": mb.Invertible(std=0.02)}, name="language")
    ids = torch.randint(5, 200, (3, 7))
    plain = model(ids, language=[None] * 3).logits
    assert torch.equal(model(ids, language="a").logits, plain)
    randomise(bay.parameters())
    first, last = (modular.parts._modules["a"].tensors() for modular in bay.modulars.values())
    assert all(last[f"inverse/{name}"] is tensor for name, tensor in first.items())
    assert len(bay.parameters("a")) == 8
    mixed = model(ids, language=["b", None, "a"]).logits
    close(mixed[0], model(ids, language="b").logits[0])
    close(mixed[2], model(ids, language="a").logits[2])
    close(mixed[1], plain[1])
    h = torch.randn(3, 7, model.config.embedding_size)
    one, other = (modular.parts._modules["a"] for modular in bay.modulars.values())
    there = h + one.kind.change(one.tensors(), h, h, context())
    close(there + other.kind.change(other.tensors(), there, there, context()), h)
    bay.save(tmp_path / "saved")
    bay.detach()
    bay = mb.load(model, tmp_path / "saved")["language"]
    close(model(ids, language=["b", None, "a"]).logits, mixed)
    assert len(bay.parameters("a")) == 8


def test_an_invertible_adapter_says_where_it_does_not_fit():
    sites = [mb.Modular(nn.Linear(8, width)).site for width in (8, 8, 8, 6)]
    for wrong in (sites[:3], sites[2:], [mb.Modular(nn.Conv2d(4, 4, 3)).site]):
        with pytest.raises(mb.errors.CompositionError, match="Invertible at"):
            mb.Invertible().init(wrong)
    with pytest.raises(mb.errors.CompositionError, match="reduction=0"):
        mb.Invertible(0)


# Residual adapters, and batch normalisation by domain


def test_a_residual_adapter_in_series_reads_the_output():
    out, z, _, p, _ = parts(mb.ResidualAdapter(), "conv2d")
    assert p["alpha"].shape == (6, 6)
    close(out, z + F.conv2d(z, p["alpha"].view(6, 6, 1, 1)))
    out, z, _, p, _ = parts(mb.ResidualAdapter(), "conv1d")
    close(out, z + z @ p["alpha"].T)


@pytest.mark.parametrize(
    "conv, x",
    [
        (nn.Conv2d(4, 6, 3, padding=1), (3, 4, 5, 5)),
        (nn.Conv2d(4, 6, (3, 5), stride=(2, 3), padding=(1, 2)), (3, 4, 9, 8)),
        (nn.Conv2d(4, 6, 3, padding="same", dilation=2), (3, 4, 7, 7)),
        (nn.Conv1d(4, 6, 1, stride=2), (3, 4, 7)),
    ],
    ids=["plain", "strides", "dilated", "pointwise"],
)
def test_a_residual_adapter_in_parallel_reads_the_input(conv: nn.Module, x: tuple):
    out, z, x, p, _ = run(mb.ResidualAdapter("parallel"), conv, mb.Modular(conv).site, torch.randn(x))
    alpha = p["alpha"].view(*p["alpha"].shape, *[1] * (x.ndim - 2))
    close(out, z + (F.conv2d if x.ndim == 4 else F.conv1d)(x, alpha, stride=conv.stride))
    net = nn.Sequential(conv)  # folded, α is in the middle of the kernel
    bay = mb.attach(net, at="0", modules={"a": mb.ResidualAdapter("parallel")})
    with torch.no_grad():
        bay.parameters()[0].copy_(p["alpha"])
    bay.use("a").fold()
    close(net(x), out)


def test_a_residual_adapter_says_where_it_does_not_fit():
    for conv in (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 2, padding="same"), nn.Conv2d(4, 4, 3, padding=1, dilation=2)):
        with pytest.raises(mb.errors.CompositionError, match="Use 'series'"):
            mb.ResidualAdapter("parallel").init([mb.Modular(conv).site])
    with pytest.raises(mb.errors.CompositionError, match="LayerNorm"):
        mb.ResidualAdapter().init([mb.Modular(nn.LayerNorm(4)).site])
    with pytest.raises(mb.errors.CompositionError, match="placement='between'"):
        mb.ResidualAdapter("between")
    net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=2))
    bay = mb.attach(net, at="0", modules={"a": mb.ResidualAdapter("parallel")}).use("a")
    randomise(bay.parameters())
    with pytest.raises(mb.errors.CompositionError, match="2 groups"):
        bay.fold()


def test_batch_norm_keeps_statistics_of_its_own():
    """Each domain's are those of its own rows, as a BatchNorm2d for each would have them."""
    net, x, domain = nn.Sequential(nn.BatchNorm2d(4)), 2 + torch.randn(6, 4, 3, 3), ["a", "b", "a", None, "b", "a"]
    apart = {name: copy.deepcopy(net[0]) for name in "abc"}
    kind = mb.BatchNorm()
    bay = mb.attach(net, at="0", modules=dict.fromkeys("abc", kind), name="domain")
    for name, norm in apart.items():
        for own, theirs in zip(bay.parameters(name), norm.parameters(), strict=True):
            nn.init.normal_(own)
            theirs.data.copy_(own)
    rows = {name: [i for i, which in enumerate(domain) if which == name] for name in "ab"}
    for _ in range(3):
        out = net(x, domain=domain)
        for name, at in rows.items():
            close(out[at], apart[name](x[at]))
    net.eval()
    out = net(x, domain=domain)
    for name, norm in apart.items():
        own = bay.modulars["0"].parts._modules[name].tensors()
        close(own["mean"], norm.running_mean)
        close(own["variance"], norm.running_var)
        if name in rows:
            close(out[rows[name]], norm.eval()(x[rows[name]]))
    before = bay.modulars["0"].parts._modules["a"].tensors()["mean"].clone()
    bay.freeze("a")
    close(net.train()(x, domain="a"), apart["a"](x))  # frozen, it normalises by what it has
    assert torch.equal(bay.modulars["0"].parts._modules["a"].tensors()["mean"], before)
    bay.unfreeze("a")
    checkpoint(net, x, use_reentrant=False, domain="a").sum().backward()
    close(bay.modulars["0"].parts._modules["a"].tensors()["mean"], before.lerp(x.mean((0, 2, 3)), 0.1))  # once


def test_what_parts_the_rows_of_a_batch_norm_is_refused():
    for norm in (nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4, momentum=None), nn.LayerNorm(4)):
        with pytest.raises(mb.errors.CompositionError, match="BatchNorm at site"):
            mb.BatchNorm().init([mb.Modular(norm).site])
    kinds, x = dict.fromkeys("ab", mb.BatchNorm()), torch.randn(4, 4, 3, 3)
    with pytest.raises(mb.errors.CompositionError, match="ties the rows"):
        mb.Modular(nn.BatchNorm2d(4), kinds, mb.ByLabel("domain"), mb.ParameterAverage())
    hyper = mb.Modular(nn.BatchNorm2d(4), {"h": mb.Hyper(mb.BatchNorm(), "d", ("a",))}, mb.Uniform(), mb.WeightedSum())
    with pytest.raises(mb.errors.CompositionError, match="ties the examples"):
        hyper(x, d="a")
    layer = mb.Modular(nn.BatchNorm2d(4), kinds, mb.ByLabel("domain"), mb.WeightedSum())
    torch._dynamo.reset()
    with pytest.raises(Exception, match="take statistics of their own rows in training"):
        torch.compile(layer, backend="aot_eager", fullgraph=True)(x, domain=torch.tensor([0, 1, 1, 0]))


@pytest.fixture
def efficientnet():
    """A random EfficientNet for images of 32 × 32, its activations kept at their size by what its norms have seen."""
    transformers = pytest.importorskip("transformers")
    config = transformers.EfficientNetConfig(
        width_coefficient=0.25, depth_coefficient=0.2, image_size=32, hidden_dim=320, drop_connect_rate=0.0
    )
    model = transformers.EfficientNetModel(config)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.ones_(layer.weight)
    with torch.no_grad():
        model.train()(torch.randn(32, 3, 32, 32))
    return model.double()


@pytest.mark.parametrize("placement, at", [("series", nn.Conv2d), ("parallel", "*.project_conv")])
def test_residual_adapters_on_efficientnet(efficientnet, tmp_path, placement: str, at):
    images, model = torch.randn(6, 3, 32, 32, dtype=torch.float64), efficientnet.eval()
    plain = model(images).pooler_output
    module = methods.residual_adapter(placement, at)
    bay = mb.attach(model, modules={"birds": module, "flowers": module}, name="domain")
    domains = ["birds", None, "flowers", "flowers", "birds", "birds"]
    close(model(images, domain=domains).pooler_output, plain)
    bay.freeze("flowers")
    optimiser = torch.optim.SGD(bay.parameters("birds"), 0.1)
    for _ in range(3):
        optimiser.zero_grad()
        model.train()(images, domain="birds").pooler_output.square().mean().backward()
        optimiser.step()
    out = model.eval()(images, domain=domains).pooler_output
    close(out[[1, 2, 3]], plain[[1, 2, 3]])  # the base's statistics, and the other's, are as they were
    close(out[[0, 4, 5]], model(images[[0, 4, 5]], domain="birds").pooler_output)
    assert not torch.allclose(out[0], plain[0], atol=1e-3)
    bay.save(tmp_path)
    bay.detach()
    close(model(images).pooler_output, plain)
    mb.load(model, tmp_path)
    close(model(images, domain=domains).pooler_output, out)


# Gates


@pytest.mark.parametrize("place", ["conv2d", "block"])
def test_a_gate_squeezes_and_excites(place: str):
    out, y, _, p, _ = parts(mb.SqueezeExcite(2, factor=1.0), place)
    y = y.movedim(1, -1) if place == "conv2d" else y
    squeezed = y.flatten(1, -2).mean(1)
    down, up = p["down"].flatten(1), p["up"].flatten(1)
    gate = torch.sigmoid(F.relu(squeezed @ down.T + p["down_bias"]) @ up.T + p["up_bias"])
    want = y * gate.view(3, *[1] * (y.ndim - 2), -1)
    close(out, want.movedim(-1, 1) if place == "conv2d" else want)
    out, y, _, p, _ = parts(mb.SqueezeExcite(2, pool=False), "block")
    close(out, 2 * y * torch.sigmoid(F.relu(y @ p["down"].T + p["down_bias"]) @ p["up"].T + p["up_bias"]))


def test_a_gate_leaves_padding_out(minilm):
    minilm.double()
    bay = mb.attach(
        minilm, at="*.output.LayerNorm", modules={"a": mb.SqueezeExcite(), "b": mb.SqueezeExcite()}, name="task"
    )
    randomise(bay.parameters())
    ids, task = torch.randint(1000, 2000, (3, 9)), ["a", None, "b"]
    mask = torch.tensor([[1] * 9, [1] * 9, [1] * 6 + [0] * 3])
    out = minilm(ids, attention_mask=mask, task=task).last_hidden_state
    alone = minilm(ids[2:, :6], attention_mask=mask[2:, :6], task="b").last_hidden_state
    close(out[2:, :6], alone)
    with pytest.raises(mb.errors.CompositionError, match="factor=0"):
        mb.SqueezeExcite(factor=0)
