"""The modularity benchmark: data by its rules, networks by their formulas, runs that are kept, and its command."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import modbay as mb
from modbay import bench
from modbay.bench._nets import MHANet, MLPNet, RNNNet, SelfScored
from modbay.cli import app
from modbay.errors import ConfigError


def draw(family: str, rules: int = 3, n: int = 50, **options):
    return bench.FAMILIES[family](rules, seed=4).draw(n, torch.Generator().manual_seed(0), **options)


def coefficients(count: int, rules: int = 3) -> list[np.ndarray]:
    random = np.random.RandomState(4)
    return [random.randn(rules) for _ in range(count)]


def test_numbers_follow_their_rules():
    (x, rule, y), (alpha, beta) = draw("mlp"), coefficients(2)
    want = [alpha[r] * a + beta[r] * b for (a, b), r in zip(x.numpy(), rule.numpy(), strict=True)]
    torch.testing.assert_close(y, torch.tensor(np.array(want), dtype=torch.float))


def test_tokens_look_up_what_their_rule_searches():
    (x, rule, y), (alpha, beta) = draw("mha", n=4), coefficients(2)
    x = x.numpy()
    for b, i in np.ndindex(4, 10):
        r = int(rule[b, i])
        found = []
        for search, held in ((4 * r, 4 * r + 2), (4 * r + 1, 4 * r + 3)):
            apart = [abs(x[b, j, search] - x[b, i, search]) if j != i else np.inf for j in range(10)]
            found.append(x[b, int(np.argmin(apart)), held])
        assert y[b, i].item() == pytest.approx(alpha[r] * found[0] + beta[r] * found[1], abs=1e-5)


def test_states_follow_the_rule_of_each_step():
    (x, rule, y), (a, b) = draw("rnn", n=4), coefficients(2)
    state = np.zeros(4)
    for t in range(10):
        state = a[rule[:, t]] * state + b[rule[:, t]] * x[:, t, 0].numpy()
        np.testing.assert_allclose(y[:, t].numpy(), state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["mlp", "mha", "rnn"])
def test_draws(family):
    near, far = draw(family), draw(family, ood=True)
    torch.testing.assert_close(far.x, 2 * near.x)
    assert (draw(family, prior=[0, 1, 0]).rule == 1).all()
    classes = bench.FAMILIES[family](3, "classification", seed=4).draw(50, torch.Generator().manual_seed(0))
    assert set(classes.y.unique().tolist()) == {0.0, 1.0}
    if family != "mlp":
        assert draw(family, length=3).y.shape == (50, 3)
    if family != "rnn":  # where the sign of the state would be told through one more coefficient
        torch.testing.assert_close(classes.y, (near.y >= 0).float())


def test_joint_scores_are_a_softmax_over_what_modules_say():
    torch.manual_seed(0)
    experts = {"a": mb.FeedForward(4), "b": mb.FeedForward(4)}
    site = mb.Site("", inputs=3, outputs=6)
    layer, x = mb.Modular(None, experts, mb.Uniform(), SelfScored(), site=site), torch.randn(5, 3)
    outs = torch.stack([part.kind.forward(part.tensors(), x, None, mb.Context()) for part in layer.order])
    weights = torch.softmax(outs[..., -1], 0)
    torch.testing.assert_close(layer(x), (outs[..., :-1] * weights.unsqueeze(-1)).sum(0))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *[("mlp", name) for name in (*bench.PAPER, "{TopK: {k: 2}}", "TopK@operation")],
        *[("mha", name) for name in ("modular", "ground-truth")],
        ("rnn", "TopK"),
        *[pytest.param("mha", name, marks=pytest.mark.slow) for name in ("joint", "TopK")],
        *[pytest.param("rnn", name, marks=pytest.mark.slow) for name in ("joint", "operation", "ground-truth")],
    ],
)
def test_every_way_learns(family, name):
    settings = {"encoder": 8, "dim": 24, "batch": 32, "lr": 5e-3}
    short, long = (
        bench.run(bench.Setting(family=family, rules=3, way=name, steps=steps, **settings)) for steps in (1, 40)
    )
    assert long["score"] < short["score"]
    table = torch.tensor(long["table"])
    assert table.sum().item() == pytest.approx(1, abs=1e-4)
    if name == "ground-truth":
        torch.testing.assert_close(table, torch.diag(table.diagonal()))
        assert bench.judge(long)["alignment"] == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize(
    ("network", "sizes", "near"), [(MLPNet, (32, 128), 0.05), (MHANet, (128, 512), 0.1), (RNNNet, (128, 128), 0.05)]
)
def test_modular_networks_are_as_large_as_the_monolithic_one(network, sizes, near):
    one, several = (
        sum(p.numel() for p in network(4, bench.way(name, 4), *sizes).parameters())
        for name in ("monolithic", "ground-truth")
    )
    assert several == pytest.approx(one, rel=near)


def test_a_grid_goes_on_where_it_stopped(tmp_path):
    settings = bench.grid((2,), ("joint", "ground-truth"), 2, steps=2, dim=8, encoder=4)
    first = bench.modularity(settings[:3], tmp_path, jobs=1)
    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write('{"family": "mlp", "ta')  # killed in the middle of a line
    told = []
    results = bench.modularity(settings, tmp_path, jobs=1, told=lambda n, result: told.append(result["way"]))
    assert results[:3] == first
    assert told == ["ground-truth"]
    rows = bench.standings(results)
    assert {row["way"] for row in rows} == {"joint", "ground-truth"}
    assert all(row["runs"] == 2 for row in rows)


def test_the_gap_is_between_joint_scores_and_ground_truth():
    table = [[0.5, 0.0], [0.0, 0.5]]
    runs = [
        {"rules": 2, "way": way, "score": score, "score_ood": 1.0, "table": table, "parameters": 1, "seconds": 1.0}
        for way, score in (("joint", 0.9), ("ground-truth", 0.1), ("TopK", 0.3))
    ]
    closed = {row["way"]: row["score_closed"] for row in bench.standings(runs)}
    assert closed == {"ground-truth": 1.0, "TopK": pytest.approx(0.75), "joint": 0.0}


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"rules": (1,)}, "nothing to route"),
        ({"family": "cnn"}, "mlp, mha or rnn"),
        ({"task": "ranking"}, "one of"),
        ({"ways": ("Nobody",)}, "no way or router"),
        ({"ways": ("{TopK: {q: 2}}",)}, "TopK"),
        ({"ways": ("TopK@x",)}, "after @"),
    ],
)
def test_bad_arguments_are_named_before_anything_runs(arguments, why):
    given = {"rules": (2,), "ways": ("joint",), "seeds": 1} | arguments
    with pytest.raises(ConfigError, match=why):
        bench.modularity(bench.grid(**given), jobs=1)


def test_the_command(tmp_path):
    line = ["bench", "modularity", "-r", "2", "-w", "joint", "-w", "ground-truth", "--seeds", "1", "--steps", "3"]
    line += ["--width", "8", "--jobs", "1", "--out", str(tmp_path)]
    shown = CliRunner().invoke(app, line)
    assert shown.exit_code == 0, shown.output
    assert "ground-truth" in shown.output
    rows = json.loads(CliRunner().invoke(app, [*line, "--json"]).stdout)
    assert {row["way"] for row in rows} == {"joint", "ground-truth"}
    bad = CliRunner().invoke(app, [*line, "-w", "Nobody"])
    assert bad.exit_code == 1
    assert "Nobody" in bad.output
