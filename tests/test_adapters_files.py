"""Checkpoints of the library adapters, in and out: outputs agree, and what is written is what adapters wrote.

The fixtures are written by benchmarks/_adapters_files.py (adapters 1.3.0), which is run apart.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import modbay as mb
from modbay.errors import BayError, CompositionError, FileError

transformers = pytest.importorskip("transformers")

FOLDER = Path(__file__).parent / "fixtures" / "adapters"
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SMALL = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
PLACES = {"max_position_embeddings": 10, "num_labels": 3}
DISTIL = {"vocab_size": 20, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
GPT = {"vocab_size": 20, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24, "n_positions": 10,
       "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
T5 = {"vocab_size": 20, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2,
      "decoder_start_token_id": 0}  # fmt: skip
SLIM = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12,
        "max_position_embeddings": 10}  # fmt: skip
ROTARY = {**SLIM, "num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 0}
DEBERTA = {**SLIM, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False,
           "share_att_key": True, "position_buckets": 4, "norm_rel_ebd": "layer_norm"}  # fmt: skip
BART = {"vocab_size": 20, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "max_position_embeddings": 10,
        "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
BEIT = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "image_size": 4,
        "patch_size": 2, "num_labels": 3, "layer_scale_init_value": 0.1}  # fmt: skip
VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 4,
       "patch_size": 2, "num_labels": 3}  # fmt: skip
BASES = {
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, **PLACES)),
    "roberta": lambda: transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**SMALL, **PLACES)),
    "distilbert": lambda: transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(**DISTIL, **PLACES)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT)),
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    "mt5": lambda: transformers.MT5ForConditionalGeneration(transformers.MT5Config(**{**T5, "num_layers": 2})),
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**VIT)),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**ROTARY)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**ROTARY, sliding_window=3)),
    "electra": lambda: transformers.ElectraForSequenceClassification(
        transformers.ElectraConfig(**SLIM, embedding_size=6, num_labels=3)
    ),
    "debertav2": lambda: transformers.DebertaV2ForSequenceClassification(
        transformers.DebertaV2Config(**DEBERTA, num_labels=3)
    ),
    "bart": lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**BART)),
    "mbart": lambda: transformers.MBartForConditionalGeneration(transformers.MBartConfig(**BART)),
    "plbart": lambda: transformers.PLBartForConditionalGeneration(transformers.PLBartConfig(**BART)),
    "beit": lambda: transformers.BeitForImageClassification(transformers.BeitConfig(**BEIT)),
    "albert": lambda: transformers.AlbertForSequenceClassification(
        transformers.AlbertConfig(**SLIM, embedding_size=6, num_labels=3)
    ),
}
TINY = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12,
        "max_position_embeddings": 10}  # fmt: skip
BASES |= {  # whose head gives words
    "bertlm": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**TINY)),
    "robertalm": lambda: transformers.RobertaForMaskedLM(transformers.RobertaConfig(**TINY)),
    "distilbertlm": lambda: transformers.DistilBertForMaskedLM(
        transformers.DistilBertConfig(**{**DISTIL, "dim": 8, "n_layers": 1}, max_position_embeddings=10)
    ),
    "gpt2lm": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**GPT, "n_embd": 8, "n_layer": 1})),
    "t5lm": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**{**T5, "d_model": 8, "d_kv": 4})),
}
TENSORS = {name: load_file(FOLDER / f"{name}.safetensors") for name in BASES}
FOUND = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())
REFUSED = {"bert-dora": "use_dora", "bert-reft": "architecture 'reft'"}
SETUPS = [name for name in FOUND if (FOLDER / name / "adapter_setup.json").exists()]
READ = [name for name in FOUND if name not in REFUSED and name != "bert-average"]


def base(kind):
    model = BASES[kind]().eval()
    here = model.state_dict()
    tensors = {name if name in here else of_today(name): tensor for name, tensor in TENSORS[kind].items()}
    model.load_state_dict(tensors, strict=False)
    tied = ("lm_head.weight", "embed_tokens.weight", "decoder.weight", "decoder.bias", "vocab_projector.weight",
            "final_logits_bias")  # fmt: skip
    assert not [name for name in here.keys() - tensors if "position_ids" not in name and not name.endswith(tied)]
    return model


def of_today(name):
    """The name of a weight of ViT's, or of BEiT's, in transformers 5."""
    then = ("encoder.layer.", "attention.attention.", "attention.output.dense", "intermediate.dense", "output.dense")
    now = ("layers.", "attention.", "attention.o_proj", "mlp.fc1", "mlp.fc2")
    for old, new in (*zip(then, now, strict=True), ("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        name = name.replace(old, new)
    return name


def run(kind, model):
    ids = TENSORS[kind]["ids"]
    both = {"decoder_input_ids": ids} if kind in ("t5", "mt5", "t5lm", "bart", "mbart", "plbart") else {}
    with torch.no_grad():
        out = model(ids, output_hidden_states=True, **both)
    return out.logits, (out.decoder_hidden_states if both else out.hidden_states)[-1]


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


SAVED = ("bert-invertible", "bert-unipelt", "bert-fuse", "bert-stack", "bert-mam", "bertlm-inverse", "gpt2-unipelt",
         "t5-prefix")  # fmt: skip


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


ALIKE = [
    name for name in READ if name not in SETUPS and name not in ("bert-vera", "bert-plus", "bert-flex", "vit-plus")
]


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


def test_an_inverse_runs_before_the_words_where_it_did(tmp_path):
    """Of adapters' own classes, and of its forerunner's; not of those of transformers, nor without such a head."""
    word = transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, max_position_embeddings=10)).eval()
    first, last = "bert.embeddings.LayerNorm", "cls.predictions.decoder[before]"
    said = json.loads((FOLDER / "bert-invertible" / "adapter_config.json").read_text())
    for i, (change, model, sites) in enumerate([
        ({}, word, {first}),
        ({"model_class": "BertAdapterModel"}, word, {first, last}),
        ({"version": None}, word, {first, last}),
        ({"version": "3.2.1", "model_class": "BertModelWithHeads"}, word, {first, last}),
        ({"model_class": "BertAdapterModel"}, base("bert"), {first}),
    ]):  # fmt: skip
        shutil.copytree(FOLDER / "bert-invertible", tmp_path / f"{i}")
        (tmp_path / f"{i}" / "adapter_config.json").write_text(json.dumps({**said, **change}))
        bay = mb.load(model, tmp_path / f"{i}")["adapters"]
        have = {site for site, one in bay.modulars.items() if isinstance(one.order[0].kind, mb.Invertible)}
        assert have == sites
        bay.detach()


@pytest.mark.parametrize("name", SETUPS)
def test_setups_are_written_as_adapters_wrote_them(name, tmp_path):
    """Stacks and fusions, file by file; an average, which adapters itself divides once more, is refused."""
    bay = mb.load(base("bert"), FOLDER / name)["adapters"]
    if name == "bert-average":
        with pytest.raises(CompositionError, match="divides by their number once more"):
            bay.export(tmp_path / "out", format="adapters")
        assert not (tmp_path / "out").exists()
        return
    bay.export(tmp_path / "out", format="adapters")
    here, there = ({str(p.relative_to(f)): p for p in f.rglob("*.*")} for f in (tmp_path / "out", FOLDER / name))
    assert here.keys() == there.keys()
    for file, path in there.items():
        if path.suffix == ".json":
            assert json.loads(here[file].read_text()) == json.loads(path.read_text())
        else:
            assert_close(load_file(here[file]), load_file(path), rtol=0, atol=0)
    model = base("bert")
    mb.load(model, tmp_path / "out")
    check("bert", name.partition("-")[2], model)


def test_what_is_no_setup_of_adapters(tmp_path):
    two = {"a": {"*.output.dense": mb.Bottleneck(4)}, "b": {"*.output.dense": mb.Bottleneck(4)}}
    bay = mb.attach(base("bert"), modules=two)
    with pytest.raises(BayError, match="none is set to work"):
        bay.export(tmp_path / "out", format="adapters")
    with pytest.raises(CompositionError, match="by 'WeightedSum'"):
        bay.use("a", "b").export(tmp_path / "out", format="adapters")
    beside = {"*.query": mb.LoRA(2), **two["b"]}
    bay = mb.attach(base("bert"), modules={"a": two["a"], "b": beside}, aggregator=mb.PerSite(
        {"*.dense": mb.Sequence()}))  # fmt: skip
    with pytest.raises(CompositionError, match="more than serial bottlenecks"):
        bay.use("a", "b").export(tmp_path / "out", format="adapters")
    assert not (tmp_path / "out").exists()


# What is refused


def edit(**fields):
    def change(folder):
        path = folder / "adapter_config.json"
        said = json.loads(path.read_text())
        path.write_text(json.dumps({**said, "config": {**said["config"], **fields}}))

    return change


def tensors(change):
    def run_it(folder):
        path = folder / "adapter.safetensors"
        save_file(dict(change(load_file(path))), path)

    return run_it


class Evil:
    def __reduce__(self):
        return (Path.mkdir, (Path("ran"),))


def pickled(value, **more):
    def change(folder):
        torch.save(value, folder / "pytorch_adapter.bin", **more)
        (folder / "adapter.safetensors").unlink()

    return change


def written(data):
    def change(folder):
        (folder / "pytorch_adapter.bin").write_bytes(data)
        (folder / "adapter.safetensors").unlink()

    return change


WIDE = torch.zeros(1).expand(1 << 40)
BAD = {
    "an unknown method": (edit(architecture="lily"), "'lily'"),
    "a function of words": (edit(non_linearity="wavy"), "non_linearity='wavy'"),
    "a residual twice": (edit(residual_before_ln="post_add"), "there twice"),
    "a number of words": (edit(scaling=[1]), "scaling"),
    "half a bottleneck": (tensors(lambda t: {k: v for k, v in t.items() if "up.bias" not in k}), "adapter_up.bias"),
    "another model's": (tensors(lambda t: {k.replace("layer.1", "layer.7"): v for k, v in t.items()}), "layer.7"),
    "another width": (tensors(lambda t: {k: v[..., :-1].contiguous() for k, v in t.items()}), "shapes"),
    "not a number": (tensors(lambda t: {k: v * float("nan") for k, v in t.items()}), "NaN"),
    "what nobody knows": (tensors(lambda t: {**t, "bert.else": torch.ones(2)}), "bert.else"),
    "code": (pickled({"x": Evil()}), "may run code"),
    "no dictionary": (pickled([torch.ones(1)]), "a list"),
    "no tensors": (pickled({"x": 3}), "no tensor by its name"),
    "a tensor too wide": (pickled({"x": WIDE}), "more than it can hold"),
    "a sparse tensor": (pickled({"x": torch.eye(3).to_sparse()}), "may run code"),
    "an old file": (pickled({"x": torch.ones(1)}, _use_new_zipfile_serialization=False), "torch 1.6"),
    "a bare pickle": (written(b"\x80\x04N."), "torch 1.6"),
    "nothing": (lambda folder: (folder / "adapter.safetensors").unlink(), "missing"),
    "no JSON": (lambda folder: (folder / "adapter_config.json").write_text("{"), "not JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(name, tmp_path):
    change, why = BAD[name]
    folder = tmp_path / "case"
    shutil.copytree(FOLDER / "bert-pfeiffer", folder)
    change(folder)
    model = base("bert")
    before = run("bert", model)[0]
    with pytest.raises(FileError, match=why):
        mb.load(model, folder)
    assert not mb.bays(model) and torch.equal(run("bert", model)[0], before)
    assert not Path("ran").exists() and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("kinds", "aggregator", "why"),
    [
        ({"*.self.query": mb.LoRA(2), "*.self.value": mb.LoRA(3)}, None, "the rank is"),
        ({"*.self.query": mb.LoRA(2, bias=True)}, None, "has a bias"),
        ({"*.attention.output.dense": mb.LoRA(2)}, None, "no query, key, value"),
        ({"*.layer.0.attention.self.query": mb.LoRA(2), "*.self.value": mb.LoRA(2)}, None, "layer 1 has"),
        ({"*.layer.0.output.dense": mb.IA3("input")}, None, "scales the input"),
        ({"*.query": mb.DoRA(2)}, None, "none of adapters'"),
        ({"*.output.LayerNorm": mb.Bottleneck(4)}, lambda: mb.Again(), "none of adapters' ways"),
        ({"*.output.dense": mb.Bottleneck(4, placement="parallel")}, None, "nowhere so"),
        ({"*.intermediate.dense": mb.Bottleneck(4)}, None, "no end of attention"),
        ({"": mb.Prompt(3)}, None, "the embeddings' norm"),
        ({"classifier": mb.Full()}, None, "a head alone"),
    ],
)
def test_what_adapters_can_not_hold(kinds, aggregator, why, tmp_path):
    bay = mb.attach(base("bert"), modules={"m": kinds}, aggregator=aggregator)
    with pytest.raises(CompositionError, match=why):
        bay.export(tmp_path / "out", format="adapters")
    assert not (tmp_path / "out").exists()


# composable-sft


def encoded(change):
    """A difference as composable-sft keeps it: the first dimension counts fastest, the first step is numpy's."""
    places = change.mT.flatten().nonzero().flatten() if change.ndim == 2 else change.nonzero().flatten()
    values = (change.mT if change.ndim == 2 else change).flatten()[places]
    steps = torch.diff(places, prepend=places.new_zeros(1)).tolist()
    return {"size": change.size(), "index_steps": [np.int64(steps[0]), *steps[1:]], "values": values}


def sparse(model, names):
    changes = {}
    for name, p in model.named_parameters():
        if any(part in name for part in names):
            changes[name] = torch.randn_like(p) * (torch.rand_like(p) < 0.2)
            changes[name].view(-1)[1] = 0.5
    return changes


def test_sparse_fine_tunings_come_in(tmp_path):
    """Weights, biases, both, norms and embeddings by their differences; a head whole; also where weights are tied."""
    torch.manual_seed(0)
    model = base("bert")
    changes = sparse(model, ("word_embeddings", "query", "LayerNorm", "intermediate.dense.bias", "key.weight"))
    head = {"classifier.weight": torch.randn(3, 16), "classifier.bias": torch.randn(3)}
    held = {"diffs": {name: encoded(change) for name, change in changes.items()}, "abs": head}
    (tmp_path / "de").mkdir()
    torch.save(held, tmp_path / "de" / "pytorch_diff.bin")
    wanted = base("bert")
    with torch.no_grad():
        for name, change in changes.items():
            wanted.get_parameter(name).add_(change)
        for name, value in head.items():
            wanted.get_parameter(name).copy_(value)
    bay = mb.load(model, tmp_path / "de")["sft"]
    assert_close(run("bert", model), run("bert", wanted), **CLOSE)
    kinds = {type(part.kind) for modular in bay.modulars.values() for part in modular.order}
    assert kinds == {mb.SparseDelta, mb.BitFit, mb.Norm, mb.Full}
    bay.save(tmp_path / "saved")
    again = base("bert")
    mb.load(again, tmp_path / "saved")["sft"].use("de")
    assert_close(run("bert", again), run("bert", wanted), **CLOSE)
    with pytest.raises(FileError, match="no parameter 'bert"):
        mb.load(base("roberta"), tmp_path / "de")
    held["diffs"]["bert.encoder.layer.0.attention.self.query.weight"]["index_steps"][1] = 0
    torch.save(held, tmp_path / "de" / "pytorch_diff.bin")
    with pytest.raises(FileError, match="does not fit"):
        mb.load(base("bert"), tmp_path / "de")


def test_a_tied_embedding_is_changed_at_both_ends(tmp_path):
    torch.manual_seed(0)
    make = lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, max_position_embeddings=10)).eval()
    model = make()
    wanted = make()
    wanted.load_state_dict(model.state_dict())
    changes = sparse(model, ("word_embeddings",))
    torch.save({"diffs": {k: encoded(v) for k, v in changes.items()}, "abs": {}}, tmp_path / "pytorch_diff.bin")
    with torch.no_grad():
        for name, change in changes.items():
            wanted.get_parameter(name).add_(change)
        mb.load(model, tmp_path)
        assert_close(model(TENSORS["bert"]["ids"]).logits, wanted(TENSORS["bert"]["ids"]).logits, **CLOSE)


def test_by_the_command_line(tmp_path):
    """modbay convert, from one to the other and back."""
    from typer.testing import CliRunner

    from modbay.cli import app

    base("bert").save_pretrained(tmp_path / "base")
    for source, out, to in ((FOLDER / "bert-lora", "ours", "modbay"), (tmp_path / "ours", "theirs", "adapters")):
        said = CliRunner().invoke(
            app, ["convert", str(source), str(tmp_path / out), "--to", to, "-m", str(tmp_path / "base")]
        )
        assert said.exit_code == 0, said.output
    ours = load_file(tmp_path / "theirs" / "adapter.safetensors")
    assert len(ours) == len(load_file(FOLDER / "bert-lora" / "adapter.safetensors"))
