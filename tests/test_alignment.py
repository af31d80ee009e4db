"""Networks whose units are permuted are brought together again, and the paths between networks are what they say."""

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import modbay as mb
from modbay import merging, methods
from modbay.errors import CompositionError


def mlp(width: int = 24) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width + 4), nn.LayerNorm(width + 4), nn.Tanh()),
        nn.Linear(width + 4, 3),
    )


def convolutional() -> nn.Sequential:
    """With batch norm that has seen data, a flattened convolution, group norm and a bias left out."""
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 8, 3, bias=False), nn.BatchNorm2d(8), nn.PReLU(8), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(8, 10, 3, padding=1), nn.GroupNorm(1, 10), nn.GELU(), nn.Flatten()),
        *(nn.Linear(10 * 9, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3)),
    )
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d, nn.GroupNorm, nn.PReLU)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    for _ in range(3):
        net(torch.randn(16, 2, 8, 8))
    return net.eval()


NETWORKS = {"mlp": (mlp, (6,)), "convolutional": (convolutional, (2, 8, 8))}


def shuffled(spec, state) -> dict[str, torch.Tensor]:
    return {group: torch.randperm(n) for group, n in merging.permutation_sizes(spec, state).items()}


def run(net, state, x):
    with torch.no_grad():
        return functional_call(net, state, (x,))


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("name", NETWORKS)
def test_a_permuted_network_is_the_same_function_and_comes_back(name):
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    net, x = make().double(), torch.randn(5, *shape, dtype=torch.float64)
    state, spec = net.state_dict(), methods.permutation_spec(net)
    p = shuffled(spec, state)
    moved = merging.permuted(state, spec, p)
    assert any(not torch.equal(moved[key], w) for key, w in state.items())
    torch.testing.assert_close(run(net, moved, x), run(net, state, x))
    back = merging.permuted(moved, spec, merging.unpermuted(p))
    assert all(torch.equal(back[key], w) for key, w in state.items())


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_that_were_permuted_are_mapped_back(name):
    torch.manual_seed(1)
    net = NETWORKS[name][0]()
    state, spec = net.state_dict(), methods.permutation_spec(net)
    moved = merging.permuted(state, spec, shuffled(spec, state))
    found = merging.match_weights(state, moved, spec)
    back = merging.permuted(moved, spec, found)
    assert all(torch.equal(back[key], w) for key, w in state.items())


def test_the_spec_of_a_chain_is_written_out():
    net = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(4 * 6, 5), nn.Linear(5, 2))
    norm = [(f"1.{key}", 0, 1) for key in ("weight", "bias", "running_mean", "running_var")]
    assert methods.permutation_spec(net) == {
        "P1": [("0.weight", 0, 1), ("0.bias", 0, 1), *norm, ("3.weight", 1, 6)],
        "P2": [("3.weight", 0, 1), ("3.bias", 0, 1), ("4.weight", 1, 1)],
    }


def test_a_spec_by_hand_for_a_residual_network():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.up, self.down, self.leave = (
                *(nn.Linear(4, 8), nn.Linear(8, 16), nn.Linear(16, 8)),
                nn.Linear(8, 2),
            )

        def forward(self, x):
            x = self.enter(x)
            return self.leave(x + self.down(torch.relu(self.up(x))))

    torch.manual_seed(2)
    net, x = Residual().double(), torch.randn(5, 4, dtype=torch.float64)
    spec = {
        "stream": [
            *(("enter.weight", 0), ("enter.bias", 0), ("up.weight", 1)),
            *(("down.weight", 0), ("down.bias", 0), ("leave.weight", 1)),
        ],
        "inner": [("up.weight", 0), ("up.bias", 0), ("down.weight", 1)],
    }
    state = net.state_dict()
    moved = merging.permuted(state, spec, shuffled(spec, state))
    torch.testing.assert_close(run(net, moved, x), run(net, state, x))
    for back in (
        merging.permuted(moved, spec, merging.match_weights(state, moved, spec)),
        merging.ot_fusion(state, moved, spec, share=1.0),
    ):
        for key, w in state.items():
            torch.testing.assert_close(back[key], w)
    with pytest.raises(CompositionError, match=r"no nn\.Sequential"):
        methods.permutation_spec(net)


def test_the_agreement_never_falls():
    torch.manual_seed(3)
    nets = [mlp(40), mlp(40)]
    a, b = (net.state_dict() for net in nets)
    spec = methods.permutation_spec(nets[0])

    def agreement(p):
        moved = merging.permuted(b, spec, p)
        return sum(float((w.double() * moved[key].double()).sum()) for key, w in a.items())

    found = [merging.match_weights(a, b, spec, most=n, seed=5) for n in range(12)]
    values = [agreement(p) for p in found]
    assert all(after >= before - 1e-9 for before, after in pairwise(values))
    assert values[1] > values[0] and values[2] > values[1] + 1e-3
    assert merging.match_weights(a, b, spec, seed=5)["P1"].tolist() == found[-1]["P1"].tolist()  # until none gains
    again = merging.match_weights(a, b, spec, start=found[-1], seed=9)
    assert all(torch.equal(again[group], p) for group, p in found[-1].items())


def test_one_hidden_layer_is_matched_best_of_all():
    from itertools import permutations as every

    torch.manual_seed(4)
    nets = [nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)) for _ in range(2)]
    a, b = (net.state_dict() for net in nets)
    spec = methods.permutation_spec(nets[0])

    def distance(p):
        moved = merging.permuted(b, spec, {"P1": torch.as_tensor(p)})
        return sum(float((w - moved[key]).square().sum()) for key, w in a.items())

    best = min(every(range(5)), key=distance)
    assert merging.match_weights(a, b, spec)["P1"].tolist() == list(best)


def test_running_statistics_do_not_count_but_move():
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    state, spec = net.state_dict(), methods.permutation_spec(net)
    p = shuffled(spec, state)
    other = merging.permuted(state, spec, p)
    other["1.running_var"] = 1e6 * torch.rand(16)
    found = merging.match_weights(state, other, spec)
    assert torch.equal(found["P1"], p["P1"].argsort())
    moved = merging.permuted(other, spec, found)
    assert torch.equal(moved["1.running_var"], other["1.running_var"][found["P1"]])


@pytest.mark.parametrize("correlation", [False, True])
def test_activations_find_the_permutation(correlation):
    torch.manual_seed(6)
    net, x = convolutional(), torch.randn(64, 2, 8, 8)
    state, spec = net.state_dict(), methods.permutation_spec(net)
    moved = merging.permuted(state, spec, shuffled(spec, state))
    sites = {"P1": "0.2", "P2": "1.2", "P3": "3"}
    z_a = methods.activations(net, sites, x.split(16))
    z_b = methods.activations(net, sites, x.split(16), moved)
    assert z_a["P1"].shape == (64 * 36, 8) and z_a["P3"].shape == (64, 12)
    found = merging.match_activations(z_a, z_b, correlation)
    back = merging.permuted(moved, spec, found)
    assert all(torch.equal(back[key], w) for key, w in state.items())


def test_units_that_never_change_are_matched_last():
    z = torch.tensor([[0.0, 1.0, 2.0], [0.0, 2.0, 1.0], [0.0, 4.0, 0.0]])
    found = merging.match_activations({"P": z}, {"P": z[:, [2, 0, 1]] * 3 + 7}, correlation=True)
    assert found["P"].tolist() == [1, 2, 0]


@pytest.mark.parametrize("by", ["weights", "activations", "entropy"])
def test_fusion_with_a_permuted_copy_is_the_original(by):
    torch.manual_seed(7)
    net, x = convolutional().double(), torch.randn(64, 2, 8, 8, dtype=torch.float64)
    state, spec = net.state_dict(), methods.permutation_spec(net)
    moved = merging.permuted(state, spec, shuffled(spec, state))
    sites = {"P1": "0.1", "P2": "1.1", "P3": "3"}
    z = [methods.activations(net, sites, [x], s) for s in (state, moved)] if by == "activations" else None
    fused = merging.ot_fusion(state, moved, spec, activations=z and tuple(z), entropy=1e-3 if by == "entropy" else None)
    for key, w in state.items():
        torch.testing.assert_close(fused[key], w)


def test_a_transport_plan_is_optimal():
    """Of a by b units, uniform masses: as good as the assignment of copies, and columns of 1."""
    from scipy.optimize import linear_sum_assignment

    torch.manual_seed(8)
    nets = [nn.Sequential(nn.Linear(3, n), nn.ReLU(), nn.Linear(n, 2)) for n in (4, 6)]
    a, b = (net.state_dict() for net in nets)
    spec = methods.permutation_spec(nets[0])
    plan = merging.transport_plans(a, b, spec)["P1"]
    assert plan.shape == (6, 4)
    torch.testing.assert_close(plan.sum(0), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(plan.sum(1), torch.full((6,), 4 / 6, dtype=torch.float64))
    rows = [torch.cat([s["0.weight"], s["0.bias"][:, None]], 1).double() for s in (b, a)]
    cost = torch.cdist(*rows)
    copies = cost.repeat_interleave(2, 0).repeat_interleave(3, 1)  # 12 by 12
    i, j = linear_sum_assignment(copies.numpy())
    assert float((plan * cost).sum()) / 4 == pytest.approx(float(copies[i, j].mean()))
    near = merging.transport_plans(a, b, spec, entropy=0.01)["P1"]
    torch.testing.assert_close(near, plan, atol=0.05, rtol=0)


def test_networks_of_unequal_width_fuse():
    """Where every unit of a stands twice in b, b is carried to a's units, and what reads them to the mean of both."""
    torch.manual_seed(9)
    small = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    large = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3)).double()
    a, twice = small.state_dict(), torch.randperm(10)
    b = {name: w.clone() for name, w in a.items()}
    for name, axis in (("0.weight", 0), ("0.bias", 0), ("2.weight", 1)):
        b[name] = a[name].repeat_interleave(2, axis).index_select(axis, twice)
    large.load_state_dict(b)
    fused = merging.ot_fusion(a, b, methods.permutation_spec(large))
    for name, w in a.items():
        torch.testing.assert_close(fused[name], w)
    assert merging.ot_fusion(b, a, methods.permutation_spec(large))["0.weight"].shape == (10, 6)


@pytest.mark.parametrize("name", NETWORKS)
def test_repaired_statistics_are_the_interpolations(name):
    torch.manual_seed(10)
    make, shape = NETWORKS[name]
    nets, share = [make().eval() for _ in range(2)], 0.3
    a, b = (net.state_dict() for net in nets)
    sites = ["0", "2", "3"] if name == "mlp" else ["0.1", "1.0", "3"]
    batches = list(torch.randn(48, *shape).split(16))
    mended = methods.repair(nets[0], a, b, share, batches, reversed(sites))
    z = [
        methods.activations(nets[0], {site: site for site in sites}, batches, state)
        for state in (a, b, merging.interpolated(a, b, share), mended)
    ]
    for site in sites:
        for of in (lambda y: y.mean(0), lambda y: y.std(0, correction=0)):
            first, second, plain, now = (of(each[site]) for each in z)
            want = (1 - share) * first + share * second
            torch.testing.assert_close(now, want, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(plain, want, rtol=1e-2)
    ends = methods.repair(nets[0], a, b, 1.0, batches, sites)
    torch.testing.assert_close(run(nets[0], ends, batches[0]), run(nets[0], b, batches[0]), atol=1e-5, rtol=1e-4)


def test_repair_wants_what_can_be_rescaled():
    net = convolutional()
    a, x = net.state_dict(), [torch.randn(4, 2, 8, 8)]
    with pytest.raises(CompositionError, match=r"'0\.0'.*name the norm"):
        methods.repair(net, a, a, 0.5, x, ["0.0"])
    with pytest.raises(CompositionError, match=r"'0\.2'"):
        methods.repair(net, a, a, 0.5, x, ["0.1", "0.2"])
    with pytest.raises(CompositionError, match="gone through 3 times"):
        methods.repair(net, a, a, 0.5, iter(x), ["0.1"])
    with pytest.raises(CompositionError, match="no modules 'x'"):
        methods.activations(net, {"P1": "x"}, x)


def test_the_barrier_of_a_network_with_itself_is_nought():
    torch.manual_seed(11)
    net, batch = mlp(), (torch.randn(20, 6), torch.randint(3, (20,)))
    state = net.state_dict()
    before = {name: w.clone() for name, w in state.items()}
    path = methods.along(net, lambda t: merging.interpolated(state, state, t), [batch], cross_entropy)
    assert len(path.t) == 25 and path.t[0] == 0 and path.t[-1] == 1
    assert abs(path.barrier) < 1e-6
    assert methods.barrier(net, state, state, [batch], cross_entropy) == path.barrier
    assert all(torch.equal(w, net.state_dict()[name]) for name, w in before.items())


def test_a_barrier_is_written_out():
    """L(w) = (w² − 1)² between −1 and 3/2, whose hill stands on a rising line."""
    net = nn.Linear(1, 1, bias=False).double()
    a, b = ({"weight": torch.full((1, 1), v, dtype=torch.float64)} for v in (-1.0, 1.5))
    loss = lambda model, batch: (model(batch).square() - 1).square().mean()
    x = [torch.ones(1, 1, dtype=torch.float64)]
    t = [i / 24 for i in range(25)]
    want = max(((-1 + 2.5 * s) ** 2 - 1) ** 2 - 1.25**2 * s for s in t)
    assert want > 0.3
    assert methods.barrier(net, a, b, x, loss) == pytest.approx(want, abs=1e-12)
    path = methods.along(net, lambda s: merging.interpolated(a, b, s), x, loss, n=2001)
    # ∫ (w² − 1)² dw / 2.5 from −1 to 1.5
    f = lambda w: w**5 / 5 - 2 * w**3 / 3 + w
    assert path.mean == pytest.approx((f(1.5) - f(-1)) / 2.5, abs=1e-5)
    with pytest.raises(CompositionError, match="gone through again"):
        methods.along(net, lambda s: a, iter(x), loss)


def test_curves_start_and_end_in_their_ends():
    torch.manual_seed(12)
    a, middle, b = ({"w": torch.randn(3, 2), "n": torch.tensor(i)} for i in range(3))
    for curve in (merging.bezier, merging.polychain):
        assert torch.equal(curve(a, middle, b, 0.0)["w"], a["w"]) and torch.equal(curve(a, middle, b, 1.0)["w"], b["w"])
        assert torch.equal(curve(a, middle, b, 0.3)["n"], a["n"])
        on = merging.interpolated(a, b, 0.5)  # a curve through the mean is the segment
        torch.testing.assert_close(curve(a, on, b, 0.2)["w"], merging.interpolated(a, b, 0.2)["w"])
    torch.testing.assert_close(merging.bezier(a, middle, b, 0.5)["w"], a["w"] / 4 + middle["w"] / 2 + b["w"] / 4)
    assert torch.equal(merging.polychain(a, middle, b, 0.5)["w"], middle["w"])
    with pytest.raises(CompositionError, match="'n'"):
        merging.interpolated(a, {"w": b["w"]}, 0.5)


@pytest.mark.parametrize("curve", [merging.bezier, merging.polychain])
def test_a_curve_goes_round_a_barrier(curve):
    """L(u, v) = (u² + v² − 1)² from (−1, 0) to (1, 0): the segment passes the hill at 0, a curve goes round it."""
    torch.manual_seed(13)
    net = nn.Linear(1, 2, bias=False)
    a, b = ({"weight": torch.tensor([[u], [0.0]])} for u in (-1.0, 1.0))
    with torch.no_grad():
        b["weight"][1] = 0.1  # off the line of symmetry, on which no gradient bends it

    def loss(model, batch):
        return (model(batch).square().sum(-1) - 1).square().mean()

    x = [torch.ones(1, 1)]
    middle = methods.connect(net, a, b, x, loss, steps=600, curve=curve)
    segment = methods.along(net, lambda t: merging.interpolated(a, b, t), x, loss)
    bent = methods.along(net, lambda t: curve(a, middle, b, t), x, loss)
    assert segment.barrier > 0.9 and bent.barrier < 0.45 * segment.barrier and bent.mean < 0.35 * segment.mean
    assert bent.losses[0] == segment.losses[0] and bent.losses[-1] == segment.losses[-1]
    again = methods.connect(net, a, b, iter(x), loss, steps=600, curve=curve)
    assert torch.equal(again["weight"], middle["weight"])
    with pytest.raises(CompositionError, match="no batches"):
        methods.connect(net, a, b, [], loss)


def modules():
    torch.manual_seed(14)
    net = mlp()
    bay = mb.attach(net, nn.Linear, {name: mb.LoRA(2, alpha=4.0) for name in "abc"})
    for name in "ab":
        for p in bay.parameters(name):
            nn.init.normal_(p, std=0.5)
    return bay, (torch.randn(20, 6), torch.randint(3, (20,)))


def test_the_barrier_of_two_modules():
    bay, batch = modules()
    bay.use("a")
    first, second = methods.ends(bay, "a", "b")
    assert methods.barrier(bay.model, first, first, [batch], cross_entropy) == pytest.approx(0, abs=1e-6)
    path = methods.along(bay.model, lambda t: merging.interpolated(first, second, t), [batch], cross_entropy, n=3)
    want = []
    for name in "ab":
        bay.use(name)
        want.append(cross_entropy(bay.model, batch).item())
    assert [path.losses[0], path.losses[-1]] == pytest.approx(want, rel=1e-5)
    with torch.no_grad():  # the middle, of factors, in the place of c
        for p, x, y in zip(*(bay.parameters(name) for name in "cab"), strict=True):
            p.copy_((x + y) / 2)
    bay.use("c")
    assert path.losses[1] == pytest.approx(cross_entropy(bay.model, batch).item(), rel=1e-5)


def test_a_curve_between_modules_moves_modules_alone():
    bay, batch = modules()
    bay.use("a")
    first, second = methods.ends(bay, "a", "b")
    before = {name: p.clone() for name, p in bay.model.named_parameters()}
    middle = methods.connect(bay.model, first, second, [batch], cross_entropy, steps=60)
    assert set(middle) == set(first) and len(first) == 6
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in bay.model.named_parameters())
    segment = methods.along(bay.model, lambda t: merging.interpolated(first, second, t), [batch], cross_entropy)
    bent = methods.along(bay.model, lambda t: merging.bezier(first, middle, second, t), [batch], cross_entropy)
    assert bent.mean < segment.mean
    bay.add("d", mb.LoRA(3))
    with pytest.raises(CompositionError, match="one kind"):
        methods.ends(bay, "a", "d")


FAULTS = {
    "an unknown parameter": ({"P1": [("0.weight", 0), ("9.bias", 0)]}, r"'9\.bias', which is not in the state"),
    "no such axis": ({"P1": [("0.bias", 1)]}, r"axis 1 of '0\.bias', whose shape is \(24,\)"),
    "an axis twice": ({"P1": [("0.bias", 0)], "P2": [("0.bias", 0)]}, "by 'P1' and again by 'P2'"),
    "another length": ({"P1": [("0.weight", 0), ("5.weight", 1)]}, "has 28 units, the group 'P1' has 24"),
    "blocks that do not divide": ({"P1": [("0.weight", 0, 5)]}, "blocks of 5"),
    "no axes": ({"P1": []}, "owns no axis"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_spec_that_does_not_fit_raises(fault):
    spec, match = FAULTS[fault]
    state = mlp().state_dict()
    for verb in (
        lambda: merging.permuted(state, spec, {}),
        lambda: merging.match_weights(state, state, spec),
        lambda: merging.ot_fusion(state, state, spec),
    ):
        with pytest.raises(CompositionError, match=match):
            verb()


def test_what_is_no_permutation_raises():
    state, spec = mlp().state_dict(), methods.permutation_spec(mlp())
    with pytest.raises(CompositionError, match="no group 'P9'"):
        merging.permuted(state, spec, {"P9": torch.arange(3)})
    for wrong in (torch.zeros(24, dtype=torch.long), torch.arange(23), torch.arange(24.0)):
        with pytest.raises(CompositionError, match=r"not each of 0 … 23 once"):
            merging.permuted(state, spec, {"P1": wrong})
    with pytest.raises(CompositionError, match="has 20 units, the group 'P1' has 24"):
        merging.match_weights(state, mlp(20).state_dict(), spec)
    with pytest.raises(CompositionError, match=r"two axes of '0\.weight'"):
        merging.match_weights(*[{"0.weight": torch.eye(3)}] * 2, {"P": [("0.weight", 0), ("0.weight", 1)]})
    with pytest.raises(CompositionError, match="order of the forward pass"):
        merging.ot_fusion(state, state, dict(reversed(spec.items())))
    with pytest.raises(CompositionError, match=r"'P1' is \(4, 2\) in a, \(4, 3\) in b"):
        merging.match_activations({"P1": torch.zeros(4, 2)}, {"P1": torch.zeros(4, 3)})


@pytest.mark.parametrize(
    ("layers", "match"),
    [
        ([nn.Linear(4, 4), nn.Softmax(-1), nn.Linear(4, 2)], "'1' is Softmax"),
        ([nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 2, 1)], "2 groups tie units"),
        ([nn.Conv2d(2, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 1)], "tie units to each other"),
        ([nn.Conv1d(2, 4, 1), nn.LayerNorm((4, 5)), nn.Conv1d(4, 2, 1)], "norms places"),
        ([nn.Linear(4, 2)], "no hidden units"),
        (
            [nn.Linear(4, 6), nn.AvgPool1d(2), nn.Linear(3, 2)],
            "AvgPool1d: what it does to the order of units",
        ),
        ([nn.Linear(4, 6), nn.Flatten(), nn.Linear(12, 2)], "reads 12 values of vectors of 6 units"),
        ([nn.Conv1d(2, 4, 1), nn.Linear(4, 2)], "reads 4 values of maps of 4 units"),
        ([nn.Conv2d(2, 4, 1), nn.Flatten(2), nn.Linear(4, 2)], "flattens from 2 to -1"),
    ],
)
def test_layers_whose_symmetry_is_unknown_raise(layers, match):
    with pytest.raises(CompositionError, match=match):
        methods.permutation_spec(nn.Sequential(*layers))


def test_permutations_are_learned_straight_through():
    """From a start that no matching of weights improves, the gradient of the middle's loss finds a better one."""
    torch.manual_seed(15)
    teacher, x = mlp(), torch.randn(256, 6)
    batch, nets = (x, teacher(x).argmax(-1)), [mlp(12), mlp(12)]
    for net in nets:
        optimiser = torch.optim.Adam(net.parameters(), 0.02)
        for _ in range(80):
            optimiser.zero_grad()
            cross_entropy(net, batch).backward()
            optimiser.step()
    net, (a, b) = nets[0], (net.state_dict() for net in nets)
    spec, before = methods.permutation_spec(net), copy.deepcopy(a)

    def middle(p):
        other = merging.permuted(b, spec, p)
        return methods.along(net, lambda t: merging.interpolated(a, other, t), [batch], cross_entropy, n=3).losses[1]

    by_weights = middle(merging.match_weights(a, b, spec, seed=0))
    adam = lambda p: torch.optim.Adam(p, 0.05)
    learned = methods.match_by_gradient(net, a, b, spec, [batch], cross_entropy, steps=60, optimiser=adam)
    assert middle(methods.match_by_gradient(net, a, b, spec, [batch], cross_entropy, steps=1)) == by_weights
    assert middle(learned) < by_weights - 0.01 < middle({}) - 0.01
    assert all(torch.equal(w, before[name]) for name, w in net.state_dict().items())


def test_tied_and_running_tensors_stay_apart():
    """Tied weights bend as one; a pass in training changes neither the ends' running statistics nor the model's."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.enter, self.leave = nn.BatchNorm1d(3), nn.Linear(3, 3), nn.Linear(3, 3)
            self.leave.weight = self.enter.weight

        def forward(self, x):
            return self.leave(torch.tanh(self.enter(self.norm(x))))

    torch.manual_seed(16)
    nets, batch = [Tied(), Tied()], (torch.randn(20, 3), torch.randint(3, (20,)))
    a, b = (net.state_dict() for net in nets)
    before = [copy.deepcopy(state) for state in (a, b)]
    path = methods.along(nets[0], lambda t: merging.interpolated(a, b, t), [batch], cross_entropy, n=3)
    middle = methods.connect(nets[0], a, b, [batch], cross_entropy, steps=5)
    assert torch.isfinite(torch.tensor(path.losses)).all()
    assert not torch.equal(middle["enter.weight"], merging.interpolated(a, b, 0.5)["enter.weight"])
    for state, was in zip((a, b), before, strict=True):
        assert all(torch.equal(w, was[name]) for name, w in state.items())
    assert nets[0].leave.weight is nets[0].enter.weight and isinstance(nets[0].enter.weight, nn.Parameter)
    with pytest.raises(CompositionError, match="'x' are no parameters"):
        methods.along(nets[0], lambda t: {"x": batch[0]}, [batch], cross_entropy)
