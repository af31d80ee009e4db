"""Checkpoints of the library adapters, in and out: outputs agree, and what is written is what adapters wrote.

The fixtures are written by benchmarks/_adapters_files.py (adapters 1.3.0), which is run apart.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import modbay as mb
from modbay.errors import FileError

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
READ = [name for name in FOUND if name not in REFUSED and name not in SETUPS]


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
    assert (run(kind, model)[0] - plain[0]).abs().max() > 1e-2
    assert not any(p.requires_grad for p in bay.parameters())
    bay.detach()
    assert torch.equal(run(kind, model)[0], plain[0])


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_equal_is_refused(name):
    with pytest.raises(FileError, match=REFUSED[name]):
        mb.load(base("bert"), FOLDER / name)
