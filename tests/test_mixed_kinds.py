"""Kinds mixed in one network, after ideas of peft's own tests: pairs at one layer or at two, in either order, in one
bay or in two; several nested; ranks that differ; what is removed, added again, folded in part, kept and loaded."""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import modbay as mb

EXACT = {"rtol": 1e-9, "atol": 1e-9}
KINDS = {
    "lora": mb.LoRA(4, alpha=7),
    "rslora": mb.LoRA(3, alpha=2, stable=True),
    "loha": mb.LoHa(3),
    "lokr": mb.LoKr(2),
    "adalora": mb.AdaLoRA(4),
    "dense": mb.DenseDelta(),
    "bias": mb.BitFit(),
}
PAIRS = list(itertools.combinations(KINDS, 2)) + [(name, name) for name in KINDS]
X = torch.arange(40, dtype=torch.float64).view(4, 10) / 20


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 16))
    return layers.double().eval()


def trained(bay: mb.Bay, *names: str) -> mb.Bay:
    """Far from where modules start; each the same whenever it is made."""
    for i, name in enumerate(names or bay.names()):
        torch.manual_seed(100 + i)
        with torch.no_grad():
            for p in bay.parameters(name):
                p.add_(0.3 * torch.randn_like(p))
    return bay


def bits(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.state_dict().values()]


def same(model: nn.Module, before: list[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(bits(model), before, strict=True))


@pytest.mark.parametrize("first, second", PAIRS)
def test_pairs_at_the_last_layer_add_up_in_any_order(first, second):
    model = net()
    base, before = model(X), bits(model)
    bay = trained(mb.attach(model, at="2", modules={"a": KINDS[first], "b": KINDS[second]}))
    alone = {name: bay.use(name) and model(X) for name in "ab"}
    both = bay.use("a", "b") and model(X)
    assert_close(both - base, alone["a"] + alone["b"] - 2 * base, **EXACT)
    assert not torch.allclose(both, alone["a"]) and not torch.allclose(both, alone["b"])
    assert_close(bay.use("b", "a") and model(X), both, **EXACT)
    with bay.disable():
        assert torch.equal(model(X), base)
    for order in (("a", "b"), ("b", "a")):
        bay.fold(*order)
        assert_close(model(X), both, **EXACT)
        bay.unfold()
    bay.detach()
    assert same(model, before) and torch.equal(model(X), base)


@pytest.mark.parametrize("first, second", PAIRS)
@pytest.mark.parametrize("sites", [("0", "0"), ("0", "2"), ("2", "0")])
def test_pairs_in_two_bays_do_not_mind_which_is_attached_first(first, second, sites):
    """Before a ReLU nothing adds up; the order is without meaning all the same, as changes of parameters."""
    want, models = None, []
    for order in ((0, 1), (1, 0)):
        model = net()
        bays = {}
        for i in order:
            kind = KINDS[(first, second)[i]]
            bays[i] = mb.attach(model, at=sites[i], modules={"m": kind}, name=f"bay{i}").use("m")
            torch.manual_seed(i)
            with torch.no_grad():
                for p in bays[i].parameters():
                    p.copy_(0.3 * torch.randn_like(p))
        want = model(X) if want is None else want
        assert_close(model(X), want, **EXACT)
        for i in order:
            bays[i].fold()
        assert_close(model(X), want, **EXACT)
        for i in reversed(order):
            bays[i].detach(keep=True)
        assert not mb.bays(model)
        models.append(model)
    for p, q in zip(bits(models[0]), bits(models[1]), strict=True):
        assert_close(p, q, **EXACT)


def nested() -> tuple[nn.Module, mb.Bay]:
    model = net()
    modules = {
        "a": {"[02]": mb.LoRA(4)},
        "b": {"0": mb.LoHa(3)},
        "c": {"2": mb.AdaLoRA(4)},
        "d": {"[02]": mb.LoKr(2)},
    }
    return model, trained(mb.attach(model, modules=modules))


def test_four_nested_and_some_of_them():
    """Each set of modules is what a model with those alone computes, and what it folds to."""
    model, bay = nested()
    for n in range(1, 5):
        for chosen in itertools.combinations("abcd", n):
            twin, alone = nested()
            for name in set("abcd") - set(chosen):
                alone.remove(name)
            assert_close(bay.use(*chosen) and model(X), alone.use(*chosen) and twin(X), **EXACT)
            alone.fold().detach(keep=True)
            assert_close(twin(X), model(X), **EXACT)


def test_a_subset_is_folded_and_kept():
    model, bay = nested()
    bay.use("b", "d")
    want = model(X)
    bay.use("a", "b", "c", "d").fold("b", "d").detach(keep=True)
    assert_close(model(X), want, **EXACT)
    assert not mb.bays(model) and isinstance(model[0], nn.Linear)


def test_modules_are_removed_and_added_again():
    model, bay = nested()
    base = net()(X)
    outputs = {name: bay.use(name) and model(X) for name in "abcd"}
    both = bay.use("a", "b") and model(X)
    bay.remove("d")  # at rest: those at work stay
    assert torch.equal(model(X), both)
    bay.remove("b")
    assert bay.names() == ["a", "c"]
    with pytest.raises(mb.errors.BayError, match="'b'"):
        bay.use("a", "b")
    for name in "ac":
        assert torch.equal(bay.use(name) and model(X), outputs[name])
    bay.add("b", {"0": mb.LoHa(3)})
    assert_close(bay.use("a", "b") and model(X), outputs["a"], **EXACT)  # it begins as nothing
    for name in bay.names():
        bay.remove(name)
    assert torch.equal(bay.use(None) and model(X), base)
    bay.detach()
    assert torch.equal(model(X), base)


def test_one_is_trained_and_the_others_do_not_move():
    model, bay = nested()
    others = [p.detach().clone() for name in "acd" for p in bay.parameters(name)]
    before, own = bits(net()), [p.detach().clone() for p in bay.parameters("b")]
    bay.use("b")
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        model(X).square().mean().backward()
        optimiser.step()
    assert all(p.grad is None for name in "acd" for p in bay.parameters(name))
    now = [p for name in "acd" for p in bay.parameters(name)]
    assert all(torch.equal(p, q) for p, q in zip(now, others, strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(bay.parameters("b"), own, strict=True))
    bay.detach()
    assert same(model, before)


@pytest.mark.parametrize("ranks", [(16, 2, 7), (2, 7, 16), (1, 1, 8)])
def test_ranks_that_fall_and_rise(ranks):
    """Alone, together, a row each, and folded."""
    model = net()
    base = model(X)
    modules = {f"m{i}": {"0": mb.LoRA(r), "2": mb.LoRA(1 + r // 2, alpha=r)} for i, r in enumerate(ranks)}
    bay = trained(mb.attach(model, modules=modules, name="task"))
    alone = [bay.use(f"m{i}") and model(X) for i in range(3)]
    bay.use()
    mixed = model(X, task=["m2", None, "m0", "m1"])
    assert_close(mixed, torch.stack([alone[2][0], base[1], alone[0][2], alone[1][3]]), **EXACT)
    together = bay.use("m0", "m1", "m2") and model(X)
    bay.fold()
    assert_close(model(X), together, **EXACT)


LAYERS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), lambda: torch.randn(2, 4, 7).double()),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2), lambda: torch.randn(2, 4, 7, 7).double()),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: torch.randn(2, 4, 5, 5).double()),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), lambda: torch.randn(2, 4, 3, 3, 3).double()),
    "embedding": (lambda: nn.Embedding(12, 6), lambda: torch.arange(8).view(2, 4)),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    "first, second", [("loha", "lokr"), ("lora", "loha"), ("adalora", "dense"), ("lokr", "dense"), ("lora", "adalora")]
)
def test_pairs_at_other_layers(layer, first, second):
    if layer == "groups" and {first, second} & {"lora", "adalora"}:
        pytest.skip("B after A is no change of the weight of a convolution with groups")
    torch.manual_seed(0)
    make, data = LAYERS[layer]
    model, x = nn.Sequential(make()).double(), data()
    base, before = model(x), bits(model)
    bay = trained(mb.attach(model, at="0", modules={"a": KINDS[first], "b": KINDS[second]}))
    alone = [bay.use(name) and model(x) for name in "ab"]
    both = bay.use("b", "a") and model(x)
    assert_close(both, alone[0] + alone[1] - base, **EXACT)
    bay.fold("a", "b")
    assert_close(model(x), both, **EXACT)
    bay.unfold()
    bay.detach()
    assert same(model, before)


@pytest.mark.parametrize("of", ["output", "input"])
@pytest.mark.parametrize("layer", ["conv1d", "conv2d", "groups", "conv3d"])
def test_scales_of_a_convolution_fold(layer, of):
    torch.manual_seed(0)
    make, data = LAYERS[layer]
    model, x = nn.Sequential(make()).double(), data()
    bay = trained(mb.attach(model, at="0", modules={"a": mb.IA3(of)}).use("a"))
    want = model(x)
    bay.fold()
    assert_close(model(x), want, **EXACT)


def test_loha_changes_the_weight_of_a_convolution_with_groups():
    """f by W + (B₁ A₁) ⊙ (B₂ A₂), for one module and for a row each."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)).double(), torch.randn(2, 4, 5, 5).double()
    trained(mb.attach(model, at="0", modules={"a": mb.LoHa(3, alpha=2), "b": mb.LoHa(3, alpha=2)}, name="task"))
    rows = []
    for i, name in enumerate("ab"):
        own = {key.rpartition(".")[2]: p for key, p in model.named_parameters() if f".{name}." in key}
        one, two = (own[f"B{i}"] @ own[f"A{i}"].flatten(1) for i in (1, 2))
        change = (2 / 3 * one * two).view(6, 2, 3, 3)
        rows.append(nn.functional.conv2d(x[i : i + 1], model[0].weight + change, model[0].bias, groups=2))
    assert_close(model(x, task=["a", "b"]), torch.cat(rows), **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pairs_in_half_precision(dtype):
    """They run, fold and unfold, near what float64 gives."""
    model, bay = nested()
    bay.use("a", "b", "c", "d")
    want = model(X).detach()
    half = copy.deepcopy(model).to(dtype)
    near = {"rtol": 0.05, "atol": 0.1 * float(want.abs().mean())}
    other = mb.bays(half)["modules"]
    assert half(X.to(dtype)).dtype == dtype
    assert_close(half(X.to(dtype)).double(), want, **near)
    other.fold()
    assert_close(half(X.to(dtype)).double(), want, **near)
    other.unfold()
    assert_close(half(X.to(dtype)).double(), want, **near)


@pytest.mark.parametrize("order", ["abcd", "dcba", "cadb"])
def test_what_was_kept_is_loaded_in_any_order(order, tmp_path):
    model, bay = nested()
    bay.save(tmp_path)
    twin, other = nested()  # of the same base, other values
    for name in "abcd":
        other.reset(name)
    other.use(*order)
    for name in order:
        other.load(tmp_path, name)
    assert_close(twin(X), bay.use("a", "b", "c", "d") and model(X), **EXACT)


def test_disabling_nests_and_comes_back():
    model, bay = nested()
    base, on = net()(X), bay.use("a", "d") and model(X)
    with bay.disable():
        with bay.disable():
            assert torch.equal(model(X), base)
        assert torch.equal(model(X), base)
    assert torch.equal(model(X), on)
    bay.fold()
    with pytest.raises(mb.errors.BayError):
        bay.detach()
    bay.unfold()
    assert torch.equal(model(X), on)
