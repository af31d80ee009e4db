"""Checkpoints of the library adapters, in and out: outputs agree, and what is written is what adapters wrote.

The fixtures are written by benchmarks/_adapters_files.py (adapters 1.3.0), which is run apart.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import modbay as mb
from modbay.errors import BayError, FileError

transformers = pytest.importorskip("transformers")

FOLDER = Path(__file__).parent / "fixtures" / "adapters"
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SMALL = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
PLACES = {"max_position_embeddings": 10, "num_labels": 3}
DISTIL = {"vocab_size": 20, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
BASES = {
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, **PLACES)),
    "roberta": lambda: transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**SMALL, **PLACES)),
    "distilbert": lambda: transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(**DISTIL, **PLACES)
    ),
}
TENSORS = {name: load_file(FOLDER / f"{name}.safetensors") for name in BASES}
FOUND = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())
REFUSED = {"bert-dora": "use_dora", "bert-reft": "architecture 'reft'"}
SETUPS = [name for name in FOUND if (FOLDER / name / "adapter_setup.json").exists()]
READ = [name for name in FOUND if name not in REFUSED and name != "bert-average"]


def base(kind):
    model = BASES[kind]().eval()
    missing, _ = model.load_state_dict(TENSORS[kind], strict=False)
    assert not [name for name in missing if "position_ids" not in name]
    return model


def run(kind, model):
    with torch.no_grad():
        out = model(TENSORS[kind]["ids"], output_hidden_states=True)
    return out.logits, out.hidden_states[-1]


def check(kind, name, model):
    logits, hidden = run(kind, model)
    assert_close(hidden[:, -5:], TENSORS[kind][f"hidden.{name}"][:, -5:], **CLOSE)
    assert_close(logits, TENSORS[kind][f"logits.{name}"], **CLOSE)


@pytest.mark.parametrize("name", READ)
def test_what_adapters_wrote(name):
    """The same outputs as there, and not the base's; frozen; and gone on detach."""
    kind, _, short = name.partition("-")
    model = base(kind)
    plain = run(kind, model)
    assert_close(plain[0], TENSORS[kind]["logits."], **CLOSE)
    bay = mb.load(model, FOLDER / name)["adapters"]
    check(kind, short, model)
    assert (run(kind, model)[1] - plain[1]).abs().max() > 1e-2 if "prompt" not in name else True
    assert not any(p.requires_grad for p in bay.parameters())
    bay.detach()
    assert torch.equal(run(kind, model)[0], plain[0])


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_equal_is_refused(name):
    with pytest.raises(FileError, match=REFUSED[name]):
        mb.load(base("bert"), FOLDER / name)


def test_an_average_is_a_weighted_sum(caplog):
    """adapters 1.3 divides by the number of modules once more, which it is told."""
    model = base("bert")
    bay = mb.load(model, FOLDER / "bert-average")["adapters"]
    assert "divides by their number once more" in caplog.text
    own = run("bert", model)
    assert torch.equal(own[0], run("bert", bay.use({"a": 0.2, "b": 0.8}).model)[0])
    bay.use({"a": 0.1, "b": 0.4})
    check("bert", "average", model)


SAVED = ("bert-invertible", "bert-unipelt", "bert-fuse", "bert-stack", "bert-mam")


@pytest.mark.parametrize("name", SAVED)
def test_it_is_kept_as_modbay_keeps_its_own(name, tmp_path):
    """Aggregators, gates and fusions, too."""
    kind, _, short = name.partition("-")
    bay = mb.load(base(kind), FOLDER / name, name="task")["task"]
    bay.save(tmp_path)
    model = base(kind)
    again = mb.load(model, tmp_path)["task"]
    if short != "unipelt":
        again.use(*bay.names())
    check(kind, short, model)


def test_several_of_one_folder_in_a_mixed_batch(tmp_path):
    """Those that are put together with the base alike share a bay, and a batch; others are refused."""
    for name, there in {"en": "bert-pfeiffer", "de": "bert-plus", "fr": "bert-pfeiffer"}.items():
        shutil.copytree(FOLDER / there, tmp_path / name, ignore=shutil.ignore_patterns("*head*"))
    with pytest.raises(FileError, match=r"one by one"):
        mb.load(base("bert"), tmp_path)
    shutil.rmtree(tmp_path / "de")
    model = base("bert")
    bay = mb.load(model, tmp_path, name="language")["language"]
    assert bay.names() == ["en", "fr"]
    with torch.no_grad():
        mixed = model(TENSORS["bert"]["ids"], language=["en", None, "fr"], output_hidden_states=True).hidden_states[-1]
    wanted = TENSORS["bert"]["hidden.pfeiffer"]
    assert_close(mixed[[0, 2]], wanted[[0, 2]], **CLOSE)
    assert_close(mixed[1], TENSORS["bert"]["hidden."][1], **CLOSE)


def test_into_a_bay_that_is_there(tmp_path):
    """Only where the bay puts modules together with the base as the stranger is."""
    model, guest = base("bert"), tmp_path / "guest"
    shutil.copytree(FOLDER / "bert-pfeiffer", guest, ignore=shutil.ignore_patterns("*head*"))
    kinds = {"own": mb.Bottleneck(reduction=4)}
    at = [f"bert.encoder.layer.{i}.output.LayerNorm" for i in range(2)]
    bay = mb.attach(model, at=at, modules=kinds, name="plain")
    with pytest.raises(BayError, match="needs Again"):
        bay.load(guest, add=True)
    assert bay.names() == ["own"]
    bay.detach()
    bay = mb.attach(model, at=at, modules=kinds, aggregator=mb.Again("input"), name="again")
    bay.load(guest, add=True).use("guest")
    assert_close(run("bert", model)[1], TENSORS["bert"]["hidden.pfeiffer"], **CLOSE)


def test_heads_come_along(caplog):
    """The labels that it was saved with; onto a base without a head none, and it is told."""
    model = base("bert")
    bay = mb.load(model, FOLDER / "bert-flex")["adapters"]
    assert bay.modulars["classifier"].parts._modules["bert-flex"].kind == mb.Head(("no", "yes"))
    bare = base("bert").bert
    mb.load(bare, FOLDER / "bert-flex")
    assert "head of a BertAdapterModel" in caplog.text
    with torch.no_grad():
        assert_close(bare(TENSORS["bert"]["ids"])[0], TENSORS["bert"]["hidden.flex"], **CLOSE)


ALIKE = [name for name in READ if name not in SETUPS and name not in ("bert-vera", "bert-plus", "bert-flex")]


def saved(folder):
    path = folder / "adapter.safetensors"
    return load_file(path) if path.exists() else torch.load(folder / "pytorch_adapter.bin", weights_only=True)


@pytest.mark.parametrize("name", ALIKE)
def test_what_is_written_is_what_adapters_wrote(name, tmp_path):
    """Config and tensors, key by key; and it is read again."""
    kind, _, short = name.partition("-")
    bay = mb.load(base(kind), FOLDER / name)["adapters"]
    bay.rename(name, short)
    bay.export(tmp_path / "out", format="adapters")
    ours, theirs = saved(tmp_path / "out"), saved(FOLDER / name)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert_close(ours[key], tensor, rtol=1e-4, atol=1e-4 if short == "unipelt" else 0, msg=key)
    ours, theirs = (json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path / "out", FOLDER / name))
    assert ours == theirs
    model = base(kind)
    mb.load(model, tmp_path / "out")
    check(kind, short, model)
