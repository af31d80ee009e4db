"""Prefixes as the library adapters has them where positions bias the attention, gates of what a site gives, and what of
adapters' prefixes and LoRA is refused; the round trips are in test_adapters_files.py."""

import copy
import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import modbay as mb
from modbay.errors import CompositionError, FileError
from test_adapters_files import CLOSE, FOLDER, TENSORS, base, edit, run

transformers = pytest.importorskip("transformers")

SELF = "*.SelfAttention"
KINDS = {"a": mb.Prefix(3, relative="keys"), "b": mb.Prefix(2, relative="keys"), "c": mb.Prefix(3, relative="keys")}
LABELS = ["a", None, "b", "c"]


def t5(kernel="sdpa"):
    config = transformers.T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
        relative_attention_num_buckets=8, relative_attention_max_distance=6, attn_implementation=kernel,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    for name, p in model.named_parameters():
        if "relative_attention_bias" in name:
            nn.init.normal_(p)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def batch(rows=4):
    return {"input_ids": torch.randint(3, 50, (rows, 6)), "decoder_input_ids": torch.randint(3, 50, (rows, 5))}


# Under a bias of relative positions


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("place", ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"])
def test_keys_are_counted_from_the_prefix_on(place, kernel):
    """One attention of T5, all of it written out: key j and query i have the bias of j − i, the prefix counted."""
    model, inputs = t5(kernel), batch()
    attention = model.get_submodule(f"{place}.layer.0.SelfAttention")
    first = model.get_submodule(f"{place.partition('.')[0]}.block.0.layer.0.SelfAttention")
    bay = mb.attach(model, f"{place}.layer.0.SelfAttention", {"a": KINDS["a"]}).use("a")
    seen = {}
    attention.register_forward_hook(lambda m, args, out: seen.update(x=args[0], y=out[0]))
    with torch.no_grad():
        model(**inputs)
        x, (prefix,) = seen["x"], bay.parameters()
        t = x.shape[1]
        q, k, v = (part(x).view(4, t, 4, 8).transpose(1, 2) for part in (attention.q, attention.k, attention.v))
        k, v = (torch.cat([p.expand(4, -1, -1, -1), own], 2) for p, own in zip(prefix, (k, v), strict=True))
        bias = first.compute_bias(t, 3 + t)
        seen_by = torch.ones(t, 3 + t, dtype=torch.bool)
        seen_by = seen_by.tril(3) if place.startswith("decoder") else seen_by
        weights = (q @ k.mT + bias).masked_fill(~seen_by, float("-inf")).softmax(-1)
        assert_close(seen["y"], attention.o((weights @ v).transpose(1, 2).flatten(2)), **CLOSE)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_mixed_batch_is_loop(kernel):
    """Prefixes of different lengths count for their rows alone; and it is another function than without positions."""
    model, inputs = t5(kernel), batch()
    plain = model(**inputs).logits
    bay = mb.attach(model, SELF, KINDS, name="task")
    mixed = model(**inputs, task=LABELS).logits
    weight = torch.randn_like(mixed[:1])
    (mixed * weight).sum().backward()
    together = [p.grad.clone() for p in bay.parameters()]
    for p in bay.parameters():
        p.grad = None
    for i, label in enumerate(LABELS):
        alone = model(**{name: ids[i : i + 1] for name, ids in inputs.items()}, task=[label]).logits
        assert_close(alone, mixed[i : i + 1], **CLOSE)
        if label is None:
            assert_close(alone, plain[i : i + 1], **CLOSE)
        else:
            (alone * weight).sum().backward()
    for one, p in zip(together, bay.parameters(), strict=True):
        assert_close(one, p.grad, atol=1e-5, rtol=1e-4)
    other = t5(kernel)
    again = mb.attach(other, SELF, {"a": mb.Prefix(3)}).use("a")
    for ours, theirs in zip(again.parameters(), bay.parameters("a"), strict=True):
        ours.data.copy_(theirs)
    assert (other(**inputs).logits - model(**inputs, task="a").logits).abs().max() > 1e-3


def test_generation_is_loop():
    """With a cache, and without; each row as alone."""
    model = t5()
    mb.attach(model, SELF, KINDS, name="task")
    ids, how = torch.randint(3, 50, (3, 6)), {"max_new_tokens": 5, "do_sample": False}
    labels = ["a", "b", None]
    mixed = model.generate(input_ids=ids, task=labels, **how)
    assert mixed.tolist() == model.generate(input_ids=ids, task=labels, use_cache=False, **how).tolist()
    for i, label in enumerate(labels):
        assert mixed[i].tolist() == model.generate(input_ids=ids[i : i + 1], task=[label], **how)[0].tolist()


def test_copies_files_and_bfloat16(tmp_path):
    model, inputs = t5(), batch()
    bay = mb.attach(model, SELF, KINDS, name="task")
    wanted = model(**inputs, task=LABELS).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**inputs, task=LABELS).logits, wanted)
        table = other.encoder.block[0].layer[0].SelfAttention
        assert next(iter(other.encoder.block[1].layer[0].SelfAttention._bay.seams.values())).table is table
    bay.save(tmp_path)
    again = t5()
    mb.load(again, tmp_path)
    assert torch.equal(again(**inputs, task=LABELS).logits, wanted)
    half = copy.deepcopy(model).bfloat16()(**inputs, task=LABELS).logits
    assert half.dtype == torch.bfloat16 and (half.float() - wanted).abs().max() < 0.2 * wanted.abs().max()


@pytest.mark.slow
def test_compiled():
    model, inputs = t5(), batch()
    mb.attach(model, SELF, KINDS, name="task")
    wanted, index = model(**inputs, task=LABELS).logits, torch.tensor([0, -1, 1, 2])
    assert_close(torch.compile(model, backend="aot_eager")(**inputs, task=index).logits, wanted, **CLOSE)


def test_where_it_means_nothing_it_raises():
    bert = transformers.BertModel(
        transformers.BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).eval()
    ids = torch.randint(3, 20, (2, 5))
    mb.attach(bert, modules={"a": KINDS["a"]}).use("a")
    with pytest.raises(CompositionError, match="no bias of relative positions"):
        bert(ids)
    for at in ("*.EncDecAttention", [SELF, "*.EncDecAttention"]):
        model = t5()
        mb.attach(model, at, {"a": KINDS["a"]}).use("a")
        with pytest.raises(CompositionError, match=r"EncDecAttention.*no bias of relative positions"):
            model(**batch())
    model = t5()
    mb.attach(model, SELF, {"a": KINDS["a"], "d": mb.Prefix(3)}).use("a")
    with pytest.raises(CompositionError, match="bay of its own"):
        model(**batch())
    model = t5()
    for name in ("one", "two"):
        mb.attach(model, SELF, {name: KINDS["a"]}, name=name).use(name)
    with pytest.raises(CompositionError, match="prefixes of several bays"):
        model(**batch())


def test_tokens_of_the_three_attentions_stay_apart(tmp_path):
    """Each group of prefixes has its own, in files, too."""
    bay = mb.load(base("t5"), FOLDER / "t5-prefix", name="task")["task"]
    tokens = lambda bay: [modular.order[0].tokens for modular in bay.modulars.values()]
    assert len({id(t) for t in tokens(bay)}) == 3
    bay.save(tmp_path)
    model = base("t5")
    again = mb.load(model, tmp_path)["task"].use("t5-prefix")
    assert len({id(t) for t in tokens(again)}) == 3
    assert_close(run("t5", model)[0], TENSORS["t5"]["logits.prefix"], **CLOSE)


# What is refused


def drop(text):
    def change(folder):
        held = torch.load(folder / "pytorch_adapter.bin", weights_only=True)
        save_file({k: v.clone() for k, v in held.items() if text not in k}, folder / "adapter.safetensors")

    return change


def fewer(folder):
    path = folder / "adapter.safetensors"
    save_file({k: v[:-1].clone() if "lora_B" in k else v for k, v in load_file(path).items()}, path)


BAD = {
    "a layer of T5 left out": ("mt5-prefix-flat", edit(leave_out=[1]), "has no bias"),
    "an attention without its prefix": ("t5-prefix-flat", drop("cross_prefix"), "'cross_prefix': not all of it"),
    "a prefix that is not told of": ("t5-prefix-flat", edit(cross_prefix=False), "prefixes at"),
    "another function": ("gpt2-prefix", edit(non_linearity="relu"), "in a prefix"),
    "a gated scale": ("bert-ia3", None, "use_gating=True with composition_mode='scale'"),
    "a scale of the rest": ("gpt2-ia3", edit(alpha=2), "the rest of query, key and value"),
    "parts that are none": ("gpt2-lora", fewer, "no LoRA of 2 parts"),
    "no parts": ("gpt2-lora", edit(attn_matrices=[]), "no LoRA of 0 parts"),
}


def gated(folder):
    path = folder / "adapter.safetensors"
    held = load_file(path)
    for key in list(held):
        if key.endswith("lora_B"):
            held |= {key.replace("lora_B", "gate.weight"): torch.ones(1, 16)}
            held |= {key.replace("lora_B", "gate.bias"): torch.ones(1)}
    save_file(held, path)


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(name, tmp_path):
    source, change, why = BAD[name]
    shutil.copytree(FOLDER / source, tmp_path / "case")
    (change or gated)(tmp_path / "case")
    model = base(source.partition("-")[0])
    with pytest.raises(FileError, match=why):
        mb.load(model, tmp_path / "case")
    assert not mb.bays(model)


@pytest.mark.parametrize(
    ("kind", "kinds", "why"),
    [
        ("t5", {"*Attention": mb.Prefix(3)}, "relative=None"),
        ("t5", {"*.EncDecAttention": mb.Prefix(3)}, "one attention, and none at the other"),
        ("mt5", {"*.block.0.layer.0.SelfAttention": mb.Prefix(3, relative="keys")}, "no bias of positions"),
        ("gpt2", {"*.h.0.attn": mb.Prefix(3), "*.h.1.attn": mb.Prefix(2)}, "the prefix is"),
        ("gpt2", {"*.attn.c_attn": mb.LoRA(2)}, "no query, key, value"),
        ("gpt2", {mb.part("*.h.0.attn.c_attn", 0, 16): mb.LoRA(2), "*.h.1.mlp.c_fc": mb.LoRA(2)}, "layer 0 has"),
        ("t5", {"*.SelfAttention.q": mb.LoRA(2)}, "layer 1 has"),
    ],
)
def test_what_adapters_can_not_hold(kind, kinds, why, tmp_path):
    bay = mb.attach(base(kind), modules={"m": kinds})
    with pytest.raises(CompositionError, match=why):
        bay.export(tmp_path / "out", format="adapters")
    assert not (tmp_path / "out").exists()


def test_some_attentions_of_t5_alone(tmp_path):
    """Those of the encoder, of the decoder without the encoder's, or all but a layer's at GPT-2: written as it is."""
    wholly = mb.Prefix(3, relative="keys")
    for kinds, flags in (
        ({"encoder.*.SelfAttention": wholly}, {"cross_prefix": False, "encoder_prefix": True, "leave_out": [1]}),
        ({"decoder.*.SelfAttention": wholly}, {"cross_prefix": False, "encoder_prefix": False, "leave_out": []}),
    ):
        folder = tmp_path / next(iter(kinds))[:3]
        model = base("t5")
        bay = mb.attach(model, modules={"m": kinds}).use("m")
        wanted = run("t5", model)[0]
        bay.export(folder, format="adapters")
        said = json.loads((folder / "adapter_config.json").read_text())["config"]
        assert {key: said[key] for key in flags} == flags
        again = base("t5")
        mb.load(again, folder)
        assert_close(run("t5", again)[0], wanted, **CLOSE)
    bay = mb.attach(base("gpt2"), modules={"m": {"*.h.1.attn": mb.Prefix(3, bottleneck=4)}}).use("m")
    bay.export(tmp_path / "gpt2", format="adapters")
    assert json.loads((tmp_path / "gpt2" / "adapter_config.json").read_text())["config"]["leave_out"] == [0]


# Bottlenecks that read a sum which no module gives


def test_a_bottleneck_of_a_sum():
    """Δ = A(x + y), by hand; x and y of different widths have none."""
    torch.manual_seed(2)
    f, x = nn.Linear(8, 8), torch.randn(2, 5, 8)
    made = mb.Modular(f, {"a": mb.Bottleneck(3, placement="sum", std=0.3)}, mb.Uniform(), mb.WeightedSum())
    own = made.order[0].tensors()
    down = F.relu(F.linear(x + f(x), own["down"], own["down_bias"]))
    assert_close(made(x), f(x) + F.linear(down, own["up"], own["up_bias"]), **CLOSE)
    with pytest.raises(CompositionError, match="have no sum"):
        mb.Modular(nn.Linear(8, 6), {"a": mb.Bottleneck(3, placement="sum")}, mb.Uniform(), mb.WeightedSum())


def test_a_sum_that_some_module_gives_or_whose_gate_is_asked_for(tmp_path):
    """Both ways to say a part of GPT-2's are one to adapters; and none at BERT, whose norm follows."""
    outs = []
    for at, kind in (
        ("*.h.?", mb.Bottleneck(4)),
        (mb.span("*.ln_2", "*.mlp.c_proj"), mb.Bottleneck(4, placement="sum")),
    ):
        model = base("gpt2")
        bay = mb.attach(model, at, {"m": kind}).use("m")
        torch.manual_seed(0)
        for parameter in bay.parameters():
            nn.init.normal_(parameter, std=0.3)
        bay.export(tmp_path / str(len(outs)), format="adapters")
        outs.append(run("gpt2", model)[0])
    assert_close(*outs, **CLOSE)
    one, two = (load_file(tmp_path / name / "adapter.safetensors") for name in "01")
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    span = mb.span("*.attention.self.query", "*.attention.output.dense")
    bay = mb.attach(base("bert"), span, {"m": mb.Bottleneck(4, placement="sum")})
    with pytest.raises(CompositionError, match=r"no end of attention|nowhere so"):
        bay.export(tmp_path / "bert", format="adapters")
    for source in ("gpt2-both", "vit-both"):
        shutil.copytree(FOLDER / source, tmp_path / source)
        path = tmp_path / source / "adapter.safetensors"
        held = load_file(path)
        for key in [key for key in held if key.endswith("adapter_up.bias")]:
            held |= {key.replace("adapter_up.bias", "gate.weight"): torch.ones(1, 16)}
            held |= {key.replace("adapter_up.bias", "gate.bias"): torch.ones(1)}
        save_file(held, path)
        with pytest.raises(FileError, match="a gate, that reads a sum"):
            mb.load(base(source.partition("-")[0]), tmp_path / source)


# Gates that read what a site gives


def layer(router, aggregator, kind=None, f=None):
    torch.manual_seed(1)
    f = nn.Linear(8, 8) if f is None else f
    made = mb.Modular(f, dict.fromkeys("ab", kind or mb.Bottleneck(3)), router, aggregator)
    with torch.no_grad():
        for parameter in [*made.parts.parameters(), *router.parameters()]:
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def test_a_gate_of_the_output():
    """α = mean_t σ(w · f(x)_t + b), by hand; gradients go through it, too."""
    made, x = layer(mb.Gate(), mb.WeightedSum("output")).double(), torch.randn(3, 5, 8, dtype=torch.float64)
    y = made.f(x)
    weights = torch.sigmoid(y.float() @ made.router.weight.mT.float() + made.router.bias.float()).mean(1)
    changes = []
    for part in made.order:
        own = part.tensors()
        changes.append(F.linear(F.relu(F.linear(y, own["down"], own["down_bias"])), own["up"], own["up_bias"]))
    wanted = y + sum(w.view(-1, 1, 1) * d for w, d in zip(weights.double().unbind(1), changes, strict=True))
    assert_close(made(x), wanted, atol=1e-7, rtol=1e-6)
    assert not torch.allclose(layer(mb.Gate(), mb.WeightedSum()).double()(x), wanted, atol=1e-3)
    made(x).sum().backward()
    assert made.router.weight.grad.abs().max() > 0


def test_a_route_that_is_set_is_not_asked_for_again():
    made, x = layer(mb.Gate(), mb.WeightedSum("output")), torch.randn(3, 5, 8)
    plain = layer(mb.Gate(), mb.WeightedSum())
    for weights in (torch.tensor([0.2, 0.9]), torch.rand(3, 2)):
        given = mb.Routing(weights=weights)
        assert_close(made(x, routing=given), plain(x, routing=given), **CLOSE)


def test_labels_say_whose_gate_counts():
    """A mixed batch is a loop; a row without a module is f alone; in bfloat16; made again from its arguments."""
    made, x = layer(mb.Gate("task"), mb.WeightedSum("output")), torch.randn(3, 5, 8)
    labels = ["a", None, "b"]
    mixed = made(x, task=labels)
    for i, label in enumerate(labels):
        assert_close(mixed[i : i + 1], made(x[i : i + 1], task=[label]), **CLOSE)
    assert_close(mixed[1], made.f(x[1]), **CLOSE)
    assert made.bfloat16()(x.bfloat16(), task=labels).dtype == torch.bfloat16
    assert mb.WeightedSum("output").arguments() == {"reads": "output"} and mb.WeightedSum().arguments() == {}


def test_where_the_output_can_not_be_read():
    with pytest.raises(CompositionError, match="reads='both'"):
        mb.WeightedSum("both")
    for kind, f in ((mb.IA3("input"), None), (mb.Full(), None), (mb.LoRA(2), nn.Linear(8, 6))):
        with pytest.raises(CompositionError, match="reads f"):
            layer(mb.Gate(), mb.WeightedSum("output"), kind, f)
    made = layer(mb.TopK(1, balance=0.1), mb.WeightedSum("output")).train()
    with pytest.raises(CompositionError, match="asked twice"):
        made(torch.randn(2, 3, 8))
