"""bay.record(): what routers chose, of every granularity and at every level, as a plain loop would count it."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import modbay as mb
from modbay import report, training
from modbay.errors import CallError, CompositionError, LabelError

TASKS = ["x", "y", "x", None, "z"]
B, T = len(TASKS), 4


class Net(nn.Module):
    """Two linear maps over embedded tokens."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, input_ids, attention_mask=None):
        return self.b(torch.tanh(self.a(self.embed(input_ids))))


def made(router, modules=("p", "q", "r"), at=("a", "b"), model=None, **more):
    model = Net() if model is None else model
    bay = mb.attach(model, at=list(at), modules={m: mb.LoRA(2) for m in modules}, router=router, name="m", **more)
    return model, bay


def drawn():
    mask = torch.ones(B, T)
    mask[0, 2:] = 0
    return torch.randint(11, (B, T)), mask


def counted(routings, mask=None, values=None):
    """{value: (counts (n,), mean weights, examples, mean entropy)} of routings of one site, in plain loops."""
    out = {}
    for routing in routings:
        w = routing.dense(3).detach().double()
        w = w.expand(B, -1) if w.ndim == 1 and values else w.reshape(-1, 3) if w.ndim == 1 else w
        for i, row in enumerate(w):
            value = "all" if values is None else values[i]
            if value is None:
                continue
            tokens = [row] if row.ndim == 1 else [t for t, real in zip(row, mask[i], strict=True) if real]
            shares = [t / t.sum() if t.sum() > 0 else t for t in tokens]
            h = [float(torch.special.entr(s).sum()) for s in shares]
            got = out.setdefault(value, [0, 0, 0, 0])
            got[0] = got[0] + sum(shares) / len(shares)
            got[1] = got[1] + sum(tokens) / len(tokens)
            got[2] += 1
            got[3] += sum(h) / len(h)
    return {v: (c, w / n, n, h / n) for v, (c, w, n, h) in out.items()}


def check(table, wanted):
    assert table.values == sorted(wanted)
    for i, value in enumerate(table.values):
        counts, weights, examples, entropy = wanted[value]
        assert table.counts[i] == pytest.approx(counts.numpy(), abs=1e-5)
        assert table.weights[i] == pytest.approx(weights.numpy(), abs=1e-5)
        assert table.examples[i] == examples and table.entropy[i] == pytest.approx(entropy, abs=1e-5)


def spied(bay):
    """Every routing that the bay's routers give from now on, by site."""
    seen = {}
    for site, router in [("", bay.state.router), *((s, m.router) for s, m in bay.modulars.items())]:
        if router is not None:
            router.register_forward_hook(lambda one, args, out, site=site: seen.setdefault(site, []).append(out))
    return seen


ROUTERS = {
    "token, sparse": lambda: mb.TopK(2),
    "token, one": mb.TopK,
    "token, dense": lambda: mb.TopK(2, dense=True),
    "example": lambda: mb.TopK(1, by="example"),
    "gate": mb.Gate,
    "set": lambda: mb.Fixed({"p": 0.5, "r": 1.0}),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("make", ROUTERS.values(), ids=ROUTERS)
def test_tables_are_what_a_loop_counts(make, shared, training):
    model, bay = made(make() if shared else make)
    model.train(training)
    seen = spied(bay)
    with bay.record() as recording:
        for _ in range(3):
            ids, mask = drawn()
            recording.label(task=TASKS)
            model(ids, attention_mask=torch.ones(B, T) if _ == 1 else mask)
    assert recording.calls == 3 and recording.sites() == list(seen) and recording.labels() == ["task"]
    for site, (one, two, three) in seen.items():
        _, mask = drawn()
        parts = [counted([r], m, TASKS) for r, m in ((one, mask), (two, torch.ones(B, T)), (three, mask))]
        whole = {
            v: (
                sum(p[v][0] for p in parts),
                sum(p[v][1] * p[v][2] for p in parts) / sum(p[v][2] for p in parts),
                sum(p[v][2] for p in parts),
                sum(p[v][3] * p[v][2] for p in parts) / sum(p[v][2] for p in parts),
            )
            for v in parts[0]
        }
        check(recording.table(site), whole)
        (row,) = [row for row in recording.rows() if row["site"] == site and row["label"] == "task"]
        assert row["values"] == ["x", "y", "z"] and row["modules"] == ["p", "q", "r"] and row["bay"] == "m"
        assert np.array(row["weights"]) == pytest.approx(recording.table(site, "task").weights)


def test_labels_of_the_call_as_names_lists_and_indices():
    router = mb.Skills("task", ["x", "y"], mode="sigmoid")
    with torch.no_grad():
        model, bay = made(router)
        router.logits.copy_(torch.tensor([[9.0, -9, -9], [-9, 9, 9]]))
    ids, _ = drawn()
    with bay.record() as recording:
        model(ids, task="x")
        model(ids[:3], task=["y", None, "x"])
        model(ids[:3], task=torch.tensor([1, -1, 1]))
    table = recording.table(label="task")
    assert table.values == ["x", "y"] and table.counts == pytest.approx(np.array([[2, 0, 0], [0, 1.5, 1.5]]), abs=1e-3)
    assert recording.table(label="").values == ["all"]
    with pytest.raises(LabelError, match="'tusk' was not recorded; there are 'task'"):
        recording.table(label="tusk")
    with pytest.raises(CallError, match="site='a' was not recorded"):
        recording.table("a")


def test_labels_beside_the_call():
    model, bay = made(mb.TopK())
    ids, _ = drawn()
    with bay.record(values={"domain": ["news", "law"]}) as recording:
        recording.label(domain=torch.tensor([0, 1, 1, -1, 0]), language="en")
        model(ids)
        recording.label()
        model(ids)
    assert recording.table(label="domain").examples.tolist() == [2, 2]  # sorted: law, news
    assert recording.table(label="language").examples.tolist() == [5]
    assert recording.table(label="").examples.tolist() == [10]
    with pytest.raises(LabelError, match="'domain', 'language' were recorded: name one"):
        recording.table()
    with pytest.raises(LabelError, match="what its numbers mean"), bay.record() as recording:
        recording.label(domain=torch.tensor([0, 1, 1, -1, 0]))
        model(ids)
    with pytest.raises(LabelError, match="domain=2 labels for the routes of 5 examples"), bay.record() as recording:
        recording.label(domain=["a", "b"])
        model(ids)


def test_training_serving_and_what_is_not_recorded():
    model, bay = made(mb.TopK())
    ids, _ = drawn()
    for when, calls in (("always", 2), ("training", 1), ("evaluation", 1)):
        with bay.record(when=when) as recording:
            model.train()(ids)
            model.eval()(ids)
        model(ids)
        assert recording.calls == calls and recording.table().examples.tolist() == [5 * calls]
    with bay.record(when="training") as recording:
        model(ids)
    with pytest.raises(CallError, match=r"no router was called .when='training'"):
        recording.table()
    with pytest.raises(CompositionError, match="when='sometimes'"), bay.record(when="sometimes"):
        pass


def test_recording_changes_nothing():
    model, bay = made(lambda: mb.TopK(1, noise=True))
    ids, mask = drawn()

    def step():
        torch.manual_seed(3)
        model.zero_grad()
        out = model.train()(ids, attention_mask=mask)
        (out.square().mean() + sum(bay.losses().values())).backward()
        return [out, torch.rand(1), *(p.grad for p in bay.parameters())]

    plain = step()
    with bay.record(tokens=100):
        watched = step()
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert not any(m._forward_hooks for m in model.modules() if isinstance(m, mb.Router))


def test_nothing_is_read_back_in_a_call():
    """Tensors of the meta device have no values: whoever read one would raise."""

    class Soft(mb.Router):
        def forward(self, x, c):
            return mb.Routing(weights=x[..., :3].softmax(-1))

    model, bay = made(Soft)
    model.to("meta")
    ids, mask = torch.ones(B, T, dtype=torch.long, device="meta"), torch.ones(B, T, device="meta")
    with bay.record(tokens=100, values={"domain": ["news", "law"]}) as recording:
        for _ in range(3):
            recording.label(task=TASKS, domain=torch.zeros(B, dtype=torch.long, device="meta"))
            model.train()(ids, attention_mask=mask)
    assert recording.calls == 3


def test_a_route_that_learns_is_kept_as_it_was():
    model, bay = made(mb.Fixed({"p": 1.0, "q": 0.0, "r": 0.0}, learned=True))
    ids, _ = drawn()
    with bay.record() as recording:
        model(ids)
        with torch.no_grad():
            for p in bay.state.router.parameters():
                p.copy_(torch.tensor([0.0, 0, 1]))
    assert recording.table().counts[0] == pytest.approx([1, 0, 0])


def test_recomputation_counts_once():
    class Checkpointed(Net):
        def forward(self, input_ids, attention_mask=None):
            x = self.embed(input_ids)
            return torch.utils.checkpoint.checkpoint(lambda x: self.b(self.a(x)), x, use_reentrant=False)

    model, bay = made(mb.TopK, model=Checkpointed())
    ids, _ = drawn()
    with bay.record() as recording:
        model.train()(ids).sum().backward()
    assert recording.table("a").examples.tolist() == [5]


def test_a_copy_is_not_recorded():
    model, bay = made(mb.TopK())
    ids, _ = drawn()
    with bay.record() as recording:
        twin = copy.deepcopy(model)
        model(ids)
        twin(ids)
    assert recording.table().examples.tolist() == [5]


def test_modules_come_and_go():
    model, bay = made(mb.Uniform())
    ids, _ = drawn()
    with bay.record() as recording:
        model(ids)
        bay.add("s", mb.LoRA(2))
        model(ids)
        bay.remove("p")
        model(ids)
    table = recording.table()
    assert table.modules == ["p", "q", "r", "s"]
    assert table.counts[0] == pytest.approx(
        [1 / 3 + 1 / 4, 1 / 3 + 1 / 4 + 1 / 3, 1 / 3 + 1 / 4 + 1 / 3, 1 / 4 + 1 / 3]
    )


def test_layers_inside_modules_are_levels():
    inner = mb.Modular(None, {"u": mb.FeedForward(3), "v": mb.FeedForward(3)}, mb.TopK(), mb.Mixture(), features=6)
    model = Net()
    bay = mb.attach(model, at=["a"], modules={"p": inner, "q": mb.LoRA(2)}, router=mb.Uniform, name="m")
    ids, _ = drawn()
    with bay.record() as recording:
        model(ids)
    first, second = recording.sites()
    assert first == "a" and second.startswith("a.parts.p")
    assert recording.table("a").modules == ["p", "q"] and recording.table(second).modules == ["u", "v"]
    assert recording.table().modules == ["p", "q"]


def test_over_time_in_windows_of_bounded_number():
    model, bay = made(mb.TopK())
    gate = bay.state.router.gate
    ids, _ = drawn()
    with bay.record() as recording:
        for i in range(100):
            with torch.no_grad():
                gate.zero_()[0 if i < 50 else 1].copy_(5 * model.embed(ids).mean((0, 1)))
            model(ids, attention_mask=None)
    windows = recording.over_time()
    assert len(windows) <= 32 and windows[0][0] == 1 and windows[-1][1] == 100
    assert [b + 1 for _, b, _ in windows[:-1]] == [a for a, _, _ in windows[1:]]
    whole = recording.table(label="").counts
    assert sum(table.counts for *_, table in windows) == pytest.approx(whole, rel=1e-5)
    assert windows[0][2].counts[0, 0] > windows[-1][2].counts[0, 0]
    assert windows[-1][2].counts[0, 1] > windows[0][2].counts[0, 1]


def test_which_tokens_went_where():
    model, bay = made(mb.TopK())
    gate = bay.state.router.gate
    with torch.no_grad():
        model.embed.weight.zero_()
        model.embed.weight[torch.arange(11), torch.arange(11) % 3] = 1  # token i asks for module i modulo 3
        gate.zero_()[torch.arange(3), torch.arange(3)] = 1
    mask = torch.ones(B, T)
    mask[:, 3:] = 0
    with bay.record(tokens=200) as recording:
        for _ in range(60):
            ids = torch.randint(1, 11, (B, T))
            ids[:, 3:] = 0
            model(ids, attention_mask=mask)
    found = recording.tokens()
    assert all(token % 3 == i for i, name in enumerate("pqr") for token in found[name])
    assert 0 < sum(sum(counter.values()) for counter in found.values()) <= 200
    assert 0 not in found["p"]  # padding
    assert recording.tokens("") == found


def test_metrics_are_of_the_table():
    model, bay = made(mb.Skills("task", ["x", "y"], mode="sigmoid"), modules=("p", "q"))
    ids, _ = drawn()
    with bay.record() as recording, torch.no_grad():
        bay.state.router.logits.copy_(torch.tensor([[50.0, -50], [-50, 50]]))
        model(ids, task=["x", "y", "y", "y", "x"])
    every, by_task = recording.metrics()
    assert by_task["label"] == "task" and by_task["mutual_information"] == pytest.approx(math.log(2))
    assert by_task["alignment"] == pytest.approx(0) and by_task["H_a"] == pytest.approx(0, abs=1e-6)
    assert every["H_b"] == pytest.approx(mb.metrics.entropy([0.4, 0.6])) and every["examples"] == 5
    assert recording.alarms() == ["bay 'm', all sites: too few routes to judge 2 modules by (5 were recorded). "
                                  "Record more calls."]  # fmt: skip


def recorded(weights, labels, calls=4):
    """A recording of a router that gives these weights, whatever comes: (b, n)."""

    class Given(mb.Router):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x, c):
            return mb.Routing(weights=torch.tensor(weights) * self.scale)

    names = [f"e{i}" for i in range(len(weights[0]))]
    model, bay = made(Given, modules=names)
    with bay.record() as recording:
        for _ in range(calls):
            recording.label(task=labels)
            model(torch.randint(11, (len(weights), T)))
    return recording


def test_alarms_of_collapse():
    (said,) = recorded([[0.97, 0.01, 0.01, 0.01]] * 8, ["x", "y"] * 4).alarms()
    assert said.startswith("bay 'm', 2 sites, 'a', 'b': the router has collapsed onto module 'e0' (97.0% of the use")
    assert "H_b = 0.17 of 1.39 nats" in said and "'task' makes no difference" in said and "mb.TopK(balance=" in said


def test_alarms_of_a_router_that_does_nothing():
    (said,) = recorded([[0.25, 0.25, 0.25, 0.25]] * 8, ["x", "y"] * 4).alarms()
    assert "routing does nothing, as all modules get the same of everything (a route spreads over 4.00 of 4" in said


def test_alarms_of_modules_out_of_use_and_of_labels_that_are_not_told():
    unused, blind = recorded([[1.0, 0, 0], [0, 1.0, 0]] * 4, ["x", "x", "y", "y"] * 2).alarms()
    assert "module 'e2' is out of use (0.00% of the use, where an equal share is 33.3%" in unused
    assert "bay.remove('e2')" in unused
    assert "2 values of 'task' are routed alike" in blind and "mb.Skills('task', …)" in blind


def test_no_alarm_where_all_is_well():
    assert recorded([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]] * 3, ["x", "y", "z"] * 3).alarms() == []


def test_routers_that_do_as_told_raise_no_alarm():
    model, bay = made(mb.ByLabel("task"))
    with bay.record() as recording:
        for _ in range(9):
            model(drawn()[0], task="p")
    assert recording.alarms() == []


@pytest.mark.filterwarnings("ignore")
def test_compiled_calls_are_recorded_from_the_first():
    torch._dynamo.reset()
    model, bay = made(lambda: mb.TopK(1, dense=True))
    ids, _ = drawn()
    with bay.record() as recording:
        out = torch.compile(model, backend="aot_eager")(ids)
    assert recording.table("a").examples.tolist() == [5] and torch.allclose(out, model(ids), atol=1e-6)


def test_a_run_tells_its_routing(tiny_base, tiny_csv, tmp_path):
    """`modbay train` with a router that reads its input: the test rows' routes, and those of training over time."""
    said = {"base": str(tiny_base), "data": str(tiny_csv), "by": "language", "method": "mixture", "steps": 8}
    config = training.config({**said, "batch": 8, "probe": 20, "lr": 3e-3, "options": {"experts": 4}})
    run = training.train(config, tmp_path / "run", page=report.write)
    rows = [row for row in run.facts["routing"] if row["bay"] == "experts"]
    assert {row["label"] for row in rows} == {"language"} and rows[0]["values"] == ["de", "en"]
    assert {row["label"] for row in run.facts["figures"]} == {"language"}
    (over,) = run.facts["over_time"]
    assert over["calls"][0][0] == 1 and over["calls"][-1][1] == 8
    assert all(sum(line) == pytest.approx(1) for line in over["shares"])
    (sample,) = run.facts["tokens"]
    assert len(sample["modules"]) == 4 and any(text.isalpha() for m in sample["modules"] for text, *_ in m["tokens"])
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert all(f'id="{name}"' in page for name in ("routing", "over_time", "tokens", "figures"))
    again = training.evaluate(run)
    assert len(again.facts["routing"]) == len(run.facts["routing"])
