"""Every kind alone: what it makes, that it starts where it says, that a group of it equals a loop, and its equation."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import modbay as mb
import tiny
from helpers import KINDS, SITES, Case, cases, context, fresh, function, ids, site_of, trained
from modbay.core._engine import apply

EVERY = pytest.mark.parametrize("case, place", cases(), ids=ids)


def run(case, kind, params, module, site, x, rows=None):
    """The site's output with one module."""
    f, c = function(module, x), context(case, len(x) if rows is None else rows)
    if kind.replaces:
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
    if not kind.replaces or kind.neutral:
        assert out.shape == module(x).shape


@EVERY
def test_kinds_are_equal_by_their_fields_and_can_be_hashed(case: Case, place: str):
    assert case.make() == case.make() and hash(case.make()) == hash(case.make())


@pytest.mark.parametrize("case", [case for case in KINDS if case.folds], ids=ids)
def test_a_kind_that_folds_says_so(case: Case):
    assert case.make().folds


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
    ys = None if kind.replaces else x if kind.enters else module(x.flatten(0, 1)).unflatten(0, (3, 2))

    stack = {name: torch.stack([p[name] for p in several]) for name in several[0]}
    rows = torch.arange(6)
    grouped = apply(kind, stack, f, x, ys, c.at(rows), site, True)
    alone = [
        apply(kind, p, f, x[i], None if ys is None else ys[i], c.at(rows[2 * i : 2 * i + 2]), site, False)
        for i, p in enumerate(several)
    ]
    assert_close(grouped, torch.stack(alone), atol=1e-5, rtol=1e-5)

    learned = [t for p in several for t in p.values() if t.requires_grad] + [x] * x.is_floating_point()
    if not learned:
        return
    out = torch.randn_like(grouped)
    ours = torch.autograd.grad(grouped, learned, out, allow_unused=True, retain_graph=True)
    theirs = torch.autograd.grad(torch.stack(alone), learned, out, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("learned", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@EVERY
def test_a_base_in_bfloat16(case: Case, place: str, learned: torch.dtype):
    """Modules of either dtype run and learn on it, near what the same weights give in float32."""
    base = SITES[place].make().requires_grad_(False).bfloat16()
    narrow = mb.Modular(base, {name: case.make() for name in "abc"}, mb.Uniform(), mb.WeightedSum()).train(case.trains)
    for parameter in narrow.parts.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    narrow.parts.to(learned)
    wide, x = copy.deepcopy(narrow).float(), SITES[place].example(4)
    x = x.bfloat16() if x.is_floating_point() else x
    for host in ((1,), (1,), (1,), (1,)), ((0,), (2,), (0,), (1,)):
        routing, given = mb.Routing(index=torch.tensor(host), host=host), context(case, 4).labels
        ours = narrow(x, routing=routing, **given)
        theirs = wide(x.float() if x.is_floating_point() else x, routing=routing, **given)
        assert ours.dtype == torch.bfloat16
        assert (ours - theirs).norm() < 0.02 * theirs.norm()
        if case.learns:
            down = torch.randn_like(theirs)
            a = gradient(ours, narrow, down.bfloat16())
            b = gradient(theirs, wide, down)
            assert (
                a.isfinite().all() and b.any() and (a - b).norm() < 0.2 * b.norm()
            )  # a relu may fall to the other side
    assert all(p.dtype == learned and (p.grad is None or p.grad.dtype == learned) for p in narrow.parts.parameters())


def gradient(out: torch.Tensor, model: nn.Module, down: torch.Tensor) -> torch.Tensor:
    """All that arrives at what learns, in one vector."""
    model.zero_grad()
    out.backward(down)
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten().float()
                      for p in model.parameters() if p.requires_grad])  # fmt: skip


@pytest.mark.parametrize("learned", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize(
    "kind",
    [
        mb.Prompt(3),
        mb.EncodedPrompt(3, hidden=6),
        mb.EncodedPrompt(3, "mlp", hidden=6),
        mb.FactoredPrompt(3, 2),
        mb.Prefix(3),
        mb.Prefix(3, bottleneck=6),
        mb.Hyper(mb.Prefix(2)),
    ],
    ids=["prompt", "lstm", "mlp", "factored", "prefix", "prefix-bottleneck", "hyper-prefix"],
)
def test_what_is_put_in_front_on_a_base_in_bfloat16(kind: mb.Kind, learned: torch.dtype):
    narrow, ids = tiny.llama().to(torch.bfloat16).eval(), tiny.tokens(4)
    bay = mb.attach(narrow, modules={"a": kind, "b": kind}, name="task")
    for parameter in bay.parameters():
        parameter.data = parameter.data.to(learned) + 0.3 * torch.randn_like(parameter, dtype=learned)
    wide, task = copy.deepcopy(narrow).float(), ["a", None, "b", "a"]
    ours, theirs = narrow(ids, task=task).logits, wide(ids, task=task).logits
    assert ours.dtype == torch.bfloat16 and (ours - theirs).norm() < 0.02 * theirs.norm()
    down = torch.randn_like(theirs)
    a, b = gradient(ours, narrow, down.bfloat16()), gradient(theirs, wide, down)
    assert a.isfinite().all() and b.any() and (a - b).norm() < 0.1 * b.norm()
    assert all(parameter.grad.dtype == learned for parameter in bay.parameters())


# The equations, written by hand


def parts(kind: mb.Kind, place: str, rows: int = 3):
    """(the site's output, f(x), x, parameters, module), after something was learned."""
    module, site = site_of(place)
    params, x = trained(kind, site), SITES[place].example(rows)
    label = mb.Context(labels={"language": ["en", "sw", None][:rows]})
    f = function(module, x)
    if kind.replaces:
        return apply(kind, params, f, x, None, label, site, False), module(x), x, params, module
    y = f(x)
    out = f(x + apply(kind, params, f, x, x, label, site, False)) if kind.enters else None
    out = y + apply(kind, params, f, x, y, label, site, False) if out is None else out
    return out, y, x, params, module


def close(ours, theirs):
    assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def weight_at(place: str, module) -> torch.Tensor:
    return module.weight.T if place == "conv1d" else module.weight


@pytest.mark.parametrize("place", ["linear", "conv1d"])
@pytest.mark.parametrize("stable", [False, True])
def test_lora_is_w_plus_scaled_ba(place: str, stable: bool):
    out, _, x, p, module = parts(mb.LoRA(4, alpha=6.0, stable=stable), place)
    close(out, F.linear(x, weight_at(place, module) + 6 / (2 if stable else 4) * p["B"] @ p["A"], module.bias))


def test_lora_at_a_convolution_and_at_an_embedding():
    out, _, x, p, module = parts(mb.LoRA(2), "conv2d")
    close(out, F.conv2d(x, module.weight + torch.einsum("or,rihw->oihw", p["B"], p["A"]), module.bias, padding=1))
    out, _, x, p, module = parts(mb.LoRA(2), "embedding")
    close(out, (module.weight + (p["B"] @ p["A"]).T)[x])


@pytest.mark.parametrize("place", ["linear", "embedding", "norm", "block"])
def test_a_serial_bottleneck_reads_the_output(place: str):
    out, y, _, p, _ = parts(mb.Bottleneck(3, activation="gelu", scale=0.5), place)
    close(out, y + 0.5 * (F.gelu(y @ p["down"].T + p["down_bias"]) @ p["up"].T + p["up_bias"]))


def test_a_parallel_bottleneck_reads_the_input():
    out, y, x, p, _ = parts(mb.Bottleneck(3, placement="parallel", scale=4.0), "linear")
    assert p["down"].shape == (3, 8) and p["up"].shape == (6, 3)
    close(out, y + 4 * (F.relu(x @ p["down"].T + p["down_bias"]) @ p["up"].T + p["up_bias"]))


def test_a_bottleneck_may_normalise_first_and_learn_its_scale():
    out, y, _, p, _ = parts(mb.Bottleneck(3, norm=True, scale="learned"), "block")
    v = F.layer_norm(y, (8,), p["norm"], p["norm_bias"])
    close(out, y + p["scale"] * (F.relu(v @ p["down"].T + p["down_bias"]) @ p["up"].T + p["up_bias"]))


def test_a_bottleneck_at_a_convolution_is_two_1x1_convolutions():
    out, y, x, p, _ = parts(mb.Bottleneck(3), "conv2d")
    close(out, y + F.conv2d(F.relu(F.conv2d(y, p["down"], p["down_bias"])), p["up"], p["up_bias"]))
    out, y, x, p, _ = parts(mb.Bottleneck(3, placement="parallel"), "conv2d")
    close(out, y + F.conv2d(F.relu(F.conv2d(x, p["down"], p["down_bias"])), p["up"], p["up_bias"]))


def test_the_size_of_a_bottleneck_and_how_it_is_drawn():
    site = mb.Modular(nn.Linear(64, 64)).site
    assert fresh(mb.Bottleneck(), site)["down"].shape == (4, 64)
    assert fresh(mb.Bottleneck(reduction=2), site)["down"].shape == (32, 64)
    near = fresh(mb.Bottleneck(48, std=1e-2), site)
    assert not mb.Bottleneck(48, std=1e-2).neutral
    for name in ("down", "up"):
        assert near[name].abs().max() <= 2e-2 and 0.8e-2 < near[name].std() < 0.96e-2  # a normal cut at two deviations


@pytest.mark.parametrize("place", ["linear", "conv1d", "embedding", "norm", "block"])
def test_ia3_scales_the_output_bias_included(place: str):
    out, y, _, p, _ = parts(mb.IA3(), place)
    close(out, p["l"] * y)


@pytest.mark.parametrize("place", ["linear", "conv1d"])
def test_ia3_scales_the_input(place: str):
    out, _, x, p, module = parts(mb.IA3("input"), place)
    close(out, module(p["l"] * x))


def test_ia3_at_a_convolution_scales_channels():
    out, y, x, p, module = parts(mb.IA3(), "conv2d")
    close(out, p["l"].view(-1, 1, 1) * y)
    out, y, x, p, module = parts(mb.IA3("input"), "conv2d")
    close(out, module(p["l"].view(-1, 1, 1) * x))


def test_bitfit_moves_the_bias():
    out, _, x, p, module = parts(mb.BitFit(), "norm")
    close(out, F.layer_norm(x, (8,), module.weight, module.bias + p["bias"]))
    out, _, x, p, module = parts(mb.BitFit(), "conv2d")
    close(out, F.conv2d(x, module.weight, module.bias + p["bias"], padding=1))


@pytest.mark.parametrize("place", ["linear", "conv1d", "conv2d", "embedding"])
def test_a_sparse_delta_changes_chosen_entries(place: str):
    out, _, x, p, module = parts(mb.SparseDelta(density=0.25), place)
    assert len(p["values"]) == round(module.weight.numel() / 4) == len(p["indices"].unique())
    with torch.no_grad():
        module.weight.view(-1)[p["indices"]] += p["values"]
    close(out, module(x))


def test_the_entries_of_a_sparse_delta_are_the_seeds_or_the_masks():
    _, site = site_of("linear")
    first = fresh(mb.SparseDelta(0.2), site)
    assert torch.equal(first["indices"], fresh(mb.SparseDelta(0.2), site)["indices"])
    assert not torch.equal(first["indices"], fresh(mb.SparseDelta(0.2, seed=1), site)["indices"])
    mask = torch.rand(6, 8) < 0.3
    given = fresh(mb.SparseDelta(mask={"linear": mask}), site)
    assert torch.equal(given["indices"], mask.flatten().nonzero()[:, 0])
    assert mb.SparseDelta(mask={"linear": mask}) == mb.SparseDelta(None)


@pytest.mark.parametrize("gated", [False, True])
def test_a_feed_forward_expert_stands_instead_of_f(gated: bool):
    out, _, x, p, _ = parts(mb.FeedForward(5, "silu", gated=gated), "linear")
    up = F.linear(x, p["up"], p["up_bias"])
    hidden = F.silu(F.linear(x, p["gate"], p["gate_bias"])) * up if gated else F.silu(up)
    close(out, F.linear(hidden, p["down"], p["down_bias"]))


@pytest.mark.parametrize("place", ["linear", "conv1d", "conv2d", "embedding", "norm", "block"])
def test_full_is_the_site_with_other_parameters(place: str):
    out, _, x, p, module = parts(mb.Full(), place)
    named = {name.replace("/", "."): tensor for name, tensor in p.items()}
    close(out, torch.func.functional_call(module, named, (x,)))
    assert all(not torch.equal(named[name], own) for name, own in module.named_parameters())


def test_full_keeps_tied_parameters_tied():
    module = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    module[2].weight = module[0].weight
    layer = mb.Modular(module, {"a": mb.Full()}, mb.Uniform(), mb.WeightedSum())
    own = layer.parts._modules["a"]
    assert own.tensors()["0/weight"] is own.tensors()["2/weight"] and len(list(own.parameters())) == 3


def test_a_head_gives_logits():
    out, _, x, p, _ = parts(mb.Head(("no", "yes", "maybe")), "linear")
    close(out, x @ p["weight"].T + p["bias"])
    assert out.shape == (3, 3, 3)


@pytest.mark.parametrize("hidden", [None, 6])
def test_a_hypernetwork_generates_each_examples_parameters(hidden: int | None):
    kind = mb.Hyper(mb.LoRA(2), "language", ("en", "de", "sw"), size=4, hidden=hidden)
    out, y, x, p, _ = parts(kind, "linear")  # for en, sw and None
    for i, label in enumerate([0, 2]):
        code = torch.cat([p["labels"][label], p["site"]])
        code = code if hidden is None else F.relu(p["project"] @ code + p["project_bias"])
        a, b = (p[f"start/{n}"] + p[f"weight/{n}"] @ code / math.sqrt(len(code)) for n in "AB")
        close(out[i], y[i] + x[i] @ a.T @ b.T)
    close(out[2], y[2])


def test_a_hypernetwork_is_shared_by_sites_and_takes_labels_in_three_forms():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 6))
    hyper = mb.Hyper(mb.LoRA(2), "language", ("en", "de"), size=4)
    bay = mb.attach(model, at=nn.Linear, modules={"h": hyper}).use("h")
    p = [modular.parts._modules["h"].tensors() for modular in bay.modulars.values()]
    assert p[0]["labels"] is p[1]["labels"] is p[2]["labels"] and p[0]["site"] is not p[1]["site"]
    assert p[0]["weight/B"] is p[1]["weight/B"] and p[1]["weight/B"].shape != p[2]["weight/B"].shape
    for parameter in bay.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(3, 8)
    mixed = model(x, language=["en", "de", "en"])
    close(mixed, model(x, language=torch.tensor([0, 1, 0])))
    close(mixed[::2], model(x, language="en")[::2])
    assert not torch.allclose(mixed[1], model(x, language="en")[1])


# In a batch together


def test_heads_of_several_sizes_share_a_batch():
    layer = mb.Modular(
        nn.Linear(8, 4), {"a": mb.Head(2), "b": mb.Head(6), "c": mb.Head(3)}, mb.ByLabel("task"), mb.WeightedSum()
    )
    x, tasks = torch.randn(4, 8), ["a", "b", None, "c"]
    out = layer(x, task=tasks)
    assert out.shape == (4, 6)
    for row, (task, classes) in enumerate(zip(tasks, (2, 6, 4, 3), strict=True)):
        close(out[row, :classes], layer(x[row : row + 1], task=[task])[0])
        assert (out[row, classes:] == float("-inf")).all()


def test_masks_of_several_sizes_share_a_batch():
    masks = [torch.rand(6, 8) < density for density in (0.1, 0.3, 0.3)]
    kinds = {name: mb.SparseDelta(mask={"": mask}) for name, mask in zip("abc", masks, strict=True)}
    layer = mb.Modular(nn.Linear(8, 6), kinds, mb.ByLabel("task"), mb.WeightedSum())
    for parameter in layer.parts.parameters():
        nn.init.normal_(parameter)
    x, tasks = torch.randn(4, 8), ["a", "b", "c", "b"]
    close(layer(x, task=tasks), torch.cat([layer(x[i : i + 1], task=[t]) for i, t in enumerate(tasks)]))


def test_full_copies_of_a_block_share_a_batch_and_each_gets_its_rows_of_the_mask():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x, mask=None, cache=None):
            return self.linear(x) * mask.unsqueeze(-1)

    model = Masked()
    bay = mb.attach(model, at="", modules={"a": mb.Full(), "b": mb.Full()}, name="task")
    for parameter in bay.parameters():
        nn.init.normal_(parameter)
    x, mask, tasks = torch.randn(5, 3, 8), torch.rand(5, 3), ["b", "a", "b", None, "a"]
    alone = [model(x[i : i + 1], mask=mask[i : i + 1], task=[task]) for i, task in enumerate(tasks)]
    close(model(x, mask=mask, task=tasks), torch.cat(alone))
    with pytest.raises(mb.errors.SiteError, match="use_cache=False"):
        model(x, mask=mask, cache={}, task=tasks)
    model(x, mask=mask, cache={}, task="a")


def test_the_features_of_a_batch_norm_are_its_channels():
    x, norm = torch.randn(2, 4, 4, 4), nn.BatchNorm2d(4).eval()
    for kind in (mb.BitFit(), mb.IA3(), mb.Bottleneck(2)):
        layer = mb.Modular(norm, {"a": kind}, mb.Uniform(), mb.WeightedSum())
        assert_close(layer(x), norm(x))
        for parameter in layer.parts.parameters():
            nn.init.normal_(parameter)
        change = layer(x) - norm(x)
        if isinstance(kind, mb.BitFit):
            assert_close(change, layer.parts._modules["a"].tensors()["bias"].view(4, 1, 1).expand(2, 4, 4, 4))


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 4), (5, 4, 3)])
@pytest.mark.parametrize("kind", [mb.BitFit(), mb.IA3(), mb.Norm(), mb.Gates(2), mb.BatchNorm(), mb.Full()], ids=repr)
@pytest.mark.parametrize("make", [nn.BatchNorm1d, lambda d: nn.GroupNorm(2, d)], ids=["batch", "group"])
def test_the_features_of_a_norm_are_its_second_axis(make, kind: mb.Kind, shape: tuple[int, ...]):
    """However many axes follow: of (b, d) and (b, d, t); in a mixed batch, too, and folded."""
    norm, x = make(4).eval(), torch.randn(shape)
    nn.init.normal_(norm.weight)
    if isinstance(kind, mb.BatchNorm) and not isinstance(norm, nn.BatchNorm1d):
        return
    bay = mb.attach(norm, "", {"a": kind, "b": kind}, mb.ByLabel("task"))
    for parameter in bay.parameters():
        nn.init.normal_(parameter)
    out = norm(x, task=["a", "b", "b", None, "a"])
    rows = x.movedim(1, -1).flatten(1, -2) if x.ndim > 2 else x.unsqueeze(1)  # (b, t, d)
    for i, task in enumerate(["a", "b", "b", None, "a"]):
        assert_close(out[i : i + 1], norm(x[i : i + 1], task=[task]))
    if isinstance(kind, mb.IA3):
        plain = norm(x, task=[None] * 5)
        gain = next(iter(bay.modulars.values())).parts._modules["a"].tensors()["l"]
        assert_close(out[0], plain[0] * gain.view(4, *[1] * (len(shape) - 2)))
    if isinstance(norm, nn.BatchNorm1d):  # in evaluation each place is treated alone
        each = norm(rows[0], task=["a"] * len(rows[0]))
        assert_close(out[0].movedim(0, -1).reshape(each.shape), each)
    if kind.folds:
        want = norm(x, task=["a"] * 5)
        bay.fold("a")
        assert_close(norm(x), want)


class Scaled(nn.Embedding):
    """As Gemma's words: what is looked up is scaled."""

    embed_scale = 3.0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * self.embed_scale


@pytest.mark.parametrize(
    "kind", [mb.LoRA(2), mb.DenseDelta(), mb.SparseDelta(0.5), mb.LoHa(2), mb.LoKr(2), mb.DoRA(2)], ids=repr
)
def test_a_change_of_an_embedding_is_scaled_as_it_is(kind):
    torch.manual_seed(0)
    net, ids = nn.Sequential(Scaled(12, 6)), torch.randint(12, (3, 4))
    bay = mb.attach(net, "0", {"a": kind, "b": kind}, name="task")
    for parameter in bay.parameters():
        nn.init.normal_(parameter, std=0.3)
    for name, labels in (("a", ["a"] * 3), ("b", ["a", "b", None])):
        part = bay.modulars["0"].order[bay.names().index(name)]
        change, _ = kind.delta(part.tensors(), bay.modulars["0"].site).dense(bay.modulars["0"].site)
        want = 3 * nn.functional.embedding(ids, net[0].weight + change)
        row = labels.index(name)
        close(net(ids, task=labels)[row], want[row])
        bay.fold(name)
        close(net(ids), want)
        bay.unfold()


@pytest.mark.parametrize("case", [case for case in KINDS if case.generated], ids=ids)
def test_a_hypernetwork_compiles_whole(case: Case):
    layer = mb.Modular(site_of("linear")[0], {"a": case.make()}, mb.Uniform(), mb.WeightedSum()).train(case.trains)
    for parameter in layer.parts.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, labels = torch.randn(3, 2, 8), torch.tensor([0, -1, 2])
    torch._dynamo.reset()
    given = dict.fromkeys(case.labels, labels)
    close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x, **given), layer(x, **given))


# What is refused


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: mb.Bottleneck(8, reduction=2), "give one"),
        (lambda: mb.Bottleneck(0), "size=0"),
        (lambda: mb.Bottleneck(8, activation="swish"), "activation='swish'.*'silu'"),
        (lambda: mb.SparseDelta(0.0), "density=0.0"),
        (lambda: mb.FeedForward(-1), "size=-1"),
        (lambda: mb.Head(()), "labels="),
        (lambda: mb.Head(("a", "a")), "distinct"),
        (lambda: mb.Hyper(mb.LoRA(2), "language", ()), "labels="),
        (lambda: mb.Hyper(mb.Hyper(mb.LoRA(2), "a", ("b",)), "a", ("b",)), "no generator"),
    ],
)
def test_a_bad_argument_is_named(make, message: str):
    with pytest.raises(mb.errors.CompositionError, match=message):
        make()


@pytest.mark.parametrize(
    "kind, module",
    [
        (mb.LoRA(2), nn.LayerNorm(8)),
        (mb.Bottleneck(2), nn.Tanh()),
        (mb.Bottleneck(2, placement="parallel"), nn.Embedding(5, 8)),
        (mb.Bottleneck(2, placement="parallel"), nn.Conv2d(4, 4, 3, stride=2)),
        (mb.IA3("input"), nn.Embedding(5, 8)),
        (mb.IA3("input"), nn.LayerNorm(8)),
        (mb.SparseDelta(), nn.LayerNorm(8)),
        (mb.SparseDelta(mask={"elsewhere": torch.ones(8, 8, dtype=torch.bool)}), nn.Linear(8, 8)),
        (mb.SparseDelta(mask={"": torch.ones(4, 8, dtype=torch.bool)}), nn.Linear(8, 8)),
        (mb.SparseDelta(mask={"": torch.tensor([3, 64])}), nn.Linear(8, 8)),
        (mb.SparseDelta(None), nn.Linear(8, 8)),
        (mb.FeedForward(4), nn.Conv2d(4, 4, 3)),
        (mb.Head(4), nn.Embedding(5, 8)),
        (mb.Full(), nn.Tanh()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_site_that_does_not_fit_is_named(kind: mb.Kind, module: nn.Module):
    with pytest.raises(mb.errors.CompositionError, match=f"{type(kind).__name__}|{type(module).__name__}"):
        kind.init([mb.Modular(module).site])


def test_the_labels_of_a_hypernetwork_are_checked():
    layer = mb.Modular(
        nn.Linear(8, 6), {"h": mb.Hyper(mb.Bottleneck(2, std=0.1), "language", ("en",))}, mb.Uniform(), mb.WeightedSum()
    )
    x = torch.randn(2, 8)
    with pytest.raises(mb.errors.LabelError, match="no such label; it has 'en'"):
        layer(x, language=["en", "xx"])
    with pytest.raises(mb.errors.LabelError, match="starts with a change of its own"):
        layer(x, language=["en", None])
    with pytest.raises(mb.errors.LabelError, match="no label 'language'"):
        layer(x)
    linear = nn.Linear(8, 6)
    with pytest.raises(mb.errors.LabelError, match="'input'"):
        mb.attach(linear, at="", modules={"h": mb.Hyper(mb.LoRA(2), "input", ("en",))})
    assert type(linear) is nn.Linear
