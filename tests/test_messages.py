"""What modbay says when it refuses: the argument, the value, the cause and the way out; and nothing is changed."""

import copy

import pytest
import torch
from torch import nn

import modbay as mb


class Model(nn.Module):
    """A model whose call owns the argument `language`, as Whisper's does."""

    def __init__(self):
        super().__init__()
        self.query = nn.Linear(4, 4)
        self.value = nn.Linear(4, 4)

    def forward(self, x, language=None):
        return self.value(self.query(x))


def attach(model=None, at="value", **options):
    options = {"modules": {"en": mb.LoRA(2), "de": mb.LoRA(2)}, "name": "task", **options}
    return mb.attach(model if model is not None else Model(), at, **options)


def untouched(model):
    """Whether the model is as if modbay had never seen it."""
    clean = all("_base" not in type(m).__dict__ and not m._forward_pre_hooks for m in model.modules())
    return (
        clean
        and "_bay" not in str(dict(model.named_modules()).keys())
        and all(p.requires_grad for p in model.parameters())
    )


REFUSED_AT_ATTACH = {
    "a pattern that matches nothing": (
        {"at": "*.valeu"}, mb.errors.MatchError, ["at='*.valeu'", "matches no module", "'value'", "modbay inspect"]),
    "one of a list that doesn't": (
        {"at": ["value", "*.gate"]}, mb.errors.MatchError, ["at='*.gate'", "matches no module"]),
    "a type that isn't there": (
        {"at": nn.Conv2d}, mb.errors.MatchError, ["Conv2d", "matches no module"]),
    "no place at all": ({"at": None}, mb.errors.BayError, ["LoRA", "no place", "at="]),
    "a label name that the model's call owns": (
        {"name": "language"}, mb.errors.LabelError, ["'language'", "Model.forward", "another name"]),
    "a label that is no name": ({"name": "my bay"}, mb.errors.LabelError, ["'my bay'", "name='my_bay'"]),
    "a kind under an aggregator that can't take it": (
        {"aggregator": mb.Mixture()}, mb.errors.CompositionError, ["Mixture", "'value'", "LoRA", "WeightedSum"]),
    "a kind where there is no weight": (
        {"at": "", "modules": {"en": mb.LoRA(2)}}, mb.errors.CompositionError, ["LoRA", "Model", "Linear"]),
    "something that is no kind": (
        {"modules": {"en": 8}}, mb.errors.CompositionError, ["modules['en'] = 8", "mb.LoRA"]),
    "a module name with a dot": (
        {"modules": {"v1.0": mb.LoRA(2)}}, mb.errors.BayError, ["'v1.0'", "'.'"]),
    "a table that names modules the bay lacks": (
        {"router": mb.ByLabel("task", {"x": ["fr"]})}, mb.errors.LabelError, ["ByLabel", "'fr'"]),
    "something that is no router": (
        {"router": lambda: 3}, mb.errors.CompositionError, ["router=", "int"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_AT_ATTACH)
def test_refused_at_attach(case):
    options, error, words = REFUSED_AT_ATTACH[case]
    model = Model()
    keys, out = list(model.state_dict()), model(torch.ones(2, 4))
    with pytest.raises(error) as caught:
        attach(model, **options)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
    assert untouched(model) and list(model.state_dict()) == keys and torch.equal(model(torch.ones(2, 4)), out)


REFUSED_AT_CALL = {
    "an unknown label": ({"task": ["en", "fr", None]}, ["task='fr'", "'en', 'de'", "None", "bay.add('fr'"]),
    "too few labels": ({"task": ["en"]}, ["1 labels", "3 examples", "too few"]),
    "too many labels": ({"task": ["en"] * 4}, ["4 labels", "3 examples", "too many"]),
    "no label at all": ({}, ["no label 'task'", "task=…", "bay.use"]),
    "an index out of range": ({"task": torch.tensor([0, 1, 2])}, ["task", "2", "2 labels"]),
    "labels as floats": ({"task": torch.ones(3)}, ["task", "float32", "integers"]),
}


@pytest.mark.parametrize("case", REFUSED_AT_CALL)
def test_refused_at_the_call(case):
    labels, words = REFUSED_AT_CALL[case]
    model, x = Model(), torch.ones(3, 4)
    attach(model)
    with pytest.raises(mb.errors.LabelError) as caught:
        model(x, **labels)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
    assert model(x, task="en").shape == x.shape  # the next call is none the worse


def test_a_bay_name_twice():
    model = Model()
    bay = attach(model)
    with pytest.raises(mb.errors.BayError, match=r"name='task'.*has a bay of that name.*add\(\)"):
        attach(model, "query")
    assert bay.detach() is model and untouched(model)


def test_detaching_out_of_order():
    model = Model()
    first, second = attach(model), attach(model, name="other")
    with pytest.raises(mb.errors.BayError, match=r"'task' is not the one attached last.*Detach 'other' first"):
        first.detach()
    second.detach(), first.detach()
    assert untouched(model)
    with pytest.raises(mb.errors.BayError, match="not attached any more"):
        first.detach()


def test_detaching_under_another_class():
    model = Model()
    bay = attach(model)
    nn.utils.parametrize.register_parametrization(model.value, "weight", nn.Identity())
    with pytest.raises(mb.errors.BayError, match="undo that first"):
        bay.detach()
    nn.utils.parametrize.remove_parametrizations(model.value, "weight")
    bay.detach()


def test_names_of_modules():
    bay = attach()
    for verb in (bay.use, bay.remove, bay.freeze, bay.reset):
        with pytest.raises(mb.errors.BayError, match=r"no module 'fr' in bay 'task'; there are 'en', 'de'"):
            verb("fr")
    with pytest.raises(mb.errors.BayError, match=r"add\('en'\).*of that name"):
        bay.add("en", mb.LoRA(2))
    with pytest.raises(mb.errors.BayError, match=r"rename\('en', 'de'\)"):
        bay.rename("en", "de")


def test_a_layer_that_lacks_a_part():
    with pytest.raises(mb.errors.CompositionError, match=r"without an aggregator.*mb\.WeightedSum"):
        mb.Modular(nn.Linear(4, 4), {"a": mb.LoRA(2)}, mb.Uniform())(torch.ones(1, 4))
    with pytest.raises(mb.errors.CompositionError, match=r"without a router.*mb\.ByLabel"):
        mb.Modular(nn.Linear(4, 4), {"a": mb.LoRA(2)}, aggregator=mb.WeightedSum())(torch.ones(1, 4))


def test_a_second_root():
    model = nn.ModuleDict({"inner": Model()})
    attach(model["inner"])
    with pytest.raises(mb.errors.BayError, match=r"'inner'.*same root"):
        mb.attach(model, "inner.query", {"a": mb.LoRA(2)}, name="outer")


def test_a_copy_is_not_disturbed_by_an_error():
    model = Model()
    attach(model)
    twin = copy.deepcopy(model)
    with pytest.raises(mb.errors.LabelError):
        model(torch.ones(1, 4), task="fr")
    assert twin(torch.ones(1, 4), task="en").shape == (1, 4)
