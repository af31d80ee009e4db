"""The report: whole, harmless, the same twice, and silent about what the facts leave out."""

import re
from html.parser import HTMLParser
from math import inf, nan
from random import Random

import pytest
import torch
from torch import nn

import modbay as mb
from modbay import metrics, report
from modbay.report._yaml import dump

EVIL = "<script>alert('x')</script>\"&\x00\ud800"
VALUES = ["pt", "de", "عربية", "a label whose name is too long for any column of a telephone"]
MODULES = [f"skill-{i}" for i in range(8)]
SECTIONS = [
    *("warnings", "results", "compare", "against", "transfer", "shots", "proof", "use", "routing", "over_time"),
    *("tokens", "figures", "similarity"),
    *("curve", "parameters", "data", "run", "config"),
]


def cell(task, label, value, metric="accuracy", estimate=0.8):
    return {
        "task": task, "label": label, "value": value, "metric": metric, "estimate": estimate, "low": estimate - 0.05,
        "high": estimate + 0.04, "n": 200,
    }  # fmt: skip


def difference(task, label, value, d=0.03):
    return cell(task, label, value) | {
        "a": 0.8,
        "b": 0.8 - d,
        "difference": d,
        "low": d - 0.02,
        "high": d + 0.02,
        "p": 0.0004,
    }


def rich(sites=6, values=tuple(VALUES), seed=0):
    """Facts with all keys."""
    r = Random(seed)
    values = list(values)
    weights = lambda n: [[r.random() for _ in range(n)] for _ in values]
    tasks = ["intents", EVIL]
    beside = {"shared": {"difference": -0.02, "low": -0.03, "high": -0.01, "p": 0.01}}
    return {
        "title": f"Intents {EVIL}", "command": f"modbay train {EVIL} --method x", "when": "2026-11-24T21:30:12+0000",
        "seconds": 1374.2, "versions": {"torch": "2.9.1"},
        "machine": {"cores": 2, "threads": 2, "gpu": None}, "seed": 0,
        "method": "polytropon", "base": {"name": "some/base", "revision": "abc", "parameters": 22_713_216, "layers": 6},
        "data": [{"task": EVIL, "split": "test", "path": f"{EVIL}.csv", "rows": 20, "sha256": "ab" * 32}],
        "warnings": [f"class {EVIL} has two rows"],
        "config": {"lr": 1e-5, EVIL: [EVIL, None, True], "tasks": [{"a": 1}]},
        "results": [cell(task, "", "") for task in tasks]
        + [cell(task, "language", value, estimate=r.random()) for task in tasks for value in values]
        + [cell("intents", "class", f"{EVIL}{i}", "f1") for i in range(3)]
        + [cell("rating", "", "", "rmse", 1.2), cell("rating", "language", "", "rmse", 1.2)],
        "against": {"name": EVIL, "rows": [
            difference("intents", "", ""), *(difference(EVIL, "language", v) for v in values)]},
        "compare": {
            "metric": "accuracy", "verdict": f"Take {EVIL}.", "budget": "100 steps",
            "rows": [
                {"method": "shared", "title": "Shared", "estimate": 0.8, "low": 0.7, "high": 0.9, "parameters": 1000,
                 "seconds": 5, "by": dict.fromkeys(values, 0.8), "beside": {}},
                {"method": "private", "title": EVIL, "estimate": 0.78, "low": 0.7, "high": 0.8, "parameters": 1000,
                 "seconds": 500, "by": dict.fromkeys(values, 0.8), "beside": beside},
            ],
        },
        "transfer": {"rows": values, "columns": ["private", EVIL], "of": EVIL,
                     "values": [[0.01, None] for _ in values]},
        "routing": [
            {"bay": "skills", "site": f"encoder.layer.{i}.{EVIL}", "label": "language", "values": values,
             "modules": MODULES, "weights": weights(8)} for i in range(sites)
        ],
        "similarity": [{"bay": EVIL, "of": "deltas", "modules": values,
                        "cosine": [[r.uniform(-1, 1) for _ in values] for _ in values]}],
        "use": [{"bay": "skills", "module": m, "share": r.random()} for m in MODULES], "collapse": [EVIL],
        "over_time": [{"bay": "skills", "site": site, "modules": MODULES, "calls": [[1, 5], [6, 6], [7, 1200]],
                       "shares": [[r.random() for _ in MODULES] for _ in range(3)]} for site in (None, EVIL)],
        "tokens": [{"bay": "skills", "site": site, "positions": 300, "modules": [
            {"module": m, "share": 0.125, "tokens": [[EVIL, 3, 4], ["##ing", 2, 2]]} for m in MODULES]}
            for site in (None, EVIL, "b")],
        "figures": [{"bay": "skills", "site": "a", "label": label, "values": 4, "modules": 8, "examples": 100.0,
                     "collapse_average": 0.25, "collapse_worst": 1.0, "mutual_information": 0.125, "alignment": 0.5,
                     "adaptation": nan, "H_a": 0.0, "H_b": 1.25, "effective_modules": 3.5, "gini": 0.375,
                     "utilisation": 0.75} for label in ("", "language", EVIL)],
        "parameters": [{"bay": "skills", "module": m, "kind": "LoRA", "sites": 24, "parameters": 10, "learning": 10,
                        "norm": 1.5} for m in MODULES],
        "curve": [{"step": i, "loss": 3 / (i + 1), "lr": 1e-3, "validation": 0.5 + i / 200 if i % 10 == 0 else None}
                  for i in range(100)],
        "shots": {"metric": "accuracy", "shots": [0, 1, 4], "rows": [
            {"way": way, "value": EVIL, "estimates": [0.4, 0.5, None], "low": [0.3, 0.4, None],
             "high": [0.5, 0.6, None]}
            for way in ("scratch", EVIL)]},
        "proof": [{"what": EVIL, "rows": 20, "changed": 0}, {"what": "the other", "rows": 20, "changed": 3}],
        "time": {"train": 10.5, "evaluate": 2}, "memory": {"peak_mib": 1833},
    }  # fmt: skip


class Reader(HTMLParser):
    """Fails where tags don't match; keeps tags, ids and text."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.ids, self.words = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), (tag, names)
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def read(page):
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert not reader.open
    return reader


def sections(page):
    return re.findall(r'<section aria-labelledby="(\w+)">', page)


def test_all_facts_make_a_page_in_order():
    page = report.html(rich())
    reader = read(page)
    assert sections(page) == SECTIONS
    assert len(set(reader.ids)) == len(reader.ids)
    tags = [tag for tag, _ in reader.tags]
    assert tags.count("h1") == 1 and tags.count("main") == 1 and tags.count("title") == 1
    assert page.startswith("<!doctype html>\n<html lang=")
    links = [attrs["href"] for tag, attrs in reader.tags if tag == "a"]
    assert links == [f"#{name}" for name in SECTIONS]


def test_every_section_begins_with_what_it_shows():
    page = report.html(rich())
    assert len(re.findall(r'<section [^>]*><h2 id="\w+">[^<]+</h2><p class="lead">[^<]+', page)) == len(SECTIONS)


def test_data_stay_text():
    page = report.html(rich())
    reader = read(page)
    tags = {tag for tag, _ in reader.tags}
    assert not tags & {"script", "iframe", "img", "link", "object", "base", "form", "embed"}
    assert not any(name.startswith("on") for _, attrs in reader.tags for name in attrs)
    assert "\x00" not in page and "<script" not in page
    assert "<script>alert('x')</script>\"&\ufffd\ufffd" in "".join(reader.words)
    page.encode()  # no lone surrogate is left


def test_nothing_is_loaded():
    page = report.html(rich())
    reader = read(page)
    for tag, attrs in reader.tags:
        assert not attrs.keys() & {"src", "srcset", "data", "action", "poster", "background"}, tag
        assert attrs.get("href", "#").startswith("#")
    assert not re.search(r"https?:|url\(|@import", page)
    policy = next(attrs["content"] for tag, attrs in reader.tags if attrs.get("http-equiv"))
    assert policy.startswith("default-src 'none'")


def test_equal_facts_give_equal_bytes(tmp_path):
    report.write(tmp_path / "a.html", rich())
    report.write(tmp_path / "b.html", rich())
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes() == report.html(rich()).encode()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "b.html"]


def test_a_failed_write_leaves_the_old_page(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    report.write(path, {"title": "old"})
    before = path.read_bytes()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        report.write(path, rich())
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize("key", sorted(rich()))
def test_an_absent_key_is_left_out(key):
    facts = rich()
    del facts[key]
    left = sections(report.html(facts))
    read(report.html(facts))
    assert set(SECTIONS) - set(left) == {key} & set(SECTIONS) - {"use"}  # signs of collapse stand there too


def test_no_facts_make_a_page():
    page = report.html({})
    assert sections(page) == [] and "<h1>" in page
    read(page)


def spoilt(value, r):
    """The facts with keys lost, figures that are none, and lists cut short."""
    if isinstance(value, dict):
        return {k: spoilt(v, r) for k, v in value.items() if r.random() > 0.06}
    if isinstance(value, list):
        return [spoilt(v, r) for v in value if r.random() > 0.04]
    return r.choice([None, nan, inf, -inf, 0]) if r.random() < 0.06 else value


@pytest.mark.parametrize("seed", range(40))
def test_odd_facts_make_a_page_all_the_same(seed):
    r = Random(seed)
    page = report.html(spoilt(rich(seed=seed), r))
    read(page)
    shown = re.sub(r"<style>.*?</style>", "", page, flags=re.S)
    assert not re.search(r' (d|x|y|cx|cy|width)="[^"]*(nan|inf)', shown)  # no coordinate is NaN


def test_the_verdict_names_the_figure_and_its_interval():
    facts = rich()
    del facts["compare"]
    words = "".join(read(report.html(facts)).words)
    assert "Accuracy on intents is 80.0\u202f% (95\u202f% interval [75.0, 84.0]) over 200 test rows" in words
    assert "+3.0 points [+1.0, +5.0], p <\u202f0.001." in words
    facts["results"].insert(0, cell("", "", "", estimate=0.5))
    assert "Accuracy over all tasks is 50.0\u202f%" in "".join(read(report.html(facts)).words)


def test_differences_are_bold_only_where_they_are_shown():
    rows = [
        difference("sure", "", ""),
        difference("unsure", "", "", d=0.01),
        difference("many", "", "", d=0.05) | {"p": 0.2},
    ]
    page = report.html({"against": {"name": "other", "rows": rows}})
    assert "<b>+3.0</b>" in page and page.count("<b>+") == 1 and "+1.0" in page
    assert "of 3 differences 1 is shown" in page


def test_failed_proofs_are_not_hidden():
    page = report.html(rich())
    assert "1 comparison failed" in page and "✗ changed" in page and "✓ bit-equal" in page


def test_long_tables_are_folded_with_the_weakest_before():
    classes = [cell("intents", "class", f"c{i:03d}", "f1", estimate=i / 200) for i in range(200)]
    page = report.html({"results": classes})
    before, after = page.split("<details>", 1)
    assert before.count('<th scope="row">') == 8 and "c000" in before and "c199</th>" not in before
    assert "All 200 values of class" in after and "c199" in after


def test_many_sites_and_classes_stay_small_and_quick():
    facts = rich(sites=500, values=[f"language-{i}" for i in range(30)])
    facts["results"] += [cell("intents", "class", f"class-{i}", "f1") for i in range(300)]
    page = report.html(facts)
    assert len(page.encode()) < 800_000
    assert len(report.html(rich()).encode()) < 120_000
    assert "Site by site (500)" in page and "mean of 500 sites" in page


def test_lower_is_better_for_errors():
    rows = [cell("t", "language", f"v{i}", "perplexity", 10 + i) for i in range(30)]
    page = report.html({"results": rows})
    assert "from 39.00 (v29, the weakest) to 10.00 (v0)" in page


def test_tables_and_drawings_are_named_and_headed():
    reader = read(report.html(rich()))
    for tag, attrs in reader.tags:
        if tag in ("table", "svg", "section", "nav"):
            assert attrs.keys() & {"aria-label", "aria-labelledby", "aria-hidden"}, (tag, attrs)
        if tag == "th":
            assert attrs.get("scope") in ("row", "col")
        if attrs.get("class") == "chart":
            assert attrs["role"] == "img" and len(attrs["aria-label"]) > 20


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("dark", [False, True])
def test_text_has_contrast(dark):
    style = re.search(r"<style>(.*?)</style>", report.html({}), re.S)[1]
    colours = {}
    for block in re.findall(r":root\{(.*?)\}", style, re.S)[: 1 + dark]:
        for name, value in re.findall(r"--(\w+):(#[0-9a-f]+)", block):
            colours[name] = value if len(value) == 7 else "#" + "".join(2 * c for c in value[1:])
    for ink in ("ink", "soft", "accent", "warn", "good", "bad", "c0", "c1", "c2", "c3", "c4", "c5"):
        for paper in ("paper", "wash"):
            low, high = sorted((luminance(colours[ink]), luminance(colours[paper])))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, paper)


def test_the_config_reads_back():
    yaml = pytest.importorskip("yaml")
    config = {
        "lr": 1e-5, "big": 1e22, "half": 0.5, "n": 3, "none": None, "yes": True, "word": "no", "date": "2026-11-24",
        "octal": "0o17", "empty": "", "odd": "a: b #c", "lines": "a\nb", "list": [1, "two", None],
        "nested": [[1, 2], [3]],
        "tasks": [{"name": "x", "columns": {"text": ["a", "b"]}}, {"name": "y", "none": {}, "void": []}], "~": "~",
        "long": [f"value-{i}" for i in range(30)],
    }  # fmt: skip
    assert yaml.safe_load(dump(config)) == config


# What was recorded


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(12, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, input_ids):
        return self.b(self.a(self.embed(input_ids)))


def recorded(collapsed, watch=None):
    """A recording of a gate of three modules at two sites: token i asks for module i modulo 3, or all for the first."""
    model = Net()
    bay = mb.attach(model, ["a", "b"], {m: mb.LoRA(2) for m in "pqr"}, mb.TopK(), name="experts")
    with torch.no_grad():
        model.embed.weight.zero_()
        model.embed.weight[torch.arange(12), 0 if collapsed else torch.arange(12) % 3] = 1
        bay.state.router.gate.zero_()[torch.arange(3), torch.arange(3)] = 1
    with watch(model) if watch else bay.record(tokens=500) as recording:
        for _ in range(20):
            recording.label(task=["x", "y", "x", "y"])
            model(torch.randint(12, (4, 5)))
    return recording


def test_a_recording_as_a_page(tmp_path):
    path = tmp_path / "routing.html"
    report.routing(recorded(False), path, decode=lambda i: f"word-{i}", title="Healthy")
    page = path.read_text(encoding="utf-8")
    reader = read(page)
    words = "".join(reader.words)
    assert sections(page) == ["use", "routing", "over_time", "tokens", "figures"]
    assert "No sign of collapse was found." not in words  # two tasks that are routed alike are one
    assert "2 values of 'task' are routed alike" in words and "word-4" in words and "effective modules, exp H" in words
    rows = [row for row in re.findall(r"<tr>.*?</tr>", page) if "word-" in row]
    assert len(rows) == 3
    for i, row in enumerate(rows):
        assert {int(word) % 3 for word in re.findall(r"word-(\d+)", row)} == {i}


def test_a_collapsed_recording_says_so(tmp_path):
    report.routing(recorded(True), tmp_path / "a.html", labels=["task"])
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    words = "".join(read(page).words)
    assert "1 sign of collapse: look here" in words
    assert "the router has collapsed onto module 'p' (100.0% of the use" in words
    assert "all examples" not in words


def test_all_bays_of_a_model_on_one_page(tmp_path):
    watched = recorded(False, watch=lambda model: metrics.recorded(model, when="always"))
    report.routing(watched, tmp_path / "a.html")
    assert sections((tmp_path / "a.html").read_text(encoding="utf-8")) == ["use", "routing", "over_time", "figures"]
