"""Reference numerics: the same weights in peft 0.21 and here give the same outputs, to 1e-5."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import modbay as mb
from modbay.modules import IA3, LoRA

peft = pytest.importorskip("peft")
Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D


class Net(nn.Module):
    """One layer, named `layer`."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def _conv1d():
    layer = Conv1D(6, 8)
    nn.init.normal_(layer.bias)
    return layer


LAYERS = {
    "linear": (lambda: nn.Linear(8, 6), lambda: torch.randn(3, 4, 8)),
    "conv1d": (_conv1d, lambda: torch.randn(3, 4, 8)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), lambda: torch.randn(3, 4, 7, 7)),
    "embedding": (lambda: nn.Embedding(11, 6), lambda: torch.randint(11, (3, 4))),
}


def both(layer, kind, config):
    """(theirs, ours) around copies of one layer, theirs with random parameters."""
    net = Net(layer).eval()
    theirs = peft.get_peft_model(copy.deepcopy(net), config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name or "ia3_" in name:
            nn.init.normal_(parameter)
    ours = copy.deepcopy(net)
    bay = mb.attach(ours, at="layer", modules={"m": kind}).use("m")
    return theirs, ours, bay


def fill(bay, site="layer", **tensors):
    own = bay.modulars[site].parts._modules["m"].tensors()
    assert own.keys() == tensors.keys()
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def same(theirs, ours, x):
    assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours(x), theirs.get_base_model().layer.base_layer(x))  # something was compared


@pytest.mark.parametrize("stable", [False, True], ids=["plain", "rslora"])
@pytest.mark.parametrize("place", LAYERS)
def test_lora(place, stable):
    make, example = LAYERS[place]
    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_rslora=stable, target_modules=["layer"], fan_in_fan_out=place == "conv1d"
    )
    theirs, ours, bay = both(make(), LoRA(4, alpha=6.0, stable=stable), config)
    layer = theirs.get_base_model().layer
    if place == "embedding":
        a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    else:
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    fill(bay, A=a, B=b.flatten(1))
    same(theirs, ours, example())


@pytest.mark.parametrize("of", ["output", "input"])
@pytest.mark.parametrize("place", ["linear", "conv1d", "conv2d"])
def test_ia3(place, of):
    make, example = LAYERS[place]
    config = peft.IA3Config(
        target_modules=["layer"],
        feedforward_modules=["layer"] if of == "input" else [],
        fan_in_fan_out=place == "conv1d",
    )
    theirs, ours, bay = both(make(), IA3(of), config)
    fill(bay, l=theirs.get_base_model().layer.ia3_l["default"].flatten())
    same(theirs, ours, example())


@pytest.mark.parametrize("place", ["linear", "conv1d", "conv2d", "embedding"])
def test_a_new_lora_is_drawn_from_the_same_distribution(place):
    make, _ = LAYERS[place]
    config = peft.LoraConfig(r=64, target_modules=["layer"], fan_in_fan_out=place == "conv1d")
    layer = peft.get_peft_model(Net(make()), config).get_base_model().layer
    if place == "embedding":
        theirs = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    else:
        theirs = layer.lora_A["default"].weight, layer.lora_B["default"].weight.flatten(1)
    model = Net(make())
    own = mb.attach(model, at="layer", modules={"m": LoRA(64)}).modulars["layer"].parts._modules["m"].tensors()
    for ours, other in zip((own["A"], own["B"]), theirs, strict=True):
        assert ours.shape == other.shape
        assert_close(ours.std(), other.std(), rtol=0.15, atol=1e-6)


def test_modules_to_save_equals_full_and_loras_beside_it():
    """peft's modules_to_save and LoRA on two layers, against Full and LoRA as one module here."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["0"], modules_to_save=["2"])
    theirs = peft.get_peft_model(copy.deepcopy(net), config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            nn.init.normal_(parameter)
    base = theirs.get_base_model()
    bay = mb.attach(net, modules={"m": {"0": LoRA(2), "2": mb.Full()}}).use("m")
    fill(bay, "0", A=base[0].lora_A["default"].weight, B=base[0].lora_B["default"].weight)
    fill(bay, "2", weight=base[2].modules_to_save["default"].weight, bias=base[2].modules_to_save["default"].bias)
    x = torch.randn(5, 8)
    assert_close(net(x), theirs(x), atol=1e-5, rtol=1e-5)
