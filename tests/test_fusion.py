"""AdapterFusion, folded: the same numbers as keys and values of every change, from fewer and smaller products."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import modbay as mb
from helpers import KINDS, ROUTINGS, SITES, B, Case, T, ids, trained
from modbay.abstract import Factors, FunctionComposition, ParameterComposition
from modbay.core import describe
from modbay.core._engine import factored

D = 8
SMALL = {
    "bottleneck": mb.Bottleneck(2, std=0.3),
    "parallel": mb.Bottleneck(2, placement="parallel", scale=4.0, activation="gelu", std=0.3),
    "normed": mb.Bottleneck(3, norm=True, scale="learned", std=0.3),
    "lora": mb.LoRA(2, alpha=3.0),
    "biased": mb.LoRA(2, start="pissa", bias=True),
    "vera": mb.VeRA(3),
    "compacter": mb.Compacter(2, size=2),
    "bias": mb.BitFit(),
}
WIDE = {
    "after": mb.Bottleneck(2, norm="after", std=0.3),
    "scale": mb.IA3(),
    "enters": mb.IA3("input"),
    "expert": mb.FeedForward(3),
    "dora": mb.DoRA(2),
}
MIXES = {name: [kind] * 4 for name, kind in (SMALL | WIDE).items()} | {
    "small-mixed": [SMALL["lora"], SMALL["bottleneck"], SMALL["lora"], SMALL["bias"]],
    "all-mixed": [WIDE["scale"], SMALL["bottleneck"], WIDE["expert"], SMALL["lora"]],
}


def layer(kinds: list[mb.Kind], dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> mb.Modular:
    """A layer whose modules and fusion have learned something."""
    named = dict(zip("abcdefghijklmnop", kinds, strict=False))
    made = mb.Modular(nn.Linear(D, D), named, mb.Uniform(), mb.AdapterFusion(dropout)).to(dtype)
    with torch.no_grad():
        for parameter in [*made.parts.parameters(), *made.aggregator.parameters()]:
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def plain(made: mb.Modular, x: Tensor, routing: mb.Routing) -> Tensor:
    """y + Σ_i s_i V Δ_i, s = softmax(dropped (Q y) · (K Δ_i)), from every key and value."""
    modules, fusion = made.modules_at(), made.aggregator
    if not modules.active(routing):
        return made.f(x)
    f = mb.core.Function(made.f, (x,), {}, made.f)
    outputs, y = modules.outputs(f, x, routing, mb.Context())
    there = fusion._there(routing, modules.active(routing), len(modules))
    there = there.view(*there.shape[:-1], *[1] * (y.ndim - there.ndim), there.shape[-1])
    changes = (outputs - y).movedim(0, -2)
    scores = (fusion.key(changes) @ fusion.query(y).unsqueeze(-1)).squeeze(-1)
    scores = F.dropout(scores, fusion.dropout, fusion.training).masked_fill(~there, -torch.inf)
    shares = torch.softmax(scores, -1).nan_to_num() * there
    return y + (shares.unsqueeze(-2) @ fusion.value(changes)).squeeze(-2)


def learn(made: mb.Modular, out: Tensor, x: Tensor) -> dict[str, Tensor | None]:
    """The gradients of everything that is learned, and of x."""
    parameters = {name: p for name, p in made.named_parameters() if p.requires_grad} | {"x": x}
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    gradients = torch.autograd.grad((out * weights).sum(), list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, gradients, strict=True))


@pytest.mark.parametrize("tokens", [T, 40])  # fewer rows than columns of U, and more
@pytest.mark.parametrize("mix", MIXES)
def test_it_is_attention_over_every_key_and_value(mix, tokens):
    """Forward and gradients, in training with dropped scores, for every form of routing."""
    made = layer(MIXES[mix], dropout=0.3, dtype=torch.float64).train()
    for form in ROUTINGS:
        if form.tokens and tokens != T:
            continue
        x, routing = torch.randn(B, tokens, D, dtype=torch.float64, requires_grad=True), form.make()
        found = []
        for run in (lambda x, r: made(x, routing=r), lambda x, r: plain(made, x, r)):
            torch.manual_seed(1)
            out = run(x, routing)
            found.append((out, learn(made, out, x)))
        (got, ours), (want, theirs) = found
        assert_close(got, want, msg=lambda m, form=form: f"{form}: {m}")
        for name, gradient in theirs.items():
            if gradient is None or ours[name] is None:
                assert gradient is None or not gradient.any(), (form.id, name)
            else:
                assert_close(ours[name], gradient, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("tokens", [T, 40])
def test_in_single_precision_it_is_as_near(tokens):
    routing = mb.Routing(weights=torch.ones(4))
    for kinds in (MIXES["bottleneck"], MIXES["all-mixed"]):
        made = layer(kinds)
        x = torch.randn(B, tokens, D, requires_grad=True)
        got, want = made(x, routing=routing), plain(made, x, routing)
        assert_close(got, want, rtol=2e-6, atol=2e-6)
        theirs = learn(made, want, x)
        for name, gradient in learn(made, got, x).items():
            if theirs[name] is not None and name != "aggregator.key.bias":  # zero, but for rounding
                assert_close(gradient, theirs[name], rtol=1e-5, atol=1e-5)
    half = copy.deepcopy(made).to(torch.bfloat16)
    assert_close(half(x.bfloat16(), routing=routing).float(), want, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("mix, tokens", [("bottleneck", T), ("all-mixed", T), ("small-mixed", 40)])
def test_compiled_it_is_the_same(mix, tokens):
    torch._dynamo.reset()  # one function, compiled anew for every layer
    made, x, routing = layer(MIXES[mix]), torch.randn(B, tokens, D), mb.Routing(weights=torch.rand(B, 4))
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x, routing=routing), made(x, routing=routing))


def changed(tensor: Tensor) -> None:
    tensor.data[-1] *= 1.5  # which no version counter sees


@pytest.mark.parametrize("tokens", [2, 40])
@torch.no_grad()
def test_what_is_kept_between_calls_follows_every_change(tokens):
    made, x = layer(MIXES["bottleneck"]).eval(), torch.randn(B, tokens, D)
    routing = mb.Routing(weights=torch.ones(4))
    same = lambda routing=routing: assert_close(made(x, routing=routing), plain(made, x, routing), rtol=2e-6, atol=2e-6)
    for parameter in [*made.parts.parameters(), *made.aggregator.parameters()]:
        for _ in range(3):  # made, kept, found
            same()
        before = made(x, routing=routing)
        changed(parameter)
        same()
        assert not torch.equal(made(x, routing=routing), before) or parameter is made.aggregator.key.bias
    some = mb.Routing(index=torch.tensor([2, 0]))
    for chosen in (some, routing, routing, some, some, mb.Routing(index=torch.tensor([0, 2]))):
        same(chosen)
    made.double()
    x = x.double()
    same()


def test_what_is_kept_stays_out_of_copies_and_of_training():
    made, x, routing = layer(MIXES["bottleneck"]), torch.randn(B, T, D), mb.Routing(weights=torch.ones(4))
    want = made(x, routing=routing)
    with torch.inference_mode():
        for _ in range(3):
            assert_close(made(x, routing=routing), want)
    assert made.aggregator._kept
    assert not copy.deepcopy(made).aggregator._kept
    assert not any("kept" in key for key in made.state_dict())
    made(x, routing=routing).sum().backward()
    assert made.aggregator.value.weight.grad is not None
    with torch.no_grad():
        each = torch.func.vmap(lambda v: made(v, routing=routing))(x.unsqueeze(1)).squeeze(1)
    assert_close(each, want)


@pytest.mark.parametrize("mix", ["bottleneck", "scale"])
def test_more_modules_need_no_more_large_products(mix):
    """Three products (d, d) a row, and what the modules need; not 2 n + 1."""
    d, rows = 64, 32
    counts = {}
    for n in (2, 8):
        kinds = dict.fromkeys("abcdefgh"[:n], mb.Bottleneck(2) if mix == "bottleneck" else mb.IA3())
        made, x = mb.Modular(nn.Linear(d, d), kinds, mb.Uniform(), mb.AdapterFusion()), torch.randn(1, rows, d)
        with FlopCounterMode(display=False) as counter:
            made(x, routing=mb.Routing(weights=torch.ones(n)))
        counts[n] = counter.get_total_flops() / (2 * rows * d * d) - 1  # without f, in products of (d, d)
    assert counts[8] < 4.5
    if mix == "scale":
        assert counts[8] == pytest.approx(counts[2])


def test_what_is_kept_leaves_small_products_alone():
    d, rows, n = 64, 32, 4
    made = mb.Modular(nn.Linear(d, d), dict.fromkeys("abcd", mb.Bottleneck(2)), mb.Uniform(), mb.AdapterFusion())
    counts, x = [], torch.randn(1, rows, d)
    with torch.no_grad():
        for _ in range(3):
            with FlopCounterMode(display=False) as counter:
                made(x, routing=mb.Routing(weights=torch.ones(n)))
            counts.append(counter.get_total_flops() / (2 * rows * d * d) - 1)
    assert counts[2] < 0.8 < counts[0]


def has_factors(case: Case) -> bool:
    kind = case.make()
    if isinstance(kind, ParameterComposition):
        return not kind.enters
    return isinstance(kind, FunctionComposition) and type(kind).factors is not FunctionComposition.factors


@pytest.mark.parametrize(
    "case, site",
    [(c, s) for c in KINDS if has_factors(c) for s in c.sites if s in ("linear", "conv1d", "norm")],
    ids=ids,
)
def test_factors_are_the_change(case, site):
    """Of one module, and of a group that sees the same rows."""
    module = SITES[site].make()
    where, kind, x = describe(site, module), case.make(), SITES[site].example(B)
    y, c = module(x), mb.Context()
    several = [trained(kind, where) for _ in range(3)]
    one = factored(kind, several[0], x, y, c, where)
    if one is None:
        return
    change = lambda p: kind.delta(p, where).apply(x, y, where) if hasattr(kind, "delta") else kind.change(p, x, y, c)
    whole = lambda f: f.code @ f.out.mT + (0 if f.offset is None else f.offset)
    assert_close(whole(one), change(several[0]), rtol=1e-5, atol=1e-6)
    group = factored(kind, {name: torch.stack([p[name] for p in several]) for name in several[0]}, x, y, c, where)
    for k, params in enumerate(several):
        own = Factors(group.code[k], group.out[k], None if group.offset is None else group.offset[k])
        assert_close(whole(own), change(params), rtol=1e-5, atol=1e-6)


def test_a_kind_says_what_it_has():
    site = describe("", nn.Linear(D, D))
    x = torch.randn(2, 3, D)
    for kinds, there in ((SMALL, True), (WIDE, False)):
        for name, kind in kinds.items():
            found = factored(kind, kind.init([site])[site.name], x, x, mb.Context(), site)
            assert (found is not None) == there or kind.enters, name
