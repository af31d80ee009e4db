"""Metrics against scikit-learn and scipy, intervals against known ones, spans against cases made by hand."""

import itertools
import math
import time

import numpy as np
import pytest
import torch

import modbay as mb
from modbay import metrics

pytest.importorskip("sklearn")
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, root_mean_squared_error

from modbay.errors import DataError
from modbay.metrics import (
    Record,
    collapse,
    effective_modules,
    entropy,
    norms,
    paired,
    parameters,
    recorded,
    records,
    routes,
    similarity,
    spans,
    table,
    use,
    verdict,
    write_records,
)
from modbay.metrics._paired import holm


def classified(n=300, classes=7, right=0.7, seed=0, task="intent", values=("en", "de", "pt")):
    g, truth = np.random.default_rng(seed), np.random.default_rng(99).integers(0, classes, n)
    said = np.where(g.random(n) < right, truth, g.integers(0, classes + 1, n))  # one class is never a target
    return [
        Record(f"d.csv:{i + 2}", task, {"language": values[i % len(values)], "task": task}, f"c{t}", f"c{p}", 0.5)
        for i, (t, p) in enumerate(zip(truth, said, strict=True))
    ]


def cell(cells, metric, label="", value="", task="intent"):
    (found,) = [c for c in cells if (c.task, c.label, c.value, c.metric) == (task, label, value, metric)]
    return found


def test_records_come_back_and_bad_lines_are_named(tmp_path):
    path = tmp_path / "deep" / "predictions.jsonl"
    rows = [
        *classified(3),
        Record("t:1", "ner", {}, ("B-PER", "O"), ("O", "O")),
        Record("x\udcff:2\u2028", "lm", {"language": "ไทย"}, None, None, None, 3.5, 7),
    ]
    assert records(write_records(path, rows)) == rows
    assert [p.name for p in path.parent.iterdir()] == ["predictions.jsonl"]
    with pytest.raises(DataError, match=r"t:1.*nll"):
        write_records(path, [Record("t:1", "lm", nll=math.nan)])
    assert records(path) == rows  # the old file is whole
    path.write_text('{"where": "a", "task": "b"}\nno\n[1]\n{"where": 1, "colour": 2}\n')
    with pytest.raises(DataError, match=r":2:(.|\n)*:3:.*list(.|\n)*:4:.*'colour'.*'task'"):
        records(path)


def test_classification_is_scikit_learns():
    rows = classified()
    cells = table(rows, {"intent": "classification"}, ["language"], draws=50)
    for value in ("", "en", "de", "pt"):
        some = [r for r in rows if value in ("", r.labels["language"])]
        truth, said = [r.target for r in some], [r.prediction for r in some]
        label = "language" if value else ""
        assert cell(cells, "accuracy", label, value).estimate == pytest.approx(accuracy_score(truth, said))
        macro = f1_score(truth, said, average="macro", labels=sorted(set(truth)))
        assert cell(cells, "macro_f1", label, value).estimate == pytest.approx(macro)
    truth, said, names = [r.target for r in rows], [r.prediction for r in rows], sorted({r.target for r in rows})
    each = f1_score(truth, said, average=None, labels=names)
    assert [cell(cells, "f1", "class", name).estimate for name in names] == pytest.approx(list(each))
    mean = np.mean([cell(cells, "macro_f1", "language", v).estimate for v in ("en", "de", "pt")])
    assert cell(cells, "macro_f1", "language").estimate == pytest.approx(mean)


def test_a_draw_of_macro_f1_is_scikit_learns_of_the_rows_drawn():
    from modbay.metrics._scores import scorer

    rows, w = classified(40), np.random.default_rng(0).integers(0, 3, (40, 5)).astype(float)
    score = scorer("classification", "intent", rows)(w)
    for i in range(5):
        drawn = [r for r, k in zip(rows, w[:, i], strict=True) for _ in range(int(k))]
        truth, said = [r.target for r in drawn], [r.prediction for r in drawn]
        macro = f1_score(truth, said, average="macro", labels=sorted(set(truth)))
        assert score["macro_f1", ""][i] == pytest.approx(macro)


def test_regression_is_scipys():
    from modbay.metrics._scores import scorer

    g = np.random.default_rng(1)
    x = np.round(g.normal(1e6, 1, 80), 1)  # ties, and a large mean
    y = np.round(x + g.normal(0, 1, 80), 1)
    rows = [Record(f"d:{i}", "sts", {}, float(a), float(b)) for i, (a, b) in enumerate(zip(x, y, strict=True))]
    w = np.concatenate([np.ones((80, 1)), g.integers(0, 3, (80, 3))], 1)
    score = scorer("regression", "sts", rows)(w)
    for i in range(4):
        a, b = np.repeat(x, w[:, i].astype(int)), np.repeat(y, w[:, i].astype(int))
        assert score["pearson", ""][i] == pytest.approx(stats.pearsonr(a, b)[0], abs=1e-8)
        assert score["spearman", ""][i] == pytest.approx(stats.spearmanr(a, b)[0])
        assert score["rmse", ""][i] == pytest.approx(root_mean_squared_error(a, b))
    constant = [Record(f"d:{i}", "sts", {}, 0.1, float(b)) for i, b in enumerate(y)]
    assert [c.metric for c in table(constant, {"sts": "regression"}, [])] == ["rmse"]


SPANS = [
    ("O O O", []),
    ("B-X", [(0, 1, "X")]),
    ("B-X I-X O", [(0, 2, "X")]),
    ("O B-X I-X", [(1, 3, "X")]),
    ("B-X B-X", [(0, 1, "X"), (1, 2, "X")]),
    ("B-X I-X B-X I-X I-X", [(0, 2, "X"), (2, 5, "X")]),
    ("I-X I-X O I-X", [(0, 2, "X"), (3, 4, "X")]),  # a span may begin with I, after O
    ("B-X I-Y I-Y", [(0, 1, "X"), (1, 3, "Y")]),  # and where the type changes
    ("I-X B-X", [(0, 1, "X"), (1, 2, "X")]),
    ("X X O Y Y X", [(0, 2, "X"), (3, 5, "Y"), (5, 6, "X")]),  # bare tags
    ("DRUG-dose DRUG-dose O", [(0, 2, "DRUG-dose")]),
    ("B-A-b I-A-b", [(0, 2, "A-b")]),
    ("B I O B", [(0, 2, ""), (3, 4, "")]),
    ("", []),
]


@pytest.mark.parametrize(("tags", "found"), SPANS)
def test_spans(tags, found):
    assert spans(tags.split()) == set(found)


def test_tagging_counts_spans_that_are_wholly_right():
    rows = [
        Record("t:1", "ner", {}, ("B-X", "I-X", "O", "B-Y"), ("B-X", "O", "O", "B-Y")),
        Record("t:2", "ner", {}, ("O", "O"), ("O", "B-Z")),
    ]
    cells = table(rows, {"ner": "tagging"}, [], draws=50)
    assert cell(cells, "span_f1", task="ner").estimate == pytest.approx(2 * 1 / (3 + 2))
    assert cell(cells, "token_accuracy", task="ner").estimate == pytest.approx(4 / 6)
    assert {c.value: c.estimate for c in cells if c.metric == "f1"} == {"X": 0.0, "Y": 1.0}
    with pytest.raises(DataError, match="one tag and one predicted tag a word: 't:3'"):
        table([*rows, Record("t:3", "ner", {}, ("O",), ("O", "O"))], {"ner": "tagging"}, [])


def test_perplexity_is_a_ratio_of_sums():
    rows = [Record(f"l:{i}", "lm", {}, None, None, None, 2.0 * i, i) for i in range(1, 30)]
    (found,) = table([*rows, Record("l:0", "lm", {}, None, None, None, 0.0, 0)], {"lm": "causal"}, [])
    assert (found.metric, found.estimate) == ("perplexity", pytest.approx(math.exp(2)))
    assert found.low == pytest.approx(found.high)


def test_intervals_cover_what_they_claim():
    """A proportion's interval is the normal one; a mean over values has the spread of its own values."""
    rows = classified(900, right=0.6)
    cells = table(rows, {"intent": "classification"}, ["language"])
    found = cell(cells, "accuracy")
    half = 1.96 * math.sqrt(found.estimate * (1 - found.estimate) / 900)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)
    parts = [cell(cells, "accuracy", "language", v).estimate for v in ("en", "de", "pt")]
    half = 1.96 * math.sqrt(sum(p * (1 - p) / 300 for p in parts)) / 3
    found = cell(cells, "accuracy", "language")
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)
    many = table(classified(900, 40, values=[str(i) for i in range(12)]), {"intent": "classification"}, ["language"])
    assert all(c.low <= c.estimate <= c.high for c in many)
    assert table(rows, {"intent": "classification"}, ["language"]) == cells  # seeded
    assert table(rows, {"intent": "classification"}, ["language"], seed=1) != cells
    sure = [Record(f"d:{i}", "intent", {}, "a", "a") for i in range(20)]
    assert cell(table(sure, {"intent": "classification"}, []), "accuracy").low == pytest.approx(
        stats.binomtest(20, 20).proportion_ci().low
    )


def test_means_over_tasks():
    rows = [*classified(task="intent"), *classified(task="topic", right=0.5)]
    cells = table(rows, {"intent": "classification", "topic": "classification"}, ["language", "task"], draws=50)
    for label, value in (("", ""), ("language", ""), ("language", "de")):
        each = [cell(cells, "accuracy", label, value, task).estimate for task in ("intent", "topic")]
        assert cell(cells, "accuracy", label, value, "").estimate == pytest.approx(np.mean(each))
    assert not [c for c in cells if c.label == "task"]


def test_ten_thousand_rows_are_quick():
    rows, start = classified(10_000, 60), time.perf_counter()
    table(rows, {"intent": "classification"}, ["language"])
    assert time.perf_counter() - start < 10  # about 1 s


def test_paired_says_what_is_shown_and_no_more():
    good, bad = classified(right=0.9), classified(right=0.5, seed=3)
    found = paired(good, bad, {"intent": "classification"}, ["language"], flips=2000)
    top = next(d for d in found if not d.label and d.metric == "accuracy")
    assert top.difference == pytest.approx(top.a - top.b) and top.low < top.difference < top.high
    assert top.p < 0.05 and top.n == 300
    said = verdict(found, "routed", "shared")
    assert "accuracy of intent: routed is better than shared" in said and "n = 300" in said and "corrected p" in said
    assert "routed is worse than shared" in verdict(
        paired(bad, good, {"intent": "classification"}, []), "routed", "shared"
    )
    alike = paired(good, good, {"intent": "classification"}, ["language"])
    assert {d.p for d in alike} == {1.0} and {d.difference for d in alike} == {0.0}
    assert "no difference between a and b is shown" in verdict(alike) and "better" not in verdict(alike)
    assert "Nothing was compared" in verdict([])


def test_few_rows_are_permuted_exactly():
    """Of 5 rows that differ, all in favour of one, 2 of 2⁵ changes are as extreme."""
    a = [Record(f"d:{i}", "t", {}, "x", "x") for i in range(8)]
    b = [Record(f"d:{i}", "t", {}, "x", "y" if i < 5 else "x") for i in range(8)]
    (found,) = paired(a, b, {"t": "classification"}, [], metrics=["accuracy"])
    assert found.p == pytest.approx(2 / 32) and found.difference == pytest.approx(5 / 8)
    assert "no difference" in verdict([found])


def test_drawn_permutations_are_the_sign_test():
    a, b = classified(400, right=0.8), classified(400, right=0.72, seed=5)
    (found,) = paired(a, b, {"intent": "classification"}, [], metrics=["accuracy"])
    pairs = [(r.target == r.prediction, s.target == s.prediction) for r, s in zip(a, b, strict=True)]
    first, second = sum(x and not y for x, y in pairs), sum(y and not x for x, y in pairs)
    assert found.p == pytest.approx(stats.binomtest(first, first + second).pvalue, abs=0.015)


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_rows_that_do_not_join():
    kinds, a = {"intent": "classification"}, classified()
    found = paired(a[:-30], a[30:], kinds, ["language"])
    assert {d.n for d in found if not d.label} == {240} and {d.missing for d in found if not d.label} == {60}
    assert {d.missing for d in found if d.value == "de"} == {20}
    assert "60 rows are in only one" in verdict(found)
    with pytest.raises(DataError, match="no row in common"):
        paired(a[:10], a[10:], kinds, [])
    with pytest.raises(DataError, match=r"rows come twice: 'd\.csv:2'"):
        paired([a[0], *a], a, kinds, [])
    with pytest.raises(DataError, match="different targets"):
        paired(a, [Record(a[0].where, a[0].task, a[0].labels, "other", "c1"), *a[1:]], kinds, [])


def test_what_cannot_be_scored_is_said():
    rows = classified(4)
    for bad, message in (
        (([], {}, []), "no records"),
        ((rows, {}, []), "the tasks 'intent'"),
        ((rows, {"intent": "classes"}, []), "the kinds are 'classification'"),
        ((rows, {"intent": "classification"}, ["dialect"]), "no record has a label 'dialect'"),
        ((rows, {"intent": "causal"}, []), "4 of 4 records lack an nll"),
        ((rows, {"intent": "regression"}, []), "a number and a predicted number"),
    ):
        with pytest.raises(DataError, match=message):
            table(*bad)


# Modules and routing


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(6, 8), torch.nn.Linear(8, 6)
        self.conv = torch.nn.Conv1d(6, 4, 3, padding=1)

    def forward(self, x, attention_mask=None):
        h = self.b(torch.relu(self.a(x)))
        return h, self.conv(h.mT)


def bayed(modules, **more):
    torch.manual_seed(0)
    bay = mb.attach(Net(), at=["a", "b", "conv"], modules=modules, name="language", **more)
    for p in bay.parameters():
        torch.nn.init.normal_(p)
    return bay


def changes(bay):
    """ΔW and Δb of each module, dense, in a row."""
    rows = []
    for i in range(len(bay.names())):
        row = []
        for m in bay.modulars.values():
            part = m.order[i]
            if part is None:
                row += [torch.zeros(m.site.weight.numel() + len(m.site.bias))]
                continue
            w, b = part.kind.delta(part.tensors(), m.site).dense(m.site)
            row += [w.detach().flatten(), torch.zeros(len(m.site.bias)) if b is None else b.detach()]
        rows.append(torch.cat(row))
    return torch.stack(rows).double()


@pytest.mark.parametrize(
    "modules",
    [
        {"en": mb.LoRA(2), "de": mb.LoRA(3, alpha=5), "pt": {"a": mb.LoRA(1)}},
        {"en": mb.LoRA(2), "de": mb.BitFit(), "pt": mb.IA3()},
    ],
    ids=["low-rank", "mixed"],
)
def test_similarity_is_that_of_dense_updates(modules):
    bay = bayed(modules)
    rows = changes(bay)
    found = similarity(bay)
    assert (found["bay"], found["of"], found["modules"]) == ("language", "deltas", ["en", "de", "pt"])
    wanted = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)
    assert torch.tensor(found["cosine"], dtype=torch.double) == pytest.approx(wanted, abs=1e-5)
    assert list(norms(bay).values()) == pytest.approx(rows.norm(dim=1).tolist(), rel=1e-5)
    assert [row["norm"] for row in parameters(bay)] == list(norms(bay).values())


def test_low_rank_updates_are_not_made_dense(monkeypatch):
    monkeypatch.setattr(mb.deltas.LowRank, "dense", None)
    bay = bayed({"en": mb.LoRA(2), "de": mb.LoRA(3)})
    assert norms(bay)["en"] > 0
    assert {row["kind"].split("(")[0] for row in parameters(bay)} == {"LoRA"}
    sizes = [sum(p.numel() for p in bay.parameters(name)) for name in bay.names()]
    assert [row["parameters"] for row in parameters(bay)] == sizes


def test_similarity_of_copies_new_modules_and_others():
    bay = bayed({"en": mb.Full(), "de": mb.Full()})
    for p, q in zip(bay.parameters("en"), bay.parameters("de"), strict=True):
        q.data = p.data.clone()
    assert similarity(bay)["cosine"][0][1] == pytest.approx(1) and similarity(bay)["of"] == "deltas"
    bay.reset("de")  # a copy of the base changes nothing
    assert similarity(bay)["cosine"] == [[1, 0], [0, 1]] and norms(bay)["de"] == 0
    bay = mb.attach(Net(), at=["a"], modules={"en": mb.Bottleneck(2), "de": mb.Bottleneck(2)}, name="language")
    assert similarity(bay)["of"] == "parameters"


def test_routes_by_label_and_skills():
    (row,) = routes(bayed({"en": mb.LoRA(2), "de": mb.LoRA(2)}))
    assert (row["site"], row["label"], row["values"]) == ("", "language", ["en", "de"])
    assert row["weights"] == [[1, 0], [0, 1]]
    table = {"x": ["en", "de"], "y": ["de"]}
    (row,) = routes(bayed({"en": mb.LoRA(2), "de": mb.LoRA(2)}, router=mb.ByLabel("language", table)), ["y", "x"])
    assert row["weights"] == [[0, 1], [1, 1]]
    router = mb.Skills("task", ["t1", "t2", "t3"])
    (row,) = routes(bayed({"a": mb.LoRA(2), "b": mb.LoRA(2)}, router=router))
    gates = torch.sigmoid(router.logits)
    assert torch.tensor(row["weights"]) == pytest.approx((gates / gates.sum(-1, keepdim=True)).detach())
    assert router.training
    assert len(routes(bayed({"a": mb.LoRA(2)}, router=lambda: mb.Uniform()))) == 3
    with pytest.raises(mb.errors.CompositionError, match="recorded"):
        routes(mb.attach(Net(), at="a", modules={"a": mb.LoRA(2)}, router=mb.TopK(1), name="m"))


def test_routes_of_calls_are_recorded():
    torch.manual_seed(0)
    model = Net()
    modules = {"x": mb.LoRA(2), "y": mb.LoRA(2)}
    bay = mb.attach(model, at=["a", "b"], modules=modules, router=lambda: mb.TopK(1), name="m")
    x, mask, language = torch.randn(4, 5, 6), torch.ones(4, 5), ["en", "de", "en", None]
    mask[0, 2:] = 0
    model.train()(x, attention_mask=mask)
    model.eval()
    with recorded(model) as recorder:
        recorder.label(language=language)
        model(x, attention_mask=mask)
        recorder.label(language=["en", "fr"])
        model(x[:2], attention_mask=mask[:2])
    model(x, attention_mask=mask)  # not recorded
    rows = {(row["site"], row["label"]): row for row in recorder.rows()}
    assert set(rows) == {("a", ""), ("a", "language"), ("b", ""), ("b", "language")}
    row = rows["a", "language"]
    assert (row["bay"], row["values"], row["modules"]) == ("m", ["de", "en", "fr"], ["x", "y"])
    gate = bay.modulars["a"].router.gate
    p = torch.softmax(x @ gate.T, -1)
    weights = torch.where(p == p.max(-1, keepdim=True).values, p, 0)
    mean = (weights * mask[..., None]).sum(1) / mask.sum(1)[:, None]
    wanted = torch.stack([mean[1], (mean[0] + mean[2] + mean[0]) / 3, mean[1]])
    assert torch.tensor(row["weights"]) == pytest.approx(wanted.detach(), abs=1e-6)


def test_use_and_collapse():
    w = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    assert use(w) == pytest.approx([0.75, 0.25, 0])
    assert entropy([0.5, 0.5]) == pytest.approx(stats.entropy([0.5, 0.5]))
    assert effective_modules([0.25] * 4) == pytest.approx(4) and effective_modules([1, 0]) == pytest.approx(1)
    assert use([[0.0, 0.0]]) == pytest.approx([0, 0])
    (said,) = collapse(["a", "b", "c"], w, bay="m")
    assert "'c' gets 0.00% of the use" in said
    (said,) = collapse(["a", "b"], [[0.5, 0.5], [0.5, 0.5]])
    assert "does not tell them apart" in said
    (said,) = collapse(["a", "b"], similarity={"of": "deltas", "cosine": [[1, 0.999], [0.999, 1]]})
    assert "nearly the same" in said
    assert collapse(["a", "b"], [[1.0, 0.0], [0.0, 1.0]]) == []


# Tables of routing


def permuted(n, seed=0):
    """A table in which each value has a module of its own."""
    return np.eye(n)[np.random.default_rng(seed).permutation(n)]


def test_uniform_routing_has_no_information():
    w = np.ones((4, 4)) * 3
    assert metrics.collapse_average(w) == pytest.approx(0) and metrics.collapse_worst(w) == pytest.approx(0)
    assert metrics.mutual_information(w) == pytest.approx(0) and metrics.inverse_mutual_information(w) == 1
    assert metrics.alignment(w) == pytest.approx(3 / 4)
    assert metrics.selection_entropies(w) == pytest.approx((math.log(4), math.log(4)))
    assert metrics.gini(w) == pytest.approx(0) and metrics.utilisation(w) == 1
    assert metrics.specialise_reuse(w)[0] == pytest.approx(0)


@pytest.mark.parametrize("seed", range(3))
def test_a_module_for_each_value(seed):
    w = 7 * permuted(5, seed)
    assert metrics.collapse_average(w) == metrics.collapse_worst(w) == pytest.approx(0)
    assert metrics.mutual_information(w) == pytest.approx(math.log(5))
    assert metrics.inverse_mutual_information(w) == pytest.approx(0)
    assert metrics.alignment(w) == pytest.approx(0) and metrics.matching(w) == list(w.argmax(1))
    assert metrics.adaptation(w) == pytest.approx(0)
    assert metrics.selection_entropies(w) == pytest.approx((0, math.log(5)))
    assert metrics.specialise_reuse(w)[0] == 1 and math.isnan(metrics.specialise_reuse(w)[1])


def test_one_module_for_all():
    w = np.eye(4)[[2, 2, 2, 2]]
    assert metrics.collapse_average(w) == pytest.approx(1) and metrics.collapse_worst(w) == 1
    assert metrics.mutual_information(w) == pytest.approx(0)
    assert metrics.selection_entropies(w) == pytest.approx((0, 0))
    assert metrics.gini(w) == pytest.approx(3 / 4) and metrics.utilisation(w) == pytest.approx(1 / 4)


def test_figures_are_those_of_the_authors_code():
    """Written out as Mittal's scripts have them: R rules and as many modules."""
    r = 6
    w = np.random.default_rng(0).dirichlet(np.ones(r) / 2, r)
    p = w / r
    m = p.sum(0)
    assert metrics.joint(5 * w) == pytest.approx(p)
    assert metrics.collapse_average(w) == pytest.approx(r * np.maximum(1 / r - m, 0).sum() / (r - 1))
    assert metrics.collapse_worst(w) == pytest.approx(1 - r * m.min())
    mutual = (p * np.log(p / (m[None] * p.sum(1, keepdims=True)))).sum()
    assert metrics.mutual_information(w) == pytest.approx(mutual)
    assert metrics.inverse_mutual_information(w) == pytest.approx((math.log(r) - mutual) / math.log(r))
    best = min(itertools.permutations(range(r)), key=lambda s: np.abs(np.eye(r)[list(s)] - r * p).sum())
    assert metrics.alignment(w) == pytest.approx(np.abs(np.eye(r)[list(best)] - r * p).sum() / (2 * r))
    assert metrics.matching(w) == list(best)


def test_values_count_alike_however_many_examples_they_have():
    w = permuted(3) * np.array([[1], [10], [1000]])
    assert metrics.collapse_average(w) == pytest.approx(0) and metrics.mutual_information(w) == pytest.approx(np.log(3))
    assert metrics.mutual_information([[0, 0], [1, 0], [0, 2]]) == pytest.approx(math.log(2))  # a value without a route


def test_more_values_than_modules_and_fewer():
    two = np.eye(2)[[0, 1, 0, 1]]
    assert metrics.alignment(two) == pytest.approx(0) and metrics.inverse_mutual_information(two) == pytest.approx(0)
    few = np.eye(4)[[3, 1]]
    assert metrics.alignment(few) == pytest.approx(0) and metrics.inverse_mutual_information(few) == pytest.approx(0)
    assert metrics.alignment(np.eye(2)[[0, 0, 0, 0]]) == pytest.approx(1 / 2)  # a module takes two of four


def test_adaptation_of_two_values_has_a_closed_form():
    """p = (a, 1 − a) with a uniform: E |a − 1/2| = 1/4 from half and half."""
    assert metrics.adaptation(np.ones((2, 2)), draws=200_000) == pytest.approx(1 / 4, abs=2e-3)
    assert metrics.adaptation(np.eye(2)[[0, 0]], draws=200_000) == pytest.approx(1 / 4, abs=2e-3)  # E (1 − max p)
    assert metrics.adaptation(np.ones((3, 2))) == metrics.adaptation(np.ones((3, 2)))


def test_selection_entropies_of_rows():
    w = [[1, 0], [0.5, 0.5], [0, 0]]
    assert metrics.selection_entropies(w) == pytest.approx((math.log(2) / 2, stats.entropy([0.75, 0.25])))


def test_overlap_of_masks():
    a, b = torch.tensor([1, 1, 1, 0, 0]).bool(), torch.tensor([0, 1, 1, 1, 0]).bool()
    assert metrics.overlap(a, b) == pytest.approx((2 / 4, 2 / 3))
    assert metrics.overlap(a, a) == (1, 1) and metrics.overlap(a, ~a) == (0, 0)
    masks = torch.stack([a, a, ~a])
    assert metrics.specialise_reuse(masks, ["add", "add", "multiply"]) == (1, 1)
    assert metrics.specialise_reuse(masks, ["add", "multiply", "add"]) == (1 - (1 + 0) / 2, 0)


def test_transfer_and_interference():
    assert metrics.transfer([[0.9, 0.5], [0.7, 0.8]], [0.8, 0.8]) == pytest.approx(np.array([[0.1, -0.3], [-0.1, 0]]))
    stages = [[0.9, 0.1, 0.1], [0.7, 0.8, 0.2], [0.8, 0.5, 0.9]]
    found = metrics.interference(stages)
    assert np.isnan(found[np.triu_indices(3)]).all()
    assert found[np.tril_indices(3, -1)] == pytest.approx([-0.2, 0.1, -0.3])
    backward = ((0.8 - 0.9) + (0.5 - 0.8)) / 2
    assert np.nansum(found) / 2 == pytest.approx(backward)
