"""Roles from structure: the expected names were written by reading each model's list of modules."""

# ruff: noqa: C408  names and settings read better as keywords
import copy
import fnmatch

import pytest
import torch
from torch import nn

from modbay.errors import ModbayError, RoleError
from modbay.seams._roles import NAMES, Role, describe_roles, find_roles, match_role, role

TEXT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=50)
GROUPED = dict(TEXT, num_key_value_heads=2, pad_token_id=0)
IMAGE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16)
IMAGE["patch_size"] = 8
SEQ2SEQ = dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=50)
SEQ2SEQ |= dict(encoder_attention_heads=4, decoder_attention_heads=4)
GPT = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=50)
T5 = dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=50)
SPEECH = dict(num_mel_bins=8, max_source_positions=8, max_target_positions=8, pad_token_id=0, bos_token_id=1)
SPEECH |= dict(eos_token_id=2, decoder_start_token_id=1)
TOWERS = dict(text_config=TEXT | {"projection_dim": 24}, vision_config=IMAGE | {"projection_dim": 24})
NEO = dict(hidden_size=32, num_layers=2, num_heads=4, vocab_size=50, attention_types=[[["global", "local"], 1]])

# name: (model's class, config's class, config)
ZOO = {
    "bert": ("BertForSequenceClassification", "BertConfig", TEXT),
    "bert trunk": ("BertModel", "BertConfig", TEXT),
    "bert lm": ("BertForMaskedLM", "BertConfig", TEXT),
    "albert": ("AlbertForSequenceClassification", "AlbertConfig", TEXT | {"embedding_size": 16}),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", TEXT),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        dict(dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=50),
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT),
    "gpt2 cross": ("GPT2LMHeadModel", "GPT2Config", GPT | {"add_cross_attention": True}),
    "gpt_neo": ("GPTNeoForCausalLM", "GPTNeoConfig", NEO),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", GROUPED),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, vocab_size=50)
        | {"word_embed_proj_dim": 32},
    ),
    "bloom": ("BloomForCausalLM", "BloomConfig", dict(hidden_size=32, n_layer=2, n_head=4, vocab_size=50)),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", GROUPED | {"num_local_experts": 4}),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "t5 gated": ("T5ForConditionalGeneration", "T5Config", T5 | {"feed_forward_proj": "gated-gelu"}),
    "bart": ("BartForConditionalGeneration", "BartConfig", SEQ2SEQ),
    "mbart": ("MBartForConditionalGeneration", "MBartConfig", SEQ2SEQ),
    "vit": ("ViTForImageClassification", "ViTConfig", IMAGE),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", SEQ2SEQ | SPEECH),
    "clip": ("CLIPModel", "CLIPConfig", TOWERS),
    "siglip": ("SiglipModel", "SiglipConfig", TOWERS),
    "xlnet": ("XLNetLMHeadModel", "XLNetConfig", dict(d_model=32, n_layer=2, n_head=4, d_inner=64, vocab_size=50)),
    "funnel": (
        "FunnelForSequenceClassification",
        "FunnelConfig",
        dict(vocab_size=50, block_sizes=[1, 1], d_model=32, n_head=4, d_head=8, d_inner=64),
    ),
    "esm": ("EsmForSequenceClassification", "EsmConfig", TEXT | {"pad_token_id": 0}),
    "mobilebert": (
        "MobileBertForSequenceClassification",
        "MobileBertConfig",
        TEXT | {"intra_bottleneck_size": 16, "embedding_size": 16},
    ),
    "longformer": ("LongformerForSequenceClassification", "LongformerConfig", TEXT | {"attention_window": 4}),
    "deberta_v2": (
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        TEXT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    ),
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        dict(hidden_size=32, num_hidden_layers=2, vocab_size=50, state_size=4),
    ),
}

# `{}` is the number of a layer; a role that is not named must raise.
BERT = dict(
    attention="L.attention.self",
    query="L.attention.self.query",
    key="L.attention.self.key",
    value="L.attention.self.value",
    output="L.attention.output.dense",
    ffn_in="L.intermediate.dense",
    ffn_out="L.output.dense",
    block="L",
)
LLAMA = dict(
    attention="L.self_attn",
    query="L.self_attn.q_proj",
    key="L.self_attn.k_proj",
    value="L.self_attn.v_proj",
    output="L.self_attn.o_proj",
    ffn="L.mlp",
    ffn_in="L.mlp.gate_proj L.mlp.up_proj",
    ffn_out="L.mlp.down_proj",
    block="L",
    embedding="model.embed_tokens",
    head="lm_head",
    norm="L.input_layernorm L.post_attention_layernorm model.norm",
)
FUSED = dict(
    attention="L.attention",
    qkv="L.attention.query_key_value",
    output="L.attention.dense",
    ffn="L.mlp",
    ffn_in="L.mlp.dense_h_to_4h",
    ffn_out="L.mlp.dense_4h_to_h",
    block="L",
    head="lm_head",
)
CROSS = "E.self_attn{0} D.self_attn{0} D.encoder_attn{0}"
BART = dict(
    attention=CROSS.replace("{0}", ""),
    query=CROSS.replace("{0}", ".q_proj"),
    key=CROSS.replace("{0}", ".k_proj"),
    value=CROSS.replace("{0}", ".v_proj"),
    output=CROSS.replace("{0}", ".out_proj"),
    ffn_in="E.fc1 D.fc1",
    ffn_out="E.fc2 D.fc2",
    block="E D",
    norm="E.self_attn_layer_norm E.final_layer_norm D.self_attn_layer_norm D.encoder_attn_layer_norm "
    "D.final_layer_norm",
)
T5_ATTENTION = "E.layer.0.SelfAttention{0} D.layer.0.SelfAttention{0} D.layer.1.EncDecAttention{0}"
T5_ROLES = dict(
    attention=T5_ATTENTION.replace("{0}", ""),
    query=T5_ATTENTION.replace("{0}", ".q"),
    key=T5_ATTENTION.replace("{0}", ".k"),
    value=T5_ATTENTION.replace("{0}", ".v"),
    output=T5_ATTENTION.replace("{0}", ".o"),
    ffn="E.layer.1.DenseReluDense D.layer.2.DenseReluDense",
    ffn_in="E.layer.1.DenseReluDense.wi D.layer.2.DenseReluDense.wi",
    ffn_out="E.layer.1.DenseReluDense.wo D.layer.2.DenseReluDense.wo",
    block="E D",
    embedding="encoder.embed_tokens",
    head="lm_head",
    norm="E.layer.0.layer_norm E.layer.1.layer_norm encoder.final_layer_norm D.layer.0.layer_norm D.layer.1.layer_norm "
    "D.layer.2.layer_norm decoder.final_layer_norm",
)
GPT2 = dict(
    attention="L.attn",
    qkv="L.attn.c_attn",
    output="L.attn.c_proj",
    ffn="L.mlp",
    ffn_in="L.mlp.c_fc",
    ffn_out="L.mlp.c_proj",
    block="L",
    embedding="transformer.wte",
    head="lm_head",
    norm="L.ln_1 L.ln_2 transformer.ln_f",
)


def separate(attention: str, q: str, k: str, v: str, o: str) -> dict[str, str]:
    parts = {name: " ".join(f"{a}.{part}" for a in attention.split())
             for name, part in dict(query=q, key=k, value=v, output=o).items()}  # fmt: skip
    return {"attention": attention, **parts}


BERT_NORM = "bert.embeddings.LayerNorm L.attention.output.LayerNorm L.output.LayerNorm"
EXPECTED = {
    "bert": ("L=bert.encoder.layer.{}", BERT | dict(
        embedding="bert.embeddings.word_embeddings", head="classifier", norm=BERT_NORM)),
    "bert trunk": ("L=encoder.layer.{}", BERT | dict(
        embedding="embeddings.word_embeddings", norm=BERT_NORM.removeprefix("bert."))),
    "bert lm": ("L=bert.encoder.layer.{}", BERT | dict(
        embedding="bert.embeddings.word_embeddings", head="cls.predictions.decoder",
        norm=BERT_NORM + " cls.predictions.transform.LayerNorm")),
    "albert": ("L=albert.encoder.albert_layer_groups.0.albert_layers.0", dict(
        separate("L.attention", "query", "key", "value", "dense"), ffn_in="L.ffn", ffn_out="L.ffn_output", block="L",
        embedding="albert.embeddings.word_embeddings", head="classifier",
        norm="albert.embeddings.LayerNorm L.full_layer_layer_norm L.attention.LayerNorm")),
    "roberta": ("L=roberta.encoder.layer.{}", BERT | dict(
        embedding="roberta.embeddings.word_embeddings", head="classifier.dense classifier.out_proj",
        norm=BERT_NORM.replace("bert.", "roberta."))),
    "distilbert": ("L=distilbert.transformer.layer.{}", dict(
        separate("L.attention", "q_lin", "k_lin", "v_lin", "out_lin"), ffn="L.ffn", ffn_in="L.ffn.lin1",
        ffn_out="L.ffn.lin2", block="L", embedding="distilbert.embeddings.word_embeddings",
        head="pre_classifier classifier",
        norm="distilbert.embeddings.LayerNorm L.sa_layer_norm L.output_layer_norm")),
    "gpt2": ("L=transformer.h.{}", GPT2),
    "gpt2 cross": ("L=transformer.h.{}", {name: names for name, names in GPT2.items() if name != "qkv"} | dict(
        attention="L.attn L.crossattention", output="L.attn.c_proj L.crossattention.c_proj",
        norm="L.ln_1 L.ln_cross_attn L.ln_2 transformer.ln_f")),
    "gpt_neo": ("L=transformer.h.{}", dict(
        separate("L.attn.attention", "q_proj", "k_proj", "v_proj", "out_proj"), ffn="L.mlp", ffn_in="L.mlp.c_fc",
        ffn_out="L.mlp.c_proj", block="L", embedding="transformer.wte", head="lm_head",
        norm="L.ln_1 L.ln_2 transformer.ln_f")),
    "gpt_neox": ("L=gpt_neox.layers.{}", FUSED | dict(
        embedding="gpt_neox.embed_in",
        norm="L.input_layernorm L.post_attention_layernorm gpt_neox.final_layer_norm")),
    "llama": ("L=model.layers.{}", LLAMA),
    "qwen2": ("L=model.layers.{}", LLAMA),
    "mistral": ("L=model.layers.{}", LLAMA),
    "phi3": ("L=model.layers.{}", dict(
        attention="L.self_attn", qkv="L.self_attn.qkv_proj", output="L.self_attn.o_proj", ffn="L.mlp",
        ffn_in="L.mlp.gate_up_proj", ffn_out="L.mlp.down_proj", block="L", embedding="model.embed_tokens",
        head="lm_head", norm="L.input_layernorm L.post_attention_layernorm model.norm")),
    "opt": ("L=model.decoder.layers.{}", dict(
        separate("L.self_attn", "q_proj", "k_proj", "v_proj", "out_proj"), ffn_in="L.fc1", ffn_out="L.fc2", block="L",
        embedding="model.decoder.embed_tokens", head="lm_head",
        norm="model.decoder.final_layer_norm L.self_attn_layer_norm L.final_layer_norm")),
    "bloom": ("L=transformer.h.{}", {
        name: names.replace("L.attention", "L.self_attention") for name, names in FUSED.items()} | dict(
        embedding="transformer.word_embeddings",
        norm="transformer.word_embeddings_layernorm L.input_layernorm L.post_attention_layernorm transformer.ln_f")),
    "mixtral": ("L=model.layers.{}", {n: v for n, v in LLAMA.items() if n not in ("ffn_in", "ffn_out")}),
    "t5": ("E=encoder.block.{} D=decoder.block.{}", T5_ROLES),
    "t5 gated": ("E=encoder.block.{} D=decoder.block.{}", T5_ROLES | dict(
        ffn_in=" ".join(f"{f}.{w}" for f in T5_ROLES["ffn"].split() for w in ("wi_0", "wi_1")))),
    "bart": ("E=model.encoder.layers.{} D=model.decoder.layers.{}", BART | dict(
        embedding="model.encoder.embed_tokens", head="lm_head",
        norm=BART["norm"] + " model.encoder.layernorm_embedding model.decoder.layernorm_embedding")),
    "mbart": ("E=model.encoder.layers.{} D=model.decoder.layers.{}", BART | dict(
        embedding="model.encoder.embed_tokens", head="lm_head",
        norm=BART["norm"] + " model.encoder.layernorm_embedding model.decoder.layernorm_embedding "
        "model.encoder.layer_norm model.decoder.layer_norm")),
    "vit": ("L=vit.layers.{}", dict(
        separate("L.attention", "q_proj", "k_proj", "v_proj", "o_proj"), ffn="L.mlp", ffn_in="L.mlp.fc1",
        ffn_out="L.mlp.fc2", block="L", embedding="vit.embeddings.patch_embeddings", head="classifier",
        norm="L.layernorm_before L.layernorm_after vit.layernorm")),
    # The spectrogram's convolution or the decoder's tokens: the embedding is refused.
    "whisper": ("E=model.encoder.layers.{} D=model.decoder.layers.{}", BART | dict(
        head="proj_out", norm=BART["norm"] + " model.encoder.layer_norm model.decoder.layer_norm")),
    "clip": ("E=text_model.encoder.layers.{} D=vision_model.encoder.layers.{}", dict(
        separate("E.self_attn D.self_attn", "q_proj", "k_proj", "v_proj", "out_proj"), ffn="E.mlp D.mlp",
        ffn_in="E.mlp.fc1 D.mlp.fc1", ffn_out="E.mlp.fc2 D.mlp.fc2", block="E D",
        norm="E.layer_norm1 E.layer_norm2 D.layer_norm1 D.layer_norm2 text_model.final_layer_norm "
        "vision_model.pre_layrnorm vision_model.post_layernorm")),
    # The pooling head has an attention and a feed-forward part of its own: all but blocks and norms is refused.
    "siglip": ("E=text_model.encoder.layers.{} D=vision_model.encoder.layers.{}", dict(
        block="E D", norm="E.layer_norm1 E.layer_norm2 D.layer_norm1 D.layer_norm2 text_model.final_layer_norm "
        "vision_model.post_layernorm vision_model.head.layernorm")),
    # Its projections are parameters of the attention.
    "xlnet": ("L=transformer.layer.{}", dict(
        attention="L.rel_attn", ffn="L.ff", ffn_in="L.ff.layer_1", ffn_out="L.ff.layer_2", block="L",
        embedding="transformer.word_embedding", head="lm_loss", norm="L.rel_attn.layer_norm L.ff.layer_norm")),
    "funnel": ("L=funnel.encoder.blocks.{}.0", dict(
        separate("L.attention", "q_head", "k_head", "v_head", "post_proj"), ffn="L.ffn", ffn_in="L.ffn.linear_1",
        ffn_out="L.ffn.linear_2", block="L", embedding="funnel.embeddings.word_embeddings",
        head="classifier.linear_hidden classifier.linear_out",
        norm="funnel.embeddings.layer_norm L.attention.layer_norm L.ffn.layer_norm")),
    # Its contact head belongs to the trunk.
    "esm": ("L=esm.encoder.layer.{}", BERT | dict(
        embedding="esm.embeddings.word_embeddings", head="classifier.dense classifier.out_proj",
        norm="L.attention.LayerNorm L.LayerNorm esm.encoder.emb_layer_norm_after")),
    # Four feed-forward pairs and three bottlenecks in a block.
    "mobilebert": ("L=mobilebert.encoder.layer.{}", {n: v for n, v in BERT.items() if "ffn" not in n} | dict(
        embedding="mobilebert.embeddings.word_embeddings", head="classifier",
        norm="mobilebert.embeddings.LayerNorm L.attention.output.LayerNorm L.output.LayerNorm "
        "L.output.bottleneck.LayerNorm L.bottleneck.input.LayerNorm L.bottleneck.attention.LayerNorm "
        "L.ffn.0.output.LayerNorm L.ffn.1.output.LayerNorm L.ffn.2.output.LayerNorm")),
    # query and query_global …
    "longformer": ("L=longformer.encoder.layer.{}", {
        n: v for n, v in BERT.items() if n not in ("query", "key", "value")} | dict(
        embedding="longformer.embeddings.word_embeddings", head="classifier.dense classifier.out_proj",
        norm=BERT_NORM.replace("bert.", "longformer."))),
    "deberta_v2": ("L=deberta.encoder.layer.{}", {n: v for n, v in BERT.items() if n not in ("query", "key")} | dict(
        value="L.attention.self.value_proj", embedding="deberta.embeddings.word_embeddings",
        norm=BERT_NORM.replace("bert.", "deberta."))),
    "mamba": ("L=backbone.layers.{}", dict(head="lm_head", norm="L.norm backbone.norm_f")),
}  # fmt: skip


def build(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    model, config, settings = ZOO[name]
    return getattr(transformers, model)(getattr(transformers, config)(**copy.deepcopy(settings)))


def expand(layers: str, names: str) -> set[str]:
    """`L.query`, with L=layer.{}: the two layers' names."""
    stands = dict(pair.split("=") for pair in layers.split())
    out = set()
    for name in names.split():
        first, dot, rest = name.partition(".")
        out |= {(stands.get(first, first) + dot + rest).replace("{}", str(i)) for i in (0, 1)}
    return out


@pytest.mark.parametrize("name", EXPECTED)
def test_names(name):
    model, (layers, expected) = build(name), EXPECTED[name]
    roles, order = find_roles(model), [n for n, _ in model.named_modules()]
    for r in NAMES:
        assert set(roles[r]) == expand(layers, expected.get(r, "")), r
        assert roles[r] == sorted(roles[r], key=order.index), r
    refused = next(r for r in NAMES if r not in expected)
    with pytest.raises(RoleError, match=f"at=mb.role.{refused} has no certain answer in {type(model).__name__}: "):
        match_role(model, Role(refused))


def test_what_roles_name_is_called():
    """The embedding and the head of T5 and BART fire, which their own `shared` does not."""
    for name in ("t5", "mbart", "bert lm"):
        model, fired = build(name).eval(), set()
        for n, m in model.named_modules():
            m.register_forward_hook(lambda *_, n=n, fired=fired: fired.add(n))
        ids = torch.arange(4)[None]
        with torch.no_grad():
            model(input_ids=ids, **({"decoder_input_ids": ids} if name != "bert lm" else {}))
        roles = find_roles(model)
        for r in NAMES:
            assert set(roles[r]) <= fired, (name, r)


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2, enable_nested_tensor=False)


def test_torch_encoder():
    model = encoder()
    assert match_role(model, role.attention) == ["layers.0.self_attn", "layers.1.self_attn"]
    assert match_role(model, role.ffn_in) == ["layers.0.linear1", "layers.1.linear1"]
    assert match_role(model, role.ffn_out) == ["layers.0.linear2", "layers.1.linear2"]
    assert match_role(model, role.block) == ["layers.0", "layers.1"]
    assert len(match_role(model, role.norm)) == 4
    for part in (role.query, role.output, role.qkv):
        with pytest.raises(RoleError, match="MultiheadAttention computes it in no module that is called"):
            match_role(model, part)
    assert not any("out_proj" in name for names in find_roles(model).values() for name in names)


def test_plain_torch_model():
    model = nn.ModuleDict({"tokens": nn.Embedding(9, 32), "pos": nn.Embedding(9, 32), "trunk": encoder()})
    model["classify"] = nn.Linear(32, 3)
    assert match_role(model, role.embedding) == ["tokens"]
    assert match_role(model, role.head) == ["classify"]
    model["other"] = nn.Linear(32, 3)
    with pytest.raises(RoleError, match=r"several Linears .* It could mean 'classify' \(1\), 'other' \(1\)"):
        match_role(model, role.head)


SOURCE = """
class CausalSelfAttention(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x):
        q, k, v = self.c_attn(x).split(x.shape[-1], -1)
        return self.c_proj((q @ k.mT).softmax(-1) @ v)

class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(d), CausalSelfAttention(d), nn.LayerNorm(d)
        self.mlp = nn.Sequential(nn.Linear(d, 3 * d), nn.GELU(), nn.Linear(3 * d, d))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))
"""


def test_without_source():
    """Classes that Python has no source of: compiled, frozen, or typed at a prompt. An MLP three wide is no q|k|v."""
    scope = {"nn": nn, "__name__": "nowhere"}
    exec(SOURCE, scope)
    model = nn.Sequential(*[scope["Block"](32) for _ in range(2)])
    assert match_role(model, role.attention) == ["0.attn", "1.attn"]
    assert match_role(model, role.qkv) == ["0.attn.c_attn", "1.attn.c_attn"]
    assert match_role(model, role.output) == ["0.attn.c_proj", "1.attn.c_proj"]
    assert match_role(model, role.ffn) == ["0.mlp", "1.mlp"]
    assert match_role(model, role.ffn_in) == ["0.mlp.0", "1.mlp.0"]
    assert match_role(model, role.block) == ["0", "1"]
    with pytest.raises(RoleError, match=r"fused in '0.attn.c_attn'; take mb.role.attention.qkv"):
        match_role(model, role.attention.query)


def test_a_feed_forward_module_holds_no_attention():
    """The module in which its Linears meet may be one around the attention too."""
    model = nn.ModuleList([Wrapped(), Wrapped()])
    assert match_role(model, role.ffn_in) == ["0.inner.up", "1.inner.up"]
    with pytest.raises(RoleError, match="its Linears meet only in the block"):
        match_role(model, role.ffn)


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        parts = {"attn": nn.MultiheadAttention(32, 4), "up": nn.Linear(32, 64), "down": nn.Linear(64, 32)}
        self.inner = nn.ModuleDict(parts)


def test_swapped_modules_are_their_base():
    """What modbay swaps and adds changes no role."""
    model = build("bert")
    before = find_roles(model)
    for name in ("", "bert.encoder.layer.0.attention.self", "bert.encoder.layer.0.attention.self.query"):
        module = model.get_submodule(name)
        base = type(module)
        module.__class__ = type(base.__name__, (base,), {"_base": base, "forward": lambda self, *a, **k: None})
        module.add_module("_bay", nn.ModuleDict({"a_norm": nn.LayerNorm(32), "query": nn.Linear(32, 32)}))
    assert find_roles(model) == before


def test_a_list_that_differs_is_refused():
    """A layer that is no block among the blocks."""
    model = build("bert")
    model.bert.encoder.layer.append(nn.Linear(32, 32))
    with pytest.raises(RoleError, match=r"'bert.encoder.layer.\*' \(1\) stand among the blocks"):
        match_role(model, role.block)


def test_strange_attention_is_refused():
    """Something that calls itself attention, and is not recognised."""
    model = build("bert")
    model.bert.encoder.extra = type("LinearAttention", (nn.Module,), {})()
    model.bert.encoder.extra.mix = nn.Linear(32, 32)
    with pytest.raises(RoleError, match=r"'bert.encoder.extra' \(1\) are called attention"):
        match_role(model, role.attention)


def test_messages():
    """The argument, the cause, what could be meant, the way out."""
    with pytest.raises(RoleError) as caught:
        match_role(build("bert"), role.ffn)
    assert str(caught.value) == (
        "at=mb.role.ffn has no certain answer in BertForSequenceClassification: its feed-forward part is no module: "
        "its Linears meet only in the block; take mb.role.ffn_in, mb.role.ffn_out or mb.span(mb.role.ffn_in, "
        "mb.role.ffn_out). It could mean 'bert.encoder.layer.*.intermediate.dense' (2), "
        "'bert.encoder.layer.*.output.dense' (2). Give names or a pattern instead, "
        "at='bert.encoder.layer.*.intermediate.dense': `modbay inspect MODEL` lists them."
    )
    with pytest.raises(RoleError, match=r"'longformer.encoder.layer.\*.attention.self.query_global' \(2\)"):
        match_role(build("longformer"), role.query)
    with pytest.raises(RoleError, match=r"fused parameters. It could mean 'model.layers.\*.mlp.experts.gate_up_proj'"):
        match_role(build("mixtral"), role.ffn_in)
    with pytest.raises(RoleError, match="there is no role 'mlp'; the roles are attention, query"):
        match_role(build("bert"), Role("mlp"))
    assert issubclass(RoleError, ModbayError)


def test_vocabulary():
    assert role.attention.query == role.query == Role("query") and role.attention.qkv == role.qkv
    assert repr(role.attention) == "mb.role.attention" and copy.deepcopy(role.attention) == role.attention
    assert all(getattr(role, name) == Role(name) for name in NAMES)
    with pytest.raises(AttributeError, match=r"mb.role.ffn has no part 'query'"):
        role.ffn.query  # noqa: B018
    with pytest.raises(AttributeError, match=r"mb.role has no 'mlp'; the roles are attention, query"):
        role.mlp  # noqa: B018


def test_describe():
    rows = {row.pattern: row for row in describe_roles(build("bert"))}
    query = rows["bert.encoder.layer.*.attention.self.query"]
    assert (query.type, query.shape, query.count, query.roles) == ("Linear", "32 → 32", 2, "query")
    assert rows["bert.encoder.layer.*"].roles == "block" and rows["bert.encoder.layer.*"].type == "BertLayer"
    assert rows["bert.encoder.layer.*.intermediate.dense"].roles == "ffn_in"
    assert rows["bert.embeddings.word_embeddings"].shape == "50 × 32"
    doubtful = {row.pattern: row.roles for row in describe_roles(build("longformer"))}
    assert doubtful["longformer.encoder.layer.*.attention.self.query_global"] == "query?"
    experts = [row for row in describe_roles(build("mixtral")) if row.type == "Parameter"]
    assert [(row.pattern, row.count) for row in experts] == [
        ("model.layers.*.mlp.experts.gate_up_proj", 2),
        ("model.layers.*.mlp.experts.down_proj", 2),
    ]


def test_described_patterns_match():
    """What `inspect` prints can be pasted into `at`."""
    model = build("t5")
    names = [name for name, _ in model.named_modules()]
    for row in describe_roles(model):
        assert len(fnmatch.filter(names, row.pattern)) >= row.count
