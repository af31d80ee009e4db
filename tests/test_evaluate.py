"""`modbay evaluate`, `predict` and `inspect` on finished runs: figures, files and folders."""

import csv
import errno
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

pytest.importorskip("transformers")

from conftest import tiny_rows, write_csv
from modbay import data, metrics, training
from modbay.cli import app
from modbay.errors import ConfigError
from modbay.training.evaluation import _evaluate, _tell

FAST = {"steps": 4, "batch": 8, "probe": 40, "lr": 3e-3, "evaluate_every": 4, "save_every": 4}


def made(base: Path, source, out: Path, **more) -> Path:
    """A finished run."""
    given = source if isinstance(source, dict) else str(source)
    config = training.config({"base": str(base), "data": given, **FAST, **more})
    return training.train(config, out).folder


def call(*arguments, code: int = 0) -> str:
    """What a command printed; on standard error if it was to fail."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result.stderr if code else result.stdout


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_csv(folder / "said.csv", tiny_rows())
    write_csv(folder / "new.csv", tiny_rows(each=4, seed=9))
    return folder


@pytest.fixture(scope="module")
def private(tiny_base, home) -> Path:
    return made(tiny_base, home / "said.csv", home / "private", by="language", method="private")


@pytest.fixture(scope="module")
def shared(tiny_base, home) -> Path:
    return made(tiny_base, home / "said.csv", home / "shared", by="language", method="shared", steps=1, probe=1)


@pytest.fixture(scope="module")
def mixture(tiny_base, home) -> Path:
    options = {"experts": 4}
    return made(tiny_base, home / "said.csv", home / "mixture", by="language", method="mixture", options=options)


@pytest.fixture(scope="module")
def several(tiny_base, home) -> Path:
    """Classes of two tasks and a measure, private by language."""
    rows = tiny_rows()
    topics = write_csv(home / "topics.csv", rows)
    tongues = write_csv(home / "tongues.csv", [(f"{t} 7", l, l) for t, _, l in rows])
    lengths = write_csv(home / "lengths.csv", [(f"{t} 9", 0.5 * len(t), l) for t, _, l in rows])
    source = {"topics": str(topics), "tongues": str(tongues), "lengths": {"path": str(lengths), "kind": "regression"}}
    return made(tiny_base, source, home / "several", method="private", by="language")


# evaluate


def test_figures_are_those_counted_by_hand(private):
    said = json.loads(call("evaluate", private, "--json"))
    rows = read_lines((private / "predictions.jsonl").read_text(encoding="utf-8"))
    cells = {(r["label"], r["value"]): r for r in said["results"] if r["metric"] == "accuracy"}
    right = lambda some: sum(r["prediction"] == r["target"] for r in some) / len(some)
    assert cells["", ""]["estimate"] == pytest.approx(right(rows)) and cells["", ""]["n"] == len(rows)
    each = {v: [r for r in rows if r["labels"]["language"] == v] for v in ("en", "de")}
    for value, some in each.items():
        assert cells["language", value]["estimate"] == pytest.approx(right(some))
        assert cells["language", value]["n"] == len(some)
        assert cells["language", value]["low"] <= right(some) <= cells["language", value]["high"]
    assert cells["language", ""]["estimate"] == pytest.approx(sum(map(right, each.values())) / 2)
    assert [one["split"] for one in said["data"]] == ["test"] and said["parameters"]
    printed = call("evaluate", private)
    assert f"{right(rows):.3f}" in next(line for line in printed.splitlines() if "accuracy" in line)


def test_new_data_by_other_columns(private, home, tmp_path):
    rows = tiny_rows(each=3, seed=9)
    other = write_csv(tmp_path / "other.csv", [(y, l, t) for t, y, l in rows], ("class", "tongue", "body"))
    more = ["--text", "body", "--target", "class", "--by", "language=tongue", "--json"]
    said = json.loads(call("evaluate", private, other, *more))
    network = training.open_run(private).network()
    same = data.read(
        str(other), data.Columns("body", "class", {"language": "tongue"}), "classification", "said", whole=False
    )
    right = sum(r.prediction == r.target for r in training.predict(network, same)) / len(same)
    cell = next(r for r in said["results"] if r["metric"] == "accuracy" and not r["label"])
    assert cell["estimate"] == pytest.approx(right) and cell["n"] == len(rows) == 18
    assert said["data"][0]["sha256"] == data.digest(same)


def test_rows_that_were_trained_on_are_told(private, home):
    said = json.loads(call("evaluate", private, home / "said.csv", "--json"))
    trained = next(d["rows"] for d in said["data"])
    learned = next(d["rows"] for d in training.open_run(private).facts["data"] if d["split"] == "train")
    assert trained == 120 and f"{learned} of the 120 rows have texts that the run learned from" in said["warnings"][0]


def test_an_unknown_class_is_an_error_of_its_row(private, tmp_path):
    bad = write_csv(tmp_path / "bad.csv", [("rain sun", "wether", "en"), ("song band", "music", "en")])
    said = call("evaluate", private, bad, code=1)
    assert "bad.csv:2" in said and "did you mean 'weather'?" in said
    assert "no task 'sayd'" in call("evaluate", private, f"sayd={bad}", code=1)
    assert "no network.json" in call("evaluate", tmp_path, code=1)


def test_against_another_run_row_by_row(private, shared):
    said = json.loads(call("evaluate", private, "--against", shared, "--json"))
    rows = said["against"]["rows"]
    head, by_value = rows[0], {r["value"]: r for r in rows if r["label"] == "language" and r["value"]}
    a, b = ({r.where: r for r in metrics.records(run / "predictions.jsonl")} for run in (private, shared))
    gap = sum((a[w].prediction == a[w].target) - (b[w].prediction == b[w].target) for w in a) / len(a)
    assert (head["task"], head["label"], head["metric"]) == ("said", "", "accuracy")
    assert head["difference"] == pytest.approx(gap) and head["n"] == len(a) and set(by_value) == {"en", "de"}
    assert said["against"]["verdict"].startswith("accuracy of said: private is better than shared")
    printed = call("evaluate", private, "--against", shared)
    assert said["against"]["verdict"].splitlines()[0] in printed
    same = json.loads(call("evaluate", private, "--against", private, "--json"))["against"]
    assert same["rows"][0]["difference"] == 0 and "no difference" in same["verdict"]


def test_against_on_new_rows_of_several_tasks(several, private, home, tmp_path):
    rows = [f"topics={home / 'topics.csv'}", f"lengths={home / 'lengths.csv'}"]
    said = json.loads(call("evaluate", several, *rows, "--against", several, "--json"))
    assert {r["metric"] for r in said["against"]["rows"]} == {"accuracy", "pearson"}
    assert {(d["task"], d["rows"]) for d in said["data"]} == {("topics", 120), ("lengths", 120)}
    assert "has no task 'lengths'" in call("evaluate", several, *rows, "--against", private, code=1)
    assert "Say of which one this is" in call("evaluate", several, home / "topics.csv", code=1)


@pytest.mark.parametrize("new", [False, True])
def test_routes_of_a_router_that_reads_its_input(mixture, home, tmp_path, new):
    files = [home / "new.csv"] if new else []
    call("evaluate", mixture, *files, "--out", tmp_path / "out")
    said = json.loads((tmp_path / "out/evaluation.json").read_text(encoding="utf-8"))
    rows = [row for row in said["routing"] if row["bay"] == "experts"]
    assert len(rows) == len({row["site"] for row in rows}) > 1
    for row in rows:
        assert row["label"] == "language" and row["values"] == ["de", "en"] and len(row["modules"]) == 4
        assert all(sum(line) == pytest.approx(1, abs=1e-4) for line in row["weights"])
    assert sum(one["share"] for one in said["use"] if one["bay"] == "experts") == pytest.approx(1)


def test_an_evaluation_is_a_folder(private, home, tmp_path):
    out = tmp_path / "deep" / "ev"
    call("evaluate", private, home / "new.csv", "--out", out)
    assert listing(out) == ["evaluation.json", "predictions.jsonl", "report.html"]
    facts = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    assert len(metrics.records(out / "predictions.jsonl")) == facts["data"][0]["rows"] == 24
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and "private, evaluated" in page
    assert "is not overwritten" in call("evaluate", private, "--out", out, code=1)


def test_a_full_disk_leaves_no_evaluation(private, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_evaluate, "write_json", full)
    assert "No space left" in call("evaluate", private, "--out", tmp_path / "ev", code=1)
    assert listing(tmp_path) == []


def test_without_labels_and_by_wrong_ones(private, home, monkeypatch):
    said = json.loads(call("evaluate", private, home / "new.csv", "--by", "task", "--json"))
    assert {r["label"] for r in said["results"]} == {"", "class"}
    assert "TASK=FILE" in call("evaluate", private, home / "new.csv", "--by", "task=job", code=1)
    assert "did you mean 'language'?" in call("predict", private, home / "new.csv", "--by", "langage=x", code=1)
    bare = write_csv(home / "bare.csv", [(t, y) for t, y, l in tiny_rows(each=2) if l == "de"], ("text", "target"))
    rows = read_lines(call("predict", private, bare, "--value", "language=de"))
    assert len(rows) == 6 and {row["language"] for row in rows} == {"de"}
    said = json.loads(call("evaluate", private, bare, "--value", "language=de", "--json"))
    assert {r["value"] for r in said["results"] if r["label"] == "language"} == {"de"}
    assert "LABEL=VALUE is wanted" in call("predict", private, bare, "--value", "language", code=1)

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "evaluate", stopped)
    assert "nothing was written" in call("evaluate", private, code=130)


# predict


def test_csv_in_csv_out(private, home, tmp_path):
    said = call("predict", private, home / "new.csv", "--out", tmp_path / "told.csv")
    assert said.strip() == str(tmp_path / "told.csv")
    before, after = read_csv(home / "new.csv"), read_csv(tmp_path / "told.csv")
    assert list(after[0]) == ["text", "target", "language", "prediction", "confidence"]
    assert [{k: r[k] for k in b} for b, r in zip(before, after, strict=True)] == before
    run = training.open_run(private)
    rows = data.read(str(home / "new.csv"), data.Columns("text", "target", {"language": "language"}), "classification",
                     "said")  # fmt: skip
    records = training.predict(run.network(), rows)
    assert [r["prediction"] for r in after] == [r.prediction for r in records]
    assert [float(r["confidence"]) for r in after] == pytest.approx([r.confidence for r in records], abs=2e-6)
    assert call("predict", private, home / "new.csv", "--out", tmp_path / "again.csv", "--json")
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "told.csv").read_bytes()


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_tasks_and_labels_in_one_file(several, tmp_path, form):
    """No target is needed; each row has a task and a language of its own."""
    jobs = ("topics", "tongues", "lengths")
    rows = [{"text": t, "language": l, "job": jobs[i % 3]} for i, (t, _, l) in enumerate(tiny_rows(each=5))]
    source, out = tmp_path / f"mixed.{form}", tmp_path / f"told.{form}"
    write(source, rows)
    call("predict", several, source, "--by", "task=job", "--out", out)
    told = read(out)
    assert [{k: r[k] for k in rows[0]} for r in told] == rows
    run = training.open_run(several)
    network = run.network()
    for task, kind in run.known["kinds"].items():
        mine = [r for r in told if r["job"] == task]
        labels = [{"task": task, "language": r["language"]} for r in mine]
        own = [
            data.Row(r["text"], None, None, task, said, "", None, kind) for r, said in zip(mine, labels, strict=True)
        ]
        said = [r.prediction for r in training.predict(network, own)]
        if kind == "regression":
            assert [float(r["prediction"]) for r in mine] == pytest.approx(said, rel=1e-5)
            assert all(r["confidence"] in (None, "") for r in mine)
        else:
            assert [r["prediction"] for r in mine] == said


def write(path: Path, rows: list[dict]) -> None:
    if path.suffix == ".csv":
        write_csv(path, [tuple(r.values()) for r in rows], tuple(rows[0]))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def read(path: Path) -> list[dict]:
    if path.suffix == ".csv":
        return read_csv(path)
    if path.suffix == ".jsonl":
        return read_lines(path.read_text(encoding="utf-8"))
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pylist()


def test_several_files_become_a_folder(several, home, tmp_path):
    files = [f"topics={home / 'topics.csv'}", f"lengths={home / 'lengths.csv'}"]
    said = call("predict", several, *files, "--out", tmp_path / "told", "--json")
    assert sorted(json.loads(said)["files"]) == [str(tmp_path / f"told/{n}.csv") for n in ("lengths", "topics")]
    assert list(read_csv(tmp_path / "told/lengths.csv")[0])[-1] == "prediction"
    assert listing(tmp_path) == ["told", "told/lengths.csv", "told/topics.csv"]
    assert "would be" in call("predict", several, *files, "--out", tmp_path / "one.csv", code=1)
    assert "--by task=COLUMN" in call("predict", several, home / "topics.csv", code=1)


def test_streaming_equals_the_whole(private, home, tmp_path, monkeypatch):
    call("predict", private, home / "new.csv", "--out", tmp_path / "whole.csv")
    sizes = []
    once = _tell.predict
    monkeypatch.setattr(_tell, "CHUNK", 7)
    monkeypatch.setattr(_tell, "predict", lambda n, rows, **more: sizes.append(len(rows)) or once(n, rows, **more))
    call("predict", private, home / "new.csv", "--out", tmp_path / "parts.csv")
    assert sizes == [7, 7, 7, 3]
    whole, parts = read_csv(tmp_path / "whole.csv"), read_csv(tmp_path / "parts.csv")
    assert [r["prediction"] for r in whole] == [r["prediction"] for r in parts]
    sure = lambda rows: [float(r["confidence"]) for r in rows]
    assert sure(whole) == pytest.approx(sure(parts), abs=2e-6)


def test_json_lines_on_standard_output(private, home):
    for out in ([], ["--out", "-"]):
        rows = read_lines(call("predict", private, home / "new.csv", *out))
        assert len(rows) == 24 and rows[0]["where"].endswith("new.csv:2")
        assert set(rows[0]) == {"where", "text", "task", "language", "prediction", "confidence"}


def test_an_unknown_label_names_its_row_or_takes_the_base(private, tmp_path):
    source = write_csv(
        tmp_path / "fr.csv", [(t, l) for t, _, l in tiny_rows(("en", "fr"), each=1)], ("text", "language")
    )
    said = call("predict", private, source, "--out", tmp_path / "told.csv", code=1)
    assert "fr.csv:5: language='fr' is new to the run" in said and "There are 3 such rows" in said
    assert "--unknown base" in said and listing(tmp_path) == ["fr.csv"]
    call("predict", private, source, "--unknown", "base", "--out", tmp_path / "told.csv")
    network = training.open_run(private).network()
    rows = data.read(str(source), data.Columns("text", None, {"language": "language"}), "classification", "said",
                     wanted_target=False)  # fmt: skip
    alone = [{"head": "said", "language": row.labels["language"] if i < 3 else None} for i, row in enumerate(rows)]
    records = training.predict(network, rows, routes=alone)
    told = read_csv(tmp_path / "told.csv")
    assert [r["prediction"] for r in told] == [r.prediction for r in records]
    assert "unknown='bass'" in call("predict", private, source, "--unknown", "bass", code=1)


def test_nothing_is_overwritten(private, home, tmp_path):
    out = tmp_path / "told.csv"
    out.write_text("mine")
    assert "say --force" in call("predict", private, home / "new.csv", "--out", out, code=1)
    assert out.read_text() == "mine"
    call("predict", private, home / "new.csv", "--out", out, "--force")
    assert "prediction" in out.read_text()
    own = write_csv(tmp_path / "own.csv", tiny_rows(each=1))
    assert "is what is read" in call("predict", private, own, "--out", own, "--force", code=1)
    assert "has columns 'prediction'" in call("predict", private, out, "--out", tmp_path / "x.csv", code=1)
    assert "in its own format" in call("predict", private, own, "--out", tmp_path / "x.jsonl", code=1)
    assert listing(tmp_path) == ["own.csv", "told.csv"]


@pytest.mark.parametrize("place", ["spool", "write", "bad row"])
def test_nothing_half_written_after_an_error(private, home, tmp_path, monkeypatch, place):
    source = write_csv(tmp_path / "in.csv", tiny_rows(each=1))
    if place == "bad row":
        source.write_text(source.read_text() + ",music,en\n")
    once, count = _tell.Spool.add, iter(range(1000))

    def full(self, value):
        if next(count) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        once(self, value)

    def replaced(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    if place == "spool":
        monkeypatch.setattr(_tell.Spool, "add", full)
    elif place == "write":
        monkeypatch.setattr(data._write.csv, "writer", replaced)
    said = call("predict", private, source, "--out", tmp_path / "new/told.csv", code=1)
    assert ("in.csv:8" if place == "bad row" else "No space left on device") in said
    assert listing(tmp_path) == ["in.csv"]


def test_a_tag_for_each_word(tiny_base, tmp_path):
    rows = [(t, " ".join("B-X" if len(w) > 4 else "O" for w in t.split()), l) for t, _, l in tiny_rows(each=8)]
    source = write_csv(tmp_path / "tags.csv", rows)
    run = made(tiny_base, source, tmp_path / "run", kind="tagging", by="language")
    call("predict", run, source, "--out", tmp_path / "told.csv")
    for row in read_csv(tmp_path / "told.csv"):
        tags = json.loads(row["prediction"])
        assert len(tags) == len(row["text"].split()) and set(tags) <= {"B-X", "O"}
        assert 0 < float(row["confidence"]) <= 1
    assert "span_f1" in call("evaluate", run, source)


def test_how_unlikely_a_text_is_and_what_is_answered(tiny_base, home, tmp_path):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_base)
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    gpt = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=64, **sizes)
    t5 = transformers.T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0,
                               vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=3)  # fmt: skip
    models = {"causal": transformers.GPT2LMHeadModel(gpt), "seq2seq": transformers.T5ForConditionalGeneration(t5)}
    for kind, model in models.items():
        model.save_pretrained(tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
        run = made(tmp_path / kind, home / "said.csv", tmp_path / f"{kind}-run", kind=kind, by="language",
                   method="private", max_length=12)  # fmt: skip
        out = tmp_path / f"{kind}.csv"
        call("predict", run, home / "new.csv", "--out", out)
        rows = read_csv(out)
        if kind == "causal":
            for row in rows:
                mean = float(row["nll"]) / int(row["tokens"])
                assert float(row["perplexity"]) == pytest.approx(math.exp(mean), rel=1e-4)
            whole = sum(float(r["nll"]) for r in rows) / sum(int(r["tokens"]) for r in rows)
            said = json.loads(call("evaluate", run, home / "new.csv", "--json"))["results"]
            assert next(r for r in said if not r["label"])["estimate"] == pytest.approx(math.exp(whole), rel=1e-4)
        else:
            assert all(isinstance(row["prediction"], str) for row in rows)
            assert list(rows[0])[-1] == "prediction"


# inspect


def test_inspect_a_run_and_its_folders(private):
    facts = training.open_run(private).facts
    said = json.loads(call("inspect", private, "--json"))
    assert said["is"] == "run" and [one["bay"] for one in said["bays"]] == ["heads", "language"]
    norms = {row["module"]: row["norm"] for row in facts["parameters"]}
    assert {row["module"]: row["norm"] for row in said["parameters"]} == norms
    assert said["similarity"] == facts["similarity"] and said["data"] == facts["data"]
    assert len(said["base"]["digest"]) == 16 and said["base"]["parameters"] == facts["base"]["parameters"]
    text = call("inspect", private)
    assert "fingerprint " + said["base"]["digest"] in text and "ByLabel(label='language'" in text
    assert "each value has the module of its name" in text and "closest: " in text
    bay = json.loads(call("inspect", private / "modules/language", "--json"))
    assert bay["is"] == "bay" and [one["bay"] for one in bay["bays"]] == ["language"]
    assert {row["bay"] for row in bay["parameters"]} == {"language"} and bay["similarity"] == facts["similarity"]
    module = json.loads(call("inspect", private / "modules/language/de", "--json"))
    assert module["is"] == "module" and [row["module"] for row in module["parameters"]] == ["de"]
    assert "give the model" in call("inspect", private, "--at", "*.query", code=1)


def test_inspect_modules_without_their_run(private, tmp_path):
    """Only the files are read: figures are of the parameters in them."""
    shutil.copytree(private / "modules", tmp_path / "kept")
    state = torch.get_rng_state()
    said = json.loads(call("inspect", tmp_path / "kept", "--json"))
    assert torch.equal(state, torch.get_rng_state())
    assert said["is"] == "modules" and "data" not in said and "parameters" not in said["base"]
    flat = {}
    for name in ("de", "en"):
        tensors = load_file(tmp_path / f"kept/language/{name}/module.safetensors")
        flat[name] = torch.cat([tensors[key].double().flatten() for key in sorted(tensors)])
        row = next(row for row in said["parameters"] if row["module"] == name)
        assert row["parameters"] == flat[name].numel() and row["norm"] == pytest.approx(float(flat[name].norm()))
    (alike,) = said["similarity"]
    cosine = float(torch.nn.functional.cosine_similarity(flat["de"], flat["en"], 0))
    assert alike["of"] == "parameters" and alike["cosine"][0][1] == pytest.approx(cosine)
    assert said["pairs"][0]["closest"][0] == {"modules": ["de", "en"], "cosine": alike["cosine"][0][1]}
    routing = next(row for row in said["routing"] if row["bay"] == "language")
    assert routing["values"] == ["de", "en"] and routing["weights"] == [[1, 0], [0, 1]]


def test_inspect_learned_routes_and_those_that_need_rows(tiny_base, mixture, home, tmp_path):
    run = made(tiny_base, home / "said.csv", tmp_path / "run", by="language", method="polytropon")
    shutil.copytree(run / "modules", tmp_path / "kept")
    routed = lambda said: next(row for row in said["routing"] if row["bay"] == "language")
    own, bare = (json.loads(call("inspect", folder, "--json")) for folder in (run, tmp_path / "kept"))
    for a, b in zip(routed(own)["weights"], routed(bare)["weights"], strict=True):
        assert a == pytest.approx(b)
    assert any("the router does not tell them apart" in line for line in own["collapse"])
    assert "routing by language at" in call("inspect", mixture)  # as the run's test rows were routed
    shutil.copytree(mixture / "modules", tmp_path / "experts")
    assert "routing: it reads the input" in call("inspect", tmp_path / "experts")


def test_inspect_what_is_broken(private, tmp_path):
    shutil.copytree(private, tmp_path / "run")
    (tmp_path / "run/network.json").unlink()
    assert "the run is unfinished" in call("inspect", tmp_path / "run", code=1)
    shutil.copytree(private / "modules", tmp_path / "kept")
    (tmp_path / "kept/language/de/module.safetensors").write_bytes(b"\x80\x04rubbish")
    assert "is a pickle" in call("inspect", tmp_path / "kept", code=1)


def test_a_new_folder_is_free_or_refused(tmp_path):
    (tmp_path / "x.partial").mkdir()
    with pytest.raises(ConfigError, match=r"unfinished work is in .*x\.partial"):
        training.free(tmp_path / "x")
