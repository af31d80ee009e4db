"""Rubbish in, one clear message out, and nothing left behind: what `modbay train` says to whom it can't serve."""

import errno
import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("transformers")

from conftest import tiny_rows, write_csv
from modbay.cli import app


def table(folder: Path, rows=None, heads=("text", "target", "language"), name="said.csv") -> Path:
    return write_csv(folder / name, tiny_rows() if rows is None else rows, heads)


def written(folder: Path, content: str | bytes, name="said.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def relabelled(change) -> list:
    return [change(i, *row) for i, row in enumerate(tiny_rows())]


# name: (what makes the input in a folder, more arguments, what the message must say)
CASES = {
    "no such file": (lambda f: f / "gone.csv", [], ["gone.csv"]),
    "an empty file": (lambda f: written(f, ""), [], ["said.csv", "empty"]),
    "a header alone": (lambda f: written(f, "text,target,language\n"), [], ["said.csv"]),
    "a missing column": (lambda f: table(f, heads=("text", "label", "language")), [], ["'target'", "'label'"]),
    "a column twice": (lambda f: table(f, heads=("text", "target", "target")), [], ["'target'", "said.csv"]),
    "one class only": (lambda f: table(f, relabelled(lambda i, t, y, l: (t, "spam", l))), [], ["'spam'", "one class"]),
    "classes that differ by case": (
        lambda f: table(f, relabelled(lambda i, t, y, l: (t, y.title() if i == 3 else y, l))), [],
        ["'Weather'", "'weather'"],
    ),
    "a text of 1 MB, unquoted": (
        lambda f: written(f, "text,target,language\n" + "so, " * 250_000 + ",x,en\n"), [], ["said.csv:2"],
    ),
    "a target that is no number": (
        lambda f: table(f, relabelled(lambda i, t, y, l: (t, "NaN" if i == 5 else i, l))), ["--kind", "regression"],
        ["said.csv:7", "finite"],
    ),
    "a wrong encoding": (
        lambda f: written(f, "text,target,language\nmüde Füße,a,de\n".encode("latin-1")), [], ["said.csv", "UTF-8"],
    ),
    "a binary file": (lambda f: written(f, bytes(range(256)) * 8), [], ["said.csv"]),
    "a file of another kind": (lambda f: written(f, "x", "said.docx"), [], ["said.docx"]),
    "a row with too many fields": (
        lambda f: written(f, "text,target,language\na b,x,en\na, b,y,en\nc d,y,en\n"), [], ["said.csv:3", "fields"],
    ),
    "a broken line of JSON": (
        lambda f: written(f, '{"text": "a", "target": "x"}\n{"text": "b", \n', "said.jsonl"), [], ["said.jsonl:2"],
    ),
    "an empty text": (
        lambda f: table(f, relabelled(lambda i, t, y, l: ("" if i == 4 else t, y, l))), [], ["said.csv:6"],
    ),
    "an empty label": (
        lambda f: table(f, relabelled(lambda i, t, y, l: (t, y, "" if i == 0 else l))), ["--by", "language"],
        ["said.csv:2", "language"],
    ),
    "words without tags": (
        lambda f: table(f, [("a b c", "X O", "en"), ("a b", "X O", "en")]), ["--kind", "tagging"],
        ["said.csv:2", "3 words", "2 tags"],
    ),
    "too few rows": (lambda f: table(f, tiny_rows()[:1]), [], ["said.csv"]),
    "an unknown method": (table, ["--method", "polytropn"], ["'polytropn'", "'polytropon'"]),
    "an unknown kind of task": (table, ["--kind", "clasification"], ["kind='clasification'", "'classification'"]),
    "an unknown kind of module": (table, ["--module", "{LoRA: {rang: 4}}"], ["rang", "rank"]),
    "a number that is none": (table, ["--set", "lr=fast"], ["lr='fast'"]),
    "an argument that is none": (table, ["--set", "learning_rate=1e-3"], ["learning_rate"]),
    "a pattern that matches nothing": (table, ["--at", "*.nowhere.*"], ["*.nowhere.*"]),
    "a base that is not there": (table, ["--base", "gone/"], ["base='gone/'"]),
    "a base without a config": (table, ["--base", "."], ["base=", "config.json"]),
    "a batch that does not divide": (
        table, ["--set", "batch=10", "--set", "accumulate=4"], ["batch=10", "accumulate=4"],
    ),
    "a share of more than all": (table, ["--test", "0.7", "--validation", "0.6"], ["0.7", "0.6"]),
    "a typo in YAML": (
        lambda f: written(f, "data: said.csv\nbase: x\nstpes: 3\n", "run.yaml"), [],
        ["'stpes'", "did you mean 'steps'"],
    ),
    "no YAML at all": (lambda f: written(f, "data: [said.csv\n", "run.yaml"), [], ["run.yaml"]),
    "an unnamed task among named ones": (lambda f: table(f), ["b=said.csv"], ["NAME=FILE"]),
    "nothing to resume": (lambda f: None, ["--resume", "runs/gone"], ["runs/gone"]),
}  # fmt: skip


def run(*arguments) -> "tuple[int, str, str]":
    said = CliRunner().invoke(app, ["train", *[str(a) for a in arguments]])
    assert said.exception is None or isinstance(said.exception, SystemExit), said.exception
    return said.exit_code, said.stdout, said.stderr


@pytest.mark.parametrize("case", CASES)
def test_one_message_and_nothing_left(tiny_base, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    make, more, words = CASES[case]
    made = make(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    yaml = made is not None and made.suffix == ".yaml"
    base = [] if yaml or made is None else ["--base", tiny_base, "--steps", 2]
    code, out, err = run(*([] if made is None else [made.name]), *base, *more)
    message = err[err.index("modbay: ") :]
    assert code == 1, (out, err)
    assert out == ""
    assert "Traceback" not in err
    for word in words:
        assert word in message, message
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_text_of_a_megabyte_is_cut_and_said_so(tiny_base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = table(tmp_path, [*tiny_rows(), ("rain " * 200_000, "weather", "en")])
    code, out, err = run(data.name, "--base", tiny_base, "--dry-run", "--set", "max_length=32", "--json")
    assert code == 0, err
    assert json.loads(out)["truncated"]["rows"] <= 1
    assert 1_000_000 in [entry["characters"] for entry in json.loads(out)["data"]["longest"]]


@pytest.mark.parametrize("file", ["run.yaml", "network.json", "predictions.jsonl", "module.safetensors"])
def test_a_full_disk_is_one_message(tiny_base, tiny_csv, tmp_path, monkeypatch, file):
    monkeypatch.chdir(tmp_path)
    replace = os.replace

    def full(source, target, *rest, **more):
        if Path(target).name == file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        return replace(source, target, *rest, **more)

    monkeypatch.setattr(os, "replace", full)
    code, _, err = run(tiny_csv, "--base", tiny_base, "--by", "language", "--steps", 2, "--out", "run")
    assert code == 1
    assert "No space left on device" in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", ["extend", "adapt", "compare"])
def test_a_disk_that_is_full_at_the_report_is_one_message(tiny_base, tiny_csv, tmp_path, monkeypatch, verb):
    monkeypatch.chdir(tmp_path)
    small = ["--steps", 2, "--set", "probe=5"]
    assert run(tiny_csv, "--base", tiny_base, "--by", "language", "--method", "private", *small, "--out", "run")[0] == 0
    french = table(tmp_path, tiny_rows(("fr",)), name="fr.csv")
    asked = {
        "extend": ["extend", "run", french, "--steps", 2],
        "adapt": ["adapt", "run", french, "--value", "language=fr", "--ways", "nearest", "--steps", 2],
        "compare": ["compare", tiny_csv, "--base", tiny_base, "--methods", "shared,majority", *small],
    }

    def full(path, facts):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("modbay.report.write", full)
    said = CliRunner().invoke(app, [*map(str, asked[verb]), "--out", "new"])
    assert said.exit_code == 1
    assert "No space left on device" in said.stderr
    assert "Traceback" not in said.stderr
    assert not (tmp_path / "new").exists()
    assert ("--resume new" in said.stderr) == (tmp_path / "new.partial").exists()
