"""Routes by task: fixed ones and their trees, hashes and clusters; gates by task; modules that were trained apart."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import modbay as mb
from helpers import ROUTERS, ids
from modbay import losses, methods
from modbay.core import describe
from modbay.errors import CallError, CompositionError, LabelError

SITE = describe("site", nn.Linear(8, 6))


def built(router: mb.Router, *names: str) -> mb.Router:
    router.build(names or ("a", "b", "c"), SITE)
    return router


def context(**labels) -> mb.Context:
    return mb.Context(labels=labels)


def shaken(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def layer(router, aggregator=None, kind=None, names="abc", f=None) -> mb.Modular:
    f = nn.Linear(8, 6) if f is None else f
    return shaken(mb.Modular(f, dict.fromkeys(names, kind or mb.LoRA(2)), router, aggregator or mb.WeightedSum()))


def alone(made: mb.Modular, name: str, x: torch.Tensor) -> torch.Tensor:
    """What one module adds to f(x)."""
    return made(x, routing=mb.Routing(index=torch.tensor([made.inventory.names.index(name)]))) - made.f(x)


# Fixed routes


def test_an_allocation_is_a_row_of_the_matrix():
    table = {"x": ["a", "c"], "y": [], "z": ["b"]}
    made, x = layer(mb.ByLabel("task", table)), torch.randn(4, 8)
    matrix = torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 0]])
    routing = made.router(x, context(task=["x", "y", "z", "x"]))
    assert torch.equal(routing.dense(3), matrix[[0, 1, 2, 0]])
    change = torch.stack([alone(made, name, x) for name in "abc"], 1)
    want = made.f(x) + torch.einsum("bn,bno->bo", matrix[[0, 1, 2, 0]], change)
    assert_close(made(x, task=["x", "y", "z", "x"]), want)
    assert_close(made(x, task=torch.tensor([0, 1, 2, 0])), want)


def test_shared_and_private_modules_add_up():
    made, x = layer(mb.ByLabel("task", {t: ["c", t] for t in "ab"})), torch.randn(3, 8)
    want = made.f(x) + alone(made, "c", x)
    want = want + torch.stack([alone(made, t, x)[r] for r, t in enumerate("aba")])
    assert_close(made(x, task=["a", "b", "a"]), want)
    made(x, task=["a"] * 3).sum().backward()
    grad = {name: made.parts._modules[name].tensors()["A"].grad for name in "abc"}
    assert grad["b"] is None and grad["a"].any() and grad["c"].any()


def test_an_allocation_may_have_weights():
    table = {"x": {"a": 0.25, "c": 0.75}, "y": ["b"]}
    router = built(mb.ByLabel("task", table))
    want = torch.tensor([[0.25, 0, 0.75], [0, 1, 0], [0, 0, 0]])
    assert_close(router(None, context(task=["x", "y", None])).dense(3), want)
    assert_close(router(None, context(task="x")).dense(3), want[0])
    assert_close(router(None, context(task="y")).dense(3), want[1])
    compiled = torch.compile(lambda t: router(None, context(task=t)).dense(3), backend="aot_eager", fullgraph=True)
    assert_close(compiled(torch.tensor([0, 1, -1])), want)
    router.rename("c", "z")
    router.build(("z", "a"), SITE)
    assert router.table == {"x": {"a": 0.25, "z": 0.75}}
    again = built(mb.ByLabel(**router.arguments()), "z", "a")
    assert_close(again(None, context(task=["x"])).dense(2), torch.tensor([[0.75, 0.25]]))
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU())
    mb.attach(net, at="0", modules=dict.fromkeys("abc", mb.LoRA(2)), router=mb.Drop("task", table), name="task")
    assert net.eval()(torch.randn(2, 8), task=["x", "y"]).shape == (2, 6)


FAMILY = {"de": "germanic", "nl": "germanic", "germanic": "indo-european", "fa": "indo-european"}


def test_paths_lead_from_the_root():
    table = methods.paths(FAMILY)
    assert table["de"] == ["indo-european", "germanic", "de"] and table["germanic"] == ["indo-european", "germanic"]
    assert table["indo-european"] == ["indo-european"]
    assert methods.paths(FAMILY, mean=True)["fa"] == {"indo-european": 0.5, "fa": 0.5}
    with pytest.raises(LabelError, match="circle"):
        methods.paths({"a": "b", "b": "a"})


def test_modules_along_a_path_add_up_or_stack():
    names, x = ["germanic", "de", "indo-european", "nl", "fa"], torch.randn(3, 8)
    given = ["de", "fa", "germanic"]
    for mean in (False, True):
        made = layer(mb.ByLabel("language", methods.paths(FAMILY, mean)), names=names)
        change = {name: alone(made, name, x) for name in names}
        for r, path in enumerate(methods.paths(FAMILY)[label] for label in given):
            total = sum(change[name][r] for name in path) / (len(path) if mean else 1)
            assert_close(made(x, language=given)[r], made.f(x)[r] + total)
    f = nn.Linear(8, 8)
    made = layer(mb.ByLabel("language", methods.paths(FAMILY)), mb.Sequence("routed"), mb.Bottleneck(3), names, f)
    y = made.f(x[:1])
    for name in ("indo-european", "germanic", "de"):
        part = made.parts._modules[name]
        y = y + part.kind.change(part.tensors(), y, y, mb.Context())
    assert_close(made(x, language=given)[:1], y)


# Losses


def test_the_losses_of_orthogonality_are_written_out():
    s, p = torch.randn(5, 4), torch.randn(5, 3)
    plain = sum((s[:, i] @ p[:, j]) ** 2 for i in range(4) for j in range(3))
    assert_close(losses.difference(s, p, normalise=False), plain)
    s0, p0 = s - s.mean(0), p - p.mean(0)
    s0, p0 = s0 / s0.norm(dim=1, keepdim=True), p0 / p0.norm(dim=1, keepdim=True)
    assert_close(losses.difference(s, p), ((s0.T @ p0) ** 2).mean())
    w = torch.randn(3, 6, 4)
    want = sum(((w[a].T @ w[b]) ** 2).sum() for a, b in ((0, 1), (0, 2), (1, 2)))
    assert_close(losses.orthogonal(list(w)), want)
    q = torch.linalg.qr(torch.randn(6, 6)).Q
    assert losses.orthogonal([q[:, :3], q[:, 3:]]) < 1e-10
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    other = torch.randn(5, 4, dtype=torch.float64)
    torch.autograd.gradcheck(lambda s: losses.difference(s, other), (x,))


def test_the_difference_loss_parts_shared_and_private():
    made = layer(mb.ByLabel("task", {t: ["c", t] for t in "ab"}), kind=mb.FeedForward(6), f=nn.Linear(8, 8))
    x, y = torch.randn(64, 8), torch.randn(64, 8)
    features = lambda: [made.modules_at().one(i, made.f, x, None, mb.Context()) for i in (2, 0)]
    before = losses.difference(*features()).item()
    optimiser = torch.optim.Adam(made.parts.parameters(), 1e-2)
    for _ in range(100):
        optimiser.zero_grad()
        (F.mse_loss(made(x, task="a"), y) + losses.difference(*features())).backward()
        optimiser.step()
    assert losses.difference(*features()).item() < before / 10


# Hashes and clusters


def hashed(router: mb.Hash, ids: torch.Tensor, **arguments) -> torch.Tensor:
    return router(None, mb.Context(arguments={router.argument: ids, **arguments})).index


def test_a_hash_of_a_token_is_fixed_and_even():
    ids = torch.arange(12000).view(3, 4000)
    for of in ("token", "previous", "bigram"):
        router = built(mb.Hash(of=of), "a", "b", "c", "d")
        index = hashed(router, ids)
        assert index.shape == (3, 4000, 1) and torch.equal(index, hashed(router, ids))
        share = index.flatten().bincount(minlength=4) / 12000
        assert_close(share, torch.full((4,), 0.25), rtol=0, atol=0.02)
        other = hashed(built(mb.Hash(of=of), "c", "a", "d", "b"), ids)  # by name, in any order
        assert torch.equal(torch.tensor([2, 0, 3, 1])[other], index)
        assert not torch.equal(index, hashed(built(mb.Hash(of=of, seed=1), "a", "b", "c", "d"), ids))
    token, previous = (hashed(built(mb.Hash(of=of)), ids) for of in ("token", "previous"))
    assert torch.equal(token[:, :-1], previous[:, 1:])
    same = torch.tensor([[5, 7, 5, 7]])
    bigram = hashed(built(mb.Hash(of="bigram"), *map(str, range(50))), same)
    assert bigram[0, 1] == bigram[0, 3] and bigram[0, 1] != bigram[0, 2]


def test_a_module_that_comes_or_goes_moves_only_its_share():
    router, ids = built(mb.Hash(), "a", "b", "c"), torch.arange(6000).view(1, -1)
    before = hashed(router, ids)
    router.rename("c", "z")
    router.build(("a", "b", "z", "new"), SITE)
    after = hashed(router, ids)
    assert ((after == before) | (after == 3)).all() and 0.2 < (after == 3).float().mean() < 0.3
    router.build(("a", "z"), SITE)
    assert torch.equal(hashed(router, ids)[before == 0], before[before == 0])
    assert (hashed(router, ids)[before == 2] == 1).all()
    loaded = built(mb.Hash(), "a", "z")
    loaded.load_state_dict(router.state_dict())  # what "z" was called at first is kept
    assert torch.equal(hashed(loaded, ids), hashed(router, ids))


def test_a_balanced_hash_fills_the_emptiest():
    assert methods.balanced_hash([5, 4, 3, 3, 3], 2).tolist() == [0, 1, 1, 0, 1]
    counts = 1000 / torch.arange(1, 501)
    table = methods.balanced_hash(counts, 8)
    load = torch.zeros(8).index_add(0, table[1:], counts[1:])
    assert load[load > 0].max() < 1.05 * load[load > 0].median() * 1.5
    router = built(mb.Hash(table % 3))
    ids = torch.randint(500, (2, 5))
    assert torch.equal(hashed(router, ids)[..., 0], table[ids] % 3)
    router.build(("c", "a"), SITE)
    want = torch.tensor([1, -1, 0])[table[ids] % 3]
    assert torch.equal(hashed(router, ids)[..., 0], want)
    assert torch.equal(hashed(built(mb.Hash(**router.arguments()), "c", "a"), ids)[..., 0], want)


def test_a_clustered_hash_keeps_neighbours_together():
    centres = 10 * torch.randn(4, 6)
    which = torch.arange(40) % 4
    embeddings = centres[which] + 0.1 * torch.randn(40, 6)
    table = methods.clustered_hash(embeddings, 4)
    assert all(len(table[which == k].unique()) == 1 for k in range(4)) and len(table.unique()) == 4
    spread = methods.clustered_hash(embeddings, 10, dispersed=True)
    assert all(len(spread[which == k].unique()) == 10 for k in range(4))
    assert spread.bincount().tolist() == [4] * 10


def test_a_hash_reads_the_ids_of_a_model(minilm, minilm_tokenizer):
    model = minilm
    batch = minilm_tokenizer(["the cat sat on the mat", "a dog"], padding=True, return_tensors="pt")
    names = [f"e{i}" for i in range(4)]
    bay = mb.attach(model, at="*.output.dense", modules=dict.fromkeys(names, mb.LoRA(2)), router=mb.Hash())
    for parameter in bay.parameters():
        nn.init.normal_(parameter, std=0.1)
    model(**batch)
    index = bay.routing().index
    assert torch.equal(index, hashed(bay.state.router, batch["input_ids"]))
    with pytest.raises(CallError, match="input_ids"):
        model(inputs_embeds=torch.randn(1, 3, model.config.hidden_size))


def test_like_tasks_share_a_module():
    centres = {"x": torch.tensor([5.0, 0]), "y": torch.tensor([0, 5.0])}
    embeddings = {f"{c}{i}": centre + 0.1 * torch.randn(2) for c, centre in centres.items() for i in range(4)}
    table = methods.clusters(embeddings, 2)
    assert len({table[f"x{i}"][0] for i in range(4)}) == 1 and table["x0"] != table["y0"]
    router = built(mb.ByLabel("task", table), "cluster0", "cluster1")
    index = router(None, context(task=["x0", "x3", "y1"])).index[:, 0]
    assert index[0] == index[1] != index[2]
    drawn = methods.allocation(["x", "y", "z"], "abcd", 2, seed=3)
    assert drawn == methods.allocation(["x", "y", "z"], "abcd", 2, seed=3)
    assert all(len(set(several)) == 2 for several in drawn.values())


def test_clusters_may_be_of_one_size():
    embeddings = {str(i): [float(i)] for i in (0, 1, 2, 3, 4, 50)}
    table = methods.clusters(embeddings, 2, balanced=True)
    assert sorted(several[0] for several in table.values()) == ["cluster0"] * 3 + ["cluster1"] * 3
    assert table["3"] == table["4"] == table["50"]
    with pytest.raises(CompositionError, match="n=9"):
        methods.clusters(embeddings, 9)


# Gates by task


def test_mmoe_has_a_gate_a_task():
    made = layer(mb.SoftGate("task", ("x", "y")), mb.Mixture(), mb.FeedForward(4), f=nn.Linear(8, 8))
    x, outs = torch.randn(3, 8), []
    experts = torch.stack([made.modules_at().one(i, None, x, None, mb.Context()) for i in range(3)], 1)
    for r, task in enumerate((0, 1, 0)):
        gate = (made.router.gate[task] @ x[r]).softmax(-1)
        outs.append(gate @ experts[r])
    assert_close(made(x, task=["x", "y", "x"]), torch.stack(outs))
    assert_close(made(x, task="y")[1], outs[1])
    none = made(x, task=["x", None, "x"])
    assert_close(none[1], torch.zeros(8))
    sequence = torch.randn(2, 5, 8)  # by the mean, or by token
    gate = made.router.gate
    weights = made.router(sequence, context(task=["x", "y"])).weights
    assert_close(weights, torch.stack([(gate[i] @ sequence[i].mean(0)).softmax(-1) for i in range(2)]))
    made.router.by = "token"
    weights = made.router(sequence, context(task=["y", "x"])).weights
    assert_close(weights, torch.stack([(sequence[i] @ gate[1 - i].T).softmax(-1) for i in range(2)]))


def test_cgc_chooses_among_own_and_shared():
    table = {"x": ["a", "c"], "y": ["b", "c"]}
    router = shaken(built(mb.SoftGate("task", ("x", "y"), table=table)))
    x = torch.randn(2, 8)
    logits = torch.stack([router.gate[0] @ x[0], router.gate[1] @ x[1]])
    want = torch.zeros(2, 3)
    want[0, [0, 2]], want[1, [1, 2]] = logits[0, [0, 2]].softmax(-1), logits[1, [1, 2]].softmax(-1)
    assert_close(router(x, context(task=["x", "y"])).weights, want)
    best = built(mb.SoftGate("task", ("x", "y"), table=table, k=3))
    best.load_state_dict(router.state_dict())
    assert_close(best(x, context(task=["x", "y"])).dense(3), want)
    assert (best(x, context(task=["x", "y"])).index[:, 2] == -1).all()
    router.rename("c", "z")
    router.build(("z", "a"), SITE)
    assert router.table == {"x": ["a", "z"], "y": ["z"]}
    assert_close(router(x, context(task=["x", "y"])).weights[1], torch.tensor([1.0, 0.0]))
    again = mb.SoftGate(**router.arguments())
    again.build(("z", "a"), SITE)
    again.load_state_dict(router.state_dict())
    assert_close(again(x, context(task=["x", "y"])).weights, router(x, context(task=["x", "y"])).weights)


def test_a_task_is_routed_by_its_embedding():
    router = built(mb.SoftGate("task", ("x", "y"), of="label", size=4, k=2, balance=0.5)).train()
    logits = router.codes @ router.told.mT
    best, index = logits.topk(2)
    routing = router(None, context(task=["y", "x"]))
    assert torch.equal(routing.index, index[[1, 0]]) and not router.reads_x
    assert_close(routing.weights, best.softmax(-1)[[1, 0]])
    p = logits.softmax(-1)[[1, 0]]
    assert_close(routing.losses["balance"], 0.5 * losses.load_balance(p, index[[1, 0]]))
    assert_close(router(None, context(task=["y", None])).dense(3)[1], torch.zeros(3))
    tokens = built(mb.SoftGate(by="token", k=1, balance=1.0)).train()
    x, mask = torch.randn(2, 4, 8), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    p = (x @ tokens.gate.mT).softmax(-1)[mask.bool()]
    got = tokens(x, mb.Context(arguments={"attention_mask": mask})).losses["balance"]
    assert_close(got, losses.load_balance(p, p.argmax(-1, keepdim=True)))
    soft = built(mb.SoftGate("task", ("x", "y"), of="label", size=4))
    assert_close(soft(None, context(task="y")).weights, (soft.codes[1] @ soft.told.mT).softmax(-1))
    both = built(mb.SoftGate("task", ("x", "y"), of="both", size=4, by="token"))
    x = torch.randn(2, 5, 8)
    joint = torch.cat([both.gate, both.told], -1)  # of [x, e] at once
    seen = torch.cat([x, both.codes[[1, 0]].unsqueeze(1).expand(2, 5, 4)], -1)
    assert_close(both(x, context(task=["y", "x"])).weights, (seen @ joint.mT).softmax(-1))


def test_features_of_a_task_stand_for_its_embedding():
    router = built(mb.SoftGate("task", of="label", size=4))
    features = torch.randn(3, 4)
    assert_close(router(None, context(task=features)).weights, (features @ router.told.mT).softmax(-1))
    with pytest.raises(LabelError, match=r"\(b, 4\)"):
        router(None, context(task=torch.randn(3, 5)))


def test_the_network_of_a_task_is_taken_out():
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    router = mb.SoftGate("task", ("x", "y"), of="label", size=4, k=2)
    bay = mb.attach(net, at=nn.Linear, modules=dict.fromkeys("abcd", mb.LoRA(2)), router=router, name="task")
    shaken(bay.fitting.modulars["0"].parts), shaken(bay.fitting.modulars["2"].parts)
    x = torch.randn(3, 8)
    before = net(x, task="y")
    chosen = router.chosen("y")
    assert len(chosen) == 2 and abs(sum(chosen.values()) - 1) < 1e-6
    for name in set("abcd").difference(chosen):
        bay.remove(name)
    assert_close(net(x, task="y"), before)
    assert_close(bay.use(chosen).model(x), before)
    bay.fold()
    assert_close(net(x), before)
    with pytest.raises(CompositionError, match="as well as"):
        built(mb.SoftGate()).chosen("x")


def test_new_tasks_start_at_the_others_mean():
    for of, key in (("label", "codes"), ("x", "gate")):
        router = built(mb.SoftGate("task", ("x", "y"), of=of))
        before = getattr(router, key).detach().clone()
        router.extend("z")
        assert_close(getattr(router, key)[2], before.mean(0)) and torch.equal(getattr(router, key)[:2], before)
        assert router(torch.randn(1, 8), context(task=["z"])).weights.shape == (1, 3)


def test_smear_merges_by_the_mean_of_the_input():
    made = layer(mb.SoftGate(), mb.ParameterAverage())
    x, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    c = mb.Context(arguments={"attention_mask": mask})
    got = made(x, context=c)
    for r, mean in enumerate((x[0, :2].mean(0), x[1].mean(0))):
        p = (made.router.gate @ mean).softmax(-1)
        parts = [made.parts._modules[name].tensors() for name in "abc"]
        a, b = (sum(w * part[key] for w, part in zip(p, parts, strict=True)) for key in "AB")
        assert_close(got[r], made.f(x[r]) + x[r] @ a.mT @ b.mT)
    double = copy.deepcopy(made).double()
    torch.autograd.gradcheck(lambda x: double(x), (torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True),),
                             eps=1e-3, atol=1e-2, rtol=1e-2)  # fmt: skip  # the gate runs in float32


# Trees


TREE = {"left": ["a", "b"], "right": {"low": ["c"], "high": ["d", "e"]}}


def test_a_tree_of_gates_is_nested_mixtures():
    router = shaken(built(mb.Tree(TREE), *"edcba"))
    x = torch.randn(2, 5, 8)
    gate = lambda *edges: torch.softmax(
        torch.stack([x @ router.gate[router.edges.index(e)] + router.bias[router.edges.index(e)] for e in edges]), 0
    )
    left, right = gate("left", "right")
    low, high = gate("low", "high")
    a, b = gate("a", "b")
    d, e = gate("d", "e")
    want = torch.stack([right * high * e, right * high * d, right * low, left * b, left * a], -1)
    weights = router(x, context()).weights
    assert_close(weights, want)
    assert_close(weights.sum(-1), torch.ones(2, 5))


def test_a_tree_learns_by_the_posterior_of_its_leaves():
    """The gradient of −log Σ_i α_i N(y; μ_i) is the sum of each leaf's own, by its posterior: EM's expectation."""
    router = shaken(built(mb.Tree({"l": ["a", "b"], "r": ["c", "d"]}), *"abcd"))
    x, y, mu = torch.randn(7, 8), torch.randn(7, 1), torch.randn(4)
    log_p = -0.5 * (y - mu).square()
    alpha = router(x, context()).weights
    (exact,) = torch.autograd.grad(-torch.logsumexp(alpha.log() + log_p, -1).sum(), router.gate, retain_graph=True)
    posterior = torch.softmax(alpha.log() + log_p, -1).detach()
    (by_em,) = torch.autograd.grad(-(posterior * alpha.log()).sum(), router.gate)
    assert_close(exact, by_em)


def test_a_tree_follows_its_modules():
    router = shaken(built(mb.Tree(TREE), *"abcde"))
    kept = router.gate[router.edges.index("high")].detach().clone()
    x = torch.randn(3, 8)
    before = router(x, context()).weights
    router.rename("e", "z")
    router.build(("z", "d", "new", "a", "b"), SITE)  # c leaves, and its node with it
    weights = router(x, context()).weights
    assert router.tree == {"left": ["a", "b"], "right": {"high": ["d", "z"]}}
    assert_close(router.gate[router.edges.index("high")], kept)
    assert_close(weights[:, 3:], before[:, :2]) and not weights[:, 2].any()
    assert_close(weights[:, 0] / weights[:, 1], before[:, 4] / before[:, 3])
    again = mb.Tree(**router.arguments())
    again.build(router.names, SITE)
    again.load_state_dict(router.state_dict())
    assert_close(again(x, context()).weights, weights)


# Skills with heads; a linear hypernetwork


def test_heads_route_parts_of_the_parameters():
    made, x = layer(mb.Skills("task", ("x", "y"), heads=2), mb.ParameterAverage()).eval(), torch.randn(3, 4, 8)
    gates = made.router.logits.sigmoid()
    w = gates / gates.sum(-1, keepdim=True)  # (tasks, heads, n)
    parts = [made.parts._modules[name].tensors() for name in "abc"]
    for r, t in enumerate((1, 0, 1)):
        a = torch.cat([sum(w[t, h, i] * parts[i]["A"][:, 4 * h : 4 * h + 4] for i in range(3)) for h in range(2)], 1)
        b = torch.cat([sum(w[t, h, i] * parts[i]["B"][3 * h : 3 * h + 3] for i in range(3)) for h in range(2)], 0)
        assert_close(made(x, task=["y", "x", "y"])[r], made.f(x[r]) + x[r] @ a.mT @ b.mT)
        assert_close(made(x, task="xy"[t])[r], made(x, task=["y", "x", "y"])[r])
    assert_close(made(x, task=["y", None, "y"])[1], made.f(x[1]))
    routing = made.router(None, context(task=["x", "y"]))
    assert_close(routing.weights, w.mean(1)) and routing.heads.shape == (2, 2, 3)
    assert routing.repeated(2).heads.shape == (4, 2, 3)
    with pytest.raises(CompositionError, match="heads"):
        layer(mb.Skills("task", ("x", "y"), heads=2))(x, task="x")
    with pytest.raises(CompositionError, match="parts into 3"):
        layer(mb.Skills("task", ("x", "y"), heads=3), mb.ParameterAverage())(x, task="x")
    with pytest.raises(CompositionError, match="of='parameters'"):
        layer(mb.Skills("task", ("x", "y"), heads=2), mb.ParameterAverage("deltas"))(x, task="x")


@pytest.mark.parametrize("kind", [mb.Bottleneck(4), mb.IA3(), mb.FeedForward(4)], ids=lambda kind: type(kind).__name__)
def test_equal_heads_are_one_head(kind):
    made = layer(mb.Skills("task", ("x", "y"), heads=2), mb.ParameterAverage(), kind, f=nn.Linear(8, 8)).eval()
    plain = copy.deepcopy(made)
    plain.router = mb.Skills("task", ("x", "y")).eval()
    plain.router.build(("a", "b", "c"), made.site)
    with torch.no_grad():
        made.router.logits.copy_(plain.router.logits.normal_().unsqueeze(1).expand(2, 2, 3))
    x = torch.randn(3, 5, 8)
    assert_close(made(x, task=["x", "y", None]), plain(x, task=["x", "y", None]))


def test_a_new_task_is_learned_by_routing_alone():
    net = nn.Sequential(nn.Linear(8, 6))
    router = mb.Skills("task", ("x", "y"), heads=2, mode="sigmoid")
    bay = mb.attach(net, at="0", modules=dict.fromkeys("abc", mb.LoRA(2)), router=router,
                    aggregator=mb.ParameterAverage(), name="task")  # fmt: skip
    shaken(bay.modulars["0"].parts)
    x, target = torch.randn(32, 8), torch.tensor([[0.9, 0.1, 0.2], [0.1, 0.1, 0.8]])
    bay.freeze()
    router.extend("z")
    with torch.no_grad():
        router.logits[1] = torch.logit(target)
    y = net(x, task="y").detach()
    before = [p.detach().clone() for p in bay.parameters()]
    groups = bay.parameter_groups(1e-3, router_lr=0.1)
    assert [group["name"] for group in groups] == ["task.router"]
    optimiser = torch.optim.Adam(groups)
    for _ in range(200):
        optimiser.zero_grad()
        loss = F.mse_loss(net(x, task="z"), y)
        loss.backward()
        optimiser.step()
    assert loss < 1e-3
    assert all(torch.equal(a, b) for a, b in zip(before, bay.parameters(), strict=True))


def test_learning_goes_on_from_the_average():
    net = nn.Sequential(nn.Linear(8, 6))
    bay = mb.attach(net, at="0", modules=dict.fromkeys("abc", mb.LoRA(2)), router=mb.Skills("task", ("x",)),
                    aggregator=mb.ParameterAverage(), name="task")  # fmt: skip
    shaken(bay.modulars["0"].parts)
    x, third = torch.randn(4, 8), 1 / 3
    want = bay.use({"a": third, "b": third, "c": third}).model(x)
    methods.average(bay, "mean").use("mean")
    assert_close(net(x), want)
    net(x).sum().backward()
    assert bay.modulars["0"].parts._modules["mean"].tensors()["A"].grad.any()


def test_a_linear_hypernetwork_is_a_router():
    """φ_t = Φ α_t: the modules are the columns of Hyper's linear map, α its embeddings of tasks."""
    made = layer(mb.Skills("task", ("x", "y"), mode="linear"), mb.ParameterAverage())
    hyper = mb.Modular(made.f, {"h": mb.Hyper(mb.LoRA(2), "task", ("x", "y"), size=3, where=())}, mb.Uniform(),
                       mb.WeightedSum())  # fmt: skip
    own = hyper.parts._modules["h"].tensors()
    x, parts = torch.randn(3, 4, 8), [made.parts._modules[name].tensors() for name in "abc"]
    alpha = made.router.logits
    for r, t in enumerate((0, 1, 0)):
        a, b = (sum(alpha[t, i] * parts[i][key] for i in range(3)) for key in "AB")
        assert_close(made(x, task=["x", "y", "x"])[r], made.f(x[r]) + x[r] @ a.mT @ b.mT)
    assert own["labels"].shape == alpha.shape  # one number a module: what a hypernetwork calls an embedding
    made(x, task="x").sum().backward()
    assert made.router.logits.grad[0].any() and not made.router.logits.grad[1].any()


# Modules that were trained apart


def attached(router, names="abc", width=8):
    net = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))
    bay = mb.attach(net, at=nn.Linear, modules=dict.fromkeys(names, mb.LoRA(2)), router=router, name="task")
    for modular in bay.modulars.values():
        shaken(modular.parts)
    return net, bay


def test_arrow_points_where_a_module_acts_most():
    net, bay = attached(lambda: mb.Prototypes("arrow", k=2))
    methods.arrow(bay)
    for site, modular in bay.modulars.items():
        for i, name in enumerate("abc"):
            part = modular.parts._modules[name].tensors()
            want = torch.linalg.svd(part["B"] @ part["A"]).Vh[0]
            v = modular.router.prototypes[i]
            assert_close(v * torch.sign(v @ want), want, atol=1e-5, rtol=1e-4)
            assert not v.requires_grad, site
    router, x = bay.modulars["0"].router, torch.randn(2, 5, 8)
    scores = (x @ router.prototypes.mT).abs()
    best, index = scores.topk(2)
    routing = router(x, context())
    assert torch.equal(routing.index, index)
    assert_close(routing.weights, best.softmax(-1))
    net(x)
    bay.add("d", mb.LoRA(2))
    assert not router.prototypes[3].any() and torch.equal(
        bay.modulars["0"].router.prototypes[:3], router.prototypes[:3]
    )
    with pytest.raises(CompositionError, match="lambda"):
        methods.arrow(attached(mb.ByLabel("task"))[1])


@pytest.mark.parametrize("kind", [mb.DoRA(2), mb.LoKr(1, both=True)], ids=lambda kind: type(kind).__name__)
def test_arrow_takes_any_change_of_a_weight(kind):
    net = nn.Sequential(nn.Linear(8, 6))
    bay = mb.attach(net, at="0", modules={"a": kind}, router=lambda: mb.Prototypes("arrow", k=1))
    shaken(bay.modulars["0"].parts)
    methods.arrow(bay)
    part = bay.modulars["0"].order[0]
    weight = part.kind.delta(part.tensors(), bay.modulars["0"].site).dense(bay.modulars["0"].site)[0]
    v = bay.modulars["0"].router.prototypes[0]
    assert_close((weight @ v).norm(), torch.linalg.matrix_norm(weight, 2))


def test_phatgoose_gates_learn_and_are_routed_by():
    made, x = layer(mb.Prototypes("phatgoose", label="task")), torch.randn(2, 5, 8)
    router = made.router
    with torch.no_grad():
        router.prototypes.zero_()  # σ(0) = ½ at first
    assert_close(made(x, task="b"), made.f(x) + 0.5 * alone(made, "b", x))
    made.parts.requires_grad_(False), made.f.requires_grad_(False)
    with torch.no_grad():
        router.prototypes.normal_()
    gate = torch.sigmoid(x @ router.prototypes.mT)
    want = made.f(x) + torch.stack([gate[0, :, 2:] * alone(made, "c", x)[0], gate[1, :, :1] * alone(made, "a", x)[1]])
    assert_close(made(x, task=["c", "a"]), want)
    made(x, task=["c", "a"]).sum().backward()
    assert router.prototypes.grad[0].any() and not router.prototypes.grad[1].any()
    bar = lambda v: (v - v.mean(-1, keepdim=True)) / v.var(-1, unbiased=False, keepdim=True).add(1e-5).sqrt()
    best, index = (bar(x) @ bar(router.prototypes).mT / 8**0.5).topk(2)
    routing = router(x, context())
    assert torch.equal(routing.index, index)
    assert_close(routing.weights, best.softmax(-1))


# The same in peft


def test_arrow_in_peft():
    arrow = pytest.importorskip("peft.tuners.lora.arrow")
    from peft.tuners.lora.config import ArrowConfig

    net, bay = attached(lambda: mb.Prototypes("arrow"), names="abcde")
    made = bay.modulars["0"]
    with torch.no_grad():  # a gap between singular values, so that fifteen steps of their iteration arrive
        for part in made.order:
            part.tensors()["A"][1:] *= 0.1
    methods.arrow(bay)
    config = ArrowConfig(rng_seed=0)
    config.task_adapter_names = list("abcde")
    theirs = arrow.ArrowLoraLinearLayer(8, config)
    linear = lambda w: nn.Linear(w.shape[1], w.shape[0], bias=False).requires_grad_(False)
    a, b = {}, {}
    for name in "abcde":
        for store, key in ((a, "A"), (b, "B")):
            w = made.parts._modules[name].tensors()[key]
            store[name] = linear(w)
            store[name].weight.copy_(w)
    theirs.build_prototypes(a, b)
    x = torch.randn(2, 5, 8)
    want = theirs(x, a, b, nn.Identity(), dict.fromkeys("abcde", 1.0))
    got = net[0](x)
    with bay.disable():
        got = got - net[0](x)
    assert want.abs().max() > 0.1
    assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heads", [1, 2])
def test_polytropon_and_multi_head_routing_in_peft(heads):
    peft = pytest.importorskip("peft")
    net = nn.Sequential(nn.Linear(8, 6)).eval()
    config = peft.PolyConfig(r=2, n_tasks=3, n_skills=4, n_splits=heads, target_modules=["0"])
    theirs = peft.get_peft_model(copy.deepcopy(net), config).eval()
    shaken(theirs)
    inner = theirs.get_base_model()[0]
    with torch.no_grad():
        net[0].load_state_dict(inner.base_layer.state_dict())
        router = mb.Skills("task", ("x", "y", "z"), heads=heads)
        bay = mb.attach(net, at="0", modules=dict.fromkeys("abcd", mb.LoRA(2, alpha=1.0)), router=router,
                        aggregator=mb.ParameterAverage(), name="task")  # fmt: skip
        router.logits.copy_(inner.poly_router["default"].module_logits.view(router.logits.shape))
        for i, name in enumerate("abcd"):
            own = bay.modulars["0"].parts._modules[name].tensors()
            own["A"].copy_(inner.poly_lora_A["default"][:, i].flatten(0, 1).mT)
            own["B"].copy_(inner.poly_lora_B["default"][:, i].movedim(1, 0).flatten(1).mT)
    net.eval()
    x = torch.randn(3, 4, 8)
    want = theirs.base_model(x, task_ids=torch.tensor([2, 0, 1]))
    assert_close(net(x, task=["z", "x", "y"]), want, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(want, inner.base_layer(x))


# Streams


def test_ple_is_written_out():
    tasks, kind = ("x", "y"), mb.FeedForward(4)
    level = {"x": {"a": kind, "b": kind}, "y": {"a": kind}, "shared": {"a": kind, "b": kind}}
    net = shaken(methods.ple([level, level], features=8))
    x = torch.randn(5, 8)
    streams = dict.fromkeys((*tasks, "shared"), x)
    for made in net.levels:
        outs, names = {}, made.inventory.names
        for i, name in enumerate(names):
            outs[name] = made.modules_at().one(i, None, streams[name.split("-")[0]], None, mb.Context())
        after = {}
        for s, stream in enumerate(streams):
            may = [n for n in names if stream == "shared" or n.split("-")[0] in (stream, "shared")]
            gate = streams[stream] @ made.router.gate[s][[names.index(n) for n in may]].mT
            after[stream] = torch.einsum("bn,nbd->bd", gate.softmax(-1), torch.stack([outs[n] for n in may]))
        streams = after
    got = net(x)
    assert list(got) == ["x", "y"]
    for task in tasks:
        assert_close(got[task], streams[task])
    got["x"].sum().backward()
    grads = {name: next(part.parameters()).grad for name, part in net.levels[1].parts.named_children()}
    assert not any(grads[name].any() for name in grads if name.startswith("y")) and grads["x-a"].any()
    with pytest.raises(CompositionError, match="same tasks"):
        methods.ple([level, {"x": {"a": kind}}], features=8)


def test_soft_modularisation_is_written_out():
    layers = [{name: nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for name in "abc"} for _ in range(3)]
    net, x = shaken(methods.soft_modularisation(layers, ("push", "reach"), features=8)), torch.randn(4, 8)
    got = net(x, task=["reach", "push", "push", "reach"])
    for r, t in enumerate((1, 0, 0, 1)):
        told = x[r] * net.codes[t]
        g, logits = [x[r]] * 3, None
        for l, layer in enumerate(layers):
            seen = told if logits is None else net.up[l - 1](logits) * told
            logits = net.down[l](seen.relu())
            p = logits.view(-1, 3).softmax(-1)
            outs = torch.stack([layer[name](one) for name, one in zip("abc", g, strict=True)])
            g = list(p @ outs)
        assert len(g) == 1
        assert_close(got[r], g[0])
    got.sum().backward()
    assert net.codes.grad.any() and net.up[0].weight.grad.any()
    with pytest.raises(CompositionError, match="as many"):
        methods.soft_modularisation([{"a": nn.Linear(8, 8)}, layers[0]], ("x",), features=8)
    with pytest.raises(CompositionError, match="streams"):
        mb.Modular(None, layers[0], mb.Uniform(), mb.Exchange([0, 1, 5]), features=8)(x.expand(3, 4, 8))


# Every new router: as a file, compiled, copied, in bfloat16

NEW = ("soft-gate", "tree", "arrow", "phatgoose", "skills-linear", "by-weighed")
PARTS = pytest.mark.parametrize("part", [part for part in ROUTERS if part.id.startswith(NEW)], ids=ids)


@PARTS
def test_a_new_router_is_saved_and_copied(part, tmp_path):
    make = lambda: nn.Sequential(nn.Linear(8, 6), nn.ReLU())
    net = make()
    bay = mb.attach(net, at="0", modules={n: mb.LoRA(2) for n in "abcd"}, router=part.make(), name="bay")
    with torch.no_grad():
        for parameter in [*bay.parameters(), *bay.state.router.parameters()]:
            parameter.copy_(torch.randn_like(parameter))
    x, given = torch.randn(4, 3, 8), {keyword: label(4) for keyword, label in part.labels.items()}
    want = net.eval()(x, **given)
    bay.save(tmp_path)
    other = make()
    other.load_state_dict({key: value for key, value in net.state_dict().items() if "_bay" not in key})
    mb.load(other, tmp_path)
    assert_close(other.eval()(x, **given), want)
    assert_close(copy.deepcopy(net)(x, **given), want)
    assert_close(net.to(torch.bfloat16)(x.bfloat16(), **given).float(), want, rtol=0.2, atol=0.5)


@pytest.mark.parametrize("id", ["soft-gate-token", "tree", "phatgoose-gates"])
def test_a_new_router_compiles(id):
    torch._dynamo.reset()
    part = next(part for part in ROUTERS if part.id == id)
    made, x = layer(part.make(), names="abcd").eval(), torch.randn(4, 3, 8)
    given = {key: torch.tensor([0, 1, -1, 0]) for key in part.labels}
    run = torch.compile(made, backend="aot_eager", fullgraph=True)
    assert_close(run(x, **given), made(x, **given))


def test_a_hash_compiles():
    torch._dynamo.reset()
    router, ids = built(mb.Hash(of="bigram")), torch.randint(1000, (2, 7))
    run = torch.compile(lambda ids: hashed(router, ids), backend="aot_eager", fullgraph=True)
    assert torch.equal(run(ids), hashed(router, ids))


# What is refused


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: mb.SoftGate(of="label"), "of='label'"),
        (lambda: mb.SoftGate(k=0), "k=0"),
        (lambda: mb.SoftGate(by="batch"), "by='batch'"),
        (lambda: built(mb.SoftGate()).build(("a",), describe("wide", nn.Linear(9, 6))), "9"),
        (lambda: built(mb.Tree({"l": ["a"]}), "b"), "'a'"),
        (lambda: mb.Tree({"l": ["a"], "r": ["a"]}), "all different"),
        (lambda: mb.Tree({"l": "a"}), "no list"),
        (lambda: built(mb.Tree(["a"])).build(("a",), describe("ids", nn.Embedding(9, 6))), "token ids"),
        (lambda: mb.Hash(of="next"), "of='next'"),
        (lambda: mb.Hash([0, 1], of="bigram"), "bigram"),
        (lambda: built(mb.Hash([0, 7])), "module 7"),
        (lambda: mb.Prototypes("bow"), "'bow'"),
        (lambda: mb.Prototypes("arrow", label="task"), "label='task'"),
        (lambda: mb.Skills("task", ["x"], heads=0), "heads=0"),
    ],
)
def test_wrong_arguments_raise(make, says):
    with pytest.raises(CompositionError, match=says):
        make()


def test_tables_name_tasks_and_modules():
    with pytest.raises(LabelError, match="each task is named"):
        mb.SoftGate("task", ("x", "y"), table={"x": ["a"]})
    with pytest.raises(LabelError, match="'nobody'"):
        built(mb.SoftGate("task", ("x",), table={"x": ["nobody"]}))
    with pytest.raises(CallError, match="use_cache"):
        c = mb.Context(arguments={"input_ids": torch.ones(1, 1, dtype=torch.long), "attention_mask": torch.ones(1, 5)})
        built(mb.Hash(of="bigram"))(None, c)
