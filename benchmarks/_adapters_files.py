"""The checkpoints that tests/test_adapters_files.py reads: what the library adapters writes, on tiny random models.

Run apart, since adapters 1.3 needs an older transformers than modbay is tested with:

    pip install adapters==1.3.0 && python benchmarks/_adapters_files.py tests/fixtures/adapters

FOLDER/<base>.safetensors holds a base's weights, an input and, by name, the logits and the last hidden state with each
of its checkpoints, FOLDER/<base>-<name>/. With names of bases behind FOLDER, only theirs. To load what modbay wrote,
and print its logits' error:

    python benchmarks/_adapters_files.py --load tests/fixtures/adapters EXPORTED
"""

import copy
import json
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import adapters  # type: ignore[import-not-found] (an environment of its own)
import torch
import transformers
from adapters.composition import Average, Fuse, Stack  # type: ignore[import-not-found]
from safetensors.torch import load_file, save_file

SMALL = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
PLACES = {"max_position_embeddings": 10, "num_labels": 3}
DISTIL = {"vocab_size": 20, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
GPT = {"vocab_size": 20, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24, "n_positions": 10,
       "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
T5 = {"vocab_size": 20, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2,
      "decoder_start_token_id": 0}  # fmt: skip
SLIM = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12,
        "max_position_embeddings": 10}  # fmt: skip
ROTARY = {**SLIM, "num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 0, "attn_implementation": "eager"}
DEBERTA = {**SLIM, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False,
           "share_att_key": True, "position_buckets": 4, "norm_rel_ebd": "layer_norm"}  # fmt: skip
BART = {"vocab_size": 20, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "max_position_embeddings": 10,
        "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0, "attn_implementation": "eager"}  # fmt: skip
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
    # Eager, since under "sdpa" adapters' prefixes hide the nearest tokens, or, where a text is padded, do nothing.
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT, attn_implementation="eager")),
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
WORDS = {  # models whose head gives words: adapters' own class of each runs the inverse of an invertible adapter there
    "bertlm": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**TINY)),
    "robertalm": lambda: transformers.RobertaForMaskedLM(transformers.RobertaConfig(**TINY)),
    "distilbertlm": lambda: transformers.DistilBertForMaskedLM(
        transformers.DistilBertConfig(**{**DISTIL, "dim": 8, "n_layers": 1}, max_position_embeddings=10)
    ),
    "gpt2lm": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**GPT, "n_embd": 8, "n_layer": 1})),
    "t5lm": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**{**T5, "d_model": 8, "d_kv": 4})),
}
PREFIX = adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=6)
FLAT = adapters.PrefixTuningConfig(prefix_length=3, flat=True)
QUARTER = {"reduction_factor": 4}
METHODS = {
    "pfeiffer": adapters.SeqBnConfig(**QUARTER),
    "both": adapters.SeqBnConfig(**QUARTER, mh_adapter=True),
    "houlsby": adapters.DoubleSeqBnConfig(**QUARTER),
    "before": adapters.SeqBnConfig(**QUARTER, original_ln_before=False),
    "parallel": adapters.ParBnConfig(**QUARTER),
    "learned": adapters.ParBnConfig(**QUARTER, scaling="learned"),
    "normed": adapters.DoubleSeqBnConfig(**QUARTER, ln_before=True),
    "norm-after": adapters.DoubleSeqBnConfig(**QUARTER, ln_after=True),
    "plus": adapters.AdapterPlusConfig(**QUARTER, stochastic_depth=0.0),
    "invertible": adapters.SeqBnInvConfig(**QUARTER),
    "houlsby-invertible": adapters.DoubleSeqBnInvConfig(**QUARTER),
    "compacter": adapters.CompacterConfig(reduction_factor=2),
    "compacter++": adapters.CompacterPlusPlusConfig(reduction_factor=2),
    "phm": adapters.CompacterConfig(reduction_factor=2, factorized_phm_W=False),
    "lora": adapters.LoRAConfig(r=2, alpha=6),
    "lora-all": adapters.LoRAConfig(
        r=3, alpha=3, attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True, leave_out=[0]
    ),
    "ia3": adapters.IA3Config(),
    "vera": adapters.VeraConfig(r=2),
    "prompt": adapters.PromptTuningConfig(prompt_length=3),
    "prefix": PREFIX,
    "prefix-flat": FLAT,
    "mam": adapters.MAMConfig(PREFIX, adapters.ParBnConfig(**QUARTER)),
    "unipelt": adapters.UniPELTConfig(PREFIX, adapters.SeqBnConfig(**QUARTER), adapters.LoRAConfig(r=2, alpha=2)),
    "unipelt-flat": adapters.UniPELTConfig(FLAT, adapters.SeqBnConfig(**QUARTER), adapters.LoRAConfig(r=2, alpha=2)),
    "cross": adapters.DoubleSeqBnConfig(**QUARTER, cross_adapter=True),
    "dora": adapters.DoRAConfig(r=2, alpha=2),
    "reft": adapters.LoReftConfig(),
}
ROWS = ["prefix", "prefix-flat", "mam", "lora", "lora-all", "ia3"]
CASES = {
    "bert": [name for name in METHODS if name not in ("cross", "unipelt-flat", "both")],
    "roberta": ["pfeiffer", "lora", "prefix-flat", "houlsby-invertible"],
    "distilbert": ["pfeiffer", "parallel", "ia3", "prefix-flat"],
    "gpt2": ["pfeiffer", "houlsby-invertible", "parallel", "compacter", *ROWS, "unipelt", "both"],
    "t5": ["pfeiffer", "cross", "parallel", "houlsby-invertible", *ROWS, "unipelt-flat"],
    "mt5": ["pfeiffer", "houlsby-invertible", "prefix-flat", "lora-all", "ia3"],
    "vit": ["houlsby", "parallel", "plus", "pfeiffer", *ROWS, "unipelt", "both"],
    "llama": ["houlsby-invertible", "unipelt-flat", "lora-all"],
    "mistral": ["parallel", "prefix-flat", "ia3"],
    "electra": ["pfeiffer", "prefix-flat", "houlsby-invertible"],
    "debertav2": ["pfeiffer", "houlsby-invertible", "lora-all"],
    "bart": ["cross", "mam", "lora-all"],
    "mbart": ["both", "unipelt-flat"],
    "plbart": ["cross"],
    "beit": ["houlsby", "parallel", "unipelt-flat"],
    "albert": ["houlsby", "parallel", "unipelt-flat"],
    **{kind: ["inverse"] for kind in WORDS},
}
SETUPS = {
    "fuse": (["a", "b"], lambda: Fuse("a", "b"), adapters.SeqBnConfig(**QUARTER)),
    "fuse-before": (["a", "b"], lambda: Fuse("a", "b"), adapters.DoubleSeqBnConfig(**QUARTER)),
    "stack": (["a", "b"], lambda: Stack("a", "b"), adapters.SeqBnConfig(**QUARTER)),
    "stack-before": (["a", "b"], lambda: Stack("a", "b"), adapters.DoubleSeqBnConfig(**QUARTER)),
    "average": (["a", "b"], lambda: Average("a", "b", weights=[0.2, 0.8]), adapters.LoRAConfig(r=2, alpha=2)),
}


def shake(model: torch.nn.Module) -> None:
    """Every parameter at random, far from where it starts; a prefix's once, wherever it is found."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)


def outputs(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of an encoder-decoder, which has its input in both, those of the decoder."""
    both = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        out = model(**{model.main_input_name: ids}, **both, output_hidden_states=True)
    return {"logits": out.logits, "hidden": (out.decoder_hidden_states if both else out.hidden_states)[-1]}


def base(kind: str) -> tuple[Any, torch.Tensor]:
    model = BASES[kind]().eval()
    shake(model)
    if kind == "mt5":
        model.lm_head.weight.data.copy_(model.shared.weight)  # which transformers 5 has as one
    return model, torch.randn(3, 3, 4, 4) if kind in ("vit", "beit") else torch.randint(2, 20, (3, 5))


def write(folder: Path, kind: str) -> None:
    torch.manual_seed(0)
    model, ids = base(kind)
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()} | {"ids": ids}
    alone = copy.deepcopy(model)  # a ViT that ran before would keep its layers' forward, without adapters
    kept |= {f"{key}.": value for key, value in outputs(alone, ids).items()}
    adapters.init(model)
    for name in CASES[kind]:
        where = folder / f"{kind}-{name}"
        model.add_adapter(name, config=METHODS[name])
        added = [p for n, p in model.named_parameters() if n not in kept]
        for parameter in added:
            torch.nn.init.normal_(parameter, std=0.4)
        model.set_active_adapters(name)
        kept |= {f"{key}.{name}": value for key, value in outputs(model, ids).items()}
        tied = any(part in name for part in ("prefix", "mam", "unipelt", "normed"))  # safetensors refuses what is twice
        headed = name == "pfeiffer" and any("classifier" in n for n in kept)  # this one learned its head
        if headed:
            head = {n: p.detach().clone() for n, p in model.named_parameters() if "classifier" in n}
            shake(torch.nn.ParameterList([p for n, p in model.named_parameters() if n in head]))
            kept |= {f"{key}.{name}": value for key, value in outputs(model, ids).items()}
        model.save_adapter(str(where), name, with_head=headed, use_safetensors=not tied)
        model.delete_adapter(name)
        if headed:
            model.load_state_dict(head, strict=False)
    for name, (parts, make, config) in SETUPS.items() if kind == "bert" else ():
        for part in parts:
            model.add_adapter(part, config=config)
        setup = make()
        if isinstance(setup, Fuse):
            model.add_adapter_fusion(setup)
        for parameter in [p for n, p in model.named_parameters() if n not in kept]:
            torch.nn.init.normal_(parameter, std=0.4)
        model.set_active_adapters(setup)
        kept |= {f"{key}.{name}": value for key, value in outputs(model, ids).items()}
        model.save_adapter_setup(str(folder / f"{kind}-{name}"), setup, use_safetensors=True)
        for extra in (folder / f"{kind}-{name}").rglob("*head*"):
            extra.unlink()
        if isinstance(setup, Fuse):
            model.delete_adapter_fusion(setup)
        for part in parts:
            model.delete_adapter(part)
    if kind == "bert":
        kept |= flexible(folder, kept, ids)
    save_file({key: value.contiguous() for key, value in kept.items()}, folder / f"{kind}.safetensors")


def flexible(folder: Path, kept: dict[str, torch.Tensor], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """A model of adapters' own with a head of two labels, which is that of the transformers model."""
    model = adapters.BertAdapterModel(transformers.BertConfig(**SMALL, max_position_embeddings=10)).eval()
    model.load_state_dict({k: v for k, v in kept.items() if k.startswith("bert.")}, strict=False)
    model.add_adapter("flex", config=METHODS["before"])
    names = {0: "no", 1: "yes"}
    model.add_classification_head("flex", 2, layers=1, activation_function=None, use_pooler=True, id2label=names)
    for parameter in [p for n, p in model.named_parameters() if "flex" in n]:
        torch.nn.init.normal_(parameter, std=0.4)
    model.set_active_adapters("flex")
    model.save_adapter(str(folder / "bert-flex"), "flex", use_safetensors=True)
    return {f"{key}.flex": value for key, value in outputs(model, ids).items()}


def worded(model: Any) -> Any:
    """adapters' own class of a model whose head gives words, with the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        own = adapters.AutoAdapterModel.from_pretrained(folder).eval()
    own.config._name_or_path = ""
    bias = model.get_output_embeddings().bias
    if bias is not None:  # of BERT's kind it is not taken along
        own.get_output_embeddings().bias.data = bias.data.clone()
    return own


def write_words(folder: Path, kind: str) -> None:
    """A base whose head gives words, and an invertible adapter, with and without its inverse there."""
    torch.manual_seed(0)
    model, ids = WORDS[kind]().eval(), torch.randint(2, 20, (3, 5))
    shake(model)
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()} | {"ids": ids}
    kept |= {f"{key}.": value for key, value in outputs(model, ids).items()}
    model = worded(model)
    assert torch.allclose(outputs(model, ids)["logits"], kept["logits."], atol=1e-5)
    model.add_adapter("inverse", config=METHODS["invertible"])
    for parameter in [p for n, p in model.named_parameters() if ".inverse." in n]:
        torch.nn.init.normal_(parameter, std=0.4)
    model.set_active_adapters("inverse")
    kept |= {f"{key}.inverse": value for key, value in outputs(model, ids).items()}
    model.save_adapter(str(folder / f"{kind}-inverse"), "inverse", with_head=False, use_safetensors=True)
    save_file({key: value.contiguous() for key, value in kept.items()}, folder / f"{kind}.safetensors")


def load(folder: Path, exported: Path) -> None:
    """The largest difference of logits from the checkpoint's own, as JSON by name, and what was missing."""
    found = {}
    for where in sorted(exported.iterdir()):
        kind, _, name = where.name.partition("-")
        saved = load_file(folder / f"{kind}.safetensors")
        model = (BASES | WORDS)[kind]().eval()
        head = where / "head_config.json"
        if head.exists():
            model.config.num_labels = json.loads(head.read_text())["num_labels"]
            model = type(model)(model.config).eval()
        shapes = {key: value.shape for key, value in model.state_dict().items()}
        model.load_state_dict({k: v for k, v in saved.items() if shapes.get(k) == v.shape}, strict=False)
        if kind in WORDS:
            model = worded(model)
        else:
            adapters.init(model)
        said: dict = {}
        if (where / "adapter_setup.json").exists():
            model.load_adapter_setup(str(where), set_active=True, use_safetensors=True)
        else:
            options = {"with_head": head.exists(), "loading_info": said, "use_safetensors": True}
            model.set_active_adapters(model.load_adapter(str(where), **options))
        error = (outputs(model, saved["ids"])["logits"] - saved[f"logits.{name}"]).abs().max()
        found[where.name] = {"error": float(error), **{k: v for k, v in said.items() if v}}
    print(json.dumps(found))


def main(*arguments: str) -> None:
    if arguments[0] == "--load":
        return load(Path(arguments[1]), Path(arguments[2]))
    folder, *kinds = arguments
    for kind in kinds or CASES:
        for old in Path(folder).glob(f"{kind}[-.]*"):
            old.unlink() if old.is_file() else shutil.rmtree(old)
        Path(folder).mkdir(parents=True, exist_ok=True)
        (write_words if kind in WORDS else write)(Path(folder), kind)
    return None


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(*sys.argv[1:])
