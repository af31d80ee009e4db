"""`modbay compare`: one table of methods on the same rows, and a verdict that says no more than it shows."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

pytest.importorskip("transformers")

from conftest import tiny_rows, write_csv
from modbay import metrics, training
from modbay.cli import app
from modbay.errors import ConfigError, DataError, Interrupted
from modbay.metrics import Record
from modbay.training.comparing._verdict import Cost, verdict

FAST = {"steps": 8, "batch": 8, "probe": 20, "lr": 3e-3, "evaluate_every": 8}


def asked(base: Path, data, methods, **more) -> training.Comparison:
    return training.comparison({"base": str(base), "data": str(data), **FAST, "methods": methods, **more})


def said(rights, values=None, seed=0) -> list[Record]:
    """A record a row: right where it says 1."""
    values = values or [""] * len(rights)
    return [
        Record(f"f:{i}", "t", {"task": "t", "language": v}, "yes", "yes" if right else "no")
        for i, (right, v) in enumerate(zip(rights, values, strict=True))
    ]


# The figures


def test_a_standing_is_the_mean_over_values_with_the_interval_of_a_bootstrap():
    rng = np.random.default_rng(0)
    values = ["en"] * 300 + ["de"] * 100
    runs = {"a": [said(rng.random(400) < 0.7, values)], "b": [said(rng.random(400) < 0.5, values)]}
    found = metrics.standings(runs, {"t": "classification"}, "language")
    cells = [np.mean([r.prediction == "yes" for r in runs["a"][0] if r.labels["language"] == v]) for v in ("en", "de")]
    assert found["a"].estimate == pytest.approx(np.mean(cells))
    error = np.sqrt(sum(p * (1 - p) / n for p, n in zip(cells, (300, 100), strict=True))) / 2
    assert found["a"].high - found["a"].low == pytest.approx(2 * 1.96 * error, rel=0.06)
    gap = metrics.gaps(found)["a", "b"]
    assert gap.low < gap.difference < gap.high and metrics.differ(gap)
    assert metrics.gaps(found)["b", "a"].difference == -gap.difference


def test_rows_that_two_methods_share_pair_them():
    rng = np.random.default_rng(1)
    one = rng.random(200) < 0.6
    other = one.copy()
    other[:6] = ~other[:6]
    found = metrics.standings({"a": [said(one)], "b": [said(other)]}, {"t": "classification"}, None)
    gap = metrics.gaps(found)["a", "b"]
    assert gap.high - gap.low < 0.6 * (found["a"].high - found["a"].low)
    assert not metrics.differ(gap)


def test_what_seeds_differ_by_is_in_the_interval():
    rng = np.random.default_rng(2)
    runs = {"a": [said(rng.random(500) < p) for p in (0.5, 0.6, 0.7)], "b": [said(rng.random(500) < 0.6)] * 3}
    found = metrics.standings(runs, {"t": "classification"}, None)
    means = [np.mean([r.prediction == "yes" for r in one]) for one in runs["a"]]
    assert found["a"].estimate == pytest.approx(np.mean(means))
    wide, narrow = (found[name].high - found[name].low for name in "ab")
    assert wide > 1.8 * narrow
    expected = np.std(means, ddof=1) / np.sqrt(3)
    assert np.std(found["a"].sample.draws) == pytest.approx(np.hypot(expected, 0.5 / np.sqrt(500)), rel=0.25)


def test_methods_of_other_rows_are_not_compared():
    with pytest.raises(DataError, match="'b' was not tested on the same rows as 'a'"):
        metrics.standings({"a": [said([1, 0, 1])], "b": [said([1, 0])]}, {"t": "classification"}, None)


# The verdict

COSTS = {"big": Cost("Big", True, 900), "small": Cost("Small", True, 100), "words": Cost("Words", False, 5000)}


def told(**shares) -> str:
    runs = {name: [said(np.arange(1000) < 1000 * share)] for name, share in shares.items()}
    found = metrics.standings(runs, {"t": "classification"}, None)
    return verdict(found, metrics.gaps(found), COSTS, "small", 1)


def test_the_winner_is_taken_if_it_is_shown_to_win():
    line = told(big=0.9, small=0.5, words=0.4)
    assert line.startswith("Take “Big” (accuracy 90.0 %") and "shown to beat every other" in line
    assert "“Big” is better; “Words” is worse" not in line.split("Against")[0]


def test_of_a_tie_the_cheapest_is_taken_and_it_is_called_a_tie():
    line = told(big=0.601, small=0.6, words=0.3)
    assert line.startswith("Take “Small”") and "not shown to differ from the best estimate, “Big”" in line
    assert "better" not in line


def test_without_the_base_is_cheaper_than_with_it():
    line = told(big=0.6, small=0.3, words=0.6)
    assert line.startswith("Take “Words”") and "No method that needs the base is shown to beat it." in line
    assert "One seed" in line


# The command


@pytest.fixture(scope="module")
def finished(tiny_base, tmp_path_factory) -> Path:
    """A comparison by the command line, with a variant and a method that can't be."""
    place = tmp_path_factory.mktemp("compare")
    data = write_csv(place / "said.csv", tiny_rows())
    methods = {
        "shared": None,
        "wider": {"method": "shared", "module": {"LoRA": {"rank": 16}}, "lr": 1e-3},
        "private": {},
        "sequence": {},
        "probe": {},
        "tfidf": {},
        "tfidf-each": {},
        "majority": {},
    }
    given = {"base": str(tiny_base), "data": str(data), "by": "language", **FAST, "methods": methods}
    (place / "all.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
    out = place / "out"
    done = CliRunner().invoke(app, ["compare", str(place / "all.yaml"), "--seeds", "0,1", "--out", str(out)])
    assert done.exit_code == 0, done.stderr
    assert "sequence is left out: it routes by two labels" in done.stdout
    assert json.loads((out / "compare.json").read_text())["compare"]["verdict"] in done.stdout
    return out


def test_a_folder_holds_a_run_of_each_method_and_seed(finished):
    names = {
        f"{m}-{s}" for m in ("shared", "wider", "private", "probe", "tfidf", "tfidf-each", "majority") for s in (0, 1)
    }
    assert {path.name for path in finished.iterdir() if path.is_dir()} == names
    assert {path.name for path in finished.iterdir() if path.is_file()} == {
        "compare.yaml",
        "compare.json",
        "report.html",
    }
    assert not [path for path in finished.parent.iterdir() if path.suffix == ".partial"]
    for name in names:
        files = {path.name for path in (finished / name).iterdir()}
        assert {"predictions.jsonl", "run.json", "report.html"} <= files
        assert ("run.yaml" in files) == (not name.startswith(("tfidf", "majority")))
    assert training.open_run(finished / "wider-1").network().model is not None


def test_the_table_has_every_method_by_every_value(finished):
    facts = json.loads((finished / "compare.json").read_text())
    rows = {row["method"]: row for row in facts["compare"]["rows"]}
    assert list(rows) == ["shared", "wider", "private", "probe", "tfidf", "tfidf-each", "majority"]
    for name, row in rows.items():
        assert row["low"] <= row["estimate"] <= row["high"] and set(row["by"]) == {"de", "en"}
        assert row["estimate"] == pytest.approx(sum(row["by"].values()) / 2)
        assert set(row["beside"]) == set(rows) - {name}
    assert rows["tfidf"]["estimate"] > 0.9 > rows["majority"]["estimate"]
    assert rows["wider"]["parameters"] > rows["shared"]["parameters"] > rows["probe"]["parameters"] > 0
    assert len(facts["transfer"]["rows"]) == 2
    assert facts["left_out"].keys() == {"sequence"}


def test_a_run_of_a_comparison_is_the_run_alone(finished, tmp_path):
    config = training.config(training.read_config(finished / "private-1/run.yaml"))
    assert (config.method, config.seed) == ("private", 1)
    training.train(config, tmp_path / "alone")
    assert (tmp_path / "alone/predictions.jsonl").read_bytes() == (
        finished / "private-1/predictions.jsonl"
    ).read_bytes()


def test_what_is_finished_is_kept_and_the_rest_is_done(tiny_base, tiny_csv, tmp_path, monkeypatch):
    comparison = asked(tiny_base, tiny_csv, ["shared", "private", "majority"], by="language")
    whole = training.compare(comparison, tmp_path / "whole")
    module = training.compare.__globals__
    train = module["train"]
    monkeypatch.setitem(module, "train", _interrupting(train, "private"))
    with pytest.raises(Interrupted):
        training.compare(comparison, tmp_path / "cut")
    assert (tmp_path / "cut.partial/shared-0/run.json").is_file() and not (tmp_path / "cut").exists()
    with pytest.raises(ConfigError, match="Go on with --resume"):
        training.compare(comparison, tmp_path / "cut")
    monkeypatch.setitem(module, "train", _only(train, "private"))
    again = training.compare(training.begun(tmp_path / "cut"), tmp_path / "cut", resume=True)
    estimates = lambda done: [(row["method"], row["estimate"]) for row in done.facts["compare"]["rows"]]
    assert estimates(again) == estimates(whole)


def _interrupting(train, method):
    def run(config, out, **more):
        if config.method == method:
            raise Interrupted("stopped")
        return train(config, out, **more)

    return run


def _only(train, method):
    def run(config, out, **more):
        assert config.method == method, "a finished run was run again"
        return train(config, out, **more)

    return run


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"methods": ["shared", "privat"]}, "there is no method 'privat'; did you mean 'private'"),
        ({"methods": ["shared"]}, "two or more are wanted"),
        ({"methods": {"shared": {}, "private": {"steps": 3}}}, r"'steps' can't be its own"),
        ({"methods": {"shared": {}, "tfidf": {"lr": 1}}}, "a baseline has no arguments"),
        (
            {"methods": {"shared": {}, "polytropon": {"options": {"skils": 4}}}},
            "no option 'skils'; did you mean 'skills'",
        ),
        ({"methods": ["shared", "tfidf"], "reference": "private"}, "reference='private' is none of the methods"),
        ({"methods": ["shared", "tfidf"], "seeds": [0, 0]}, "a seed comes twice"),
        ({"methods": ["shared", "tfidf"], "method": "private"}, "a comparison has several methods"),
        ({"methods": ["shared", "tfidf"], "test": 0.0}, "no test rows"),
        ({"methods": ["private", "tfidf-each", "tfidf"], "by": {}}, "fewer than two can be compared"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(tiny_base, tiny_csv, tmp_path, more, message):
    given = {"base": str(tiny_base), "data": str(tiny_csv), "by": "language", **FAST, **more}
    with pytest.raises(ConfigError, match=message):
        training.compare(training.comparison(given), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["said.csv"]


# Baselines of other kinds


def test_baselines_of_numbers_tags_and_language_models(tiny_base, tmp_path):
    rows = tiny_rows()
    scores = write_csv(tmp_path / "scores.csv", [(t, len(t) / 10, l) for t, _, l in rows])
    done = training.compare(
        asked(tiny_base, scores, ["probe", "tfidf", "majority"], kind="regression"), tmp_path / "regression"
    )
    found = {row["method"]: row["estimate"] for row in done.facts["compare"]["rows"]}
    assert done.facts["compare"]["metric"] == "pearson" and found["majority"] is None and found["tfidf"] > 0.5
    done = training.compare(
        asked(tiny_base, scores, ["shared", "tfidf", "majority"], kind="masked"), tmp_path / "masked"
    )
    found = {row["method"]: row["estimate"] for row in done.facts["compare"]["rows"]}
    assert done.facts["compare"]["metric"] == "perplexity" and set(done.facts["left_out"]) == {"tfidf"}
    assert 1 < found["majority"] < 60


def test_a_variant_of_a_run_is_its_own(tiny_base, tiny_csv):
    mine = {"bays": [{"name": "b", "at": "role.query", "count": 2, "kind": "LoRA"}]}
    methods, module = {"shared": {}, "mine": mine}, {"LoRA": {"rank": 2}}
    comparison = asked(tiny_base, tiny_csv, methods, module=module, by="language")
    assert comparison.run(comparison.entries["mine"], 3).method is None
    assert comparison.run(comparison.entries["shared"], 3).seed == 3
    again = training.comparison(comparison.dump())
    assert again.dump() == comparison.dump() and replace(again, config=comparison.config) == comparison
