"""Merging: laws that every method keeps, closed forms, and what mergekit, peft, fusion_bench and papers' code do."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from modbay import merging
from modbay.errors import MergeError
from modbay.merging import State
from modbay.methods import catalogue

SHAPES = {"a.weight": (6, 5), "a.bias": (6,), "norm": (5,)}
NORMAL = {"rtol": 0, "atol": 1e-6}


def model(seed: int, dtype: torch.dtype = torch.float32, spread: float = 1.0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    made = {name: (spread * torch.randn(shape, generator=g)).to(dtype) for name, shape in SHAPES.items()}
    return {**made, "steps": torch.tensor(7)}


def changed(base: State, seed: int) -> dict[str, Tensor]:
    """A model that began as the base."""
    other = model(seed, base["norm"].dtype, spread=0.3)
    return {name: t + other[name] if t.is_floating_point() else t for name, t in base.items()}


def positive(seed: int) -> dict[str, Tensor]:
    return {name: t.square() + 0.1 for name, t in model(seed).items() if t.is_floating_point()}


def grams(n: int) -> list[dict[str, Tensor]]:
    return [
        {"a.weight": merging.gram(torch.randn(20, 5, generator=torch.Generator().manual_seed(i)))} for i in range(n)
    ]


def alike(a: State, b: State, **tolerance: float) -> None:
    """Equal to the bit, or to a tolerance."""
    assert list(a) == list(b)
    for name in a:
        if tolerance:
            assert_close(a[name], b[name], **tolerance)
        else:
            assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


@dataclass(frozen=True)
class Law:
    """One row: merge(models, base, weights). Flags say which laws a method claims."""

    id: str
    merge: Callable[[Sequence[State], State, list[float]], State]
    linear: bool = False  # in the weights, as a change of the base or of nothing
    mean: bool = False  # weights that sum to 1 give the same model back from two of it; else 1 and 0 do
    pairs: bool = False  # of two models alone


LAWS = [
    Law("average", lambda m, b, w: merging.average(m, w), mean=True),
    Law("sum", lambda m, b, w: merging.average(m, w, normalise=False), linear=True, mean=True),
    Law("task arithmetic", lambda m, b, w: merging.task_arithmetic(m, b, w), linear=True, mean=True),
    Law("task arithmetic, normalised", lambda m, b, w: merging.task_arithmetic(m, b, w, normalise=True), mean=True),
    Law("ties", lambda m, b, w: merging.ties(m, b, w, density=1.0), mean=True),
    Law("ties, all", lambda m, b, w: merging.ties(m, b, w, density=1.0, over="all"), mean=True),
    Law("ties, count", lambda m, b, w: merging.ties(m, b, w, density=1.0, elect="count"), mean=True),
    Law("ties, sum", lambda m, b, w: merging.ties(m, b, w, density=1.0, mean="sum"), mean=True),
    Law("ties, max", lambda m, b, w: merging.ties(m, b, w, density=1.0, mean="max")),
    Law("ties, mean by count", lambda m, b, w: merging.ties(m, b, w, density=1.0, mean="count")),
    Law("dare", lambda m, b, w: merging.dare(m, b, w, density=1.0), linear=True, mean=True),
    Law("dare, ties", lambda m, b, w: merging.dare(m, b, w, density=1.0, elect="mass"), mean=True),
    Law("slerp", lambda m, b, w: merging.slerp(m[0], m[1], w[1] / sum(w)), mean=True, pairs=True),
    Law("fisher", lambda m, b, w: merging.fisher(m, FISHERS[: len(m)], w, floor="each"), mean=True),
    Law("fisher, first", lambda m, b, w: merging.fisher(m, FISHERS[: len(m)], w), mean=True),
    Law("fisher, added", lambda m, b, w: merging.fisher(m, FISHERS[: len(m)], w, floor="added"), mean=True),
    Law("regmean", lambda m, b, w: merging.regmean(m, grams(len(m)), 0.9, w), mean=True),
    Law("soup", lambda m, b, w: merging.greedy_soup(
        [one for one, x in zip(m, w, strict=True) if x], lambda s: -float(s["norm"].norm())).model, mean=True),
    Law("sparse", lambda m, b, w: merging.add_sparse(
        b, [merging.sparse_difference(one, b) for one in m], w), linear=True, mean=True),
]  # fmt: skip
FISHERS = [positive(50 + i) for i in range(3)]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.id)
def test_the_laws_of_merging(law):
    base = model(0)
    models = [changed(base, i) for i in (1, 2, 3)][: 2 if law.pairs else 3]
    n, before = len(models), copy.deepcopy([base, *models])
    for i in range(n):  # weight 1 on one model is that model, bit for bit
        alone = law.merge(models, base, [float(i == j) for j in range(n)])
        alike(alone, models[i], **(NORMAL if law.id == "sparse" else {}))  # it has the differences, rounded, alone
        assert not {t.data_ptr() for t in alone.values()} & {t.data_ptr() for m in models for t in m.values()}
    if law.mean:  # the same model twice gives it back
        alike(law.merge([models[0]] * 2, base, [0.5, 0.5]), models[0], **NORMAL)
    if not law.pairs and law.id not in ("sum", "soup"):  # models that changed nothing change nothing
        alike(law.merge([base] * n, base, [0.5, 0.3, 0.2]), base, **NORMAL)
    weights = [0.5, 0.3, 0.2][:n]
    merged = law.merge(models, base, weights)
    if not law.id.startswith(("fisher", "regmean")):  # the order counts for nothing; theirs is that of statistics, too
        turned = law.merge(models[::-1], base, weights[::-1])
        alike(turned, merged, **NORMAL)
    if law.linear:  # the change by a sum of weights is the sum of the changes
        at = lambda *w: law.merge(models, base, [float(x) for x in w])
        zero, one, two, both = at(0, 0, 0), at(0.4, -1, 0), at(0, 0.7, 2), at(0.4, -0.3, 2)
        for name in SHAPES:
            assert_close(both[name] - zero[name], one[name] + two[name] - 2 * zero[name], atol=1e-5, rtol=0)
    for was, now in zip(before, [base, *models], strict=True):  # nothing was changed in place
        alike(was, now)


@pytest.mark.parametrize("law", [law for law in LAWS if law.id != "soup"], ids=lambda law: law.id)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_half_precision_is_computed_in_float32_and_rounded_once(law, dtype):
    base = model(0, dtype)
    models = [changed(base, i) for i in (1, 2)]
    wide = lambda m: {n: t.to(torch.promote_types(dtype, torch.float32)) if t.is_floating_point() else t
                      for n, t in m.items()}  # fmt: skip
    merged = law.merge(models, base, [0.6, 0.4])
    exact = law.merge([wide(m) for m in models], wide(base), [0.6, 0.4])
    alike(merged, {n: t.to(merged[n].dtype) for n, t in exact.items()})


@pytest.mark.parametrize("turn", [[1, 0, 2], [2, 1, 0]])
def test_methods_with_statistics_are_symmetric_in_pairs_of_model_and_statistic(turn):
    models, weights, gs = [model(i) for i in range(3)], [0.5, 0.3, 0.2], grams(3)
    moved = lambda several: [several[i] for i in turn]
    for floor in ("each", "added"):
        alike(
            merging.fisher(moved(models), moved(FISHERS), moved(weights), floor=floor),
            merging.fisher(models, FISHERS, weights, floor=floor),
            **NORMAL,
        )
    alike(
        merging.regmean(moved(models), moved(gs), 0.9, moved(weights)),
        merging.regmean(models, gs, 0.9, weights),
        **NORMAL,
    )


# Average and arithmetic


@pytest.mark.parametrize("normalise", [True, False])
def test_an_average_is_mergekit_s_linear(normalise):
    models, weights = [model(i) for i in range(3)], torch.tensor([0.7, 0.2, 0.4])
    merged = merging.average(models, weights.tolist(), normalise)
    for name in SHAPES:  # in mergekit's order: stacked, weighed, summed, divided
        stacked = torch.stack([m[name] for m in models])
        total = (weights.view(-1, *[1] * (stacked.ndim - 1)) * stacked).sum(0)
        assert_close(merged[name], total / weights.sum() if normalise else total, **NORMAL)
    alike(merging.average(models), merging.average(models, [2.0, 2.0, 2.0]), **NORMAL)


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("normalise", [False, True])
def test_task_arithmetic_is_peft_s_and_mergekit_s(scale, normalise):
    peft = pytest.importorskip("peft.utils.merge_utils")
    base, models, weights = model(0), [model(i) for i in (1, 2, 3)], [0.7, -0.2, 0.9]
    merged = merging.task_arithmetic(models, base, weights, scale, normalise)
    for name in SHAPES:
        deltas = torch.stack([m[name] - base[name] for m in models])
        mixed = (deltas * torch.tensor(weights).view(-1, *[1] * (deltas.ndim - 1))).sum(0)
        mixed = mixed / sum(weights) if normalise else mixed
        assert_close(merged[name], base[name] + scale * mixed, **NORMAL)
        theirs = peft.task_arithmetic([m[name] for m in models], torch.tensor(weights))
        assert_close(merging.task_arithmetic_tensor([m[name] for m in models], None, weights), theirs, **NORMAL)


def test_what_is_negated_and_what_is_in_analogy():
    base, a, b, c = (model(i) for i in range(4))
    alike(
        merging.task_arithmetic([a], base, [-1.0], 0.4),
        {n: base[n] - 0.4 * (a[n] - base[n]) if t.is_floating_point() else t for n, t in base.items()},
        **NORMAL,
    )
    alike(
        merging.analogy(a, b, c, base),
        {n: c[n] + b[n] - a[n] if t.is_floating_point() else t for n, t in base.items()},
        **NORMAL,
    )
    alike(merging.analogy(a, b, c, base, 0.5), {
        n: base[n] + 0.5 * (c[n] + b[n] - a[n] - base[n]) if t.is_floating_point() else t for n, t in base.items()},
        **NORMAL)  # fmt: skip
    alike(merging.analogy(a, a, c, base), c, **NORMAL)


# TIES and DARE


def mergekit(deltas: list[Tensor], weights: list[float], consensus: str | None, normalise: bool) -> Tensor:
    """What mergekit does with trimmed task vectors, entry by entry."""
    flat = torch.stack([d.flatten() for d in deltas])
    out = torch.zeros(flat.shape[1])
    for j in range(flat.shape[1]):
        weighed = [w * float(d) for w, d in zip(weights, flat[:, j], strict=True)]
        signs = [(x > 0) - (x < 0) for x in weighed]
        plus = sum(weighed) >= 0 if consensus == "sum" else sum(signs) >= 0
        kept = [i for i, s in enumerate(signs) if consensus is None or s == (1 if plus else -1)]
        below = sum(weights[i] for i in kept) if normalise else 1.0
        out[j] = sum(weighed[i] for i in kept) / (below or 1.0)
    return out.view_as(deltas[0])


def largest(delta: Tensor, density: float) -> Tensor:
    """mergekit's trim: the first int(density · n) in falling order of size."""
    mask = torch.zeros(delta.numel())
    mask[delta.abs().flatten().argsort(descending=True)[: int(density * delta.numel())]] = 1
    return delta * mask.view_as(delta)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("consensus", ["sum", "count"])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.7, 0.2, 1.4], [0.7, -0.3, 1.0]])
def test_ties_is_mergekit_s(consensus, normalise, weights):
    base, models = model(0), [model(i) for i in (1, 2, 3)]
    how = {"elect": "mass" if consensus == "sum" else "count", "mean": "weights" if normalise else "sum"}
    merged = merging.ties(models, base, weights, 0.4, 0.8, **how)
    for name in SHAPES:
        deltas = [largest(m[name] - base[name], 0.4) for m in models]
        assert_close(merged[name], base[name] + 0.8 * mergekit(deltas, weights, consensus, normalise), **NORMAL)


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("theirs, mine", [("total", "mass"), ("frequency", "count")])
def test_ties_is_peft_s(density, theirs, mine):
    peft = pytest.importorskip("peft.utils.merge_utils")
    weights = [0.7, 0.2, 1.4]
    for shape in SHAPES.values():
        deltas = [torch.randn(shape) for _ in weights]
        merged = merging.ties_tensor(deltas, None, weights, density, elect=mine, weighted=False, mean="count")
        assert torch.equal(merged, peft.ties(deltas, torch.tensor(weights), density, theirs))


def paper(checks: Tensor, share: float, merge: str) -> Tensor:
    """The paper's code, one entry at a time: checks (models, entries) of all tensors together."""
    n = checks.shape[1]
    cuts = [sorted(row.abs().tolist())[n - int(n * share) - 1] for row in checks]
    rows = [[x if abs(x) >= cut else 0.0 for x in row.tolist()] for row, cut in zip(checks, cuts, strict=True)]
    sign = lambda x: (x > 0) - (x < 0)
    signs = [sign(sum(column)) for column in zip(*rows, strict=True)]
    most, out = sign(sum(signs)), []
    for s, column in zip(signs, zip(*rows, strict=True), strict=True):
        kept = [x for x in column if (x > 0 if (s or most) > 0 else x < 0)]
        out.append({"mean": sum(kept) / max(1, len(kept)), "sum": sum(kept),
                    "max": max((abs(x) for x in column if x in kept), default=0) * (s or most)}[merge])  # fmt: skip
    return torch.tensor(out)


@pytest.mark.parametrize("mean, theirs", [("count", "mean"), ("sum", "sum"), ("max", "max")])
def test_ties_is_the_paper_s_code_and_fusion_bench_s(mean, theirs):
    base, models = model(0), [model(i) for i in (1, 2, 3)]
    for m in (*models, base):  # whole numbers, of which many are as large, and votes are even
        for name in SHAPES:
            m[name].mul_(2).round_()
    flat = lambda m: torch.cat([m[name].flatten() for name in sorted(SHAPES)])
    merged = merging.ties(models, base, density=0.3, scale=0.3, over="all", mean=mean)
    wanted = flat(base) + 0.3 * paper(torch.stack([flat(m) - flat(base) for m in models]), 0.3, theirs)
    assert_close(flat(merged), wanted, **NORMAL)
    votes = sum(d * (d.abs() >= d.abs().kthvalue(len(d) - int(len(d) * 0.3)).values) for d in
                (flat(m) - flat(base) for m in models))  # fmt: skip
    assert (votes == 0).any()


def test_ties_without_conflict_and_in_full_is_the_mean():
    base = model(0)
    changes = [{name: positive(i)[name] for name in SHAPES} for i in (1, 2, 3)]
    models = [{**base, **{n: base[n] + c[n] for n in SHAPES}} for c in changes]
    alike(merging.ties(models, base, density=1.0), merging.average(models), **NORMAL)
    alike(merging.ties(models, base, [3.0, 1.0, 2.0], 1.0), merging.average(models, [3.0, 1.0, 2.0]), **NORMAL)


def test_trimmed_entries_are_the_base_s_and_kept_ones_the_model_s_to_the_bit():
    base, one = model(0), model(1)
    merged = merging.ties([one], base, density=0.2)
    for name, shape in SHAPES.items():
        ours = merged[name] == one[name]
        assert int(ours.sum()) == int(0.2 * torch.Size(shape).numel())
        assert torch.equal(merged[name][~ours], base[name][~ours])


def test_a_tensor_at_a_time_is_the_whole():
    base, models = model(0), [model(i) for i in (1, 2, 3)]
    cuts = merging.thresholds(models, base, 0.3)
    whole = merging.ties(models, base, density=0.3, over="all")
    for name in SHAPES:
        one = merging.ties_tensor([m[name] for m in models], base[name], density=0.3, cuts=cuts)
        assert torch.equal(one, whole[name])


def test_dare_keeps_its_share_and_its_mean():
    g, delta = torch.Generator().manual_seed(3), torch.randn(200)
    drawn = torch.stack([merging.drop(delta, 0.2, generator=g) for _ in range(4000)])
    kept = drawn != 0
    assert abs(float(kept.float().mean()) - 0.2) < 0.002  # 800 000 draws: four and a half standard deviations
    assert_close(drawn[kept], (delta / 0.2).expand_as(drawn)[kept])  # what is kept is larger by 1/p
    spread = delta.abs() * (0.8 / 0.2 / 4000) ** 0.5
    assert ((drawn.mean(0) - delta).abs() < 5 * spread).all()
    assert_close(merging.drop(delta, 0.2, "l1", g).abs().sum(), delta.abs().sum())
    bare = merging.drop(delta, 0.2, None, g)
    assert torch.equal(bare[bare != 0], delta[bare != 0])


@pytest.mark.parametrize("density", [1e-300, 1e-6, 0.003, 0.2, 0.25, 0.7500000000000001, 0.999])
def test_draws_are_independent_and_as_likely_as_they_should_be(density):
    n = 400_000
    drawn = merging.draw(n, density, seed=3).double()
    spread = (density * (1 - density) / n) ** 0.5
    assert abs(float(drawn.mean()) - density) <= 5 * spread + 1e-12
    for far in (1, 2, 7, 8):  # neighbours come of one 64-bit word
        both = float((drawn[far:] * drawn[:-far]).mean())
        assert abs(both - density**2) <= 5 * density * ((1 - density**2) / n) ** 0.5 + 5 * spread * density + 1e-6
    assert torch.equal(merging.draw(n, density, seed=3).double(), drawn)
    other = merging.draw(n, density, seed=3, place=1).double()
    assert abs(float((drawn * other).mean()) - density**2) <= 10 * density * spread / max(density, 1e-6) + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trim_is_the_same_in_parts(dtype):
    vector = torch.randn(1000, generator=torch.Generator().manual_seed(2)).mul(4).round().to(dtype)  # many are as large
    for density in (0.001, 0.2, 0.5, 0.99):
        parts = lambda: vector.split(7)
        where = merging.cut(parts, 1000, density)
        whole = vector * merging.trim(vector, density)
        assert int((whole != 0).sum()) == min(int(density * 1000), int((vector != 0).sum()))
        assert torch.equal(torch.cat([merging.trimmed(p, where, 7 * i) for i, p in enumerate(parts())]), whole)


def test_what_dare_drops_follows_from_seed_name_and_place():
    base, models = model(0), [model(i) for i in (1, 2)]
    merged = merging.dare(models, base, density=0.5, seed=4)
    alike(merging.dare(models, base, density=0.5, seed=4), merged)
    some = lambda m: {name: m[name] for name in ("norm", "a.bias")}  # another order, and fewer
    alike(merging.dare([some(m) for m in models], some(base), density=0.5, seed=4), some(merged))
    assert not torch.equal(merging.dare(models, base, density=0.5, seed=5)["a.weight"], merged["a.weight"])
    assert not torch.equal(merged["norm"] == base["norm"], merged["a.bias"][:5] == base["a.bias"][:5])


@pytest.mark.parametrize("elect", [None, "mass", "count"])
def test_dare_is_peft_s_and_mergekit_s(elect):
    peft = pytest.importorskip("peft.utils.merge_utils")
    weights, density = [0.7, 0.2, 1.4], 0.4
    for shape in SHAPES.values():
        deltas = [torch.randn(shape) for _ in weights]
        torch.manual_seed(1)
        mine = merging.dare_tensor(deltas, None, weights, density, elect=elect, weighted=False, mean="count")
        torch.manual_seed(1)
        if elect is None:
            assert_close(mine, peft.dare_linear(deltas, torch.tensor(weights), density), **NORMAL)
        else:
            way = {"mass": "total", "count": "frequency"}[elect]
            assert torch.equal(mine, peft.dare_ties(deltas, torch.tensor(weights), density, way))
        torch.manual_seed(1)
        mine = merging.dare_tensor(deltas, None, weights, density, rescale="l1", elect=elect)
        torch.manual_seed(1)  # mergekit: what is left has the L1 norm of all
        kept = [d * torch.bernoulli(torch.full_like(d, density)) for d in deltas]
        kept = [k * (d.abs().sum() / k.abs().sum()) if k.any() else k for k, d in zip(kept, deltas, strict=True)]
        consensus = {None: None, "mass": "sum", "count": "count"}[elect]
        assert_close(mine, mergekit(kept, weights, consensus, normalise=False), rtol=1e-6, atol=2e-6)


# SLERP


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 0.9, 1.0, 1.5])
@pytest.mark.parametrize("near", [0.0, 1e-3, -1.0, None])
def test_slerp_is_mergekit_s(t, near):
    a = torch.randn(7, 9)
    b = torch.zeros(7, 9) if near is None else torch.randn(7, 9) if near == 0 else near * a / abs(near)
    b = b + near * torch.randn(7, 9) if near == 1e-3 else b
    unit = [x / x.norm() if x.norm() > 1e-8 else x for x in (a, b)]
    cos = (unit[0] * unit[1]).sum()
    wanted = (1 - t) * a + t * b
    if cos.abs() <= 0.9995:
        angle = torch.arccos(cos)
        wanted = (torch.sin(angle - t * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)
    assert (cos.abs() > 0.9995) == (near in (1e-3, -1.0))
    assert_close(merging.slerp_tensor([a, b], t), wanted, rtol=1e-6, atol=1e-6)


def test_slerp_keeps_the_norm_of_the_sphere():
    a, b = (torch.nn.functional.normalize(torch.randn(50), dim=0) for _ in range(2))
    for t in (0.1, 0.5, 0.8):
        assert_close(merging.slerp_tensor([a, b], t).norm(), torch.tensor(1.0))
    assert merging.average_tensor([a, b]).norm() < 0.9


# Fisher and RegMean


def test_fisher_is_the_mean_by_precision():
    models, weights = [model(i) for i in range(3)], [0.5, 2.0, 1.0]
    merged = merging.fisher(models, FISHERS, weights, normalise=False)
    for name in SHAPES:
        precision = torch.stack([w * f[name] for w, f in zip(weights, FISHERS, strict=True)])
        wanted = (precision * torch.stack([m[name] for m in models])).sum(0) / precision.sum(0)
        assert_close(merged[name], wanted, **NORMAL)
    ones = [{n: torch.ones(s) for n, s in SHAPES.items()}] * 3
    alike(merging.fisher(models, ones, weights), merging.average(models, weights), **NORMAL)


def test_fisher_is_the_paper_s_code_and_fusion_bench_s():
    models, weights, eps = [model(i) for i in range(3)], [0.5, 2.0, 1.0], 1e-6
    fishers = [{n: t * (torch.rand(t.shape) > 0.5) for n, t in f.items()} for f in FISHERS]  # some are sure of nothing
    norms = [torch.cat([t.flatten() for t in f.values()]).norm() for f in fishers]
    paper, first = merging.fisher(models, fishers, weights), models[0]
    added = merging.fisher(models, fishers, weights, floor="added")
    for name in SHAPES:
        values, diagonals = torch.stack([m[name] for m in models]), torch.stack([f[name] for f in fishers])
        by = lambda w, d, v: (w.view(-1, *[1] * (v.ndim - 1)) * d * v).sum(0) / (
            w.view(-1, *[1] * (v.ndim - 1)) * d).sum(0)  # fmt: skip
        floored = torch.cat([diagonals[:1].clamp(min=eps), diagonals[1:]])
        scaled = torch.tensor([w / n for w, n in zip(weights, norms, strict=True)])
        assert_close(paper[name], by(scaled, floored, values), **NORMAL)
        unsure = diagonals.sum(0) == 0
        assert torch.equal(paper[name][unsure], first[name][unsure])
        inverse = torch.tensor([1 / (n + eps) for n in norms])
        scaled = torch.tensor(weights) * inverse / inverse.sum()
        assert_close(added[name], by(scaled, diagonals + eps, values), **NORMAL)


@pytest.mark.parametrize("transposed", [False, True])
def test_regmean_is_least_squares_on_all_data(transposed):
    layers = [nn.Linear(5, 6) for _ in range(3)]
    xs = [torch.randn(rows, 5) + i for i, rows in enumerate((20, 9, 30))]
    models = [{"weight": layer.weight.detach().mT if transposed else layer.weight.detach(), "bias": layer.bias.detach()}
              for layer in layers]  # fmt: skip
    merged = merging.regmean(models, [{"weight": merging.gram(x)} for x in xs], alpha=1.0, transposed=transposed)
    ys = [x @ layer.weight.detach().mT for x, layer in zip(xs, layers, strict=True)]
    wanted = torch.linalg.lstsq(torch.cat(xs), torch.cat(ys)).solution
    assert_close(merged["weight"] if transposed else merged["weight"].mT, wanted, rtol=1e-4, atol=1e-5)
    assert_close(merged["bias"], torch.stack([m["bias"] for m in models]).mean(0))


def test_regmean_is_fusion_bench_s():
    models, xs, alpha = [model(i) for i in range(3)], [torch.randn(20, 5) for _ in range(3)], 0.1
    merged = merging.regmean(models, [{"a.weight": merging.gram(x) / len(x)} for x in xs], alpha)
    above, below = torch.zeros(5, 6), torch.zeros(5, 5)
    for m, x in zip(models, xs, strict=True):
        g = x.mT @ x / len(x)
        g = g * torch.full((5, 5), alpha).fill_diagonal_(1.0)
        above, below = above + g @ m["a.weight"].mT, below + g
    assert_close(merged["a.weight"], (torch.inverse(below) @ above).mT, rtol=1e-5, atol=1e-5)
    assert_close(merged["norm"], torch.stack([m["norm"] for m in models]).mean(0))


def test_regmean_leaves_inputs_that_are_always_zero_at_the_average():
    models, xs = [model(i) for i in range(2)], [torch.randn(20, 5) for _ in range(2)]
    for x in xs:
        x[:, 3] = 0
    merged = merging.regmean(models, [{"a.weight": merging.gram(x)} for x in xs], alpha=1.0)["a.weight"]
    assert_close(merged[:, 3], (models[0]["a.weight"] + models[1]["a.weight"])[:, 3] / 2)
    live = [0, 1, 2, 4]
    less = merging.regmean_tensor(
        [m["a.weight"][:, live] for m in models], [merging.gram(x[:, live]) for x in xs], alpha=1.0
    )
    assert_close(merged[:, live], less, rtol=1e-4, atol=1e-5)


# Soups, running means, sparse differences


def test_a_greedy_soup_keeps_what_makes_it_better():
    target = torch.zeros(2)
    models = [{"w": torch.tensor(w)} for w in ([1.0, 0.0], [-1.0, 0.2], [5.0, 5.0], [0.0, -0.6])]
    seen = []

    def score(state: dict[str, Tensor]) -> float:
        seen.append(state["w"])
        return -float((state["w"] - target).norm())

    soup = merging.greedy_soup(models, score)
    assert len(seen) == 4 + 3
    # Best first: 3 (0.6 away), 0 (1.0), 1, 2. 3 and 0: (0.5, −0.3), 0.58 away. With 1: (0, −0.13). Worse with 2.
    assert soup.kept == [3, 0, 1]
    assert_close(soup.model["w"], torch.tensor([0.0, -0.4 / 3])) and soup.score == score(soup.model)
    given = merging.greedy_soup(models, score, scores=[-1.0, -1.02, -7.07, -0.6])
    assert given.kept == soup.kept and torch.equal(given.model["w"], soup.model["w"])


def test_a_greedy_soup_is_never_worse_than_its_best_and_even_scores_are_a_choice():
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        models = [{"w": torch.randn(4, generator=g)} for _ in range(5)]
        score = lambda s: -float(s["w"].abs().max())
        assert merging.greedy_soup(models, score).score >= max(map(score, models))
    flat = lambda s: 0.0
    assert merging.greedy_soup(models, flat).kept == [0]
    assert merging.greedy_soup(models, flat, even=True).kept == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_running_mean_is_the_mean(dtype):
    models = [model(i, dtype) for i in range(7)]
    mean, ema = merging.RunningMean(), merging.RunningMean(0.9)
    for i, m in enumerate(models):
        m["steps"] = torch.tensor(i)
        before = copy.deepcopy(m)
        mean.update(m), ema.update(m)
        alike(m, before)
    wanted = {n: torch.stack([m[n].double() for m in models]).mean(0) for n in SHAPES}
    past = models[0]["norm"].double()
    for m in models[1:]:
        past = 0.9 * past + 0.1 * m["norm"].double()
    for name in SHAPES:
        assert_close(mean.mean[name].double(), wanted[name], rtol=0, atol=1e-6)
        assert mean.average()[name].dtype == dtype
    assert_close(ema.mean["norm"].double(), past, rtol=0, atol=1e-6)
    assert mean.average()["steps"] == 6  # a counter is the latest's


@pytest.mark.parametrize("decay", [None, 0.999, 0.3])
def test_running_means_are_torch_s_bit_for_bit(decay):
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

    net = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6))
    how = get_swa_multi_avg_fn() if decay is None else get_ema_multi_avg_fn(decay)
    theirs, mine = AveragedModel(net, multi_avg_fn=how), merging.RunningMean(decay)
    for step in range(9):
        for p in net.parameters():
            nn.init.normal_(p)
        theirs.update_parameters(net), mine.update(net.state_dict())
        if step == 4:  # stopped, and gone on with
            mine = merging.RunningMean(decay, copy.deepcopy(mine.mean), mine.count)
    parameters = dict(theirs.module.named_parameters())
    for name, p in parameters.items():
        assert torch.equal(mine.average()[name], p)


def test_sparse_differences_add_up():
    base = model(0)
    language, task = copy.deepcopy(base), copy.deepcopy(base)
    language["a.weight"][0, :3] += torch.tensor([1.0, 2.0, 3.0])
    language["norm"][1] -= 1
    task["a.weight"][0, 2:4] += torch.tensor([10.0, 20.0])
    deltas = [merging.sparse_difference(one, base) for one in (language, task)]
    assert set(deltas[0]) == {"a.weight", "norm"} and deltas[1]["a.weight"][0].tolist() == [2, 3]
    both = merging.add_sparse(base, deltas)
    wanted = {n: language[n] + task[n] - t if t.is_floating_point() else t for n, t in base.items()}
    alike(both, wanted, atol=1e-5, rtol=0)
    assert_close(both["a.weight"][0, 2], base["a.weight"][0, 2] + 13)
    summed = merging.sum_sparse(deltas, [1.0, 0.5])
    assert summed["a.weight"][0].tolist() == [0, 1, 2, 3]
    assert_close(summed["a.weight"][1], torch.tensor([1.0, 2.0, 8.0, 10.0]), atol=1e-5, rtol=0)
    alike(merging.add_sparse(base, [summed]), merging.add_sparse(base, deltas, [1.0, 0.5]), **NORMAL)
    alike(merging.add_sparse(base, deltas, [0.0, 0.0]), base)
    alike(merging.add_sparse(base, []), base)


# What is refused


def other(**changes: Tensor | None) -> dict[str, Tensor]:
    """A model with other tensors: `a_bias` for a.bias; None: without."""
    made = {**model(1), **{name.replace("_", "."): t for name, t in changes.items() if t is not None}}
    return {name: t for name, t in made.items() if changes.get(name.replace(".", "_"), t) is not None}


REFUSED = {
    "names": (lambda: merging.average([model(0), other(norm=None, extra=torch.ones(2))]),
        ["average", "models[1]", "lacks 'norm'", "has 'extra'", "one architecture"]),
    "the base's": (lambda: merging.ties([model(0)], other(norm=None)), ["ties", "base lacks 'norm'"]),
    "shapes": (lambda: merging.task_arithmetic([model(0)], other(norm=torch.ones(4))),
        ["shape of 'norm' in base", "(4,)", "(5,)", "resized"]),
    "dtypes": (lambda: merging.dare([model(0), other(norm=torch.ones(5).double())], model(2)),
        ["dtype of 'norm' in models[1]", "float64", "float32", "to(dtype)"]),
    "integers": (lambda: merging.slerp(model(0), other(steps=torch.tensor(8))), ["'steps'", "models[1]", "different"]),
    "nothing": (lambda: merging.average([]), ["nothing to merge"]),
    "weights": (lambda: merging.average([model(0)] * 2, [1.0]), ["weights=[1.0]", "1 of 2 models"]),
    "no weight": (lambda: merging.average([model(0)] * 2, [1.0, -1.0]), ["sum is 0"]),
    "not finite": (lambda: merging.average([model(0), other(norm=torch.full((5,), torch.nan))]),
        ["'norm'", "not be finite in float32"]),
    "too large": (lambda: merging.task_arithmetic([model(0, torch.float16)], model(1, torch.float16), scale=1e6),
        ["not be finite in float16", "float32"]),
    "density": (lambda: merging.ties([model(0)], model(1), density=20.0), ["density=20.0", "at most 1"]),
    "election": (lambda: merging.ties([model(0)] * 2, model(1), elect="sum"), ["elect='sum'", "'mass', 'count'"]),
    "mean": (lambda: merging.ties([model(0)] * 2, model(1), mean="median"), ["mean='median'", "'weights'"]),
    "over": (lambda: merging.ties([model(0)] * 2, model(1), over="layer"), ["over='layer'", "'tensor', 'all'"]),
    "rescale": (lambda: merging.dare([model(0)] * 2, model(1), rescale="l2"), ["rescale='l2'", "'l1'"]),
    "three on an arc": (lambda: merging.slerp_tensor([torch.ones(2)] * 3), ["two models", "3"]),
    "fewer Fishers": (lambda: merging.fisher([model(0)] * 2, FISHERS[:1]), ["1 for 2 models"]),
    "Fishers": (lambda: merging.fisher([model(0)], [{"norm": torch.ones(5)}]), ["fishers[0]", "'a.weight'", "ones"]),
    "Fishers of nothing": (lambda: merging.fisher([model(0)], [{n: torch.zeros(s) for n, s in SHAPES.items()}]),
        ["fishers[0] is zero", "normalise=False"]),
    "floor": (lambda: merging.fisher([model(0)], FISHERS[:1], floor="none"), ["floor='none'", "'first'"]),
    "fewer Grams": (lambda: merging.regmean([model(0)] * 2, grams(1)), ["1 for 2 models"]),
    "strange Grams": (lambda: merging.regmean([model(0)], [{"b.weight": torch.eye(5)}]), ["'b.weight'", "Name each"]),
    "uneven Grams": (lambda: merging.regmean([model(0)] * 2, [*grams(1), {}]), ["grams[1]", "'a.weight'"]),
    "large Grams": (lambda: merging.regmean([model(0)], [{"a.weight": torch.eye(6)}]), ["(6, 6)", "transposed=True"]),
    "scores": (lambda: merging.greedy_soup([model(0)] * 2, lambda s: 0.0, [1.0]), ["1 of 2 models"]),
    "strange sparse": (lambda: merging.add_sparse(model(0), [{"b": (torch.tensor([0]), torch.ones(1))}]),
        ["deltas[0]", "'b'"]),
    "outside": (lambda: merging.add_sparse(model(0), [{"norm": (torch.tensor([5]), torch.ones(1))}]),
        ["'norm'", "5 entries", "another base"]),
    "decay": (lambda: merging.RunningMean(1.5), ["decay=1.5"]),
    "no mean": (lambda: merging.RunningMean().average(), ["update(model.state_dict())"]),
    "no count": (lambda: merging.RunningMean(mean=model(0)), ["count=0"]),
}  # fmt: skip


@pytest.mark.parametrize("call, said", REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_fit_is_named(call, said):
    with pytest.raises(MergeError) as error:
        call()
    assert all(part in str(error.value) for part in said), str(error.value)


def test_a_running_mean_refuses_another_architecture():
    mean = merging.RunningMean()
    mean.update(model(0))
    for odd in (other(norm=None), other(norm=torch.ones(4)), other(more=torch.ones(1))):
        with pytest.raises(MergeError, match="RunningMean"):
            mean.update(odd)
    assert mean.count == 1


def test_masks_of_minus_infinity_that_all_have_stay():
    mask = torch.full((3, 3), -torch.inf).triu(1)
    models = [{**model(i), "mask": mask} for i in range(3)]
    for merged in (merging.average(models), merging.ties(models[1:], models[0]), merging.slerp(*models[:2])):
        assert torch.equal(merged["mask"], mask)


def test_the_catalogue_has_merging():
    rows = {row.name: row for row in catalogue() if row.build.startswith("merging.")}
    systems = {number for row in rows.values() for number in row.systems}
    assert systems >= {116, 122, 123, 124, 125, 126, 127, 128, 130}
    assert all(
        row.axis == "aggregation" and row.section == "5.1" and row.arxiv for n, row in rows.items() if n != "SLERP"
    )
