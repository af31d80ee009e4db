"""One module of several: Σ of deltas, exactly; what is cut has the error that is told; what can't be merged says so."""

import copy
import json

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import helpers
import modbay as mb
from modbay import merging
from modbay.errors import BayError, CompositionError, MergeError

FOLDS = [(case, site) for case, site in helpers.cases(where=lambda case: case.folds)]
WEIGHTS = {"a": 0.7, "b": -0.4}


def trained(bay: mb.Bay) -> mb.Bay:
    with torch.no_grad():
        for p in bay.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return bay


def placed(site: str, **modules) -> tuple[nn.Module, mb.Bay, Tensor]:
    """A network of one layer in evaluation mode, with modules as if trained, and x for it."""
    net = nn.Sequential(helpers.SITES[site].make()).eval()
    return net, trained(mb.attach(net, at="0", modules=modules)), helpers.SITES[site].example(4)


def parts(bay: mb.Bay, name: str) -> dict[str, Tensor]:
    return {
        f"{site}/{key}": tensor
        for site, modular in bay.modulars.items()
        if name in modular.parts._modules
        for key, tensor in modular.parts._modules[name].tensors().items()
    }


def kinds(bay: mb.Bay, name: str) -> list:
    return [m.parts._modules[name].kind for m in bay.modulars.values() if name in m.parts._modules]


@torch.no_grad()
def dense(bay: mb.Bay, name: str, site: str = "0") -> tuple[Tensor, Tensor | None]:
    """(ΔW, Δb) of one module at one site."""
    part, view = bay.modulars[site].parts._modules[name], bay.fitting.places[site].view()
    return part.kind.delta(part.tensors(), view).dense(view)


def same(net: nn.Module, bay: mb.Bay, x, weights=WEIGHTS, name: str = "m", **close) -> None:
    """The merged module gives what the others give together."""
    want = bay.use(weights) and net(x)
    plain = bay.use(None) and net(x)
    assert not torch.allclose(want, plain)
    assert_close(bay.use(name) and net(x), want, **(close or {"rtol": 1e-5, "atol": 1e-5}))


# Sums, exactly


@pytest.mark.parametrize(("case", "site"), FOLDS, ids=helpers.ids)
def test_a_sum_of_two_of_a_kind(case, site):
    net, bay, x = placed(site, a=case.make(), b=case.make())
    report = bay.merge("m", WEIGHTS)
    assert report.error == 0 and report.rows[0].of == "deltas"
    same(net, bay, x)


@pytest.mark.parametrize("site", ["linear", "conv1d", "conv2d", "embedding"])
@pytest.mark.parametrize("pair", [
    (mb.LoRA(2, alpha=3.0), mb.LoRA(3, alpha=2.0, stable=True, bias=True)),
    (mb.LoRA(2), mb.BitFit()),
    (mb.LoRA(2, bias=True), mb.DoRA(3)),
    (mb.LoHa(2), mb.LoKr(1, both=True)),
    (mb.IA3(), mb.LoRA(2)),
    (mb.SparseDelta(0.2, seed=1), mb.SparseDelta(0.3, seed=2)),
    (mb.SparseDelta(0.2), mb.DiffPruning(noise=False)),
    (mb.Norm(bias=True), mb.LoRA(2)),
    (mb.DenseDelta(bias=True), mb.LoRA(2, start="pissa")),
    (mb.Full(), mb.LoRA(2, bias=True)),
    (mb.Full(), mb.Full()),
], ids=lambda pair: " ".join(type(kind).__name__ for kind in pair))  # fmt: skip
def test_a_sum_of_two_kinds(pair, site):
    net, bay, x = placed(site, a=pair[0], b=pair[1])
    assert bay.merge("m", WEIGHTS).error == 0
    same(net, bay, x)


@pytest.mark.parametrize("site", ["norm", "block"])
def test_what_scales_and_moves_an_output_adds_up_where_there_is_no_weight(site):
    kinds_ = {"a": mb.IA3(), "b": mb.BitFit(), "c": mb.Norm(bias=True)}
    net, bay, x = placed(site, **kinds_)
    bay.merge("m", weights := {"a": 0.7, "b": -0.4, "c": 1.2})
    assert kinds(bay, "m") == [mb.Norm(bias=True)]
    same(net, bay, x, weights)


def small(lora, *modules) -> None:
    """What is low-rank stays so."""
    _, bay, _ = placed("linear", **dict(zip("abc", modules, strict=False)))
    bay.merge("m", dict.fromkeys("abc"[: len(modules)], 0.5))
    assert kinds(bay, "m") == [lora]


def test_the_smallest_kind_that_holds_it():
    small(mb.LoRA(5), mb.LoRA(2), mb.LoRA(3, alpha=4, stable=True))
    small(mb.LoRA(5, bias=True), mb.LoRA(2, bias=True), mb.LoRA(3))
    small(mb.LoRA(6), mb.LoRA(2, start="pissa"), mb.LoRA(2))
    small(mb.LoRA(8), mb.VeRA(4), mb.LoHa(2))
    small(mb.LoRA(5), mb.AdaLoRA(3), mb.LoRA(2))
    small(mb.BitFit(), mb.BitFit(), mb.BitFit())
    small(mb.IA3("input"), mb.IA3("input"), mb.Gates(2, "input"))
    small(mb.ResidualAdapter(), mb.ResidualAdapter(), mb.ResidualAdapter())
    small(mb.DenseDelta(), mb.LoKr(1), mb.LoRA(2))


def test_sites_that_one_alone_has_and_ranks_by_pattern():
    net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    modules = {"a": {"0": mb.LoRA(2), "2": mb.LoRA(4, alpha=8)}, "b": {"2": mb.LoRA(1), "4": mb.DoRA(2)}}
    bay = trained(mb.attach(net, modules=modules))
    report = bay.merge("m", {"a": 0.7, "b": 1.0})
    same(net, bay, torch.randn(4, 8), {"a": 0.7, "b": 1.0})
    assert [row.modules for row in report.rows] == [("a",), ("a", "b"), ("b",)]
    assert kinds(bay, "m") == [mb.LoRA(2), mb.LoRA(5), mb.DoRA(2)]  # b alone, at weight one: as it is
    assert [row.of for row in report.rows] == ["deltas", "deltas", "module"]


def test_a_convolution_of_groups_keeps_them():
    net, x = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), torch.randn(2, 4, 5, 5)
    bay = trained(mb.attach(net, at="0", modules={"a": mb.LoRA(2), "b": mb.LoRA(4)}))
    bay.merge("m", WEIGHTS)
    same(net, bay, x)
    with pytest.raises(CompositionError, match=r"site '0': a convolution with 2 groups has no singular values"):
        bay.merge("n", WEIGHTS, rank=2)
    assert bay.names() == ["a", "b", "m"]


class Experts(nn.Module):
    """Three experts as one parameter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eoi,bi->bo", self.weight, x)


@pytest.mark.parametrize("rank", [None, 2])
def test_fused_experts(rank):
    net, x = nn.ModuleDict({"experts": Experts()}), torch.randn(4, 8)
    bay = trained(mb.attach(net, at="experts.weight", modules={"a": mb.LoRA(2), "b": mb.LoRA(1)}))
    site, want = next(iter(bay.modulars)), 0.0
    report = bay.merge("m", WEIGHTS, rank=rank)
    for name, w in WEIGHTS.items():
        want = want + w * dense(bay, name, site)[0]
    got = dense(bay, "m", site)[0]
    assert_close(report.error, float((got - want).norm() / want.norm()), atol=1e-6, rtol=0)
    if rank is None:
        assert_close(bay.use("m") and net["experts"](x), bay.use(WEIGHTS) and net["experts"](x))
    bay.merge("t", ["a", "b"], method="ties", density=0.5)
    assert kinds(bay, "t") == [mb.DenseDelta()]
    bay.use("t") and net["experts"](x)


def test_slices_of_one_output():
    net, x = nn.Sequential(helpers.SITES["conv1d"].make()), helpers.SITES["conv1d"].example(4)
    at = [mb.part("0", 0, 2), mb.part("0", 4, 6)]
    bay = trained(mb.attach(net, at=at, modules={"a": mb.LoRA(2), "b": mb.IA3()}))
    bay.merge("m", WEIGHTS)
    same(net, bay, x)


@pytest.mark.parametrize("kind", [mb.LoRA(2), mb.DoRA(2)], ids=["lora", "dora"])
def test_on_a_base_in_bfloat16(kind):
    net = nn.Sequential(nn.Linear(8, 6)).to(torch.bfloat16)
    bay = trained(mb.attach(net, at="0", modules={"a": kind, "b": kind}))
    bay.merge("m", WEIGHTS)
    assert {t.dtype for t in parts(bay, "m").values()} == {torch.bfloat16}
    same(net, bay, torch.randn(4, 8, dtype=torch.bfloat16), rtol=0.1, atol=0.1)


def test_a_transformer_s_logits():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=20, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).double().eval()
    modules = {
        "en": {"*.c_attn": mb.LoRA(2, alpha=4, stable=True, bias=True), "*.wte": mb.LoRA(2)},
        "de": {"*.c_attn": mb.DoRA(3), "*.mlp.c_fc": mb.LoKr(1), "*.ln_1": mb.BitFit()},
        "sw": {"*.c_attn": mb.IA3(), "*.ln_1": mb.Norm()},
    }
    bay, ids = trained(mb.attach(model, modules=modules)), torch.randint(20, (2, 7))
    weights = {"en": 0.7, "de": 0.3, "sw": -0.2}
    report = bay.merge("all", weights)
    want = bay.use(weights) and model(ids).logits
    assert_close(bay.use("all") and model(ids).logits, want, atol=1e-7, rtol=1e-6)
    assert report.error == 0 and len(report.rows) == len({r.site for r in report.rows}) == 1 + 3 * 2


# Law 7, and weights


METHODS = {
    "linear": {},
    "linear, parameters": {"of": "parameters"},
    "task_arithmetic": {"method": "task_arithmetic"},
    "ties": {"method": "ties", "density": 1.0},
    "ties, parameters": {"method": "ties", "density": 1.0, "of": "parameters"},
    "dare": {"method": "dare", "density": 1.0},
    "slerp": {"method": "slerp", "t": 1},
}


@pytest.mark.parametrize("given", METHODS.values(), ids=METHODS.keys())
@pytest.mark.parametrize("case", helpers.KINDS, ids=helpers.ids)
def test_weight_1_on_one_module_is_that_module_bit_for_bit(case, given):
    _, bay, _ = placed(case.sites[0], a=case.make(), b=case.make())
    for name, which in {"m": {"a": 0, "b": 1}, "n": {"b": 1}}.items():
        if given.get("method") == "slerp" and name == "n":
            continue
        report = bay.merge(name, ["a", "b"] if given.get("method") == "slerp" else which, **given)
        assert kinds(bay, name) == kinds(bay, "b") and report.rows[0].of == "module" and report.error == 0
        ours, theirs = parts(bay, name), parts(bay, "b")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        remade = kinds(bay, "b")[0].remade
        learned = [key for key in ours if key.partition("/")[2] not in remade]
        assert not {ours[k].data_ptr() for k in learned} & {theirs[k].data_ptr() for k in learned}
        assert all(ours[k].requires_grad == theirs[k].requires_grad for k in ours)


def test_what_sites_share_stays_shared():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    kind = mb.Compacter(2, size=4, std=0.3)
    bay = trained(mb.attach(net, at=nn.Linear, modules={"a": kind, "b": kind}))
    count = len(bay.parameters("a"))
    bay.merge("one", {"a": 1})
    bay.merge("m", ["a", "b"])
    assert len(bay.parameters("one")) == len(bay.parameters("m")) == count
    for p, a, b in zip(bay.parameters("m"), bay.parameters("a"), bay.parameters("b"), strict=True):
        assert_close(p, (a + b) / 2)


def test_names_weigh_as_much_as_each_other():
    net, bay, x = placed("linear", a=mb.LoRA(2), b=mb.LoRA(3))
    assert bay.merge("mean", ["a", "b"]).weights == {"a": 0.5, "b": 0.5}
    bay.merge("sum", ["a", "b"], method="task_arithmetic")
    bay.merge("scaled", ["a", "b"], method="task_arithmetic", scale=0.3)
    bay.merge("share", {"a": 2, "b": 6}, normalise=True)
    same(net, bay, x, {"a": 0.5, "b": 0.5}, "mean")
    same(net, bay, x, {"a": 1, "b": 1}, "sum")
    same(net, bay, x, {"a": 0.3, "b": 0.3}, "scaled")
    same(net, bay, x, {"a": 0.25, "b": 0.75}, "share")


# Lower ranks


@pytest.mark.parametrize("site", ["linear", "conv1d", "conv2d", "embedding"])
@pytest.mark.parametrize("pair", [(mb.LoRA(2), mb.LoRA(3, start="olora")), (mb.LoRA(3, bias=True), mb.DoRA(2))],
                         ids=["low", "dense"])  # fmt: skip
def test_what_is_cut_is_the_nearest_and_its_error_is_told(pair, site):
    """Eckart and Young: the error is that of the dense matrix's singular value decomposition."""
    _, bay, _ = placed(site, a=pair[0], b=pair[1])
    report = bay.merge("m", WEIGHTS, rank=3)
    total, moved = 0.0, []
    for name, w in WEIGHTS.items():
        weight, bias = dense(bay, name)
        total, moved = total + w * weight, moved + ([] if bias is None else [w * bias])
    flat = total.mT if site in ("conv1d", "embedding") else total.flatten(1)
    values = torch.linalg.svdvals(flat.double())
    want = float(values[3:].norm() / values.norm())
    got, bias = dense(bay, "m")
    assert want > 0.01
    assert_close(report.error, want, atol=1e-6, rtol=1e-4)
    assert_close(float((got - total).norm() / total.norm()), want, atol=1e-6, rtol=1e-4)
    assert kinds(bay, "m") == [mb.LoRA(3, bias=bool(moved))]
    if moved:
        assert_close(bias, sum(moved))


def test_a_rank_that_is_enough_changes_nothing():
    net, bay, x = placed("linear", a=mb.LoRA(2), b=mb.LoRA(1))
    assert bay.merge("m", WEIGHTS, rank=3).error == 0
    same(net, bay, x)
    assert bay.merge("n", WEIGHTS, rank=64).error == 0 and kinds(bay, "n") == [mb.LoRA(3)]


# Other methods, on what modules change of W


@pytest.mark.parametrize("site", ["linear", "conv1d", "conv2d", "embedding"])
@pytest.mark.parametrize("method", ["ties", "dare", "slerp"])
def test_non_linear_methods_act_on_the_change_of_the_weight(method, site):
    _, bay, _ = placed(site, a=mb.LoRA(2, bias=True), b=mb.DoRA(2))
    (wa, ba), (wb, bb) = dense(bay, "a"), dense(bay, "b")
    bb = torch.zeros_like(ba) if bb is None else bb
    if method == "ties":
        report = bay.merge("m", ["a", "b"], method="ties", density=0.5)
        want = [merging.ties_tensor(pair, None, density=0.5) for pair in ((wa, wb), (ba, bb))]
    elif method == "slerp":  # all that a site changes is one vector
        report = bay.merge("m", ["a", "b"], method="slerp", t=0.3)
        one, two = (torch.cat([w.flatten(), b]) for w, b in ((wa, ba), (wb, bb)))
        flat = merging.slerp_tensor([one, two], 0.3)
        want = [flat[: wa.numel()].view_as(wa), flat[wa.numel() :]]
    else:
        report = bay.merge("m", ["a", "b"], method="dare", density=0.5, seed=3)
        got = dense(bay, "m")[0]
        bay.merge("again", ["a", "b"], method="dare", density=0.5, seed=3)
        bay.merge("other", ["a", "b"], method="dare", density=0.5, seed=4)
        assert torch.equal(dense(bay, "again")[0], got) and not torch.equal(dense(bay, "other")[0], got)
        choices = torch.stack([0 * wa, 2 * wa, 2 * wb, 2 * (wa + wb)])
        assert (choices - got).abs().amin(0).max() < 1e-5
        return
    assert report.error == 0 and kinds(bay, "m") == [mb.DenseDelta(bias=True)]
    assert_close(dense(bay, "m"), tuple(want), atol=1e-6, rtol=1e-5)


def test_slerp_of_low_rank_updates_is_low_rank():
    _, bay, _ = placed("linear", a=mb.LoRA(2), b=mb.LoRA(3))
    bay.merge("m", ["a", "b"], method="slerp", t=0.3)
    assert kinds(bay, "m") == [mb.LoRA(5)]
    want = merging.slerp_tensor([dense(bay, "a")[0], dense(bay, "b")[0]], 0.3)
    assert_close(dense(bay, "m")[0], want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("site", ["linear", "block"])
def test_ties_of_copies_is_of_what_they_changed(site):
    net, bay, _ = placed(site, a=mb.Full(), b=mb.Full())
    bay.merge("m", ["a", "b"], method="ties", density=0.4)
    for key, tensor in parts(bay, "m").items():
        base = net[0].get_parameter(key.partition("/")[2].replace("/", "."))
        assert_close(tensor, merging.ties_tensor([parts(bay, n)[key] for n in "ab"], base, density=0.4))


@pytest.mark.parametrize("method", ["ties", "dare"])
@pytest.mark.parametrize("kind", [mb.BitFit(), mb.SparseDelta(0.3), mb.IA3()], ids=["bitfit", "sparse", "ia3"])
def test_methods_on_vectors_and_entries_keep_their_form(kind, method):
    _, bay, _ = placed("linear" if kind != mb.IA3() else "block", a=kind, b=kind)
    report = bay.merge("m", ["a", "b"], method=method, density=0.5)
    want = {"BitFit": mb.BitFit(), "SparseDelta": mb.SparseDelta(None), "IA3": mb.Norm(bias=False)}
    assert kinds(bay, "m") == [want[type(kind).__name__]] and report.error == 0
    if method == "ties" and kind == mb.SparseDelta(0.3):
        assert_close(dense(bay, "m")[0], merging.ties_tensor([dense(bay, n)[0] for n in "ab"], None, density=0.5))


# Parameters


def test_averaged_factors_are_not_the_averaged_product():
    net, bay, x = placed("linear", a=mb.LoRA(2, alpha=3), b=mb.LoRA(2, alpha=3))
    report = bay.merge("m", WEIGHTS, of="parameters")
    for key in ("0/A", "0/B"):
        assert_close(parts(bay, "m")[key], 0.7 * parts(bay, "a")[key] - 0.4 * parts(bay, "b")[key])
    assert report.rows[0].of == "parameters"
    bay.merge("deltas", WEIGHTS)
    assert not torch.allclose(bay.use("m") and net(x), bay.use("deltas") and net(x), atol=1e-3)


@pytest.mark.parametrize("kind", [mb.Bottleneck(3), mb.Head(("no", "yes")), mb.FeedForward(5)], ids=str)
def test_what_has_no_delta_is_averaged(kind):
    """AdapterSoup: bottlenecks, say, have nothing but their parameters."""
    net, bay, x = placed("linear", a=kind, b=kind)
    report = bay.merge("m", ["a", "b"])
    assert report.rows[0].of == "parameters" and kinds(bay, "m") == [kind]
    for key, tensor in parts(bay, "m").items():
        assert_close(tensor, (parts(bay, "a")[key] + parts(bay, "b")[key]) / 2)
    bay.use("m") and net(x)


def test_the_average_is_that_of_the_aggregator():
    net = nn.Sequential(nn.Linear(8, 6))
    kind = mb.Bottleneck(3)
    bay = trained(mb.attach(net, at="0", modules={"a": kind, "b": kind}, aggregator=mb.ParameterAverage()))
    bay.merge("m", WEIGHTS)
    same(net, bay, torch.randn(4, 8))


def test_prompts_and_prefixes():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=20, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).eval()
    bay = trained(mb.attach(model, modules={"a": mb.Prefix(3), "b": mb.Prefix(3), "long": mb.Prefix(4)}))
    bay.merge("m", ["a", "b"])
    for key, tensor in parts(bay, "m").items():
        assert_close(tensor, (parts(bay, "a")[key] + parts(bay, "b")[key]) / 2)
    with pytest.raises(
        CompositionError, match=r"'a': Prefix\(.*'long': Prefix\(.*can't be merged one by one.*bay\.use"
    ):
        bay.merge("n", ["a", "long"])
    assert bay.names() == ["a", "b", "long", "m"]


# Reference numerics: peft's add_weighted_adapter

BOTH = {"en": 0.7, "de": -0.4}


class Net(nn.Module):
    """One layer, named `layer`."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def both(site: str, ranks=(2, 3), alphas=(6, 5), **given):
    """(peft's model with adapters en and de, ours with the same, their common layer)."""
    peft = pytest.importorskip("peft")
    net = Net(helpers.SITES[site].make()).eval()
    given |= {"fan_in_fan_out": site == "conv1d"}
    configs = [peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=["layer"], **given)
               for r, alpha in zip(ranks, alphas, strict=True)]  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(net), configs[0], adapter_name="en").eval()
    theirs.add_adapter("de", configs[1])
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    layer = theirs.get_base_model().layer
    ours = lambda r, alpha: (
        mb.DoRA(r, alpha=alpha)
        if given.get("use_dora")
        else mb.LoRA(r, alpha, given.get("use_rslora", False), given.get("lora_bias", False))
    )
    kinds_ = [ours(r, alpha) for r, alpha in zip(ranks, alphas, strict=True)]
    bay = mb.attach(net, at="layer", modules=dict(zip(BOTH, kinds_, strict=True)))
    for name in BOTH:
        if site == "embedding":
            a, b = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
        else:
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight.flatten(1)
        own = bay.modulars["layer"].parts._modules[name].tensors()
        with torch.no_grad():
            own["A"].copy_(a), own["B"].copy_(b)
            if "bias" in own:
                own["bias"].copy_(layer.lora_B[name].bias)
            if "magnitude" in own:  # a change of it here
                own["magnitude"].copy_(
                    layer.lora_magnitude_vector[name].weight.flatten() - net.layer.weight.norm(dim=1)
                )
    return theirs, net, bay


def as_theirs(theirs, net, x, **given) -> None:
    """peft's merged adapter and our module "m" give the same outputs."""
    theirs.add_weighted_adapter([*BOTH], list(BOTH.values()), "m", **given)
    theirs.set_adapter("m")
    assert_close(net(x), theirs(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("site", ["linear", "conv1d", "conv2d", "embedding"])
def test_peft_s_cat_and_svd(site):
    theirs, net, bay = both(site)
    x = helpers.SITES[site].example(4)
    assert bay.merge("m", BOTH).error == 0
    bay.use("m")
    as_theirs(theirs, net, x, combination_type="cat")
    theirs.set_adapter("en")
    theirs.delete_adapter("m")
    bay.remove("m").merge("m", BOTH, rank=2)
    bay.use("m")
    as_theirs(theirs, net, x, combination_type="svd", svd_rank=2)


@pytest.mark.parametrize("elect", ["mass", "count"])
@pytest.mark.parametrize("site", ["linear", "conv1d", "embedding"])
def test_peft_s_ties_svd(site, elect):
    theirs, net, bay = both(site)
    votes = {"elect": elect, "weighted": False, "mean": "count"}
    bay.merge("m", BOTH, method="ties", density=0.5, rank=3, **votes)
    bay.use("m")
    said = {"mass": "total", "count": "frequency"}[elect]
    given = {"combination_type": "ties_svd", "svd_rank": 3, "density": 0.5, "majority_sign_method": said}
    as_theirs(theirs, net, helpers.SITES[site].example(4), **given)


def test_peft_s_dare_svd_keeps_all_as_a_sum():
    """At density 1 nothing is drawn; what is drawn differs, as generators do."""
    theirs, net, bay = both("linear")
    bay.merge("m", BOTH, method="dare", density=1.0, rank=3)
    bay.use("m")
    with pytest.warns(UserWarning, match="no pruning"):
        as_theirs(theirs, net, torch.randn(4, 8), combination_type="dare_linear_svd", svd_rank=3, density=1.0)


def test_peft_s_linear_is_of_factors_by_roots_of_weights():
    """Σ √(w_i s_i) A_i and Σ √(w_i s_i) B_i, as of="parameters" with √w_i where s_i are equal; not Σ w_i Δ_i."""
    theirs, net, bay = both("linear", (2, 2), (6, 6))
    x = torch.randn(4, 8)
    theirs.add_weighted_adapter([*BOTH], [0.7, 0.3], "m", combination_type="linear")
    theirs.set_adapter("m")
    bay.merge("m", {"en": 0.7**0.5, "de": 0.3**0.5}, of="parameters")
    assert_close(bay.use("m") and net(x), theirs(x), atol=1e-5, rtol=1e-5)
    bay.merge("exact", {"en": 0.7, "de": 0.3})
    assert not torch.allclose(bay.use("exact") and net(x), theirs(x), atol=0.01)


@pytest.mark.parametrize("given", [{"use_rslora": True}, {"lora_bias": True}, {"use_dora": True}], ids=str)
def test_what_peft_s_merges_leave_out_is_in_ours(given):
    """Each adapter alone, as peft runs it, is the reference: f + Σ w_i (f_i − f)."""
    theirs, net, bay = both("linear", **given)
    x = torch.randn(4, 8)
    with theirs.disable_adapter():
        plain = theirs(x)
    want = plain
    for name, w in BOTH.items():
        theirs.set_adapter(name)
        want = want + w * (theirs(x) - plain)
    assert bay.merge("m", BOTH).error == 0
    assert_close(bay.use("m") and net(x), want, atol=1e-5, rtol=1e-5)


# Life afterwards


@pytest.mark.parametrize("given", [{}, {"rank": 2}, {"method": "ties", "density": 0.5}], ids=str)
def test_a_merged_module_is_saved_loaded_folded_and_copied(given, tmp_path):
    net, bay, x = placed("linear", a=mb.LoRA(2, bias=True), b=mb.DoRA(2))
    bay.merge("m", ["a", "b"], **given)
    want = bay.use("m") and net(x)
    bay.save(tmp_path, "m")
    other = nn.Sequential(nn.Linear(8, 6)).eval()
    other.load_state_dict(net.state_dict())
    back = mb.attach(other, at="0", modules={"z": mb.LoRA(1)})
    back.load(tmp_path, "m", add=True)
    assert torch.equal(back.use("m") and other(x), want)
    assert torch.equal(copy.deepcopy(net)(x), want)
    bay.fold("m")
    assert_close(net(x), want)
    bay.unfold()
    bay.remove("m")
    assert bay.names() == ["a", "b"]


def test_a_merged_module_learns_and_goes_beside_others_in_a_batch():
    net, bay, x = placed("linear", a=mb.LoRA(2), b=mb.LoRA(2))
    bay.merge("m", ["a", "b"])
    mixed = net(x, modules=["m", "a", None, "m"])
    assert_close(mixed[0], (bay.use("m") and net(x))[0])
    mixed.sum().backward()
    assert all(p.grad is not None for p in bay.parameters("m"))
    bay.use()


def test_packed_modules_merge():
    net, bay, x = placed("linear", a=mb.LoRA(2), b=mb.LoRA(2))
    bay.pack()
    bay.merge("m", WEIGHTS)
    bay.merge("one", {"b": 1})
    same(net, bay, x)
    same(net, bay, x, {"b": 1}, "one")


def test_a_learned_router_gets_a_column():
    net = nn.Sequential(nn.Linear(8, 6))
    bay = trained(mb.attach(net, at="0", modules={"a": mb.LoRA(2), "b": mb.LoRA(2)}, router=mb.Gate()))
    bay.merge("m", ["a", "b"])
    assert bay.state.router.names == ("a", "b", "m")
    net(torch.randn(4, 8))


# The report


def test_the_report_is_a_table_and_a_dict():
    _, bay, _ = placed("linear", a=mb.LoRA(2), b=mb.LoRA(3))
    report = bay.merge("m", WEIGHTS, rank=3)
    said = str(report)
    assert said.startswith("'m' = linear(a: 0.7, b: -0.4)\nsite  modules  of ")
    assert "cut from rank 5 to 3" in said and "LoRA(rank=3)" in said and "largest relative error:" in said
    as_dict = json.loads(json.dumps(report.as_dict()))
    assert as_dict["error"] == report.error == as_dict["sites"][0]["error"] and as_dict["weights"] == WEIGHTS
    assert "exact at every site" in str(bay.merge("n", WEIGHTS))


# What can't be done is told, and nothing is left half done


@pytest.mark.parametrize(("asked", "given", "error", "said"), [
    (["a", "f"], {}, CompositionError, r"site '0': 'a': LoRA\(.*'f': Bottleneck\(.*can't be merged one by one.*mb\.W"),
    (["a", "f"], {"of": "deltas"}, CompositionError, r"site '0': .*not all of them have a delta"),
    (["a", "c"], {"of": "parameters"}, CompositionError, r"'c': LoRA\(rank=3"),
    (["a", "i"], {}, CompositionError, r"site '0': .* act in part on the input and in part on the output"),
    (["s", "t"], {"of": "parameters"}, CompositionError, r"'indices' is not learned and differs between 's', 't'"),
    (["h", "g"], {}, CompositionError, r"Hyper\(.*can't be merged one by one"),
    (["a", "w"], {}, BayError, r"has no 'w'; there are 'a'"),
    (["a", "a"], {}, MergeError, r"named twice"),
    ([], {}, MergeError, r"several modules are wanted"),
    ("ab", {}, MergeError, r"several modules are wanted"),
    ({"a": 0.0, "c": 0.0}, {}, MergeError, r"not all 0"),
    ({"a": float("nan")}, {}, MergeError, r"finite numbers"),
    ({"a": 1, "c": -1}, {"normalise": True}, MergeError, r"their sum is 0"),
    (["a", "c"], {"method": "fisher"}, MergeError, r"no such method of modules; there are 'linear', 'task_arithmetic'"),
    (["a", "c"], {"density": 0.2}, MergeError, r"no arguments 'density'; it has 'normalise'"),
    (["a", "c"], {"method": "ties", "density": 2.0}, MergeError, r"ties\(density=2\.0\)"),
    ({"a": 0.5, "c": 0.5}, {"method": "slerp"}, MergeError, r"two names in a list, and t="),
    (["a", "c"], {"of": "weights"}, MergeError, r"of='weights'"),
    (["a", "c"], {"rank": 0}, MergeError, r"rank=0"),
    ({"a": 1e300, "c": 1.0}, {}, MergeError, r"'B' would not be finite in float32"),
])  # fmt: skip
def test_what_is_refused(asked, given, error, said):
    hyper = lambda: mb.Hyper(mb.LoRA(2), "language", ("en", "de"), size=4)
    modules = {
        "a": mb.LoRA(2),
        "c": mb.LoRA(3),
        "f": mb.Bottleneck(3),
        "i": mb.IA3("input"),
        "h": hyper(),
        "g": hyper(),
    }
    _, bay, _ = placed("linear", **modules, s=mb.SparseDelta(0.2, seed=1), t=mb.SparseDelta(0.2, seed=1))
    with torch.no_grad():  # as if another mask of as many entries had been loaded
        bay.modulars["0"].parts._modules["t"].indices.add_(1).remainder_(48)
    before = {name: parts(bay, name) for name in bay.names()}
    with pytest.raises(error, match=said):
        bay.merge("m", asked, **given)
    assert list(before) == bay.names() and len(bay.modulars["0"].order) == len(before)
    assert all(parts(bay, name).keys() == own.keys() for name, own in before.items())


def test_names_that_are_taken_and_bases_that_are_folded():
    _, bay, _ = placed("linear", a=mb.LoRA(2), b=mb.LoRA(2))
    with pytest.raises(BayError, match=r"has a module of that name"):
        bay.merge("a", ["a", "b"])
    with pytest.raises(BayError, match=r"without '\.' and '/'"):
        bay.merge("a.b", ["a", "b"])
    bay.fold("a")
    with pytest.raises(BayError, match=r"is folded into the base's weights: unfold it first"):
        bay.merge("m", ["a", "b"])


def test_parameters_need_every_module_at_every_site():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    bay = mb.attach(net, modules={"a": {"0": mb.Bottleneck(2)}, "b": {"[01]": mb.Bottleneck(2)}})
    with pytest.raises(CompositionError, match=r"site '1': 'a' has no part here"):
        bay.merge("m", ["a", "b"])
    assert bay.names() == ["a", "b"]


class Odd(nn.Linear):
    """A Linear that is not affine."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).abs()


def test_a_layer_that_is_not_affine_takes_what_reads_x_alone():
    net, x = nn.Sequential(Odd(8, 6)), torch.randn(4, 8)
    bay = trained(mb.attach(net, at="0", modules={"a": mb.LoRA(2), "b": mb.LoKr(1), "c": mb.IA3(), "d": mb.IA3()}))
    bay.merge("m", WEIGHTS)
    same(net, bay, x)
    bay.merge("scales", {"c": 0.5, "d": 0.7})
    same(net, bay, x, {"c": 0.5, "d": 0.7}, "scales")
    with pytest.raises(CompositionError, match=r"merge at site '0' \(Odd\): only exactly Linear"):
        bay.merge("n", ["a", "c"])


class Int8(nn.Module):
    """A Linear whose weight is quantised."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 8, 6
        self.weight = nn.Parameter(torch.randint(-127, 127, (6, 8), dtype=torch.int8), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight / 127, self.bias)


def test_low_rank_modules_of_a_quantised_base():
    net, x = nn.Sequential(Int8()), torch.randn(4, 8)
    bay = trained(mb.attach(net, at="0", modules={"a": mb.LoRA(2, bias=True), "b": mb.LoHa(2), "c": mb.LoKr(1)}))
    bay.merge("m", WEIGHTS)
    same(net, bay, x)
    with pytest.raises(CompositionError, match=r"merge at site '0': its weight is quantised \(torch\.int8\)"):
        bay.merge("n", ["a", "c"])


# The command


def test_modules_on_disk_are_merged_by_the_command(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=20, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "base")
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval()
    bay = trained(mb.attach(model, at="*.c_attn", modules={"en": mb.LoRA(2), "de": mb.DoRA(2)}, name="language"))
    bay.save(tmp_path / "saved")
    models, ids = [str(tmp_path / "saved" / "language" / name) for name in ("en", "de")], torch.randint(20, (2, 7))
    call = lambda *more, code=0: invoked("merge", *models, "--base", str(tmp_path / "base"), *more, code=code)
    out = tmp_path / "saved" / "language" / "both"
    said = call("-w", "0.7,0.3", "--out", str(out), "--dry-run")
    assert "exact at every site" in said and not out.exists()
    said = json.loads(call("-w", "0.7,0.3", "--out", str(out), "--json"))
    assert said["folder"] == str(out) and said["error"] == 0 and said["weights"] == {"en": 0.7, "de": 0.3}
    assert json.loads((out.parent / "bay.json").read_text())["modules"] == ["en", "de", "both"]
    want = bay.use({"en": 0.7, "de": 0.3}) and model(ids).logits
    fresh = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval()
    back = mb.load(fresh, tmp_path / "saved")["language"]
    assert_close(back.use("both") and fresh(ids).logits, want, atol=1e-5, rtol=1e-5)
    assert "--overwrite replaces it" in call("--out", str(out), code=1)
    call("-m", "ties", "--density", "0.3", "--set", "rank=2", "--out", str(out), "--overwrite")
    fresh = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval()
    assert kinds(mb.load(fresh, tmp_path / "saved")["language"], "both")[0] == mb.LoRA(2, bias=True)
    assert "--shard: of checkpoints" in call("--shard", "5GB", "--out", str(out), code=1)
    assert "--base is wanted" in invoked("merge", *models, code=1)


def invoked(*arguments: str, code: int = 0) -> str:
    testing = pytest.importorskip("typer.testing")
    from modbay.cli import app

    said = testing.CliRunner().invoke(app, list(arguments))
    assert said.exit_code == code, said.output
    return said.stderr if code else said.stdout


def test_a_run_s_modules_are_merged_beside_them(tiny_base, tiny_csv, tmp_path):
    training = pytest.importorskip("modbay.training")
    given = {"base": str(tiny_base), "data": str(tiny_csv), "by": "language", "method": "private"}
    run = training.train(training.config({**given, "steps": 2, "batch": 8, "probe": 20}), tmp_path / "run")
    network = run.network()
    bay = next(bay for bay in mb.bays(network.model).values() if len(bay.names()) > 1 and bay.state.name != "heads")
    folder, names = tmp_path / "run" / "modules" / bay.state.name, bay.names()[:2]
    invoked("merge", *[str(folder / name) for name in names])
    again = mb.bays(run.network().model)[bay.state.name]
    assert again.names() == [*bay.names(), "+".join(names)]
    bay.merge("m", names)
    ours, theirs = parts(again, "+".join(names)), parts(bay, "m")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
