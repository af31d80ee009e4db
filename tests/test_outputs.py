"""Aggregators over outputs, inputs and functions: ensembles, fusion, workspaces, programs; each by its formula."""

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import modbay as mb
from modbay import losses, methods
from modbay.errors import BayError, CompositionError, LabelError
from tiny import llama, tokens

ALPHA = torch.tensor([0.2, 0.5, 1.3])


def layer(kind, aggregator, f=None, names="abc") -> mb.Modular:
    f = nn.Linear(8, 8) if f is None else f
    made = mb.Modular(f, dict.fromkeys(names, kind), mb.Uniform(), aggregator)
    with torch.no_grad():
        for parameter in made.parts.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def every(weights: Tensor = ALPHA) -> mb.Routing:
    return mb.Routing(weights=weights)


def change(made: mb.Modular, name: str, x: Tensor, y: Tensor) -> Tensor:
    """What an adapter adds, by its own kind."""
    part = made.parts._modules[name]
    return part.kind.change(part.tensors(), x, y, mb.Context())


def head(made: mb.Modular, name: str, x: Tensor) -> Tensor:
    part = made.parts._modules[name]
    return part.kind.forward(part.tensors(), x, None, mb.Context())


# Sums, sequences, parallel modules


def test_a_weighted_sum_is_written_out():
    made, x = layer(mb.Bottleneck(3), mb.WeightedSum()), torch.randn(4, 5, 8)
    y = made.f(x)
    each = torch.stack([change(made, name, x, y) for name in "abc"], -1)
    assert_close(made(x, routing=every()), y + each @ ALPHA)
    own = torch.rand(4, 5, 3)
    assert_close(made(x, routing=every(own)), y + (each * own.unsqueeze(2)).sum(-1))
    made, index = layer(mb.FeedForward(4), mb.Mixture()), torch.tensor([[0, 2], [1, -1], [2, 1], [-1, -1]])
    each = torch.stack([head(made, name, x) for name in "abc"] + [torch.zeros_like(x)])
    want = torch.stack([each[a, r] + each[b, r] for r, (a, b) in enumerate(index.tolist())])
    assert_close(made(x, routing=mb.Routing(index=index)), want)


def test_the_order_of_a_sequence_matters():
    made, x = layer(mb.Bottleneck(3), mb.Sequence(["a", "b"]), names="ab"), torch.randn(4, 8)
    y = made.f(x)
    first = y + change(made, "a", x, y)
    one = made(x, routing=every(torch.ones(2)))
    assert_close(one, first + change(made, "b", x, first))
    made.aggregator = mb.Sequence(["b", "a"])
    assert not torch.allclose(made(x, routing=every(torch.ones(2))), one)
    with torch.no_grad():
        for name, parameter in made.parts._modules["b"].named_parameters():
            if "up" in name:
                parameter.zero_()  # an adapter that does nothing, wherever it stands
    assert_close(made(x, routing=every(torch.ones(2))), first)


def test_parallel_outputs_are_those_of_each_alone():
    """Parallel(a, b, c)[i] is module i alone; a batch that is split has rows of each."""
    net, x = nn.Linear(8, 8), torch.randn(6, 8)
    bay = mb.attach(net, "", {n: mb.Bottleneck(3) for n in "abc"}, mb.Uniform(), mb.Stack(), name="task")
    with torch.no_grad():
        for parameter in bay.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    stack = net(x)
    each = [bay.use(name) and net(x)[0] for name in "abc"]
    assert_close(stack, torch.stack(each))
    split = mb.Modular(None, {}, mb.ByLabel("task"), mb.WeightedSum(), features=8)
    split.f = nn.Linear(8, 8)
    for name in "ab":
        split.inventory.names.append(name)
        split.plug(name, mb.FeedForward(3))
    split.router.build(["a", "b"], split.site)
    rows = ["a"] * 2 + ["b"] * 4
    assert_close(split(x, task=rows), torch.cat([split(x[:2], task="a"), split(x[2:], task="b")]))


# Ensembles


def distributions(made: mb.Modular, x: Tensor) -> Tensor:
    return torch.stack([head(made, name, x).softmax(-1) for name in "abc"], -1)  # (b, classes, n)


def test_an_ensemble_mixes_distributions():
    made, x = layer(mb.Head(5), mb.Ensemble()), 3 * torch.randn(4, 8)
    p = distributions(made, x)
    assert_close(made(x, routing=every()).exp(), p @ (ALPHA / ALPHA.sum()))
    own = torch.tensor([[0.1, 0.9, 0.0], [1.0, 1.0, 2.0], [0.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
    got = made(x, routing=every(own))
    want = torch.einsum("bcn,bn->bc", p, own / own.sum(-1, keepdim=True).clamp(min=1e-9))
    assert_close(got.exp()[[0, 1, 3]], want[[0, 1, 3]])
    index = torch.tensor([[0, 2], [1, 1], [2, -1], [1, 0]])
    pairs = torch.stack([p[r][:, [i for i in row if i >= 0]].mean(-1) for r, row in enumerate(index.tolist())])
    got = made(x, routing=mb.Routing(index=index))  # f has 8 classes, and a slot has no module: heads are filled up
    assert_close(got.exp(), nn.functional.pad(pairs, (0, 3)))
    flipped = made(x, routing=mb.Routing(index=index.flip(-1)))
    assert_close(flipped, got)  # the order of a row's modules does not matter


def test_an_ensemble_of_logits_is_a_product_of_experts():
    made, x = layer(mb.Head(5), mb.Ensemble("logits")), torch.randn(4, 8)
    share = ALPHA / ALPHA.sum()
    got = made(x, routing=every())
    assert_close(got, torch.stack([head(made, name, x) for name in "abc"], -1) @ share)
    product = (distributions(made, x) ** share).prod(-1)
    assert_close(got.softmax(-1), product / product.sum(-1, keepdim=True))


@pytest.mark.parametrize("of", ["probabilities", "logits"])
def test_one_of_an_ensemble_predicts_as_alone(of):
    made, x = layer(mb.LoRA(2), mb.Ensemble(of), nn.Linear(8, 5)), torch.randn(3, 8)
    alone = copy.deepcopy(made)
    alone.aggregator = mb.WeightedSum()
    routing = mb.Routing(index=torch.tensor([[1], [-1], [0]]), weights=torch.tensor([[0.4], [1.0], [1.0]]))
    want = alone(x, routing=mb.Routing(index=routing.index))
    got = made(x, routing=routing)
    assert_close(got.log_softmax(-1), want.log_softmax(-1))
    assert_close(got[1], made.f(x)[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_ensemble_learns_its_weights(dtype):
    """Also that of a module at nought, and where no module gives a class any probability."""
    made, x = layer(mb.Head(5), mb.Ensemble()).to(dtype), torch.randn(4, 8, dtype=dtype)
    weights = torch.tensor([0.5, 0.0, 1.5], dtype=torch.float64, requires_grad=True)
    got = made(x, routing=every(weights))
    assert got.dtype == dtype
    got.double()[:, 1].sum().backward()
    p = distributions(made.double(), x.double())[:, 1]  # (b, n)
    want = (p / (p @ weights.detach()).unsqueeze(-1) - 1 / weights.detach().sum()).sum(0)
    assert_close(weights.grad, want, **({"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}))
    outputs = torch.full((2, 1, 3), -math.inf).index_fill(2, torch.tensor([0]), 0.0).requires_grad_()
    mixed = mb.aggregation._ensemble._mixture(outputs.log_softmax(-1), torch.ones(2, 1, 1), torch.tensor([[2.0]]))
    mixed[..., 0].sum().backward()
    assert mixed.tolist() == [[0.0, -math.inf, -math.inf]] and outputs.grad.isfinite().all()


def test_an_ensemble_of_other_classes_raises():
    made = mb.Modular(nn.Linear(8, 2), {"a": mb.Head(3), "b": mb.Head(4)}, mb.Uniform(), mb.Ensemble())
    with pytest.raises(CompositionError, match="different classes"):
        made(torch.randn(2, 8))
    mixed = made(torch.randn(2, 8), routing=mb.Routing(index=torch.tensor([[0], [1]])))
    assert_close(mixed.exp().sum(-1), torch.ones(2)) and mixed[0, 3] == -math.inf
    with pytest.raises(CompositionError, match="of='votes'"):
        mb.Ensemble("votes")
    with pytest.raises(CompositionError, match="no output of its own"):
        mb.Modular(nn.Linear(8, 8), {"a": mb.Prompt(3)}, mb.Uniform(), mb.Ensemble())


def test_an_ensemble_compiles_and_is_kept_as_a_file(tmp_path):
    made, x = layer(mb.Head(5), mb.Ensemble()), torch.randn(4, 8)
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    for routing in (every(), every(torch.rand(4, 3)), mb.Routing(index=torch.tensor([[0], [2], [1], [1]]))):
        assert_close(compiled(x, routing=routing), made(x, routing=routing))
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 5))
    twin = copy.deepcopy(net)
    bay = mb.attach(net, "1", {"a": mb.Head(5), "b": mb.Head(5)}, mb.Fixed([0.3, 0.7]), mb.Ensemble("logits"))
    bay.save(tmp_path)
    again = mb.load(twin, tmp_path)["modules"]
    assert again.state.aggregator.of == "logits"
    assert_close(twin(x), net(x), rtol=0, atol=0)


# A posterior over domains


def bayes(logits: Tensor, targets: Tensor, prior: Tensor, last: int | None) -> Tensor:
    """p(D | x_<s) of one row, by a loop: logits (k, t, v), targets (t,)."""
    out = []
    for s in range(len(targets) + 1):
        told = [t for t in range(s) if targets[t] != -100]
        told = told if last is None else told[len(told) - min(last, len(told)) :]
        joint = prior.clone()
        for t in told:
            joint = joint * logits[:, t].softmax(-1)[:, targets[t]]
        out.append(joint / joint.sum())
    return torch.stack(out, -1)


@pytest.mark.parametrize("last", [None, 1, 3])
def test_the_posterior_is_bayes_rule(last):
    logits, targets = torch.randn(4, 3, 7, 11), torch.randint(11, (4, 7))
    targets[0, 5:] = targets[1, :3] = -100  # padding on either side
    targets[2, 3] = -100
    prior = torch.tensor([0.2, 0.5, 0.3])
    got = losses.posterior(logits, targets, prior.log(), last).exp()
    for r in range(4):
        assert_close(got[r], bayes(logits[r], targets[r], prior, last))
    narrow = losses.posterior(logits.bfloat16(), targets, prior.log(), last)
    assert narrow.dtype == torch.float32 and (narrow.exp() - got).abs().max() < 0.1
    mixed = losses.marginal_tokens(logits, got[..., :-1].log())
    assert_close(mixed.exp(), torch.einsum("bkt,bktv->btv", got[..., :-1], logits.softmax(-1)))


def of_domains(**more) -> tuple[nn.Module, mb.Bay]:
    model = llama().eval()
    bay = mb.attach(model, "*.mlp", {name: mb.Full() for name in ("news", "law", "code")}, name="domain", **more)
    with torch.no_grad():
        for parameter in bay.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model, bay


def test_domains_are_mixed_by_their_posterior():
    model, bay = of_domains()
    ids, mask = tokens(3, 6), torch.ones(3, 6, dtype=torch.long)
    mask[0, 4:] = mask[1, :2] = 0
    mixture = methods.DomainMixture(bay, prior=[1.0, 2.0, 1.0])
    log_p, after = mixture(input_ids=ids, attention_mask=mask)
    each = [model(input_ids=ids, attention_mask=mask, domain=name).logits for name in bay.names()]
    targets = ids.roll(-1, 1).masked_fill(~(mask.bool() & mask.roll(-1, 1).bool()), -100)
    targets[:, -1] = -100
    assert_close(after, losses.posterior(torch.stack(each, 1), targets, torch.tensor([0.25, 0.5, 0.25]).log()))
    want = sum(after[:, i, :-1].exp().unsqueeze(-1) * each[i].softmax(-1) for i in range(3))
    assert_close(log_p.exp(), want)
    sure = methods.DomainMixture(bay, prior=[0.0, 1.0, 0.0])(input_ids=ids)[0]
    assert_close(sure, model(input_ids=ids, domain="law").logits.log_softmax(-1))
    first = methods.DomainMixture(bay, k=1)
    log_p, after = first(input_ids=ids)
    best = after[:, :, :-1].argmax(1)  # (b, t)
    alone = torch.stack([model(input_ids=ids, domain=name).logits.log_softmax(-1) for name in bay.names()], 1)
    assert_close(log_p, alone.gather(1, best[:, None, :, None].expand(-1, 1, -1, alone.shape[-1]))[:, 0])


def test_the_prior_is_a_moving_average_of_posteriors():
    _, bay = of_domains()
    ids = tokens(3, 6)
    mixture = methods.DomainMixture(bay, last=1)
    prior = torch.full((3,), 1 / 3)
    for row in range(3):
        after = methods.DomainMixture(bay, prior=prior, last=1)(input_ids=ids[row : row + 1])[1][0, :, -1].exp()
        prior = 0.7 * prior + 0.3 * after
    assert_close(mixture.update(input_ids=ids), prior.detach())
    assert_close(mixture.prior.sum(), torch.tensor(1.0))


def test_a_mixture_of_domains_is_as_good_as_knowing_the_domain():
    """Of texts that change their domain, the mixture is likelier than any one expert's guess, and near the best."""

    class Chain(nn.Module):  # words of two domains with other successors
        def __init__(self):
            super().__init__()
            self.next = nn.Embedding(6, 6)

        def forward(self, input_ids):
            return type("Out", (), {"logits": self.next(input_ids)})()

    net = Chain()
    bay = mb.attach(net, "next", {"a": mb.Full(), "b": mb.Full()}, name="domain")
    tables = torch.randn(2, 6, 6) * 2
    with torch.no_grad():
        for name, table in zip("ab", tables, strict=True):
            next(iter(bay.parameters(name))).copy_(table)
    rows = []
    for r in range(64):
        ids = [r % 6]
        for t in range(40):
            p = tables[(r + (t >= 20)) % 2][ids[-1]].softmax(-1)
            ids.append(int(torch.multinomial(p, 1)))
        rows.append(ids)
    ids = torch.tensor(rows)
    score = lambda log_p: log_p[:, :-1].gather(-1, ids[:, 1:, None]).mean()
    alone = [score(net(input_ids=ids, domain=name).logits.log_softmax(-1)) for name in "ab"]
    late = score(methods.DomainMixture(bay, last=5)(input_ids=ids)[0])
    told = torch.stack([net(input_ids=ids, domain=name).logits.log_softmax(-1) for name in "ab"])
    right = torch.tensor([[(r + (t >= 20)) % 2 for t in range(41)] for r in range(64)])
    known = score(torch.where((right == 0).unsqueeze(-1), told[0], told[1]))
    assert late > max(alone) + 0.3 and late > known - 0.3


def test_what_a_mixture_of_domains_can_t_be_raises():
    _, bay = of_domains()
    with pytest.raises(CompositionError, match="a probability for each"):
        methods.DomainMixture(bay, prior=[0.5, 0.5])
    with pytest.raises(CompositionError, match="k=4"):
        methods.DomainMixture(bay, k=4)
    with pytest.raises(BayError, match="input_ids"):
        methods.DomainMixture(bay)(inputs_embeds=torch.zeros(1, 2, 32))
    _, bay = of_domains(router=mb.Uniform())
    with pytest.raises(LabelError, match="reads the labels"):
        methods.DomainMixture(bay)


# Entropy at test time


def classifier() -> tuple[nn.Module, mb.Bay]:
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 4)).eval()
    bay = mb.attach(net, ["0", "2"], {n: mb.Bottleneck(3) for n in "abc"}, name="language")
    with torch.no_grad():
        for parameter in bay.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return net, bay


@pytest.mark.parametrize("per_site", [True, False])
def test_entropy_is_minimised_by_these_steps(per_site):
    net, bay = classifier()
    net.double()
    x, sites = torch.randn(5, 8, dtype=torch.float64), list(bay.modulars)

    def entropy(w: Tensor) -> Tensor:
        h = x
        for i in range(2):
            site = bay.modulars[sites[i]]
            y = nn.functional.linear(h, *[t.detach() for t in site.site.module.parameters() if t.shape[0] == 8][:2])
            alpha = w[i if per_site else 0].softmax(-1)
            h = y + sum(a * change(site, name, h, y) for a, name in zip(alpha, "ac", strict=True))
            h = h.tanh() if i == 0 else h
        log_p = nn.functional.linear(h, net[3].weight, net[3].bias).log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1).mean()

    w = torch.zeros(2 if per_site else 1, 2, dtype=torch.float64)
    for _ in range(3):
        slope = torch.zeros_like(w)
        for i, j in itertools.product(range(len(w)), range(2)):
            step = torch.zeros_like(w)
            step[i, j] = 1e-5
            slope[i, j] = (entropy(w + step) - entropy(w - step)) / 2e-5
        w = w - 10 * slope
    with methods.minimal_entropy(bay, lambda: losses.entropy(net(x)), ["a", "c"], 3, per_site=per_site) as alpha:
        assert_close(alpha, w.softmax(-1).float(), rtol=1e-4, atol=1e-5)


def test_minimal_entropy_makes_a_model_surer_and_leaves_it_as_it_was():
    net, bay = classifier()
    x = torch.randn(5, 8)
    bay.use({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3})
    before, state = net(x), copy.deepcopy(net.state_dict())
    with torch.no_grad(), methods.minimal_entropy(bay, lambda: losses.entropy(net(x)), lr=1.0) as alpha:
        after = net(x)
    assert alpha.shape == (2, 3) and losses.entropy(after) < losses.entropy(before)
    assert_close(alpha.sum(-1), torch.ones(2))
    assert torch.equal(net(x), before) and all(p.grad is None for p in net.parameters())
    assert all(torch.equal(state[key], tensor) for key, tensor in net.state_dict().items())
    with methods.minimal_entropy(bay, lambda: losses.entropy(net(x)), steps=0) as alpha:
        assert_close(net(x), before)  # the ensemble that it starts from


def test_what_entropy_can_t_be_minimised_raises():
    net, bay = classifier()
    x = torch.randn(5, 8)
    with pytest.raises(BayError, match="'d'"), methods.minimal_entropy(bay, lambda: losses.entropy(net(x)), ["d"]):
        pass
    label = lambda: losses.entropy(net(x, language="a"))
    with pytest.raises(CompositionError, match="does not depend"), methods.minimal_entropy(bay, label):
        pass
    assert bay.state.chosen is None


# Outputs side by side


def test_joined_outputs_go_through_a_linear_map():
    made = layer(mb.Bottleneck(3), mb.Join(["c", "a", "b"]), nn.Linear(8, 6))
    x = torch.randn(4, 5, 8)
    y, w = made.f(x), made.aggregator.map
    z = {name: change(made, name, x, y) for name in "abc"}
    weigh = dict(zip("abc", ALPHA, strict=True))
    joined = torch.cat([y, *(weigh[name] * z[name] for name in "cab")], -1)
    assert_close(made(x, routing=every()), nn.functional.linear(joined, w.weight, w.bias))
    index = torch.tensor([[0, 2], [1, -1], [-1, -1], [2, 1]])
    for r, row in enumerate(index.tolist()):
        joined = torch.cat([y[r], *(z[name][r] * ("abc".index(name) in row) for name in "cab")], -1)
        assert_close(made(x, routing=mb.Routing(index=index))[r], nn.functional.linear(joined, w.weight, w.bias))


def test_a_join_starts_as_f_and_keeps_its_blocks(tmp_path):
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    twin, x = copy.deepcopy(net), torch.randn(3, 8)
    want = net(x)
    join = mb.Join(["a", "b"], "identity")
    bay = mb.attach(net, "1", dict.fromkeys("ab", mb.Bottleneck(3)), mb.Uniform(), join)
    assert_close(net(x), want)
    with torch.no_grad():
        for parameter in [*bay.parameters(), *join.parameters()]:
            parameter.add_(0.3 * torch.randn_like(parameter))
    bay.save(tmp_path)
    mb.load(twin, tmp_path)
    assert_close(twin(x), net(x), rtol=0, atol=0)
    bay.add("c", mb.Bottleneck(3))
    with pytest.raises(CompositionError, match=r"'c'.*no block"):
        net(x)
    before = bay.use("a") and net(x)
    bay.remove("c").remove("b").use("a")
    assert_close(net(x), before)
    with pytest.raises(CompositionError, match="maps to 8"):
        mb.Modular(nn.Linear(8, 6), {"a": mb.Bottleneck(2)}, mb.Uniform(), join)
    with pytest.raises(CompositionError, match="different names"):
        mb.Join(["a", "a"])


# A shared workspace


def specialists(workspace: mb.Workspace, n: int = 3) -> mb.Modular:
    networks = {"abcdef"[i]: nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for i in range(n)}
    return mb.Modular(None, networks, mb.Uniform(), workspace, features=8)


def written(ws: mb.Workspace, h: Tensor, memory: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(M, what each specialist reads) of one example: h (n, 8), M (slots, 8), two heads."""

    def attend(which, at, over, k):
        outs = []
        q, key, v = ws.maps[f"{which}_query"](at), ws.maps[f"{which}_key"](over), ws.maps[f"{which}_value"](over)
        for part in (slice(0, 4), slice(4, 8)):
            a = (q[:, part] @ key[:, part].T / 2).softmax(-1)
            for row in a:
                row[row.argsort()[: len(row) - k]] = 0.0
            outs.append(a @ v[:, part])
        return torch.cat(outs, -1)

    new = ws.norms[0](memory + attend("write", memory, h, k))
    new = ws.norms[1](new + ws.maps["hidden"](new).relu())
    told = ws.maps["gate"](torch.stack([(ws.scale * row).relu() for row in h]).mean(0))
    gates = torch.stack([ws.gate[s] @ memory[s].tanh() + told for s in range(len(memory))])
    take, keep = (gates[:, :8] + ws.bias[0]).sigmoid(), (gates[:, 8:] + ws.bias[1]).sigmoid()
    memory = take * new.tanh() + keep * memory
    return memory, attend("read", h, memory, len(memory))


def test_a_workspace_is_written_out():
    made = specialists(mb.Workspace(slots=2, k=2, attention_heads=2))
    x, c = torch.randn(3, 4, 8), mb.Context()
    with torch.no_grad():
        first = made(x, context=c)
        memory = c.state["workspace"]
        second = made(first, context=c)
        for b in range(4):
            h = torch.stack([part.network(x[i, b]) for i, part in enumerate(made.order)])
            m, read = written(made.aggregator, h, torch.eye(2, 8), 2)
            assert_close(memory[b], m)
            assert_close(first[:, b], h + read)
            h = torch.stack([part.network(first[i, b]) for i, part in enumerate(made.order)])
            m, read = written(made.aggregator, h, m, 2)
            assert_close(c.state["workspace"][b], m)
            assert_close(second[:, b], h + read)
    assert made(torch.randn(3, 4, 5, 8)).shape == (3, 4, 5, 8)


def test_specialists_learn_of_each_other_by_the_workspace():
    made, x = specialists(mb.Workspace(slots=1, k=1), 4), torch.randn(4, 2, 8)
    out = made(x)
    order = [2, 0, 3, 1]
    turned = copy.deepcopy(made)
    turned.order = [made.order[i] for i in order]
    assert_close(turned(x[order]), out[order])  # their order does not matter
    x.requires_grad_()
    (slope,) = torch.autograd.grad(made(x)[0].square().sum(), x)
    told = (slope.flatten(2).norm(dim=-1) > 1e-9)[:, 0]
    assert told.sum() >= 2  # the first hears of itself, and of the one that wrote
    made(x).sum().backward()
    assert all(p.grad is not None for p in made.aggregator.parameters())
    small = copy.deepcopy(made).bfloat16()(x.detach().bfloat16())
    assert small.dtype == torch.bfloat16 and (small - made(x)).norm() < 0.1 * made(x).norm()
    with pytest.raises(CompositionError, match="a stream for each module"):
        made(x[:2])
    c = mb.Context()
    made(x, context=c)
    with pytest.raises(CompositionError, match="the memory in"):
        made(x[:, :1], context=c)
    with pytest.raises(CompositionError, match="first axis"):
        mb.attach(nn.Sequential(nn.Linear(8, 8)), "0", {"a": mb.LoRA(2)}, aggregator=mb.Workspace())


# Programs


class Two(nn.Module):
    """Of two inputs side by side."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(16, 8)

    def forward(self, v: Tensor) -> Tensor:
        return self.map(v).tanh()


LAYOUTS = {
    "both": ("is", ("and", "red", "circle")),
    "deep": ("and", ("not", ("and", "red", ("not", "red"))), None),
    "one": "red",
}


def program(layouts=LAYOUTS) -> mb.Modular:
    networks = {name: nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for name in ("red", "circle", "not", "is")}
    layout = mb.Layout(layouts)
    router = mb.ByLabel("layout", layout.table())
    return mb.Modular(None, {**networks, "and": Two()}, router, layout, features=8)


def by_hand(made: mb.Modular, name: str, x: Tensor) -> Tensor:
    red, circle, no, yes, both = (part.network for part in made.order)
    pair = lambda a, b: both(torch.cat([a, b], -1))
    if name == "both":
        return yes(pair(red(x), circle(x)))
    return red(x) if name == "one" else pair(no(pair(red(x), no(red(x)))), x)


def test_a_layout_is_a_tree_of_modules():
    made, x = program(), torch.randn(4, 5, 8)
    for name in LAYOUTS:
        assert_close(made(x, layout=name), by_hand(made, name, x))
    assert made.aggregator.table() == {
        "both": ["red", "circle", "and", "is"], "deep": ["red", "not", "and"], "one": ["red"]
    }  # fmt: skip
    calls = []
    made.order[0].network.register_forward_hook(lambda *_: calls.append(1))
    made(x, layout="deep")
    assert len(calls) == 1  # what occurs twice runs once
    layout, kinds = mb.Layout({"l": ("b", ("a", None))}), dict.fromkeys("ab", mb.Bottleneck(3))
    adapters = mb.Modular(nn.Linear(8, 8), kinds, mb.ByLabel("layout", layout.table()), layout)
    y = adapters(x, layout="l")
    assert_close(y, adapters.f(adapters.f(x)))  # new adapters add nothing


def test_rows_of_several_layouts_share_a_batch():
    made, x = program(), torch.randn(6, 8)
    rows = ["one", "both", None, "deep", "both", "one"]
    want = torch.stack(
        [torch.zeros(8) if name is None else by_hand(made, name, v) for name, v in zip(rows, x, strict=True)]
    )
    got = made(x, layout=rows)
    assert_close(got, want)
    got.square().sum().backward()
    assert all(p.grad is not None for p in made.parameters())
    assert_close(made(x, layout=torch.tensor([2, 0, -1, 1, 0, 2])), want)
    again = mb.Layout(**made.aggregator.arguments())
    assert again.layouts == made.aggregator.layouts
    compiled = torch.compile(made, backend="aot_eager")
    assert_close(compiled(x, layout="deep"), by_hand(made, "deep", x))


def test_a_layout_that_is_no_tree_raises():
    for wrong in ((), (1, "red"), 3, ("and", ("red", 2)), (("red",), "and")):
        with pytest.raises(CompositionError, match="in it, which is no name"):
            mb.Layout({"wrong": wrong})
    with pytest.raises(LabelError, match="'blue'"):
        program({"l": ("is", "blue")})
    made = program()
    with pytest.raises(LabelError):
        made(torch.randn(2, 8), layout="other")
    made.aggregator.layouts["one"] = ["blue", None]
    with pytest.raises(CompositionError, match="runs 'blue'"):
        made(torch.randn(2, 8), layout="one")


# Attention over prompts


def prompted(**more) -> tuple[nn.Module, mb.Bay]:
    model = llama().eval()
    kinds = dict.fromkeys(["s", "u", "rte", "cb"], mb.Prompt(3, "uniform"))
    bay = mb.attach(model, modules=kinds, aggregator=mb.PromptAttention(["s", "u"], size=5, **more), name="task")
    with torch.no_grad():
        bay.state.aggregator.up.weight.normal_()
    return model, bay


def attended(model: nn.Module, bay: mb.Bay, target: str, x: Tensor, alpha: float = 1.0) -> Tensor:
    """P of one row, x (t, d) without padding."""
    a = bay.state.aggregator
    own = {name: next(iter(bay.parameters(name))) for name in ("s", "u", target)}
    query = a.norm(a.up.weight @ nn.functional.silu(a.down.weight @ x.max(0).values))
    temperature = a.temperature or math.e * 32
    share = torch.stack([p.max(0).values @ query / temperature for p in own.values()]).softmax(0)
    return alpha * own[target] + sum(w * p for w, p in zip(share, own.values(), strict=True))


def test_prompts_are_attended_by_the_input():
    model, bay = prompted(temperature=2.0)
    ids, mask = tokens(4, 6), torch.ones(4, 6, dtype=torch.long)
    mask[0, 4:] = 0
    rows = ["rte", "cb", None, "s"]
    with torch.no_grad():
        mixed = model(input_ids=ids, attention_mask=mask, task=rows).logits
        embed = model.get_input_embeddings()(ids)
        fronts = [attended(model, bay, r, embed[i][mask[i].bool()]) for i, r in enumerate(rows) if r]
        weighed = bay.use({"cb": 0.5}) and model(input_ids=ids[:1]).logits
        half = attended(model, bay, "cb", embed[0], 0.5)
        bay.detach()
        fronts.insert(2, embed[0, :0])
        for i, front in enumerate(fronts):
            real = embed[i][mask[i].bool()]
            out = model(inputs_embeds=torch.cat([front, real])[None]).logits[0, len(front) :]
            assert_close(mixed[i][mask[i].bool()], out, atol=1e-5, rtol=1e-5)
        out = model(inputs_embeds=torch.cat([half, embed[0]])[None]).logits[:, 3:]
        assert_close(weighed, out, atol=1e-5, rtol=1e-5)


def test_the_attention_to_prompts_learns_and_is_kept(tmp_path):
    model, bay = prompted()
    twin, ids = llama().eval(), tokens(2, 6)
    bay.freeze("s", "u")
    out = model(input_ids=ids, task=["rte", "rte"]).logits
    out.square().sum().backward()
    learn = [next(iter(bay.parameters(name))).grad for name in ("rte", "cb", "s")]
    assert learn[0].abs().sum() > 0 and learn[1] is None and learn[2] is None
    assert all(p.grad.abs().sum() > 0 for p in bay.state.aggregator.parameters())
    twin.load_state_dict({key: tensor for key, tensor in model.state_dict().items() if "_bay" not in key})
    bay.save(tmp_path)
    mb.load(twin, tmp_path)
    assert_close(twin(input_ids=ids, task="rte").logits, out, atol=1e-5, rtol=1e-5)
    narrow = model.bfloat16()(input_ids=ids, task="rte").logits
    assert narrow.dtype == torch.bfloat16 and (narrow - out).norm() < 0.05 * out.norm()
    bay.remove("u")
    with pytest.raises(CompositionError, match="lacks 'u'"):
        model(input_ids=ids, task="rte")
    with pytest.raises(CompositionError, match="is no prompt"):
        mb.attach(llama(), "*.q_proj", {"a": mb.LoRA(2)}, aggregator=mb.PromptAttention(["a"]))


# Prompts from prompts


@pytest.mark.parametrize("per_token", [False, True])
def test_a_prompt_starts_from_the_nearest(per_token):
    bay = mb.attach(llama(), modules=dict.fromkeys(["a", "b", "c", "new"], mb.Prompt(3, "uniform")), name="task")
    p = {name: next(iter(bay.parameters(name))) for name in bay.names()}
    with torch.no_grad():
        p["new"].copy_(p["b"] + 0.5 * p["c"] + 0.1 * torch.randn(3, 32))
    before = {name: tensor.detach().clone() for name, tensor in p.items()}
    cos = lambda a, b: a @ b / (a.norm() * b.norm())
    if per_token:
        pairs = list(itertools.product(range(3), range(3)))
        want = {n: sum(cos(before["new"][i], before[n][j]) for i, j in pairs) / 9 for n in "abc"}
    else:
        want = {n: cos(before["new"].mean(0), before[n].mean(0)) for n in "abc"}
    near = methods.spot(bay, "new", per_token=per_token)
    assert near == pytest.approx({n: s.item() for n, s in want.items()}, abs=1e-5)
    best = sorted("abc", key=lambda n: -near[n])
    assert torch.equal(p["new"], before[best[0]]) and all(torch.equal(p[n], before[n]) for n in "abc")
    with torch.no_grad():
        p["new"].copy_(before["new"])
    methods.spot(bay, "new", ["a", "b", "c"], k=2, per_token=per_token)
    first, second = best[:2]
    share = max(near[second], 0) / (near[first] + max(near[second], 0))
    assert_close(p["new"].detach(), (1 - share) * before[first] + share * before[second])


def test_what_spot_can_t_do_raises():
    bay = mb.attach(llama(), modules={"a": mb.Prompt(3), "b": mb.Prompt(4), "c": mb.Prompt(3)}, name="task")
    for arguments in (("d",), ("a", ["a"]), ("a", ["x"]), ("a", [])):
        with pytest.raises(BayError, match="spot"):
            methods.spot(bay, *arguments)
    with pytest.raises(CompositionError, match="differ in length"):
        methods.spot(bay, "a")
    lora = mb.attach(llama(), "*.q_proj", {"a": mb.LoRA(2), "b": mb.LoRA(2)}, name="other")
    with pytest.raises(CompositionError, match=r"no mb\.Prompt"):
        methods.spot(lora, "a")


# Searches and retrievals


def retrievals(n: int = 3, **more) -> mb.Modular:
    values = {"abcd"[i]: nn.Linear(8, 5) for i in range(n)}
    aggregator = mb.CompositionalAttention(2, width=5, **more)
    return mb.Modular(None, values, mb.Uniform(), aggregator, features=8)


def test_searches_and_retrievals_are_composed():
    made, x, mask = retrievals(size=3), torch.randn(2, 4, 8), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    a, got = made.aggregator, made(x, context=mb.Context(arguments={"attention_mask": mask}))
    for b, n in ((0, 3), (1, 4)):
        real = x[b, :n]
        for t in range(n):
            heads = []
            for s in (slice(0, 3), slice(3, 6)):
                share = (a.key(real)[:, s] @ a.query(real[t])[s] / math.sqrt(3)).softmax(0)
                found = torch.stack([share @ part.network(real) for part in made.order])
                choice = (a.told(found) @ a.choice(real[t])[s] / math.sqrt(3)).softmax(0)
                heads.append(choice @ found)
            assert_close(got[b, t], a.out(torch.cat(heads)))
    turned = copy.deepcopy(made)
    turned.order.reverse()
    assert_close(turned(x), made(x))
    made(x).square().sum().backward()
    assert all(p.grad is not None for p in made.parameters())
    small = copy.deepcopy(made).bfloat16()(x.bfloat16())
    assert small.dtype == torch.bfloat16 and (small - made(x)).norm() < 0.05 * made(x).norm()
    assert_close(torch.compile(made, backend="aot_eager", fullgraph=True)(x), made(x))


def test_one_retrieval_is_attention_with_shared_values():
    made, x = retrievals(1), torch.randn(2, 4, 8)
    a = made.aggregator
    heads = lambda v: v.unflatten(-1, (2, 4)).transpose(1, 2)
    value = made.order[0].network(x).unsqueeze(1).expand(-1, 2, -1, -1)
    plain = nn.functional.scaled_dot_product_attention(heads(a.query(x)), heads(a.key(x)), value)
    assert_close(made(x), a.out(plain.transpose(1, 2).flatten(-2)))
    with pytest.raises(CompositionError, match="one route for all"):
        made(x, routing=mb.Routing(index=torch.zeros(2, 1, dtype=torch.long)))
    with pytest.raises(CompositionError, match="say width=5"):
        mb.Modular(None, {"a": nn.Linear(8, 5)}, mb.Uniform(), mb.CompositionalAttention(), features=8)(x)
    with pytest.raises(CompositionError, match="searches=0"):
        mb.CompositionalAttention(0)
