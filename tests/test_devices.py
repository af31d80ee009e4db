"""Routes are born on the host, and follow the site to its device: shown on the meta device, which every machine has."""

import pytest
import torch
from torch import nn

import modbay as mb


def test_a_route_moves_once():
    route = mb.Routing(weights=torch.tensor([0.3, 0.7]), index=torch.tensor([0, 1]))
    there = route.on(torch.device("meta"))
    assert there is route.on(torch.device("meta")) and there.weights.is_meta and there.index.is_meta
    assert there.host == ((0, 1),) and route.on(torch.device("cpu")) is route


@pytest.mark.parametrize("aggregator", [mb.WeightedSum(), mb.ParameterAverage()])
@pytest.mark.parametrize("kind", [mb.LoRA(2), mb.Bottleneck(2), mb.IA3()])
def test_labels_on_the_host_route_a_model_elsewhere(kind, aggregator):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to("meta")
    table = {"x": ["a", "b"], "y": ["a"]}
    bay = mb.attach(model, [nn.Linear], {"a": kind, "b": kind}, mb.ByLabel("task", table), aggregator)
    x = torch.randn(3, 5, 8, device="meta")
    assert all(p.is_meta for p in bay.parameters())
    for labels in (["x", "y", "x"], ["y", "y", None], "x"):
        assert model(x, task=labels).is_meta
    assert bay.use({"a": 0.3, "b": 0.7}) and model(x).is_meta
