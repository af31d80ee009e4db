"""Scouts: their loss is expectation maximisation, they move where they are not used, and they find the rules."""

import copy

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.testing import assert_close

import modbay as mb
from modbay.bench import FAMILIES
from modbay.core import describe
from modbay.errors import CallError, CompositionError, LabelError

SITE = describe("site", nn.Linear(5, 4))


def built(router: mb.Scouts, n: int = 3) -> mb.Scouts:
    """Scouts whose gate is not flat."""
    torch.manual_seed(0)
    router.build([f"m{i}" for i in range(n)], SITE)
    nn.init.normal_(router.gate, std=0.02)
    return router


def context(y: torch.Tensor, mask: torch.Tensor | None = None) -> mb.Context:
    return mb.Context(labels={"target": y}, arguments={} if mask is None else {"attention_mask": mask})


@pytest.mark.parametrize("loss", ["absolute", "squared", "binary", "classes"])
def test_the_loss_has_the_gradients_of_a_mixture_s_likelihood(loss):
    """−Σ log Σ_i p_i exp(−ℓ_i/τ) has those of EM: of experts up to 1/τ, of the gate as they are."""
    outputs = 3 if loss == "classes" else 1
    router, x = built(mb.Scouts(loss=loss, search=0, outputs=outputs)), torch.randn(7, 5)
    y = torch.randint(3, (7,)) if loss == "classes" else (torch.randn(7) > 0).float()
    learned = (router.gate, router.scouts, router.bias)
    gate, *experts = torch.autograd.grad(router(x, context(y)).losses["scouts"], learned)
    several = 10 * (torch.einsum("nod,bd->bno", router.scouts, x) + router.bias)
    guess = several[..., 0]
    each = {
        "absolute": lambda: (guess - y[:, None]).abs(),
        "squared": lambda: (guess - y[:, None]) ** 2,
        "binary": lambda: nn.functional.softplus(guess) - y[:, None] * guess,
        "classes": lambda: several.logsumexp(-1) - several[torch.arange(7), :, y],
    }[loss]()
    tau = 1.0 if loss in ("binary", "classes") else each.mean().detach() * (2 if loss == "squared" else 1)
    log_p = (router.speed * x @ router.gate.mT).log_softmax(-1)
    want, *of_experts = torch.autograd.grad(-torch.logsumexp(log_p - each / tau, -1).mean(), learned)
    assert_close(gate, want)
    assert_close(experts, [tau * tensor for tensor in of_experts])


def test_the_deviation_follows_the_errors():
    router, x, y = built(mb.Scouts(search=0)), torch.randn(9, 5), torch.randn(9)
    first = router(x, context(y))
    each = (10 * (torch.einsum("nod,bd->bn", router.scouts, x) + router.bias[:, 0]) - y[:, None]).abs()
    log_p = (router.speed * x @ router.gate.mT).log_softmax(-1)
    q = (log_p - each / each.mean()).softmax(-1)
    assert_close(router.error, (q * each).sum(-1).mean())
    assert_close(first.losses["scouts"], (q * (each - log_p)).sum(-1).mean())
    q = (log_p - each / router.error).softmax(-1)
    assert_close(router(x, context(y)).losses["scouts"], (q * (each - log_p)).sum(-1).mean())
    assert torch.equal(first.index[:, 0], log_p.argmax(-1)) and first.weights is None


def test_padding_counts_for_nothing():
    x, y = torch.randn(2, 4, 5), torch.randn(2, 4)
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    padded, dense = built(mb.Scouts(search=0)), built(mb.Scouts(search=0))
    for router in (padded, dense):
        router.error.fill_(0.5)
    got = padded(x, context(y, mask)).losses["scouts"]
    assert_close(got, dense(x[mask.bool()], context(y[mask.bool()])).losses["scouts"])
    assert_close(padded.used, dense.used)
    assert_close(padded.error, dense.error)


def test_a_class_below_nought_teaches_nothing():
    router, x = built(mb.Scouts(loss="classes", outputs=3, search=0)), torch.randn(4, 5)
    router(x, context(torch.full((4,), -100))).losses["scouts"].backward()
    for tensor in router.parameters():
        assert_close(tensor.grad, torch.zeros_like(tensor))


def test_the_least_used_scout_moves_to_the_one_that_errs_most():
    router, x, y = built(mb.Scouts(search=9, every=4)), torch.randn(6, 5), torch.randn(6)
    router.used.copy_(torch.tensor([0.1, 0.5, 0.4]))
    router.blame.copy_(torch.tensor([0.1, 0.2, 0.9]))
    before, twin = copy.deepcopy(router), copy.deepcopy(router)
    for call in range(12):
        for each in (router, twin):
            each(x, context(y))
        assert torch.equal(router.scouts, before.scouts) == (call < 4)
        if call == 4:
            far = [(router.scouts[0] - router.scouts[i]).norm() for i in (1, 2)]
            assert far[1] < far[0] and far[1] < 0.6 * before.scouts[2].norm()
            assert torch.equal(router.scouts[1:], before.scouts[1:])
        for each in (router, twin):  # as they were until they move, and from then on all are used
            each.used.copy_(before.used if call < 4 else torch.full((3,), 1 / 3))
            each.blame.copy_(before.blame)
    assert torch.equal(router.scouts, twin.scouts)  # the same draws in every process
    assert not router.searching and int(router.calls) >= 9


def test_x_learns_from_scouts_while_they_search_and_never_from_the_gate():
    for search, learns in ((0, False), (5, True)):
        x = torch.randn(6, 5, requires_grad=True)
        routing = built(mb.Scouts(search=search))(x, context(torch.randn(6)))
        assert not routing.index.requires_grad
        routing.losses["scouts"].backward()
        assert (x.grad is not None) == learns


def test_scouts_find_the_rules_of_the_benchmark():
    """Each row says its rule among other things; no label does, and a module could learn all rules alone."""
    rules, draw = 4, torch.Generator().manual_seed(0)
    data, router = FAMILIES["mlp"](rules, seed=0), mb.Scouts(search=300, every=50)
    torch.manual_seed(0)
    router.build([f"m{i}" for i in range(rules)], mb.Site("x", inputs=2 + rules, outputs=1))
    optimiser = torch.optim.Adam(router.parameters(), lr=3e-3)

    def batch(n: int):
        rows = data.draw(n, draw)
        return torch.cat([rows.x, nn.functional.one_hot(rows.rule, rules)], -1), rows

    for _ in range(400):
        x, rows = batch(128)
        optimiser.zero_grad()
        router(x, context(rows.y)).losses["scouts"].backward()
        optimiser.step()
    x, rows = batch(2000)
    found = router.eval()(x, mb.Context()).index[:, 0]
    table = torch.zeros(rules, rules).index_put_((rows.rule, found), torch.tensor(1.0), accumulate=True)
    row, column = linear_sum_assignment(-table.numpy())
    assert table[row, column].sum() / table.sum() > 0.95


def test_in_a_bay_the_target_is_a_label_of_the_call():
    net = nn.Sequential(nn.Linear(5, 4))
    bay = mb.attach(net, at="0", modules={n: mb.LoRA(2) for n in "ab"}, router=mb.Scouts("y", outputs=2))
    x, y = torch.randn(3, 5), torch.randn(3, 2)
    net.train()(x, y=y)
    assert bay.losses()["modules.scouts"].requires_grad
    with pytest.raises(LabelError, match="'y'"):
        net(x)
    net.eval()(x)
    assert not bay.losses()
    bay.freeze()
    net.train()


@pytest.mark.parametrize("shape", [(4,), (3, 2), (2, 3)])
def test_a_target_of_other_rows_is_refused(shape):
    with pytest.raises(CallError, match="target"):
        built(mb.Scouts())(torch.randn(3, 5), context(torch.randn(shape)))


def test_a_class_that_there_is_not_is_refused():
    with pytest.raises(CallError, match="the class 3"):
        built(mb.Scouts(loss="classes", outputs=3))(torch.randn(2, 5), context(torch.tensor([0, 3])))


@pytest.mark.parametrize(
    "arguments", [{"loss": "hinge"}, {"outputs": 0}, {"search": -1}, {"every": 0}, {"speed": 0.0}, {"by": "batch"}]
)
def test_arguments_are_checked(arguments):
    with pytest.raises(CompositionError, match=r"Scouts"):
        mb.Scouts(**arguments)
