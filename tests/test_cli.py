"""The command line: what it prints, for people and for programs, and how it fails."""

import importlib
import json
import re
import subprocess
import sys

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import modbay as mb
from modbay.cli import app


def call(*args: str, code: int = 0) -> str:
    """What a command printed; on standard error if it was to fail."""
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == code, result.output
    return result.stderr if code else result.stdout


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def words(text: str) -> str:
    """Text as one line: help is wrapped at the width of the terminal."""
    return " ".join(text.split())


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> str:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    folder = tmp_path_factory.mktemp("models") / "bert"
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


def test_version_and_help():
    assert call("--version").startswith("modbay 0.")
    said = call("--help")
    assert all(name in said for name in ("inspect", "methods", "demo"))
    assert "modbay inspect ./bert --at '*.query'" in words(call("inspect", "--help"))


def test_help_names_only_what_there_is():
    """No stubs: each command that the top help shows answers --help of its own."""
    for command in ("inspect", "methods", "demo"):
        assert f"modbay {command}" in call(command, "--help")
    assert "serve" not in call("--help")


def test_module_runs():
    done = subprocess.run([sys.executable, "-m", "modbay", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("modbay 0."), done.stderr


def test_the_command_begins_without_what_is_slow_to_import():
    slow = ["torch._dynamo", "scipy.optimize", "transformers", "peft", "sklearn", "matplotlib", "pandas"]
    code = f"import sys, modbay.cli; print([name for name in {slow} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_a_package_that_is_missing_is_named_with_what_brings_it():
    lines = "import sys; sys.modules['yaml'] = None; sys.argv = ['modbay', 'merge', 'a', 'b', '--out', 'c']"
    code = f"{lines}; from modbay.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "modbay: this needs yaml, which is not installed: pip install 'modbay[train]'.\n"


def test_inspect_prints_rows_and_doubts(bert):
    said = call("inspect", bert)
    assert said.startswith("BertForSequenceClassification, ")
    row = next(line for line in said.splitlines() if ".self.query" in line)
    assert row.split() == ["bert.encoder.layer.*.attention.self.query", "Linear", "8", "→", "8", "2", "query"]
    assert "In doubt" in said and "mb.span(mb.role.ffn_in, mb.role.ffn_out)" in words(said)


def test_inspect_at(bert):
    said = call("inspect", bert, "--at", "*.query", "--at", "mb.role.attention.value")
    assert "at='*.query': 2 sites, 144 parameters in them" in said
    assert "at='mb.role.attention.value': 2 sites, 144 parameters in them" in said
    row = next(line for line in said.splitlines() if line.startswith("bert.encoder.layer.*.attention.self.query"))
    assert row.split()[1:] == ["Linear", "linear", "8", "8", "2", "72"]


def test_inspect_json_is_what_attach_matches(bert):
    said = json.loads(call("inspect", bert, "--json", "--at", "role.ffn_in"))
    transformers = pytest.importorskip("transformers")
    model = transformers.BertForSequenceClassification.from_pretrained(bert)
    assert said["parameters"] == sum(p.numel() for p in model.parameters())
    bay = mb.attach(model, at=mb.role.ffn_in, modules={"a": mb.BitFit()})
    assert [site["site"] for site in said["at"]["role.ffn_in"]] == list(bay.modulars) == said["roles"]["ffn_in"]
    assert said["at"]["role.ffn_in"][0] == {
        "site": "bert.encoder.layer.0.intermediate.dense",
        "form": "linear",
        "inputs": 8,
        "outputs": 16,
        "parameters": 8 * 16 + 16,
    }
    assert "qkv" in said["doubts"] and "qkv" not in said["roles"]


def test_inspect_reads_no_weights(bert, monkeypatch):
    from transformers import PreTrainedModel

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *a, **k: pytest.fail("weights were read"))
    call("inspect", bert)


def test_inspect_fused_experts(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3, architectures=["MixtralForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    said = json.loads(call("inspect", tmp_path, "--json", "--at", "*.gate_up_proj"))
    (site,) = said["at"]["*.gate_up_proj"]
    assert site["form"] == "experts" and site["parameters"] == 3 * 32 * 8
    assert any(row["type"] == "Parameter" and row["shape"] == "3 × 32 × 8" for row in said["rows"])


def test_inspect_callable():
    said = call("inspect", f"{__name__}:small", "--at", "0")
    assert "at='0': 1 sites, 40 parameters in them" in said


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no.such.module:build", "No module named"),
        (f"{__name__}:absent", "has no 'absent'"),
        (f"{__name__}:words", "could not be called without arguments"),
        ("torch:get_num_threads", "it gave a int"),
        ("someone/no-such-model", "no such folder, and the hub gave no config"),
    ],
)
def test_inspect_says_why_a_model_cannot_be_opened(name, said):
    assert said in call("inspect", name, code=1)


def test_inspect_folder_without_a_config(tmp_path):
    assert "has no config.json" in call("inspect", tmp_path, code=1)
    (tmp_path / "config.json").write_text("{")
    assert "the config can't be read" in call("inspect", tmp_path, code=1)
    (tmp_path / "config.json").write_text('{"model_type": "bert", "hidden_size": 10, "num_attention_heads": 3}')
    assert "gives no model without weights" in call("inspect", tmp_path, code=1)


def test_inspect_pattern_that_matches_nothing(bert):
    assert "Modules are named like 'query'" in call("inspect", bert, "--at", "*.quary", code=1)
    assert "the roles are" in call("inspect", bert, "--at", "role.nothing", code=1)
    assert "take [mb.role.query" in call("inspect", bert, "--at", "role.qkv", code=1)


def test_demo_passes_its_arguments_on(monkeypatch, tmp_path):
    demo = pytest.importorskip("modbay.demo")
    seen = {}
    monkeypatch.setattr(demo, "run", lambda **given: seen.update(given), raising=False)
    monkeypatch.setattr("modbay.cli._demo.show", lambda results, out: None)
    call("demo", "--smoke", "--out", tmp_path, "--seed", "3")
    assert {name: seen[name] for name in ("smoke", "out", "seed")} == {"smoke": True, "out": tmp_path, "seed": 3}


def test_demo_without_its_extra(monkeypatch):
    demo = pytest.importorskip("modbay.demo")
    monkeypatch.setitem(sys.modules, "hassil", None)
    monkeypatch.setattr(demo, "run", lambda **_: importlib.import_module("hassil"), raising=False)
    said = call("demo", "--smoke", code=1)
    assert "hassil" in said and "`make demo`" in said and "pip install 'modbay[demo]'" in said


def test_nothing_is_drawn_by_looking():
    """Inspecting leaves the random state as it was."""
    state = torch.get_rng_state()
    call("methods")
    assert torch.equal(state, torch.get_rng_state())


def test_the_help_of_train_names_every_argument():
    from modbay.training import Config

    said = CliRunner().invoke(app, ["train", "--help"]).stdout
    assert [name for name in Config.model_fields if not re.search(rf"\b{name}\b", said)] == []
