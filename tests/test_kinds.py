"""Every kind alone: what it makes, that it starts where it says, that a group of it equals a loop, and its equation."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import modbay as mb
from helpers import SITES, Case, cases, context, fresh, function, ids, site_of, trained
from modbay.core._engine import apply

EVERY = pytest.mark.parametrize("case, place", cases(), ids=ids)


def run(case, kind, params, module, site, x, rows=None):
    """The site's output with one module."""
    f, c = function(module, x), context(case, len(x) if rows is None else rows)
    if isinstance(kind, mb.Replacement):
        return apply(kind, params, f, x, None, c, site, False)
    if kind.enters:
        return f(x + apply(kind, params, f, x, x, c, site, False))
    y = f(x)
    return y + apply(kind, params, f, x, y, c, site, False)


@EVERY
def test_a_new_module_has_finite_parameters_and_the_shape_of_its_output(case: Case, place: str):
    module, site = site_of(place)
    kind, x = case.make(), SITES[place].example(3)
    params = fresh(kind, site)
    assert params and all(torch.isfinite(t).all() for t in params.values() if t.is_floating_point())
    assert all(
        isinstance(t, nn.Parameter) for n, t in params.items() if t.is_floating_point() and n not in kind.constants
    )
    out = run(case, kind, params, module, site, x)
    if not isinstance(kind, mb.Replacement) or kind.neutral:
        assert out.shape == module(x).shape


@EVERY
def test_kinds_are_equal_by_their_fields_and_can_be_hashed(case: Case, place: str):
    assert case.make() == case.make() and hash(case.make()) == hash(case.make())


@EVERY
def test_a_neutral_kind_changes_nothing_when_it_is_new(case: Case, place: str):
    module, site = site_of(place)
    kind, x = case.make(), SITES[place].example(3)
    out = run(case, kind, fresh(kind, site), module, site, x)
    if kind.neutral:
        assert torch.equal(out, module(x))
    else:
        assert not torch.equal(out, module(x)) if out.shape == module(x).shape else True


@EVERY
def test_a_trained_module_changes_something(case: Case, place: str):
    module, site = site_of(place)
    kind, x = case.make(), SITES[place].example(3)
    out = run(case, kind, trained(kind, site), module, site, x)
    assert out.shape != module(x).shape or not torch.allclose(out, module(x))


@EVERY
def test_a_group_equals_a_loop_forward_and_gradients(case: Case, place: str):
    module, site = site_of(place)
    module.requires_grad_(False)
    kind = case.make()
    several = [trained(kind, site) for _ in range(3)]
    xs = torch.stack([SITES[place].example(2) for _ in several])  # (g, m, …)
    f, c = function(module, xs.flatten(0, 1)), context(case, 6)
    x = xs.clone().requires_grad_() if xs.is_floating_point() else xs
    ys = (
        None if isinstance(kind, mb.Replacement) else x if kind.enters else module(x.flatten(0, 1)).unflatten(0, (3, 2))
    )

    stack = {name: torch.stack([p[name] for p in several]) for name in several[0]}
    rows = torch.arange(6)
    grouped = apply(kind, stack, f, x, ys, c.at(rows), site, True)
    alone = [
        apply(kind, p, f, x[i], None if ys is None else ys[i], c.at(rows[2 * i : 2 * i + 2]), site, False)
        for i, p in enumerate(several)
    ]
    assert_close(grouped, torch.stack(alone), atol=1e-5, rtol=1e-5)

    learned = [t for p in several for t in p.values() if t.requires_grad] + [x] * x.is_floating_point()
    out = torch.randn_like(grouped)
    ours = torch.autograd.grad(grouped, learned, out, allow_unused=True, retain_graph=True)
    theirs = torch.autograd.grad(torch.stack(alone), learned, out, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b, atol=1e-5, rtol=1e-4)
