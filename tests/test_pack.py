"""A packed bay gives the same numbers, does not learn, and comes back as it was."""

import copy

import pytest
import torch
from torch import nn

import modbay as mb

LABELS = ["c", "a", None, "b", "a"]


def packed():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6))
    kinds = {"a": mb.LoRA(2), "b": mb.LoRA(2), "c": mb.Bottleneck(3), "d": mb.LoRA(2), "e": mb.SparseDelta(0.2)}
    bay = mb.attach(model, [nn.Linear], kinds, name="task")
    with torch.no_grad():
        for parameter in bay.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model, bay


def test_the_numbers_stay(tmp_path):
    (model, bay), x = packed(), torch.randn(5, 8)
    expected, each = model(x, task=LABELS), [model(x, task=name) for name in bay.names()]
    state = {name: [p.clone() for p in bay.parameters(name)] for name in bay.names()}
    bay.freeze("b").pack()
    assert not bay.parameters()
    for twin in (model, copy.deepcopy(model), copy.deepcopy(model).double().float()):
        torch.testing.assert_close(twin(x, task=LABELS), expected)
        for name, out in zip(bay.names(), each, strict=True):
            torch.testing.assert_close(twin(x, task=name), out)
    bay.save(tmp_path)
    other = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6))
    bay.disable()
    other.load_state_dict(model.state_dict())
    mb.load(other, tmp_path)
    torch.testing.assert_close(other(x, task=LABELS), expected)
    bay.unpack()
    for name, tensors in state.items():
        assert all(torch.equal(p, t) for p, t in zip(bay.parameters(name), tensors, strict=True))
        assert all(p.requires_grad == (name != "b") for p in bay.parameters(name))
    torch.testing.assert_close(model(x, task=LABELS), expected)


def test_modules_side_by_side_are_not_copied():
    _, bay = packed()
    bay.pack("a", "b", "d")
    modules = bay.modulars["0"].modules_at()
    (pool,) = bay.modulars["0"].pools
    assert modules.stacked([0, 1, 3])["A"].data_ptr() == pool.A.data_ptr()  # rows 0, 1, 2 of the pool
    assert torch.equal(modules.stacked([3, 0])["A"], pool.A[[2, 0]])


def test_a_packed_module_does_not_learn():
    (model, bay), x = packed(), torch.randn(5, 8)
    bay.pack()
    with pytest.raises(mb.errors.BayError, match=r"packed.*bay\.unpack\(\)"):
        bay.unfreeze("a")
    assert not model(x, task=LABELS).requires_grad
    bay.remove("a").add("f", mb.LoRA(2))
    assert model(x[:2], task=["f", "b"]).requires_grad  # a new one does


def test_a_packed_bay_compiles_once():
    (model, bay), x = packed(), torch.randn(5, 8)
    for name in ("c", "e"):
        bay.remove(name)
    expected = model(x, task=torch.tensor([0, 2, 1, -1, 0]))
    bay.pack()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, task=torch.tensor([0, 2, 1, -1, 0])), expected)


@pytest.mark.parametrize("kind", [mb.LoRA(2), mb.IA3(), mb.LoRA(1, bias=True)])
def test_a_mixed_batch_sorted_over_a_pool_equals_a_loop(kind, monkeypatch):
    """Also once a module has gone and another has come, so that the pool no longer holds all of them in order."""
    monkeypatch.setattr("modbay.core._sums._by_example", lambda m, p, x: False)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6))
    bay = mb.attach(model, [nn.Linear], dict.fromkeys("abcd", kind), name="task")
    labels, x = ["d", "a", "c", "b", "a", "d"], torch.randn(6, 3, 8)

    def check() -> None:
        each = [model(row.unsqueeze(0), task=label) for row, label in zip(x, labels, strict=True)]
        torch.testing.assert_close(model(x, task=labels), torch.cat(each))

    def stir() -> None:
        with torch.no_grad():
            for parameter in bay.parameters():
                parameter.add_(torch.randn_like(parameter))

    stir()
    bay.pack()
    assert all(pool.whole for m in bay.modulars.values() for pool in m.pools)
    check()
    bay.remove("a").add("e", kind)
    assert not any(pool.whole for m in bay.modulars.values() for pool in m.pools)
    stir()
    labels[:] = ["e", "c", "b", "e", "d", "c"]
    check()
