"""`modbay train`: what a run learns, writes, resumes and refuses."""

import json
import os
import random
import signal
import subprocess
import sys
import time
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
from modbay.data import Row
from modbay.errors import ConfigError, DataError
from modbay.library import Library

FAST = {"steps": 8, "batch": 8, "probe": 20, "lr": 3e-3}


def asked(base: Path, data, **more) -> training.Config:
    return training.config({"base": str(base), "data": data if isinstance(data, dict) else str(data), **FAST, **more})


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's modules."""
    return {
        f"{file.relative_to(folder)}:{name}": tensor
        for file in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def modbay(*arguments) -> "tuple[int, str, str]":
    said = CliRunner().invoke(app, [str(a) for a in arguments])
    return said.exit_code, said.stdout, said.stderr


@pytest.mark.parametrize("method", ["shared", "private", "shared+private", "polytropon", "mixture", "full", "probe"])
def test_a_method_learns_and_comes_back(tiny_base, tiny_csv, tmp_path, method):
    config = asked(tiny_base, tiny_csv, by="language", method=method, steps=30)
    run = training.train(config, tmp_path / "run")
    accuracy = next(r for r in run.facts["results"] if r["label"] == "" and r["metric"] == "accuracy")
    assert accuracy["estimate"] > 0.6  # chance is 1/3
    rows = training.read_tasks(run.config).splits.test
    said = [r.prediction for r in training.predict(run.network(), rows)]
    kept = [json.loads(line)["prediction"] for line in (tmp_path / "run/predictions.jsonl").read_text().splitlines()]
    assert said == kept


def test_a_library_finds_what_a_run_leaves(tiny_base, tiny_csv, tmp_path):
    """Labels, metrics and data of each module, of the rows that it counts for; no path in them, and no parent."""
    flags = ["--base", tiny_base, "--by", "language", "--method", "private", "--licence", "CC-BY-4.0", "--seed", 1]
    code, _, err = modbay("train", tiny_csv, *flags, "--steps", 8, "--batch", 8, "--out", tmp_path / "run")
    assert code == 0, err
    run, shelf = training.open_run(tmp_path / "run"), ["--library", tmp_path / "shelf"]
    assert modbay("library", "add", tmp_path / "run/modules", *shelf)[0] == 0
    code, out, err = modbay("library", "search", "accuracy>=0", "--label", "language=de", "--json", *shelf)
    assert code == 0, err
    found = {one["name"]: one["about"] for one in json.loads(out)}
    assert [name for name in found if not name.startswith("heads/")] == ["language/de"]
    rows = training.read_tasks(run.config).splits
    said = [json.loads(line) for line in (tmp_path / "run/predictions.jsonl").read_text().splitlines()]
    tasks = {row.task for row in rows.train}
    for name, about in found.items():
        mine = [one for one in said if "heads/" in name or one["labels"]["language"] == "de"]
        right = sum(one["prediction"] == one["target"] for one in mine) / len(mine)
        assert about["metrics"]["accuracy"] == pytest.approx(right, abs=1e-6)
        assert about["labels"] == {"task": sorted(tasks), "language": ["de", "en"] if "heads/" in name else ["de"]}
        assert {one["split"]: one["rows"] for one in about["data"]} == {
            part: len(getattr(rows, part)) for part in ("train", "validation", "test")
        }
        assert {one["name"] for one in about["data"]} == {tiny_csv.name}
        digests = {one["split"]: one["sha256"] for one in about["data"]}
        assert digests == {one["split"]: one["sha256"] for one in run.facts["data"]}
        assert about["licence"] == "CC-BY-4.0" and "parents" not in about
        assert f"seed 1; metrics of {len(mine)} test rows" in about["notes"]
    assert str(tmp_path) not in json.dumps(found)


def test_modules_are_found_by_rows_like_theirs(tiny_base, tiny_csv, tmp_path):
    """A module's embedding is the mean of its training rows by the bare base, however it is trained."""
    from transformers import AutoModel, AutoTokenizer

    run = training.train(asked(tiny_base, tiny_csv, by="language", method="shared+private"), tmp_path / "run")
    lib = Library(run.folder / "modules")
    told = {one.name: lib.read(one.name).record["about"]["embedding"] for one in lib.entries()}
    base, tokenizer = AutoModel.from_pretrained(tiny_base).eval(), AutoTokenizer.from_pretrained(tiny_base)
    rows = [row for row in training.read_tasks(run.config).splits.train if row.labels["language"] == "de"]
    with torch.no_grad():
        each = [base(**tokenizer(row.text, return_tensors="pt")).last_hidden_state[0].mean(0) for row in rows]
    assert 8 <= len(rows) <= 64
    torch.testing.assert_close(torch.tensor(told["language/de"]), torch.stack(each).mean(0), rtol=1e-3, atol=1e-4)
    network = run.network()
    torch.testing.assert_close(torch.tensor(training.embedding(network, rows)), torch.tensor(told["language/de"]))
    before = training.predict(network, rows)
    for language in ("de", "en"):  # of rows that no module has seen
        texts = [text for text, _, _ in tiny_rows((language,), 5, 9)]
        new = [Row(text, None, None, "said", {"language": language}, "x:1") for text in texts]
        found = [one.name for one in lib.search(near=training.embedding(network, new)) if "/shared" not in one.name]
        assert found[0] == f"language/{language}"
    assert training.predict(network, rows) == before


def test_few_rows_have_no_embedding(tiny_base, tmp_path):
    """It would tell of the rows themselves."""
    rows = [*tiny_rows(("en",), 10), *tiny_rows(("de",), 2)]
    data = write_csv(tmp_path / "said.csv", rows)
    run = training.train(asked(tiny_base, data, by="language", method="private", test=0.0), tmp_path / "run")
    lib = Library(run.folder / "modules")
    has = {one.name for one in lib.entries() if "embedding" in lib.read(one.name).record["about"]}
    assert "language/en" in has and "language/de" not in has


def test_without_test_rows_there_are_no_metrics(tiny_base, tiny_csv, tmp_path):
    run = training.train(asked(tiny_base, tiny_csv, test=0.0, method="shared"), tmp_path / "run")
    for file in run.folder.glob("modules/*/*/module.json"):
        about = json.loads(file.read_text(encoding="utf-8"))["about"]
        assert "metrics" not in about and "licence" not in about and about["labels"]["task"]


def test_one_seed_gives_one_result(tiny_base, tiny_csv, tmp_path):
    config = asked(tiny_base, tiny_csv, by="language", method="private")
    one, other = (training.train(config, tmp_path / name).folder for name in ("a", "b"))
    assert same(tensors(one), tensors(other))
    assert (one / "predictions.jsonl").read_bytes() == (other / "predictions.jsonl").read_bytes()
    third = training.train(config.model_copy(update={"seed": 1}), tmp_path / "c").folder
    assert not same(tensors(one), tensors(third))


def test_the_yaml_that_a_run_writes_reruns_it(tiny_base, tiny_csv, tmp_path):
    first = training.train(asked(tiny_base, tiny_csv, by="language", method="polytropon"), tmp_path / "a")
    code, out, err = modbay("train", first.folder / "run.yaml", "--out", tmp_path / "b", "--json")
    assert code == 0, err
    assert json.loads(out)["folder"] == str(tmp_path / "b")
    assert same(tensors(first.folder), tensors(tmp_path / "b"))


def test_several_tasks_with_their_own_classes(tiny_base, tmp_path):
    rows = tiny_rows()
    topics = write_csv(tmp_path / "topics.csv", [(t, y, l) for t, y, l in rows if y != "timer"])
    tongues = write_csv(tmp_path / "tongues.csv", [(f"{t} 7", l, l) for t, _, l in rows])
    lengths = write_csv(tmp_path / "lengths.csv", [(f"{t} 9", 0.5 * len(t), l) for t, _, l in rows])
    data = {"topics": str(topics), "tongues": str(tongues), "lengths": {"path": str(lengths), "kind": "regression"}}
    run = training.train(asked(tiny_base, data, method="private", steps=30), tmp_path / "run")
    assert run.known["classes"] == {"topics": ["music", "weather"], "tongues": ["de", "en"]}
    assert {r["task"] for r in run.facts["results"]} == {"", "topics", "tongues", "lengths"}
    assert {r["metric"] for r in run.facts["results"] if r["task"] == "lengths"} == {"pearson", "spearman", "rmse"}
    bays = mb.bays(run.network().model)
    assert set(bays["heads"].names()) == {"topics", "tongues", "lengths"}


def test_tagging(tiny_base, tmp_path):
    rows = [(t, " ".join("B-X" if len(w) > 4 else "O" for w in t.split()), l) for t, _, l in tiny_rows()]
    data = write_csv(tmp_path / "tags.csv", rows)
    run = training.train(asked(tiny_base, data, kind="tagging", by="language", steps=40), tmp_path / "run")
    assert next(r for r in run.facts["results"] if r["metric"] == "token_accuracy")["estimate"] > 0.8


def test_masked_language_modelling(tiny_base, tiny_csv, tmp_path):
    config = asked(tiny_base, tiny_csv, kind="masked", by="language", method="private", steps=60, lr=1e-2)
    run = training.train(config, tmp_path / "run")
    before = training.predict(training.bare_network(config), training.read_tasks(config).splits.test)
    mean = lambda records: sum(r.nll for r in records if r.nll) / sum(r.tokens for r in records)
    after = training.predict(run.network(), training.read_tasks(config).splits.test)
    assert mean(after) < mean(before)


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_causal_and_sequence_to_sequence(tiny_generators, tiny_csv, tmp_path, kind):
    target = {} if kind == "causal" else {"target": "target"}
    more = {"kind": kind, "by": "language", "method": "private", "steps": 80, "lr": 3e-2, **target}
    run = training.train(asked(tiny_generators[kind], tiny_csv, **more), tmp_path / "run")
    losses = [point["loss"] for point in run.facts["curve"] if point["loss"] is not None]
    assert losses[-1] < losses[0] - 0.1
    perplexity = next(r for r in run.facts["results"] if r["metric"] == "perplexity")
    assert 1 < perplexity["estimate"] < run.network().model.config.vocab_size


def test_accumulation_gives_the_same_modules(tiny_base, tiny_csv, tmp_path):
    whole, parts = (
        training.train(asked(tiny_base, tiny_csv, by="language", method="private", accumulate=k), tmp_path / str(k))
        for k in (1, 4)
    )
    one, other = tensors(whole.folder), tensors(parts.folder)
    assert all(torch.allclose(one[key], other[key], atol=1e-5) for key in one)


def test_auxiliary_losses_are_counted_once_whatever_the_parts(tiny_base, tiny_csv, tmp_path):
    more = {"by": "language", "method": "polytropon", "options": {"prior": 0.1}}
    one, other = (
        tensors(training.train(asked(tiny_base, tiny_csv, accumulate=k, **more), tmp_path / str(k)).folder)
        for k in (1, 2)
    )
    gates = [key for key in one if "logits" in key or "gates" in key]
    assert gates
    assert all(torch.allclose(one[key], other[key], atol=2e-3) for key in gates)


SCRIPT = """
import sys
from modbay import training
config = training.config(training.read_config(sys.argv[1]))
training.train(config, sys.argv[2], resume="resume" in sys.argv)
"""


def start(yaml: Path, out: Path, *more: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(yaml), str(out), *more], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def test_killed_and_resumed_equals_unbroken(tiny_base, tiny_csv, tmp_path):
    config = asked(tiny_base, tiny_csv, by="language", method="private", steps=60, evaluate_every=5, dropout=0.1)
    whole = training.train(config, tmp_path / "whole")
    process = start(whole.folder / "run.yaml", tmp_path / "run")
    saved, end = tmp_path / "run.partial/checkpoints", time.time() + 120
    while time.time() < end and not list(saved.glob("checkpoint-*/trainer_state.json")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "run").exists()
    assert list(saved.glob("checkpoint-*"))
    again = training.train(
        training.config(training.read_config(whole.folder / "run.yaml")), tmp_path / "run", resume=True
    )
    assert same(tensors(whole.folder), tensors(again.folder))
    assert (whole.folder / "predictions.jsonl").read_bytes() == (again.folder / "predictions.jsonl").read_bytes()
    of = lambda run: json.loads((run.folder / "modules/language/de/module.json").read_text(encoding="utf-8"))["about"]
    assert of(whole) == of(again) and "parents" not in of(again)  # a checkpoint is none


@pytest.mark.slow
def test_killed_at_twenty_random_moments(tiny_base, tiny_csv, tmp_path):
    """Whenever it is killed: what is there then is no run, and what comes of going on is the unbroken run's."""
    config = asked(tiny_base, tiny_csv, by="language", method="private", steps=200, evaluate_every=10, dropout=0.1)
    whole = training.train(config, tmp_path / "whole").folder
    yaml, draw, stages = whole / "run.yaml", random.Random(0), set()
    begun = time.time()
    assert start(yaml, tmp_path / "timed").wait() == 0
    took = time.time() - begun
    for i in range(20):
        out = tmp_path / f"run{i}"
        process = start(yaml, out)
        time.sleep(draw.uniform(0.3 * took, took))  # before that Python is still importing
        process.send_signal(signal.SIGKILL)
        process.wait()
        partial = tmp_path / f"run{i}.partial"
        stages.add("done" if out.exists() else "saved" if list(partial.glob("checkpoints/checkpoint-*")) else "begun")
        if not out.exists():
            assert start(yaml, out, "resume").wait() == 0
        assert same(tensors(whole), tensors(out))
        assert (whole / "predictions.jsonl").read_bytes() == (out / "predictions.jsonl").read_bytes()
        assert not partial.exists()
    assert "saved" in stages


def test_checkpoints_hold_modules_alone(tiny_base, tiny_csv, tmp_path, monkeypatch):
    from modbay.training import _fit

    monkeypatch.setattr(_fit, "finish", lambda partial, out: partial.rename(out))
    run = training.train(asked(tiny_base, tiny_csv, by="language", method="private"), tmp_path / "run")
    held = [
        p.relative_to(run.folder / "checkpoints").parts[1:] for p in (run.folder / "checkpoints").rglob("*.safetensors")
    ]
    assert {parts[0] for parts in held} == {"heads", "language"}


TWO = """
import sys
from modbay import training
training.train(training.config(training.read_config(sys.argv[1])), sys.argv[2])
"""


@pytest.mark.slow
def test_two_processes_give_the_modules_of_one(tiny_base, tiny_csv, tmp_path):
    config = asked(tiny_base, tiny_csv, by="language", method="private", steps=20)
    one = training.train(config, tmp_path / "one")
    (tmp_path / "two.py").write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29533",
               str(tmp_path / "two.py"), str(one.folder / "run.yaml"), str(tmp_path / "two")]  # fmt: skip
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    first, second = tensors(one.folder), tensors(tmp_path / "two")
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[key], second[key], atol=1e-5) for key in first)


def test_dry_run_writes_nothing(tiny_base, tiny_csv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = modbay("train", tiny_csv, "--base", tiny_base, "--by", "language", "--dry-run")
    assert code == 0, err
    assert "84 train, 12 validation, 24 test" in out
    assert "steps of 32" in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["said.csv"]
    code, out, _ = modbay("train", tiny_csv, "--base", tiny_base, "--by", "language", "--dry-run", "--json")
    assert json.loads(out)["steps"] == 8  # 3 epochs of 84 rows in batches of 32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": "gone.csv"}, ["gone.csv"]),
        ({"base": "gone/"}, ["base='gone/'", "there is no such folder"]),
        ({"target": "label"}, ["label", "target"]),
        ({"method": "privat"}, ["'privat'", "did you mean 'private'"]),
        ({"lrr": 1}, ["'lrr'", "did you mean"]),
        ({"batch": 0}, ["batch=0"]),
        ({"layers": 9}, ["layers=9", "2 layers"]),
        ({"by": "tongue"}, ["tongue"]),
        ({"module": "Lora"}, ["Lora", "LoRA"]),
        ({"at": "*.nowhere"}, ["nowhere"]),
        ({"options": {"skils": 4}, "method": "polytropon"}, ["skils", "skills"]),
        ({"bays": [{"name": "a", "at": "role.query", "kind": "LoRA"}]}, ["bays[0]"]),
        ({"sampling": "sometimes"}, ["sampling='sometimes'"]),
        ({"test": 1.5}, ["test=1.5"]),
    ],
)
def test_wrong_input_is_one_message_and_leaves_nothing(tiny_base, tiny_csv, tmp_path, monkeypatch, change, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ConfigError, DataError, mb.errors.ModbayError)) as error:
        training.train(training.config({"base": str(tiny_base), "data": str(tiny_csv), **FAST, **change}), "run")
    for word in words:
        assert word in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["said.csv"]


def test_a_folder_that_is_there_is_not_overwritten(tiny_base, tiny_csv, tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(ConfigError, match="it exists, and is not overwritten"):
        training.train(asked(tiny_base, tiny_csv), tmp_path / "run")


def test_a_run_stopped_by_ctrl_c_is_saved_and_goes_on(tiny_base, tiny_csv, tmp_path):
    config = asked(tiny_base, tiny_csv, by="language", method="private", steps=60, evaluate_every=30)
    whole = training.train(config, tmp_path / "whole")
    process = subprocess.Popen(
        [sys.executable, "-m", "modbay", "train", str(whole.folder / "run.yaml"), "--out", str(tmp_path / "run")],
        stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    saved, end = tmp_path / "run.partial/checkpoints", time.time() + 120
    while time.time() < end and not list(saved.glob("checkpoint-*/trainer_state.json")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1].decode()
    assert process.returncode == 130, said
    assert f"modbay train --resume {tmp_path / 'run'}" in said
    code, _, err = modbay("train", "--resume", tmp_path / "run")
    assert code == 0, err
    assert same(tensors(whole.folder), tensors(tmp_path / "run"))


def test_data_that_is_not_held(tiny_base, tmp_path):
    """Streamed data learns as data in memory does, is split by text, and goes on after an interruption."""
    rows = tiny_rows(each=60)
    data = write_csv(tmp_path / "said.csv", rows)
    more = {"by": "language", "method": "private", "streaming": True, "buffer": 50, "steps": 40, "evaluate_every": 10}
    config = asked(tiny_base, data, **more)
    run = training.train(config, tmp_path / "a")
    assert next(r for r in run.facts["results"] if r["metric"] == "accuracy")["estimate"] > 0.6
    parts = {entry["split"]: entry["rows"] for entry in run.facts["data"]}
    assert sum(parts.values()) == len(rows)
    assert all(parts[part] > 10 for part in ("train", "validation", "test"))
    tasks = training.read_tasks(config)
    texts = [{row.normal for row in held} for _, held in tasks.splits.items()]
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]
    again = training.train(config, tmp_path / "b")
    assert same(tensors(run.folder), tensors(again.folder))


def test_a_stream_goes_through_all_rows(tiny_base, tmp_path):
    from modbay.training._stream import Streamed
    from modbay.training._tasks import columns

    data = write_csv(tmp_path / "said.csv", tiny_rows(each=10))
    config = asked(tiny_base, data, by="language", streaming=True, buffer=7, batch=4)
    tasks, network = training.read_tasks(config), training.bare_network(config)
    network.routes.values = tasks.values
    what = {name: columns(config, source) for name, source in config.sources.items()}
    seen = list(Streamed(config, what, tasks.sizes, network, 40))
    assert [place for place, _ in seen] == list(range(160))
    texts = {tuple(example.pieces["input_ids"]) for _, example in seen}
    assert len(texts) == tasks.sizes["said"]


def test_a_stream_needs_steps(tiny_base, tiny_csv):
    with pytest.raises(ConfigError, match="streaming=True: say steps"):
        training.read_tasks(training.config({"base": str(tiny_base), "data": str(tiny_csv), "streaming": True}))


def test_the_best_step_is_found_for_each_part(tiny_base, tmp_path):
    """Private modules of two tasks, with heads of their own, stand apart; a shared module ties them."""
    from modbay.training import _best

    rows = tiny_rows()
    said = {name: [(f"{text} {name}", target, language) for text, target, language in rows] for name in "ab"}
    data = {name: str(write_csv(tmp_path / f"{name}.csv", several)) for name, several in said.items()}
    found = {}
    for method in ("private", "shared", "polytropon"):
        ready = training.ready(asked(tiny_base, data, method=method))
        routes = [e.routes for e in ready.examples]
        found[method] = _best.parts(ready.network, routes, routes)
    assert [sorted(part.modules) for part in found["private"]] == [
        [("heads", "a"), ("task", "a")], [("heads", "b"), ("task", "b")],
    ]  # fmt: skip
    assert sorted(place for part in found["private"] for place in part.rows) == list(range(len(routes)))
    assert len(found["shared"]) == len(found["polytropon"]) == 1


def test_each_part_is_restored_from_its_own_best_step(tiny_base, tmp_path):
    from modbay.training import _best

    rows = tiny_rows()
    said = {name: [(f"{text} {name}", target, language) for text, target, language in rows] for name in "ab"}
    data = {name: str(write_csv(tmp_path / f"{name}.csv", several)) for name, several in said.items()}
    ready = training.ready(asked(tiny_base, data, method="private"))
    best = _best.Best(ready.network, tmp_path / "best", ready.tasks, ready.examples, [])
    scores = {"a": iter([1.0, 0.0]), "b": iter([0.0, 1.0])}
    modules = mb.bays(ready.network.model)["task"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_best, "score", lambda records, kinds, by: {
            "score": next(scores[records[0].task]) if len({r.task for r in records}) == 1 else 0.0})  # fmt: skip
        for value in (1.0, 2.0):
            for parameter in modules.parameters():
                parameter.data.fill_(value)
            best()
    best.restore()
    assert {p.min().item() for p in modules.parameters("a")} == {1.0}
    assert {p.min().item() for p in modules.parameters("b")} == {2.0}
