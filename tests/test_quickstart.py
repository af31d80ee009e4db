"""The commands of docs/quickstart.md run as they are written, on small data."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("transformers")

from conftest import tiny_rows, write_csv
from modbay.cli import app

TEXT = (Path(__file__).parents[1] / "docs/quickstart.md").read_text(encoding="utf-8")
HEADS = ("utterance", "intent", "lang")


def commands() -> list[list[str]]:
    """Those in blocks of their own and those in a sentence, in order."""
    joined = re.sub(r"\\\n\s*", " ", TEXT)
    found = re.findall(r"^    (modbay .*)$|`(modbay [^`]*--out[^`]*)`", joined, re.M)
    return [shlex.split(block or inline) for block, inline in found]


def test_the_commands_run(tiny_base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_base, tmp_path / "minilm")
    write_csv(tmp_path / "mail.csv", tiny_rows(("en", "de", "fr")), HEADS)
    write_csv(tmp_path / "three.csv", tiny_rows(("en", "de")), HEADS)
    for name in ("basque.csv", "few.csv"):
        write_csv(tmp_path / name, [(text, intent, "eu") for text, intent, _ in tiny_rows(("fr",))], HEADS)
    write_csv(tmp_path / "new.csv", [("rain sun 1", "eu"), ("song band 2", "en")], ("utterance", "lang"))
    ran = []
    for program, command, *rest in commands():
        assert program == "modbay"
        if command == "demo":
            continue
        cheap = ["--steps", "6"] if command == "adapt" else []
        rest = ["0" if before == "--seeds" else said for before, said in zip(["", *rest], rest, strict=False)]
        said = CliRunner().invoke(app, [command, *rest, *cheap])
        assert said.exit_code == 0, (command, said.stderr)
        ran.append(command)
    assert set(ran) == {"train", "compare", "extend", "adapt", "predict", "evaluate", "inspect"}
    assert (tmp_path / "said.csv").read_text().splitlines()[0] == "utterance,lang,prediction,confidence"
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    names: dict = {}
    exec(compile(example, "quickstart.md", "exec"), names)
    assert names["network"].keywords
