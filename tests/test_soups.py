"""Averages of modules for what is new: adapter soups, weights from a few examples, and fusion round by round."""

import copy
import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import modbay as mb
from modbay import merging, methods
from modbay.attach import bays
from modbay.errors import BayError, CompositionError, MergeError


def moved(bay: mb.Bay, scale: float = 0.3) -> mb.Bay:
    """As if its modules had learned."""
    with torch.no_grad():
        for parameter in bay.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return bay


def domains(m: int = 40, d: int = 12) -> dict[str, Tensor]:
    """Texts of four domains, each around a direction of its own."""
    return {
        name: 2 * torch.eye(d)[i] + 0.2 * torch.randn(m, d) for i, name in enumerate(("news", "law", "mail", "tale"))
    }


# AdapterSoup


def test_a_soup_is_of_the_nearest_domains():
    have = domains()
    new = torch.cat([have["law"][:6] * torch.rand(6, 1), have["tale"][:3]]) + 0.1 * torch.randn(9, 12)
    want = {name: F.cosine_similarity(z[:, None], new[None], dim=-1).mean().item() for name, z in have.items()}
    said = methods.similarities(have, new)
    assert list(said) == list(want)
    for name in have:
        assert said[name] == pytest.approx(want[name], abs=1e-6)
    assert methods.adapter_soup(have, new, 1) == {"law": 1.0}
    assert methods.adapter_soup(have, new, 2) == {"law": 0.5, "tale": 0.5}
    assert set(methods.adapter_soup(have, new, 9, least=-1)) == set(have)  # as many as there are
    assert methods.adapter_soup(have, new, 3, least=want["tale"] + 1e-3) == {"law": 1.0}
    assert methods.adapter_soup(have, new, least=1.0) == {}
    assert methods.adapter_soup({name: z.tolist() for name, z in have.items()}, new.tolist(), 1) == {"law": 1.0}
    assert methods.adapter_soup({n: z.bfloat16() for n, z in have.items()}, new.bfloat16(), 1) == {"law": 1.0}


def test_a_soup_takes_any_measure():
    given = {"a": torch.zeros(1, 2), "b": torch.zeros(1, 2)}
    assert methods.adapter_soup(given, torch.zeros(1, 2), by=lambda some, new: {"a": 0.2, "b": 0.1}) == {
        "a": 0.5,
        "b": 0.5,
    }


def test_clusters_tell_whose_a_text_is():
    have = domains()
    new = torch.cat([have["mail"][:6], have["news"][:2]]) + 0.05 * torch.randn(8, 12)
    for n, covariance in ((None, "full"), (None, "diag"), (7, "tied"), (6, "spherical")):
        said = methods.cluster_shares(have, new, n, 5, covariance)
        assert said == {"news": 0.25, "law": 0.0, "mail": 0.75, "tale": 0.0}
    one = methods.cluster_shares(have | {"law": torch.cat([have["law"]] * 2)}, new, 1)
    assert one == {"news": 0.0, "law": 1.0, "mail": 0.0, "tale": 0.0}  # one cluster is of those that are most
    assert methods.cluster_shares(have, new, seed=3) == methods.cluster_shares(have, new, seed=3)


def test_a_soup_by_clusters_is_of_the_domains_of_its_texts():
    have = domains()
    new = torch.cat([have["mail"][:6], have["news"][:2]]) + 0.05 * torch.randn(8, 12)
    assert methods.adapter_soup(have, new, by="clusters") == {"mail": 0.5, "news": 0.5}
    assert methods.adapter_soup(have, new, by="clusters", least=0.3) == {"mail": 1.0}
    tied = functools.partial(methods.cluster_shares, n=7, covariance="tied", dims=5)
    assert methods.adapter_soup(have, new, 1, tied) == {"mail": 1.0}


@pytest.mark.parametrize("kind", [mb.Bottleneck(3), mb.LoRA(2), mb.IA3()], ids=str)
def test_a_soup_averages_parameters(kind):
    net, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), torch.randn(5, 8)
    plain = net(x)
    bay = moved(mb.attach(net, nn.Linear, dict.fromkeys(domains(), kind), aggregator=mb.ParameterAverage()))
    have = domains()
    soup = methods.adapter_soup(have, torch.cat([have["law"], have["tale"]]), 2)
    got = bay.use(soup) and net(x)
    methods.average(bay, "soup", "law", "tale")  # the same, as a module of its own
    assert_close(got, bay.use("soup") and net(x))
    bay.use(methods.adapter_soup(have, have["law"], least=2.0))
    assert_close(net(x), plain, rtol=0, atol=0)  # nothing is near: the base alone


def test_what_soup_can_t_be_made_raises():
    have = domains()
    with pytest.raises(CompositionError, match=r"k=0"):
        methods.adapter_soup(have, have["law"], 0)
    with pytest.raises(CompositionError, match=r"by='cosine'.*'clusters'"):
        methods.adapter_soup(have, have["law"], by="cosine")
    for wrong in (have["law"][0], have["law"][:, :3], have["law"][:0]):
        with pytest.raises(CompositionError, match=r"\(m, d\)"):
            methods.adapter_soup(have, wrong)
    with pytest.raises(CompositionError, match=r"\(m, d\)"):
        methods.similarities({}, have["law"])
    with pytest.raises(CompositionError, match="'law' are not finite"):
        methods.similarities(have | {"law": have["law"] / 0}, have["mail"])
    with pytest.raises(CompositionError, match=r"n=161.*160 texts"):
        methods.cluster_shares(have, have["law"], 161)


# LoraHub


def hub(n: int = 4, aggregator=None, kind=None) -> tuple[nn.Linear, mb.Bay, Tensor]:
    net = nn.Linear(8, 6)
    kinds = {name: kind or mb.LoRA(2, alpha=3.0) for name in "abcdefgh"[:n]}
    bay = mb.attach(net, "", kinds, aggregator=aggregator or mb.ParameterAverage(), name="task")
    return net.eval(), moved(bay, 0.6), torch.randn(20, 8)


def averaged(net: nn.Linear, bay: mb.Bay, x: Tensor, w: Tensor) -> Tensor:
    """f(x) + α/r · (Σ w B)(Σ w A) x, as it is written."""
    parts = [bay.modulars[""].parts.get_submodule(name).tensors() for name in bay.names()]
    a, b = (sum(w_i * part[key].detach() for w_i, part in zip(w, parts, strict=True)) for key in "AB")
    return F.linear(x, net.weight, net.bias) + 3.0 / 2 * x @ a.mT @ b.mT


@pytest.mark.parametrize("by, wanted", [("search", (0.9, 0.0, 0.6, 0.2)), ("gradient", (0.7, 0.05, 0.05, 0.2))])
def test_lora_hub_finds_the_weights_that_made_the_examples(by, wanted):
    net, bay, x = hub()
    with torch.no_grad():
        y = bay.use(dict(zip("abcd", wanted, strict=True))) and net(x)
    bay.use("b")
    found = methods.lora_hub(bay, lambda: F.mse_loss(net(x), y), steps=150, by=by, l1=0.0)
    values = np.array([found[name] for name in "abcd"])
    np.testing.assert_allclose(values * np.sign(values[0]), wanted, atol=0.03)  # −w gives the same product of A and B


def test_lora_hub_minimises_the_penalised_loss_of_the_average():
    net, bay, x = hub()
    y = averaged(net, bay, x, torch.tensor([0.8, 0.0, -0.5, 0.1])).detach() + 0.3 * torch.randn(20, 6)
    state, tried = copy.deepcopy(net.state_dict()), []

    def objective() -> Tensor:
        assert not torch.is_grad_enabled()
        w = bay.state.chosen.dense(4)
        tried.append(w)
        assert_close(net(x), averaged(net, bay, x, w))
        return F.mse_loss(net(x), y)

    bay.use("c")
    before = bay.state.chosen
    found = methods.lora_hub(bay, objective)
    assert list(found) == list("abcd") and len(tried) <= 40 and max(w.abs().max() for w in tried) <= 1.5
    value = lambda w: F.mse_loss(averaged(net, bay, x, w), y) + 0.05 / 4 * w.abs().sum()
    w = torch.tensor(list(found.values()))
    assert value(w) <= min(value(one) for one in tried) + 1e-6  # the best of what was tried
    assert not tried[0].any() and value(w) < value(tried[0])
    assert bay.state.chosen is before and all(p.grad is None for p in net.parameters())
    assert all(torch.equal(state[key], tensor) for key, tensor in net.state_dict().items())
    tried.clear()
    few = methods.lora_hub(bay, objective, ["d", "b"], steps=1)
    assert list(few) == ["d", "b"] and len(tried) == 4 and not any(w[[0, 2]].any() for w in tried)


def test_weights_by_gradient_are_these_steps():
    net, bay, x = hub()
    y, z = torch.randn(20, 6), torch.zeros(4, requires_grad=True)
    adam = torch.optim.Adam([z], 0.2)
    for _ in range(5):
        adam.zero_grad()
        F.mse_loss(averaged(net, bay, x, z.softmax(0)), y).backward()
        adam.step()
    net.zero_grad()
    found = methods.lora_hub(bay, lambda: F.mse_loss(net(x), y), steps=5, by="gradient")
    assert_close(torch.tensor(list(found.values())), z.softmax(0).detach(), rtol=1e-4, atol=1e-5)
    assert bay.state.chosen is None and all(p.grad is None or not p.grad.any() for p in net.parameters())


@pytest.mark.parametrize("aggregator, kind", [
    (mb.ParameterAverage("deltas"), mb.LoRA(2)),
    (mb.WeightedSum(), mb.Bottleneck(3)),
    (mb.ParameterAverage(), mb.IA3()),
], ids=str)  # fmt: skip
def test_lora_hub_weighs_other_kinds_under_other_aggregators(aggregator, kind):
    net, bay, x = hub(3, aggregator, kind)
    wanted = {"a": 0.7, "b": 0.3, "c": 0.0}
    with torch.no_grad():
        y = bay.use(wanted) and net(x)
    for by in ("search", "gradient"):
        found = methods.lora_hub(bay, lambda: F.mse_loss(net(x), y), steps=150, by=by, l1=0.0)
        with torch.no_grad():
            near = F.mse_loss(bay.use(found) and net(x), y)
            assert near < 0.02 * F.mse_loss(bay.use(dict.fromkeys("abc", 1 / 3)) and net(x), y)


def test_the_search_keeps_its_bounds_and_its_budget():
    tried = []

    def loss(w: list[float]) -> float:
        tried.append(w)
        return -w[0] + (w[1] - 0.5) ** 2

    best = methods.search_weights(loss, 3, 60, l1=0.3, limit=0.75)
    np.testing.assert_allclose(best, [0.75, 0.45, 0.0], atol=0.03)
    assert tried[0] == [0, 0, 0] and len(tried) <= 60 and np.abs(tried).max() <= 0.75
    assert methods.search_weights(lambda w: 0.0, 1, 1) == [0.0]
    half = methods.search_weights(lambda w: (w[0] - 0.2) ** 2 if w[0] < 0.3 else float("nan"), 1, 30, l1=0.0)
    assert half == [pytest.approx(0.2, abs=0.01)]  # what is not finite is far
    with pytest.raises(CompositionError, match="not finite in any of"):
        methods.search_weights(lambda w: float("inf"), 2, 10)


def test_weights_that_can_t_be_sought_raise():
    net, bay, x = hub()
    loss = lambda: net(x).square().mean()
    with pytest.raises(CompositionError, match=r"by='descent'.*'search' or 'gradient'"):
        methods.lora_hub(bay, loss, by="descent")
    with pytest.raises(CompositionError, match=r"steps=0"):
        methods.lora_hub(bay, loss, steps=0)
    with pytest.raises(BayError, match=r"lora_hub\(names=\['z'\]\).*'a'"):
        methods.lora_hub(bay, loss, ["z"])
    with pytest.raises(CompositionError, match="lora_hub: the objective does not depend on how bay 'task'"):
        methods.lora_hub(bay, lambda: net(x, task="a").sum(), by="gradient")
    with pytest.raises(CompositionError, match="lora_hub: the objective has no gradient"):
        methods.lora_hub(bay, lambda: net(x).sum().detach(), by="gradient")
    assert bay.state.chosen is None


# ColD Fusion


def test_cold_fusion_averages_what_contributors_make_of_one_start():
    theta, head, count = torch.tensor([1.0, 2.0]), torch.zeros(2), torch.tensor(0)
    seen = []

    def contributor(factor: float):
        def finetune() -> None:
            seen.append(theta.clone())
            theta.mul_(factor)
            head.add_(1)  # not shared: it stays
            count.add_(3)

        return finetune

    told = []
    several = {"a": contributor(1.0), "b": contributor(2.0), "c": contributor(6.0)}
    said = methods.cold_fusion([theta, theta, count], several, 2, after=lambda r, who: told.append((r, theta.tolist())))
    assert said == [["a", "b", "c"]] * 2 and told == [(0, [3.0, 6.0]), (1, [9.0, 18.0])]
    assert torch.equal(torch.stack(seen), torch.tensor([[1.0, 2.0]] * 3 + [[3.0, 6.0]] * 3))
    assert head.tolist() == [6, 6] and count.item() == 6
    some = [methods.cold_fusion([torch.ones(1)], several, 8, 2, seed) for seed in (0, 0, 1)]
    assert some[0] == some[1] != some[2] and all(len(set(who)) == 2 for who in some[0])
    assert {name for who in some[0] for name in who} == {"a", "b", "c"}
    one = torch.tensor([0.1, 1e-3]).bfloat16()
    methods.cold_fusion([one], {"alone": lambda: one.mul_(3)})
    assert torch.equal(one, torch.tensor([0.1, 1e-3]).bfloat16() * 3)  # one alone is that one


def test_cold_fusion_of_a_module_leaves_all_else():
    net, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(3, 12, 8)
    bay = moved(mb.attach(net, nn.Linear, {"all": mb.LoRA(2), "other": mb.LoRA(2)}, name="task"))
    y, state = torch.randn(3, 12, 3), copy.deepcopy(dict(net.named_parameters()))

    def train(i: int, net: nn.Module, parameters: list[nn.Parameter]) -> None:
        optimiser = torch.optim.AdamW(parameters, 0.01)
        for _ in range(3):
            optimiser.zero_grad()
            F.mse_loss(net(x[i], task="all"), y[i]).backward()
            optimiser.step()

    alone = []
    for i in range(3):
        twin = copy.deepcopy(net)
        train(i, twin, bays(twin)["task"].parameters("all"))
        alone.append(dict(twin.named_parameters()))
    finetune = {str(i): lambda i=i: train(i, net, bay.parameters("all")) for i in range(3)}
    methods.cold_fusion(bay.parameters("all"), finetune)
    mine = {id(p) for p in bay.parameters("all")}
    for name, p in net.named_parameters():
        if id(p) in mine:
            assert_close(p, torch.stack([one[name] for one in alone]).mean(0))
        else:
            assert torch.equal(p, state[name])


def test_one_round_is_the_average_of_models():
    net, x, y = (
        nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)),
        torch.randn(4, 12, 8),
        torch.arange(12) % 3,
    )

    def train(i: int, net: nn.Module) -> nn.Module:
        optimiser = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        for _ in range(4):
            optimiser.zero_grad()
            F.cross_entropy(net(x[i]), y).backward()
            optimiser.step()
        return net

    apart = [train(i, copy.deepcopy(net)).state_dict() for i in range(4)]
    methods.cold_fusion(net.state_dict().values(), {str(i): lambda i=i: train(i, net) for i in range(4)})
    want = merging.average(apart)
    for name, tensor in net.state_dict().items():
        assert_close(tensor, want[name])


def test_cold_fusion_nears_the_joint_optimum():
    """Of quadratic losses of one curvature, where the mean of optima is the joint one: θ_r = θ* + q^r (θ_0 − θ*)."""
    optima, theta = torch.randn(5, 7, dtype=torch.float64), nn.Parameter(torch.zeros(7, dtype=torch.float64))
    curvature = torch.linspace(0.5, 2, 7, dtype=torch.float64)
    start, errors = theta.detach().clone(), []

    def finetune(i: int) -> None:
        optimiser = torch.optim.SGD([theta], 0.1)
        for _ in range(3):
            optimiser.zero_grad()
            (curvature * (theta - optima[i]).square() / 2).sum().backward()
            optimiser.step()

    best = optima.mean(0)
    after = lambda r, who: errors.append((theta.detach() - best).clone())
    methods.cold_fusion([theta], {str(i): lambda i=i: finetune(i) for i in range(5)}, 10, after=after)
    for r, error in enumerate(errors):
        assert_close(error, (1 - 0.1 * curvature) ** (3 * (r + 1)) * (start - best))


def test_a_round_that_fails_leaves_its_start():
    theta = torch.ones(3)

    def fail() -> None:
        theta.fill_(7)
        raise KeyError("out of data")

    with pytest.raises(KeyError, match="out of data"):
        methods.cold_fusion([theta], {"a": lambda: theta.mul_(2), "b": fail})
    assert theta.tolist() == [1, 1, 1]
    with pytest.raises(MergeError, match="'b' left weights that are not finite"):
        methods.cold_fusion([theta], {"a": lambda: theta.mul_(2), "b": lambda: theta.div_(0)})
    assert theta.tolist() == [1, 1, 1]
    for arguments in ({"rounds": 0}, {"k": 0}, {"k": 3}):
        with pytest.raises(CompositionError, match=r"cold_fusion\(rounds=.*'a', 'b'"):
            methods.cold_fusion([theta], {"a": fail, "b": fail}, **arguments)
    with pytest.raises(CompositionError, match="0 tensors"):
        methods.cold_fusion([], {"a": fail})
