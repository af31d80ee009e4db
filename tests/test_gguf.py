"""LoRA in GGUF: what llama.cpp would compute from the file is what the module does."""

import copy

import numpy
import pytest
import torch
from typer.testing import CliRunner

import modbay as mb
from modbay.cli import app
from modbay.errors import CompositionError

transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
IDS = torch.tensor([[3, 8, 1, 40, 7, 9], [11, 2, 30, 4, 6, 5]])
GROUPED = SMALL | {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = GROUPED | {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
CONFIGS = {
    "llama": (GROUPED, "llama"),
    "mistral": (GROUPED, "llama"),
    "mixtral": (GROUPED | {"num_local_experts": 2}, "llama"),
    "granite": (GROUPED, "granite"),
    "smollm3": (GROUPED | {"tie_word_embeddings": False}, "smollm3"),
    "olmo": (GROUPED, "olmo"),
    "olmo2": (GROUPED, "olmo2"),
    "olmo3": (GROUPED, "olmo2"),
    "qwen2": (GROUPED, "qwen2"),
    "qwen2_moe": (EXPERTS, "qwen2moe"),
    "qwen3": (GROUPED | {"head_dim": 8}, "qwen3"),
    "qwen3_moe": (EXPERTS | {"head_dim": 8}, "qwen3moe"),
    "gemma": (GROUPED | {"head_dim": 8}, "gemma"),
    "gemma2": (GROUPED | {"head_dim": 8}, "gemma2"),
    "gemma3_text": (GROUPED | {"head_dim": 8}, "gemma3"),
    "phi": (GROUPED, "phi2"),
    "phi3": (GROUPED, "phi3"),
    "gpt2": (
        {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": 0}
        | {"bos_token_id": 1, "eos_token_id": 2},
        "gpt2",
    ),
    "bert": (SMALL, "bert"),
}
TURNED = ("llama", "mistral", "mixtral", "granite", "smollm3", "olmo")


def made(model_type):
    """A small model with untied embeddings."""
    config = transformers.AutoConfig.for_model(model_type, **CONFIGS[model_type][0])
    if model_type == "bert":
        return transformers.BertModel(config).eval()
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def attached(model, at, kind, name="de"):
    bay = mb.attach(model, at, {name: kind})
    with torch.no_grad():
        for p in bay.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return bay


def changed(model, bay, name="de"):
    """ΔW by site, as folding finds it: (out, in)."""
    before = {key: p.clone() for key, p in model.named_parameters()}
    bay.fold(name)
    out = {key: p - before[key] for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    bay.unfold()
    return {
        key.removesuffix(".weight"): d.mT
        if type(model.get_submodule(key.rpartition(".")[0])).__name__ == "Conv1D"
        else d
        for key, d in out.items()
    }


def value(reader, key):
    """What a reader says under a key."""
    field = reader.get_field(key)
    return field.contents()


def read(path):
    """(the reader, {name of a weight: α/r · B A}), by llama.cpp's rules."""
    reader = gguf.GGUFReader(path)
    own = {tensor.name: torch.from_numpy(numpy.array(tensor.data)).float() for tensor in reader.tensors}
    alpha, out = value(reader, "adapter.lora.alpha"), {}
    for name in {key.rpartition(".lora_")[0] for key in own}:
        a, b = own[f"{name}.lora_a"], own[f"{name}.lora_b"]
        if name == "token_embd.weight":
            a = a.mT
        out[name] = alpha / b.shape[-1] * b @ a
    return reader, out


def from_neighbours(delta, heads):
    """The rows of a head in transformers' order: those at even places first."""
    width = len(delta) // heads
    order = [head * width + i for head in range(heads) for half in (0, 1) for i in range(half, width, 2)]
    return delta[order]


@pytest.mark.parametrize("model_type", CONFIGS)
def test_the_file_holds_the_update(model_type, tmp_path):
    torch.manual_seed(0)
    model = made(model_type)
    last = ("query", "key", "value", "q_proj", "k_proj", "qkv_proj", "down_proj", "fc2", "c_attn", "c_fc")
    sites = [
        n for n, _ in model.named_modules() if n.rpartition(".")[2] in last and "experts" not in n and "cross" not in n
    ]
    bay = attached(model, sites, mb.LoRA(3, alpha=5))
    expected = changed(model, bay)
    errors = bay.export(tmp_path, "de", "gguf")
    assert set(errors) == set(sites) == set(expected) and set(errors.values()) == {0.0}
    reader, found = read(tmp_path / "de.gguf")
    architecture = CONFIGS[model_type][1]
    said = {"general.type": "adapter", "adapter.type": "lora", "general.architecture": architecture}
    assert {key: value(reader, key) for key in said} == said
    (own,) = [key for key, said in gguf.MODEL_ARCH_NAMES.items() if said == architecture]
    names = gguf.get_tensor_name_map(own, 2)
    for site, delta in expected.items():
        own = found.pop(names.get_name(site) + ".weight")
        if model_type in TURNED and site.endswith(("q_proj", "k_proj")):
            own = from_neighbours(own, 4 if site.endswith("q_proj") else 2)
        torch.testing.assert_close(own, delta, atol=1e-6, rtol=1e-5)
    assert not found


def rotated(x, neighbours):
    """Rotary positions on (heads, tokens, d): pairs half a head apart, as transformers has them, or side by side."""
    _, tokens, d = x.shape
    angles = torch.arange(tokens)[:, None] * 10000.0 ** (-torch.arange(0, d, 2) / d)
    if neighbours:
        c, s, (left, right) = angles.cos(), angles.sin(), x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([left * c - right * s, right * c + left * s], -1).flatten(-2)
    c, s, (left, right) = angles.cos(), angles.sin(), x.chunk(2, -1)
    return torch.cat([left * c - right * s, right * c + left * s], -1)


def test_permuted_queries_and_keys_meet_as_before(tmp_path):
    """By neighbouring pairs, the file's ΔW give the scores that transformers' give by halves."""
    torch.manual_seed(0)
    model = made("llama")
    bay = attached(model, ["*layers.0*q_proj", "*layers.0*k_proj"], mb.LoRA(4))
    q, k = [d for _, d in sorted(changed(model, bay).items(), reverse=True)]
    bay.export(tmp_path / "own.gguf", format="gguf")
    _, found = read(tmp_path / "own.gguf")
    x = torch.randn(6, 32)

    def scores(q, k, neighbours):
        q, k = ((x @ w.mT).unflatten(-1, (h, 8)).transpose(0, 1) for w, h in ((q, 4), (k, 2)))
        return rotated(q, neighbours) @ rotated(k, neighbours).repeat_interleave(2, 0).mT

    theirs = scores(found["blk.0.attn_q.weight"], found["blk.0.attn_k.weight"], True)
    torch.testing.assert_close(theirs, scores(q, k, False), atol=1e-4, rtol=1e-4)
    assert (theirs - scores(q, k, True)).abs().max() > 0.01


def test_embeddings_output_and_half_precision(tmp_path):
    torch.manual_seed(0)
    model = made("llama").half()
    bay = mb.attach(model, ["*.embed_tokens", "lm_head", "*.1.*.o_proj"], {"de": mb.LoRA(3)})
    with torch.no_grad():
        for p in bay.parameters():
            p.copy_(0.3 * torch.randn_like(p))
    bay.export(tmp_path, format="gguf")
    reader, found = read(tmp_path / "de.gguf")
    assert {t.tensor_type.name for t in reader.tensors} == {"F16"} and value(reader, "general.file_type") == 1
    parts = {site: modular.order[0] for site, modular in bay.fitting.modulars.items()}
    for name, site in (
        ("token_embd", "model.embed_tokens"),
        ("output", "lm_head"),
        ("blk.1.attn_output", "model.layers.1.self_attn.o_proj"),
    ):
        own = parts[site].tensors()
        delta = own["B"].float() @ own["A"].float() * parts[site].kind.factor
        torch.testing.assert_close(found[f"{name}.weight"], delta, atol=3e-3, rtol=3e-3)
    a = next(t for t in reader.tensors if t.name == "token_embd.weight.lora_a")
    assert a.data.shape == (50, 3)  # its rows are looked up


def test_unequal_ranks_and_kinds_that_are_no_lora(tmp_path):
    torch.manual_seed(0)
    model = made("qwen2")
    bay = mb.attach(
        model,
        ["*.q_proj", "*.v_proj", "*.o_proj"],
        {"de": {"*.q_proj": mb.LoRA(2), "*.v_proj": mb.LoRA(5, alpha=3), "*.o_proj": mb.IA3()}},
    )
    with torch.no_grad():
        for p in bay.parameters():
            p.add_(0.3 * torch.randn_like(p))
    expected = changed(model, bay)
    errors = bay.export(tmp_path, "de", "gguf", error=0.5)
    _, found = read(tmp_path / "de.gguf")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, 2)
    for site, delta in expected.items():
        off = (found[names.get_name(site) + ".weight"] - delta).norm() / delta.norm()
        assert abs(float(off) - errors[site]) < 1e-4
    assert all((lost > 0.01) == site.endswith("o_proj") for site, lost in errors.items())
    with pytest.raises(CompositionError, match="off by a relative"):
        bay.export(tmp_path / "new", "de", "gguf", rank=2, error=0.01)
    assert not (tmp_path / "new").exists()


REFUSED = {
    "a head": (lambda: made("llama"), {"lm_head": mb.Full(), "*.q_proj": mb.LoRA(2)}, "loads no heads"),
    "biases": (lambda: made("qwen2"), {"*.q_proj": mb.BitFit()}, "moves the bias"),
    "a function": (lambda: made("llama"), {"*.mlp": mb.Bottleneck(2)}, "there is no weight"),
    "norms": (lambda: made("llama"), {"*.input_layernorm": mb.Norm()}, "there is no weight"),
    "positions": (lambda: made("gpt2"), {"*.wpe": mb.LoRA(2)}, "changes no such weight"),
    "tied output": (lambda: made("gpt2"), {"lm_head": mb.LoRA(2)}, "output are tied"),
    "tied embeddings": (lambda: made("gpt2"), {"*.wte": mb.LoRA(2)}, "token embeddings are tied"),
    "experts": (lambda: made("mixtral"), {"*.experts.down_proj": mb.LoRA(2)}, "no LoRA of weights such as these"),
    "architecture": (
        lambda: transformers.AutoModelForCausalLM.from_config(
            transformers.GPTNeoXConfig(**SMALL, bos_token_id=0, eos_token_id=0)
        ),
        {"*.dense": mb.LoRA(2)},
        "'gpt_neox' is none of the models",
    ),
    "no transformer": (lambda: torch.nn.Sequential(torch.nn.Linear(4, 4)), {"0": mb.LoRA(2)}, "'Sequential' is none"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_can_not_load_is_refused(case, tmp_path):
    torch.manual_seed(0)
    make, kinds, match = REFUSED[case]
    model = make()
    bay = mb.attach(model, list(kinds), {"de": kinds})
    with torch.no_grad():
        for p in bay.parameters():
            p.add_(0.1)
    with pytest.raises(CompositionError, match=match):
        bay.export(tmp_path, "de", "gguf")
    assert not list(tmp_path.iterdir())


def test_written_whole_or_not_at_all(tmp_path, monkeypatch):
    model = made("llama")
    bay = attached(model, "*.q_proj", mb.LoRA(2))
    bay.export(tmp_path, "de", "gguf")
    before = (tmp_path / "de.gguf").read_bytes()

    def fails(self, **_):
        raise OSError("full")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", fails)
    with pytest.raises(OSError, match="full"):
        bay.export(tmp_path, "de", "gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["de.gguf"] and (tmp_path / "de.gguf").read_bytes() == before


def test_without_the_package(tmp_path, monkeypatch):
    bay = attached(made("llama"), "*.q_proj", mb.LoRA(2))
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError, match=r"modbay\[gguf\]"):
        bay.export(tmp_path, "de", "gguf")


def call(*args, code=0):
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == code, result.output
    return result.stderr if code else result.stdout


def test_convert(tmp_path):
    torch.manual_seed(0)
    base = made("llama")
    base.save_pretrained(tmp_path / "base")
    model = copy.deepcopy(base)
    bay = mb.attach(model, "*.q_proj", {"en": mb.LoRA(2), "de": mb.LoRA(2)})
    with torch.no_grad():
        for p in bay.parameters():
            p.add_(0.3 * torch.randn_like(p))
    bay.save(tmp_path / "modules")
    given = ["convert", tmp_path / "modules", "--to", "gguf", "--model", tmp_path / "base"]
    assert "exactly" in call(*given, tmp_path / "all")
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == ["de.gguf", "en.gguf"]
    assert "one file holds one module" in call(*given, tmp_path / "both.gguf", code=1)
    call(*given, tmp_path / "de.gguf", "--name", "de")
    call(*given, tmp_path / "de.gguf", "--name", "de", "--overwrite")
    assert (tmp_path / "de.gguf").read_bytes() == (tmp_path / "all" / "de.gguf").read_bytes()
    reader, _ = read(tmp_path / "de.gguf")
    assert value(reader, "general.base_model.0.name") == str(tmp_path / "base")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["all", "base", "de.gguf", "modules"]
