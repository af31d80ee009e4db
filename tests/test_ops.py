"""Each piece of tensor code equals the few lines beside it that say what it must be."""

import pytest
import torch

from modbay.ops import uncompiled
from modbay.ops.grouped import add_linear, linear, linear_reference, shared_linear, shared_linear_reference
from modbay.ops.lowrank import lowrank_mixture, lowrank_mixture_reference


@pytest.mark.parametrize("rows", [(4,), (4, 5)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_of_a_group(rows, bias):
    x, weight = torch.randn(3, *rows, 8), torch.randn(3, 6, 8)
    b = torch.randn(3, 6) if bias else None
    torch.testing.assert_close(linear(x, weight, b), linear_reference(x, weight, b))
    y = torch.randn(3, *rows, 6)
    torch.testing.assert_close(add_linear(y, x, weight), y + linear_reference(x, weight))
    torch.testing.assert_close(shared_linear(x[0], weight, b), shared_linear_reference(x[0], weight, b))


@pytest.mark.parametrize("routed", [(), (4,), (4, 5)])
def test_a_mixture_of_low_rank_updates(routed):
    x, a, b = torch.randn(4, 5, 8), torch.randn(3, 2, 8), torch.randn(3, 6, 2)
    weights = torch.rand(*routed, 3)
    torch.testing.assert_close(lowrank_mixture(x, a, b, weights), lowrank_mixture_reference(x, a, b, weights))


def test_what_is_not_compiled_breaks_the_graph():
    seen = []

    @uncompiled
    def middle(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.compiler.is_compiling())
        return x + int(x.sum())

    compiled = torch.compile(lambda x: middle(x * 2) * 3, backend="eager")
    torch.testing.assert_close(compiled(torch.ones(3)), (2.0 + 6) * 3 * torch.ones(3))
    assert seen == [False]
