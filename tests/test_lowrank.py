"""Low-rank and structured kinds: their formulas written out, and peft 0.21 with the same weights, to 1e-5."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

import modbay as mb
import modbay.methods
from helpers import SITES, fresh
from modbay.ops.hadamard import hadamard, hadamard_reference
from test_kinds import close, parts, weight_at
from test_peft import LAYERS, Net, fill, same

LINEAR = ("linear", "conv1d")
WEIGHTED = (*LINEAR, "conv2d", "embedding")


def under(place: str, module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The layer with another weight, (outputs, inputs, *kernel), and bias."""
    bias = getattr(module, "bias", None) if bias is None else bias
    if place == "embedding":
        return F.embedding(x, weight.T) + (0 if bias is None else bias)
    return F.conv2d(x, weight, bias, padding=1) if place == "conv2d" else F.linear(x, weight, bias)


def base(place: str, module: nn.Module) -> Tensor:
    """The weight as (outputs, inputs, *kernel)."""
    return module.weight.T if place == "embedding" else weight_at(place, module)


def product(b: Tensor, a: Tensor) -> Tensor:
    return torch.tensordot(b, a, 1)


# Formulas


@pytest.mark.parametrize("place", WEIGHTED)
def test_loha_is_a_hadamard_product(place: str):
    out, _, x, p, module = parts(mb.LoHa(2, alpha=3.0), place)
    change = 1.5 * product(p["B1"], p["A1"]) * product(p["B2"], p["A2"])
    close(out, under(place, module, x, base(place, module) + change))


@pytest.mark.parametrize("kind", [mb.LoKr(1, both=True), mb.LoKr(2, alpha=3.0, split=2), mb.LoKr(None, alpha=0.5)])
@pytest.mark.parametrize("place", WEIGHTED)
def test_lokr_is_a_kronecker_product(place: str, kind: mb.LoKr):
    out, _, x, p, module = parts(kind, place)
    c, d = (p[n] if n in p else product(p[f"{n}_left"], p[f"{n}_right"]) for n in "CD")
    change = torch.einsum("ab,cd...->acbd...", c, d).flatten(0, 1).flatten(1, 2)
    factor = {1: 1.0, 2: 1.5, None: 0.5}[kind.rank]
    close(out, under(place, module, x, base(place, module) + factor * change))


def test_the_factors_of_lokr_and_krona():
    site = mb.Modular(nn.Linear(48, 30)).site
    assert {n: tuple(t.shape) for n, t in fresh(mb.LoKr(None), site).items()} == {"C": (5, 6), "D": (6, 8)}
    split = fresh(mb.LoKr(2, split=4), site)  # 4 does not divide 30
    assert {n: tuple(t.shape) for n, t in split.items()} == {"C": (3, 4), "D_left": (10, 2), "D_right": (2, 12)}
    prime = fresh(mb.LoKr(2, both=True), mb.Modular(nn.Linear(48, 31)).site)
    assert prime["C_left"].shape == (1, 2) and prime["C_right"].shape == (2, 6)


@pytest.mark.parametrize("place", LINEAR)
def test_vera_is_two_vectors(place: str):
    out, _, x, p, module = parts(mb.VeRA(3), place)
    change = p["b"].diag() @ p["B"] @ p["d"].diag() @ p["A"]
    close(out, under(place, module, x, base(place, module) + change))
    assert not p["A"].requires_grad and p["A"].abs().max() <= math.sqrt(6 / 8)


def test_the_matrices_of_vera_are_shared_and_made_again(tmp_path):
    net, x = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)), torch.randn(3, 8)
    twin = copy.deepcopy(net)
    bay = mb.attach(net, at=nn.Linear, modules={"a": mb.VeRA(5), "b": mb.VeRA(5, seed=1)}, name="task")
    a, b = ([m.parts._modules[n].tensors()["A"] for m in bay.modulars.values()] for n in "ab")
    assert a[0] is a[1] and a[0].shape == (5, 8) and not torch.equal(a[0], b[0])
    assert a[0][0, :3].tolist() == pytest.approx([0.36257917, 0.35857174, 0.82906967], abs=1e-7)  # on every machine
    for parameter in bay.parameters():
        nn.init.normal_(parameter)
    want = net(x, task=["a", "b", None])
    bay.pack("a")
    for file in bay.save(tmp_path).rglob("*.safetensors"):
        assert set(load_file(file)) == {f"{site}/{vector}" for site in "02" for vector in "db"}
    assert set(mb.load(twin, tmp_path)) == {"task"}
    assert_close(twin(x, task=["a", "b", None]), want)


@pytest.mark.parametrize("place", WEIGHTED)
def test_dora_learns_magnitudes_and_directions(place: str):
    out, _, x, p, module = parts(mb.DoRA(2, alpha=3.0), place)
    w = base(place, module).detach()
    v = w + 1.5 * product(p["B"], p["A"])
    m = w.flatten(1).norm(dim=1) + p["magnitude"]
    direction = v / v.flatten(1).norm(dim=1).detach().view(-1, *[1] * (v.ndim - 1))
    want = under(place, module, x, m.view(-1, *[1] * (v.ndim - 1)) * direction)
    close(out, want)
    learned, g = [p[name] for name in ("A", "B", "magnitude")], torch.randn_like(out)
    for ours, theirs in zip(*(torch.autograd.grad(y, learned, g) for y in (out, want)), strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("place", WEIGHTED)
def test_a_lora_may_have_a_bias(place: str):
    out, _, x, p, module = parts(mb.LoRA(2, alpha=3.0, bias=True), place)
    bias = 1.5 * p["bias"] + (0 if place == "embedding" else module.bias)
    close(out, under(place, module, x, base(place, module) + 1.5 * product(p["B"], p["A"]), bias))


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("place", WEIGHTED)
def test_pissa_and_olora_are_the_weights_own(place: str, start: str):
    kind = mb.LoRA(2, alpha=3.0, start=start)
    out, _, x, p, module = parts(kind, place)
    w = base(place, module).detach()
    close(out, under(place, module, x, w + 1.5 * product(p["B"], p["A"]) - 1.5 * product(p["B0"], p["A0"])))
    new = fresh(kind, mb.Modular(module).site)
    taken, flat = product(new["B"], new["A"]).flatten(1), w.flatten(1)
    if start == "pissa":
        u, s, v = torch.linalg.svd(flat)
        close(1.5 * taken, u[:, :2] @ s[:2].diag() @ v[:2])
        close(new["B"].norm(dim=0), new["A"].flatten(1).norm(dim=1))
    else:
        close(new["B"].T @ new["B"], torch.eye(2))
        close(taken[:, :2], flat[:, :2])  # the first columns need no more of Q
    assert torch.equal(new["A"], new["A0"]) and torch.equal(new["B"], new["B0"])


def test_pissa_comes_back_from_a_file(tmp_path):
    net, x = nn.Sequential(nn.Linear(8, 6)), torch.randn(3, 8)
    twin = copy.deepcopy(net)
    bay = mb.attach(net, at="0", modules={"a": mb.LoRA(2, start="pissa", bias=True)}, name="task")
    for parameter in bay.parameters():
        nn.init.normal_(parameter)
    bay.use("a").save(tmp_path)
    mb.load(twin, tmp_path)["task"].use("a")
    assert torch.equal(twin(x), net(x))


@pytest.mark.parametrize("place", WEIGHTED)
def test_adalora_is_a_product_of_three(place: str):
    kind = mb.AdaLoRA(3, alpha=2.0, orthogonality=0.1)
    out, _, x, p, module = parts(kind, place)
    change = torch.einsum("or,r,ri...->oi...", p["P"], p["values"], p["Q"]) * 2 / 3
    close(out, under(place, module, x, base(place, module) + change))
    q, one = p["Q"].flatten(1), torch.eye(3)
    close(kind.penalty(p), 0.1 * ((p["P"].T @ p["P"] - one).norm() + (q @ q.T - one).norm()) / 2)


def test_a_budget_of_ranks_says_what_does_not_fit():
    net = nn.Sequential(nn.Linear(8, 6))
    bay = mb.attach(net, at="0", modules={"a": mb.AdaLoRA(4), "b": mb.LoRA(4)}, name="task").use("a")
    with pytest.raises(mb.errors.BayError, match="at '0' it is LoRA"):
        mb.methods.RankBudget(bay, "b", rank=2, steps=10)
    with pytest.raises(mb.errors.BayError, match="steps between"):
        mb.methods.RankBudget(bay, "a", rank=2, steps=10, warm=5, final=5)
    with pytest.raises(mb.errors.BayError, match="P at '0' has no gradient"):
        mb.methods.RankBudget(bay, "a", rank=2, steps=10).step()
    budget = mb.methods.RankBudget(bay, "a", rank=1, steps=110, warm=10, final=20)
    assert [budget.budget(t) for t in (0, 10, 50, 90, 100)] == [4, 4, 1, 1, 1] and budget.budget(11) == 3


@pytest.mark.parametrize("rank", [1, 2, None])
@pytest.mark.parametrize("place", ["linear", "embedding", "block"])
def test_compacter_is_a_bottleneck_of_kronecker_products(place: str, rank: int | None):
    out, y, _, p, _ = parts(mb.Compacter(2, size=4, rank=rank, std=0.1), place)

    def weight(name: str) -> Tensor:
        b = p[name] if rank is None else [s @ t for s, t in zip(p[f"{name}_s"], p[f"{name}_t"], strict=True)]
        return sum(torch.kron(a, one) for a, one in zip(p["A"], b, strict=True))

    hidden = F.gelu(y @ weight("down").T + p["down_bias"], approximate="tanh")
    assert weight("down").shape == (4, y.shape[-1])
    close(out, y + hidden @ weight("up").T + p["up_bias"])


def test_the_layers_of_compacter_share_a(minilm):
    ids = torch.tensor([[101, 2023, 2003, 102]])
    want = minilm(ids).last_hidden_state
    bay = mb.attach(minilm, [mb.role.output, mb.role.ffn_out], {"task": mb.Compacter()}).use("task")
    close(minilm(ids).last_hidden_state, want)  # near the base, at the start
    own = [m.parts._modules["task"].tensors() for m in bay.modulars.values()]
    assert len(own) == 12 and all(p["A"] is own[0]["A"] for p in own)
    one = 2 * (384 + 12) + 384 + 12  # s, t and biases, of 384 and 384/32 features
    assert sum(p.numel() for p in bay.parameters()) == 4**3 + 12 * one
    assert {p["down_s"].shape for p in own} == {(4, 3, 1)} and {p["down_t"].shape for p in own} == {(4, 1, 96)}
    plus = mb.attach(minilm, mb.role.ffn_out, {"task": mb.Compacter()}, name="plus")
    assert sum(p.numel() for p in plus.parameters()) == 4**3 + 6 * one


def test_hadamard_is_a_product_with_the_whole_matrix():
    for n in (1, 2, 64, 256):
        x = torch.randn(3, n)
        assert_close(hadamard(x), hadamard_reference(x), atol=1e-5, rtol=1e-5)
    assert_close(hadamard(hadamard(x)) / 256, x, atol=1e-5, rtol=1e-5)


def net_and_vector(kind: mb.Intrinsic):
    """(two layers, the bay, its tensors by site), after something was learned."""
    net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4, bias=False))
    bay = mb.attach(net, at=nn.Linear, modules={"m": kind}, name="task").use("m")
    for parameter in bay.parameters():
        nn.init.normal_(parameter)
    return net, bay, {site: m.parts._modules["m"].tensors() for site, m in bay.modulars.items()}


def moved(net: nn.Sequential, x: Tensor, change: Tensor) -> Tensor:
    """The net with its 54 + 24 parameters, in order, moved."""
    first, bias, last = change.split((48, 6, 24))
    hidden = torch.tanh(F.linear(x, net[0].weight + first.view(6, 8), net[0].bias + bias))
    return F.linear(hidden, net[2].weight + last.view(4, 6))


def test_intrinsic_moves_all_sites_by_one_vector(tmp_path):
    net, bay, p = net_and_vector(mb.Intrinsic(5, "dense"))
    x, matrix = torch.randn(3, 8), torch.cat([p["0"]["P"], p["2"]["P"]])
    assert p["0"]["z"] is p["2"]["z"] and [q.shape for q in bay.parameters()] == [(5,)]
    close(net(x), moved(net, x, matrix @ p["0"]["z"]))
    close(matrix.norm(dim=0), torch.ones(5))
    file = next(bay.save(tmp_path).rglob("module.safetensors"))
    assert {name: t.shape for name, t in load_file(file).items()} == {"0/z": (5,)}  # one vector, and no matrix


def test_fastfood_is_a_product_of_simple_matrices(tmp_path):
    net, bay, p = net_and_vector(mb.Intrinsic(5))
    twin, x, blocks = copy.deepcopy(bay).detach(), torch.randn(3, 8), []
    for site, rows in (("0", 54), ("2", 24)):
        n = 64 if site == "0" else 32
        h = hadamard_reference(torch.eye(n))
        g, b, permutation = p[site]["G"], p[site]["B"], p[site]["permutation"]
        block = h @ g.diag() @ torch.eye(n)[permutation] @ h @ b.float().diag()
        assert set(b.tolist()) == {-1, 1} and sorted(permutation.tolist()) == list(range(n))
        blocks.append(block[:rows, :5])
    close(net(x), moved(net, x, torch.cat(blocks) @ p["0"]["z"]))
    bay.save(tmp_path)
    mb.load(twin, tmp_path)["task"].use("m")
    assert torch.equal(twin(x), net(x))


def test_fastfood_keeps_lengths_and_is_the_same_on_every_machine():
    site = mb.Modular(nn.Linear(40, 30)).site
    for d in (10, 3000):  # of fewer dimensions than the site, and of more
        kind = mb.Intrinsic(d)
        p = fresh(kind, site) | {"z": torch.randn(d)}
        weight, bias = (part.dense(site)[k] for k, part in enumerate(kind.delta(p, site).parts))
        length = torch.cat([weight.flatten(), bias]).norm() / p["z"].norm()
        assert 0.8 < length < 1.25
    assert fresh(mb.Intrinsic(3), site)["permutation"][:4].tolist() == [1664, 1258, 1955, 72]


def test_said_has_a_scale_for_each_site():
    net, bay, p = net_and_vector(mb.Intrinsic(7, "dense", scaled=True))
    assert sum(q.numel() for q in bay.parameters()) == 7 and p["0"]["z"].shape == (5,)
    x = torch.randn(3, 8)
    change = torch.cat([p[site]["scale"] * (p[site]["P"] @ p[site]["z"]) for site in "02"])
    close(net(x), moved(net, x, change))


def test_what_sites_share_is_shared_after_packing():
    net, bay, _ = net_and_vector(mb.Intrinsic(5))
    x = torch.randn(3, 8)
    want = net(x)
    assert_close(bay.pack() and net(x), want)
    bay.unpack()
    assert len(bay.parameters()) == 1


# peft

peft = pytest.importorskip("peft")


def theirs_and_ours(place: str, kind: mb.Kind, config, keep=()):
    """(theirs, ours, our bay, their layer), theirs with random parameters."""
    net = Net(LAYERS[place][0]()).eval()
    theirs = peft.get_peft_model(copy.deepcopy(net), config).eval()
    layer = theirs.get_base_model().layer
    for name, parameter in theirs.named_parameters():
        if "base_layer" not in name and not any(word in name for word in keep):
            nn.init.normal_(parameter)
    return theirs, net, mb.attach(net, at="layer", modules={"m": kind}).use("m"), layer


@pytest.mark.parametrize("place", ["linear", "conv2d"])
def test_loha_in_peft(place: str):
    config = peft.LoHaConfig(r=3, alpha=6, target_modules=["layer"])
    theirs, net, bay, layer = theirs_and_ours(place, mb.LoHa(3, alpha=6.0), config)
    (b1, a1, b2, a2) = (getattr(layer, f"hada_w{n}")["default"] for n in ("1_a", "1_b", "2_a", "2_b"))
    shape = (3, *net.layer.weight.shape[1:])
    fill(bay, A1=a1.view(shape), B1=b1, A2=a2.view(shape), B2=b2)
    same(theirs, net, LAYERS[place][1]())


@pytest.mark.parametrize("kind", [mb.LoKr(1, alpha=2.0), mb.LoKr(8, alpha=3.0, split=2), mb.LoKr(1, both=True)])
@pytest.mark.parametrize("place", ["linear", "conv2d"])
def test_lokr_in_peft(place: str, kind: mb.LoKr):
    config = peft.LoKrConfig(
        r=kind.rank, alpha=kind.alpha or kind.rank, decompose_both=kind.both, decompose_factor=kind.split or -1,
        target_modules=["layer"],
    )  # fmt: skip
    theirs, net, bay, layer = theirs_and_ours(place, kind, config)
    own = bay.modulars["layer"].parts._modules["m"].tensors()
    names = {"C": "w1", "C_left": "w1_a", "C_right": "w1_b", "D": "w2", "D_left": "w2_a", "D_right": "w2_b"}
    fill(bay, **{n: getattr(layer, f"lokr_{names[n]}")["default"].view(t.shape) for n, t in own.items()})
    same(theirs, net, LAYERS[place][1]())


@pytest.mark.parametrize("place", LINEAR)
def test_vera_in_peft(place: str):
    config = peft.VeraConfig(r=4, target_modules=["layer"], fan_in_fan_out=place == "conv1d")
    theirs, net, bay, layer = theirs_and_ours(place, mb.VeRA(4), config)
    vectors = {"d": layer.vera_lambda_d["default"], "b": layer.vera_lambda_b["default"]}
    fill(bay, **vectors, A=layer.vera_A["default"], B=layer.vera_B["default"])
    same(theirs, net, LAYERS[place][1]())


@pytest.mark.parametrize("place", WEIGHTED)
def test_dora_in_peft(place: str):
    config = peft.LoraConfig(
        r=3, lora_alpha=6, use_dora=True, target_modules=["layer"], fan_in_fan_out=place == "conv1d"
    )
    theirs, net, bay, layer = theirs_and_ours(place, mb.DoRA(3, alpha=6.0), config)
    if place == "embedding":
        a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    else:
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    weight = base("embedding" if place == "embedding" else place, net.layer).detach()
    magnitude = layer.lora_magnitude_vector["default"].weight.flatten()
    fill(bay, A=a, B=b.flatten(1), magnitude=magnitude - weight.flatten(1).norm(dim=1))
    same(theirs, net, LAYERS[place][1]())
    out = net(x := LAYERS[place][1]())
    assert_close(bay.fold("m") and net(x), out, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("place", ["linear", "conv2d"])
def test_adalora_in_peft(place: str):
    config = peft.AdaLoraConfig(init_r=3, lora_alpha=6, target_modules=["layer"], total_step=10, tfinal=2)
    theirs, net, bay, layer = theirs_and_ours(place, mb.AdaLoRA(3, alpha=6.0), config, keep=["ranknum"])
    q = layer.lora_A["default"].view(3, *net.layer.weight.shape[1:])
    own = {"P": layer.lora_B["default"], "Q": q, "values": layer.lora_E["default"].flatten()}
    fill(bay, **own, share=torch.tensor([0.5]))
    same(theirs, net, LAYERS[place][1]())


class Guessing(nn.Module):
    """Two layers and a loss, as peft's AdaLoRA wants a model to return it."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, labels: Tensor):
        logits = self.last(torch.tanh(self.first(x)))
        return SimpleNamespace(loss=F.cross_entropy(logits, labels), logits=logits)


def test_the_budget_of_ranks_in_peft():
    """Thirty steps of training under both: the same penalty, the same values stay, and the same weights come out."""
    net = Guessing()
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=4, target_modules=["first", "last"], total_step=30, tinit=4, tfinal=8, deltaT=3
    )
    theirs = peft.get_peft_model(copy.deepcopy(net), config)
    bay = mb.attach(net, at=nn.Linear, modules={"m": mb.AdaLoRA(4)}, name="task").use("m")
    own = {site: m.parts._modules["m"].tensors() for site, m in bay.modulars.items()}
    twins = []
    for site, p in own.items():
        layer = getattr(theirs.get_base_model(), site)
        pairs = zip(("P", "Q", "values"), (layer.lora_B, layer.lora_A, layer.lora_E), strict=True)
        twins += [(p[name], other["default"]) for name, other in pairs]
    with torch.no_grad():
        for mine, other in twins:
            mine.copy_(other.view(mine.shape))
    budget = mb.methods.RankBudget(bay, "m", rank=2, steps=30, warm=4, final=8, every=3)
    optimisers = [torch.optim.SGD(list(side), 0.3) for side in zip(*twins, strict=True)]
    for t in range(30):
        x, labels = torch.randn(16, 8), torch.randint(4, (16,))
        ours, other = net(x, labels).loss, theirs.base_model(x, labels).loss
        close(ours, other)
        ours.backward()
        other.backward()
        for optimiser in optimisers:
            optimiser.step()
        budget.step()
        theirs.base_model.update_and_allocate(t)
        for optimiser in optimisers:
            optimiser.zero_grad()
        left = sum(int((p["values"] != 0).sum()) for p in own.values())
        assert t < 5 or t % 3 or left == budget.budget(t)
        for mine, twin in twins:
            assert_close(mine, twin.view(mine.shape), atol=1e-5, rtol=1e-4)
    assert sum(int(kept.sum()) for kept in budget.kept.values()) == 4 == left


def test_lora_with_a_bias_in_peft():
    config = peft.LoraConfig(r=3, lora_alpha=6, lora_bias=True, target_modules=["layer"])
    theirs, net, bay, layer = theirs_and_ours("linear", mb.LoRA(3, alpha=6.0, bias=True), config)
    b = layer.lora_B["default"]
    fill(bay, A=layer.lora_A["default"].weight, B=b.weight, bias=b.bias)
    same(theirs, net, LAYERS["linear"][1]())


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_pissa_and_olora_in_peft(start: str):
    """peft changes the base's weight for them; here the constants stand for that."""
    config = peft.LoraConfig(r=3, lora_alpha=6, init_lora_weights=start, target_modules=["layer"])
    theirs, net, bay, layer = theirs_and_ours("linear", mb.LoRA(3, alpha=6.0, start=start), config, keep=["lora"])
    own, x = bay.modulars["layer"].parts._modules["m"].tensors(), LAYERS["linear"][1]()
    with torch.no_grad():
        for mine, other in ((own["A"], layer.lora_A["default"].weight), (own["B"], layer.lora_B["default"].weight)):
            assert_close(mine, other.detach(), atol=1e-5, rtol=1e-5)  # the signs of the vectors, too
            move = torch.randn_like(mine)
            mine.add_(move)
            other.add_(move)
    same(theirs, net, x)


# What is refused


@pytest.mark.parametrize(
    "kind, module, message",
    [
        (mb.DoRA(2), nn.Conv2d(4, 4, 3, groups=2), "convolution with groups"),
        (mb.LoRA(9, start="pissa"), nn.Linear(8, 6), "rank 6 at most"),
        (mb.LoRA(2, start="olora"), nn.LayerNorm(8), "no weight"),
        (mb.LoHa(2), nn.LayerNorm(8), "no weight"),
        (mb.LoKr(2), nn.Tanh(), "no weight"),
        (mb.VeRA(2), nn.Embedding(5, 8), "Linear and Conv1D"),
        (mb.Intrinsic(2), nn.LayerNorm(8), "no weight"),
        (mb.Intrinsic(1, scaled=True), nn.Linear(8, 6), "leaves nothing for z"),
        (mb.Compacter(4), nn.Linear(8, 6), "4 must divide them; the width is 6"),
        (mb.Compacter(2), nn.Conv2d(4, 4, 3), "features on the last axis"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_site_that_does_not_fit_is_named(kind: mb.Kind, module: nn.Module, message: str):
    with pytest.raises(mb.errors.CompositionError, match=message):
        kind.init([mb.Modular(module).site])


def test_a_weight_without_a_direction_and_a_slice_are_refused():
    net = nn.Sequential(nn.Linear(8, 6))
    with pytest.raises(mb.errors.CompositionError, match="a slice of an output"):
        mb.attach(net, at=mb.part("0", 0, 3), modules={"m": mb.DoRA(2)})
    nn.init.zeros_(net[0].weight[2])
    with pytest.raises(mb.errors.CompositionError, match="a row of its weight is zero"):
        mb.attach(net, at="0", modules={"m": mb.DoRA(2)})


def test_a_dora_is_not_folded_under():
    """Its norm is of the base's weight: another bay's fold below it would change what it computes."""
    net = nn.Sequential(nn.Linear(8, 6))
    below = mb.attach(net, at="0", modules={"a": mb.LoRA(2)}, name="below")
    mb.attach(net, at="0", modules={"b": mb.DoRA(2)}, name="above").use("b")
    with pytest.raises(mb.errors.BayError, match="'above' is at work"):
        below.fold("a")


def test_each_place_has_an_example():
    assert set(WEIGHTED) <= set(SITES) & set(LAYERS)
