"""`modbay extend`: who is new gets a place of its own, and all others are answered bit for bit as before."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import modbay as mb

pytest.importorskip("transformers")

from conftest import tiny_rows, write_csv
from modbay import training
from modbay.cli import app
from modbay.errors import ConfigError, DataError, ProofError
from modbay.training.extending import _extend as extending
from modbay.training.extending import _newcomers as reading

FAST = {"steps": 8, "batch": 8, "probe": 20, "lr": 3e-3, "evaluate_every": 8, "save_every": 8}

LONG = {**FAST, "steps": 40, "lr": 1e-2, "evaluate_every": 40, "save_every": 40}
SMALL = {"polytropon": {"skills": 3}, "mixture": {"experts": 3}}


@pytest.fixture(scope="module")
def runs(tiny_base, tmp_path_factory):
    """A finished run of a method, made once."""
    place, made = tmp_path_factory.mktemp("runs"), {}
    data = write_csv(place / "said.csv", tiny_rows())

    def of(method: str) -> training.Run:
        if method not in made:
            small = {"at": "role.query", "options": SMALL.get(method, {})} if method not in ("full", "sequence") else {}
            asked = {"base": str(tiny_base), "data": str(data), "by": "language", "method": method, **LONG, **small}
            made[method] = training.train(training.config(asked), place / method)
        return made[method]

    return of


@pytest.fixture
def french(tmp_path) -> Path:
    return write_csv(tmp_path / "fr.csv", tiny_rows(("fr",)))


@pytest.fixture
def tongue(tmp_path) -> Path:
    """A new task, of other classes than the run's."""
    return write_csv(tmp_path / "tongue.csv", [(f"{t} 8", "germanic" if l != "fr" else "romance", l)
                                               for t, _, l in tiny_rows(("en", "de", "fr"), each=10)])  # fmt: skip


def extended(run, data, out: Path, **more) -> training.Run:
    path = data if isinstance(data, dict) else str(data)
    return training.extend(training.extension({"run": str(run.folder), "data": path, **FAST, **more}), out)


def modules(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of all modules."""
    return {
        f"{file.parent.relative_to(folder)}:{name}": tensor
        for file in sorted((folder / "modules").rglob("module.safetensors"))
        for name, tensor in load_file(file).items()
    }


def record(folder: Path, name: str) -> dict:
    """What the file of an arrival says."""
    return json.loads((folder / f"modules/arrivals/{name}/module.json").read_text(encoding="utf-8"))


def same_as_before(old: training.Run, new: training.Run) -> None:
    """Every module that was there has the same bits, and the proof says so of the logits."""
    before, after = modules(old.folder), modules(new.folder)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items()) and len(after) > len(before)
    said = new.facts["proof"][-1]
    assert said["changed"] == 0 and said["rows"] == len((old.folder / "predictions.jsonl").read_text().splitlines())


SLOW = [pytest.param(method, marks=pytest.mark.slow) for method in ("shared+private", "full", "sequence")]


@pytest.mark.parametrize("method", ["private", "shared", "polytropon", "mixture", *SLOW])
def test_a_language_and_then_a_task(runs, french, tongue, tmp_path, method):
    run = runs(method)
    one = extended(run, french, tmp_path / "one")
    same_as_before(run, one)
    two = extended(one, {"tongue": str(tongue)}, tmp_path / "two")
    same_as_before(one, two)
    assert two.known["kinds"] == {"said": "classification", "tongue": "classification"}
    assert [(o.label, o.value, o.task) for o in two.routes.own] == [
        ("task", "tongue", "tongue"), ("language", "fr", "said")
    ]  # fmt: skip
    network = two.network()
    bays = mb.bays(network.model)
    assert bays["arrivals"].names() == ["fr", "tongue"]
    assert bays["heads"].names() == ["said", "said-fr", "tongue"]
    assert {r["value"] for r in two.facts["results"] if r["label"] == "language"} >= {"en", "de", "fr"}
    labels = {name: record(two.folder, name)["about"]["labels"] for name in ("fr", "tongue")}
    assert labels["fr"] == {"task": ["said"], "language": ["fr"]} and labels["tongue"]["task"] == ["tongue"]
    assert record(two.folder, "fr")["about"]["metrics"].keys() == {"accuracy", "macro_f1"}

    rows, _ = reading.tested(two)  # of all three, in one batch, each is answered as alone
    assert {(row.task, row.labels["language"]) for row in rows} >= {("said", "en"), ("said", "fr"), ("tongue", "fr")}
    told = training.predict(network, rows)
    alone = [training.predict(network, [row])[0] for row in rows[::7]]
    assert [r.prediction for r in told[::7]] == [r.prediction for r in alone]
    kept = [json.loads(line)["prediction"] for line in (two.folder / "predictions.jsonl").read_text().splitlines()]
    assert [r.prediction for r in told] == kept


def test_a_new_task_learns(runs, tongue, tmp_path):
    run = extended(runs("shared"), {"tongue": str(tongue)}, tmp_path / "new", probe=200)
    found = next(r for r in run.facts["results"] if (r["task"], r["label"], r["metric"]) == ("tongue", "", "accuracy"))
    assert found["estimate"] > 0.7  # two thirds are of one class
    assert run.facts["extended"]["newcomers"][0]["head"] == "tongue"


def test_a_value_of_a_task_that_came_later_stands_on_its_module(runs, tongue, tmp_path):
    rows = [(t, y, l) for t, y, l in ((f"{t} 8", "odd" if len(t) % 2 else "even", l) for t, _, l in tiny_rows(each=10))]
    one = extended(runs("private"), {"parity": str(write_csv(tmp_path / "p.csv", rows))}, tmp_path / "one")
    fr = [(f"{t} 8", "odd" if len(t) % 2 else "even", l) for t, _, l in tiny_rows(("fr",), each=10)]
    two = extended(one, {"parity": str(write_csv(tmp_path / "q.csv", fr))}, tmp_path / "two")
    same_as_before(one, two)
    assert two.facts["extended"]["newcomers"][0]["on"] == {"language": [], "arrivals": ["parity"]}
    row = next(row for row in reading.tested(two)[0] if row.labels["language"] == "fr")
    labels = two.routes.of(row, ("head", "arrival"))
    assert labels == {"head": "parity-fr", "arrival": "parity+fr"}
    router = mb.bays(two.network().model)["arrivals"].state.router
    assert router.table["parity+fr"] == ["parity", "fr"]


def test_only_the_gates_of_who_is_new_move(runs, french, tmp_path):
    run = runs("polytropon")
    new = extended(run, french, tmp_path / "new", router_lr=0.1)
    gates = [load_file(r.folder / "modules/language/bay.safetensors")["router/logits"] for r in (run, new)]
    assert torch.equal(gates[0], gates[1][: len(gates[0])]) and len(gates[1]) == len(gates[0]) + 1
    assert gates[1][-1].abs().max() > 0.01  # they start within 0.001 of zero


@pytest.mark.parametrize(
    ("on", "modules"),
    [("de", ["de"]), ("en,de", ["en", "de"]), ("average", ["average-of-all"]), ("none", []), (None, [])],
)
def test_on_says_what_stands_under(runs, french, tmp_path, on, modules):
    run = runs("private")
    new = extended(run, french, tmp_path / "new", on=on)
    assert new.facts["extended"]["newcomers"][0]["on"] == {"language": modules}
    bay = mb.bays(new.network().model)["language"]
    assert bay.state.router.table["fr"] == modules
    if on == "average":
        mean, en, de = (bay.parameters(name) for name in ("average-of-all", "en", "de"))
        for m, a, b in zip(mean, en, de, strict=True):
            torch.testing.assert_close(m, (a + b) / 2)


def test_nearest_is_the_module_of_rows_that_are_alike(runs, tmp_path):
    """German words under another name."""
    data = write_csv(tmp_path / "gsw.csv", [(t, y, "gsw") for t, y, _ in tiny_rows(("de",), seed=5)])
    new = extended(runs("private"), data, tmp_path / "new", on="nearest")
    assert new.facts["extended"]["newcomers"][0]["on"] == {"language": ["de"]}
    assert any(note.startswith("nearest to language 'gsw' is 'de'") for note in new.facts["extended"]["notes"])


def test_nearest_of_a_new_task_is_told_by_probes(tiny_base, tmp_path):
    rows = tiny_rows()
    tasks = {name: str(write_csv(tmp_path / f"{name}.csv", [(t, y if name == "topic" else l, l) for t, y, l in rows]))
             for name in ("topic", "tongue")}  # fmt: skip
    run = training.train(training.config({"base": str(tiny_base), "data": tasks, "method": "private", **FAST}),
                         tmp_path / "run")  # fmt: skip
    new = extended(run, {"third": tasks["topic"]}, tmp_path / "new", on="nearest")
    same_as_before(run, new)
    assert new.facts["extended"]["newcomers"][0]["on"]["task"] in (["topic"], ["tongue"])


def test_ways_and_shots(runs, french, tmp_path):
    run = runs("shared+private")
    head = extended(run, french, tmp_path / "head", ways="head", shots=1)
    assert "arrivals" not in mb.bays(head.network().model)
    assert head.facts["extended"]["rows"] == {"train": 3, "validation": 0, "test": 12}
    module = extended(run, french, tmp_path / "module", ways="module", shots=4)
    assert mb.bays(module.network().model)["heads"].names() == ["said"]
    assert module.facts["extended"]["rows"]["train"] == 12
    assert module.facts["extended"]["newcomers"][0]["on"] == {"language": ["shared"]}
    few = write_csv(tmp_path / "few.csv", tiny_rows(("fr",), each=1))
    alone = extended(run, few, tmp_path / "alone")
    assert alone.facts["extended"]["rows"] == {"train": 3, "validation": 0, "test": 0}
    assert any("none is set aside for a test" in note for note in alone.facts["extended"]["notes"])


def test_known_rows_are_left_out(runs, tmp_path):
    data = write_csv(tmp_path / "mixed.csv", tiny_rows(("de", "fr"), seed=2))
    new = extended(runs("private"), data, tmp_path / "new")
    assert any("60 rows of task 'said' are of values that the run knows (language=de: 60)" in note
               for note in new.facts["extended"]["notes"])  # fmt: skip
    assert sum(new.facts["extended"]["rows"].values()) == 60


def test_the_same_file_may_have_grown(tiny_base, tmp_path):
    data = write_csv(tmp_path / "said.csv", tiny_rows())
    asked = {"base": str(tiny_base), "data": str(data), "by": "language", "method": "private", **FAST}
    run = training.train(training.config(asked), tmp_path / "run")
    write_csv(data, [*tiny_rows(), *tiny_rows(("fr",))])
    new = extended(run, data, tmp_path / "new")
    assert new.facts["proof"][-1]["rows"] == 24  # by their places, whatever a split of the grown file would be


@pytest.mark.parametrize(
    ("rows", "more", "said"),
    [
        (tiny_rows(), {}, "nothing in it is new.*--task NAME.*--value language=VALUE.*modbay evaluate"),
        ([*tiny_rows(("fr",)), ("pluie", "news", "fr")], {}, "1 classes are new to task 'said', 'news'.*--task NAME"),
        (tiny_rows(("fr",)), {"on": "es"}, "on='es'.*has no such module; there are 'en', 'de'|'de', 'en'"),
        (tiny_rows(("fr",)), {"ways": "heads"}, "ways='heads': there are"),
        (tiny_rows(("fr",)), {"max_length": 64}, "'max_length' is the run's own"),
        (tiny_rows(("fr",)), {"step": 3}, "'step' is no argument, did you mean 'steps'"),
        (tiny_rows(("fr",)), {"by": {"customer": "c"}}, "by='customer': the run knows no such label.*'language'"),
        (tiny_rows(("fr",)), {"text": "body"}, "no column 'body'"),
        (tiny_rows(("fr",)), {"kind": "regression"}, "task 'said' is classification in the run"),
        (tiny_rows(("fr",)), {"task": "new", "ways": "module"}, "a new task needs a head"),
        (tiny_rows(("fr",)), {"task": "new", "kind": "masked"}, "can't share one network"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(runs, tmp_path, rows, more, said):
    data = write_csv(tmp_path / "data.csv", rows)
    with pytest.raises((ConfigError, DataError), match=f"(?s){said}"):
        extended(runs("private"), data, tmp_path / "new", **more)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.csv"]


def test_no_choice_where_no_bay_has_the_label(runs, french, tmp_path):
    with pytest.raises(ConfigError, match="no bay of the run takes its modules by 'language'"):
        extended(runs("shared"), french, tmp_path / "new", on="nearest")


def test_one_bit_that_changed_fails_loudly(runs, french, tmp_path, monkeypatch):
    def fit(run, folder, progress):
        with torch.no_grad():
            parameter = mb.bays(run.network.model)["language"].parameters("de")[0]
            parameter.view(torch.int32).view(-1)[0] ^= 1 << 20
        return []

    monkeypatch.setattr(extending, "fit", fit)
    with pytest.raises(ProofError, match=r"test rows of .* are answered with other logits.*Nothing was written"):
        extended(runs("private"), french, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fr.csv"]


def test_language_models(tiny_base, tmp_path):
    data = write_csv(tmp_path / "said.csv", tiny_rows())
    asked = {"base": str(tiny_base), "data": str(data), "by": "language", "method": "private", "kind": "masked", **FAST}
    run = training.train(training.config(asked), tmp_path / "run")
    new = extended(run, write_csv(tmp_path / "fr.csv", tiny_rows(("fr",))), tmp_path / "new")
    same_as_before(run, new)
    with pytest.raises(ConfigError, match="has no heads"):
        extended(run, tmp_path / "fr.csv", tmp_path / "head", ways="head")


def test_the_command_line(runs, tmp_path):
    rows = [(t, y) for t, y, _ in tiny_rows(("fr",))]
    data, out = write_csv(tmp_path / "fr.csv", rows, ("body", "target")), tmp_path / "new"
    call = lambda *words: CliRunner().invoke(app, [str(word) for word in words])
    quick = ["--steps", 8, "--batch", 8, "--set", "evaluate_every=8"]
    said = call(
        "extend", runs("private").folder, data, "--text", "body", "--value", "language=fr", "--out", out, *quick
    )
    assert said.exit_code == 0, said.stderr
    assert "Proved: the logits of all 24 test rows" in said.stdout and "said-fr" in said.stdout
    assert (out / "report.html").is_file()
    again = call("extend", out / "extend.yaml", "--out", tmp_path / "again", "--json")
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout)["proof"][-1]["changed"] == 0
    first, second = modules(out), modules(tmp_path / "again")
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
    wrong = call("extend", runs("private").folder, data, "--text", "body", "--value", "language=fr", "--out", out)
    assert wrong.exit_code == 1 and "not overwritten" in wrong.stderr
    dry = call("extend", out, data, "--text", "body", "--value", "language=it", "--dry-run")
    assert dry.exit_code == 0 and "arrivals" in dry.stdout and not (tmp_path / "new-extended").exists()


def test_what_was_stopped_goes_on_to_the_same_bits(runs, french, tmp_path, monkeypatch):
    whole = extended(runs("polytropon"), french, tmp_path / "whole", save_every=4)
    real = extending.predict
    monkeypatch.setattr(extending, "predict", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        extended(runs("polytropon"), french, tmp_path / "cut", save_every=4)
    monkeypatch.setattr(extending, "predict", real)
    partial = tmp_path / "cut.partial"
    steps = sorted((partial / "checkpoints").iterdir())
    assert steps
    said = CliRunner().invoke(app, ["extend", "--resume", str(tmp_path / "cut"), "--json"])
    assert said.exit_code == 0, said.stderr
    one, other = modules(whole.folder), modules(tmp_path / "cut")
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())
