"""`modbay fold` and `modbay convert`: modules on their way out, to plain checkpoints and to other libraries."""

import copy
import json

import pytest
import torch
import transformers
from typer.testing import CliRunner

import modbay as mb
from modbay.cli import app

IDS = torch.tensor([[3, 8, 1, 40, 7, 9], [11, 2, 30, 4, 6, 5]])


def call(*args, code=0):
    """What a command printed; on standard error if it was to fail."""
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == code, result.output
    return result.stderr if code else result.stdout


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, pad_token_id=0
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer_config.json").write_text("{}")
    return model


def saved(base, folder, kinds):
    """A bay of trained modules in a folder, and the model that has them."""
    model = copy.deepcopy(base)
    bay = mb.attach(model, "*.q_proj", kinds, name="language")
    with torch.no_grad():
        for p in bay.parameters():
            p.add_(0.3 * torch.randn_like(p))
    bay.save(folder)
    return model, bay


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_fold_writes_a_plain_checkpoint(base, tmp_path):
    model, bay = saved(base, tmp_path / "modules", {"en": mb.LoRA(2), "de": mb.DoRA(2)})
    for use, flags in (("de", ["de"]), ({"en": 0.7, "de": 0.3}, ["en=0.7", "de=0.3"])):
        out = tmp_path / f"out{len(flags)}"
        said = call(
            "fold", tmp_path / "base", tmp_path / "modules", "-o", out, *[x for f in flags for x in ("--use", f)]
        )
        assert "needs no modbay" in said
        plain = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
        torch.testing.assert_close(logits(plain), logits(bay.use(use) and model), atol=1e-5, rtol=1e-5)
        assert (out / "tokenizer_config.json").exists() and "language" in (out / "README.md").read_text()
        assert not [key for key in plain.state_dict() if "_bay" in key]
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_fold_says_what_is_wrong(base, tmp_path):
    saved(base, tmp_path / "modules", {"en": mb.LoRA(2), "de": mb.LoRA(2)})
    given = ["fold", tmp_path / "base", tmp_path / "modules", "-o", tmp_path / "out"]
    assert "--use NAME" in call(*given, code=1)
    assert "en, de" in call(*given, "--use", "fr", code=1)
    assert "no number" in call(*given, "--use", "en=much", code=1)
    assert "language" in call(*given, "--bay", "task", code=1)
    assert "no config.json" in call("fold", tmp_path, tmp_path / "modules", "-o", tmp_path / "out", code=1)
    (tmp_path / "out").mkdir()
    assert "--overwrite" in call(*given, "--use", "en", code=1)
    assert "delete it yourself" in call(*given, "--use", "en", "--overwrite", code=1)
    saved(base, tmp_path / "functions", {"en": mb.Bottleneck(2)})
    refused = call("fold", tmp_path / "base", tmp_path / "functions", "-o", tmp_path / "new", "--use", "en", code=1)
    assert "Bottleneck" in refused and not (tmp_path / "new").exists()


def test_convert_there_and_back(base, tmp_path):
    model, bay = saved(base, tmp_path / "modules", {"en": mb.LoRA(2), "de": mb.DoRA(2)})
    here = ["--model", tmp_path / "base"]
    assert "exactly" in call("convert", tmp_path / "modules", tmp_path / "peft", "--to", "peft", *here)
    assert sorted(path.name for path in (tmp_path / "peft").iterdir()) == ["de", "en"]
    call("convert", tmp_path / "peft", tmp_path / "again", "--to", "modbay", *here)
    twin = copy.deepcopy(base)
    back = mb.load(twin, tmp_path / "again")["peft"]
    for name in ("en", "de"):
        back.use(name)
        torch.testing.assert_close(logits(twin), logits(bay.use(name) and model), atol=1e-5, rtol=1e-5)
    said = json.loads(
        call(
            "convert",
            tmp_path / "modules",
            tmp_path / "lora",
            "--to",
            "lora",
            "--name",
            "de",
            "--rank",
            8,
            "--error",
            0.9,
            *here,
            "--json",
        )
    )
    assert said["format"] == "lora" and 0 < max(said["errors"].values()) < 0.9
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == 8
    assert "is off by" in call(
        "convert", tmp_path / "modules", tmp_path / "x", "--to", "lora", "--name", "de", "--rank", 1, *here, code=1
    )
    assert "no such module" in call(
        "convert", tmp_path / "modules", tmp_path / "x", "--to", "peft", "--name", "fr", *here, code=1
    )
    assert "modbay" in call("convert", tmp_path / "modules", tmp_path / "x", "--to", "onnx", *here, code=1)
    assert not (tmp_path / "x").exists()
