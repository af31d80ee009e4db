"""peft's checkpoints by architecture: round trips on small random models of each family that transformers has here.

    python benchmarks/peft_families.py [--only llama cohere] [--methods prefix]

peft makes an adapter at every linear layer ("all-linear"), or in front of the text, and computes; modbay reads it,
and writes it again for peft: the larger of the two errors, as a share of peft's largest logit. benchmarks/interop.py
puts the table into docs/interop.md.
"""

import argparse
import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import modbay as mb
from modbay.errors import ModbayError

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
         "vocab_size": 99, "max_position_embeddings": 64, "pad_token_id": 0}  # fmt: skip
KV = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
MOE = {**KV, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
       "shared_expert_intermediate_size": 24}  # fmt: skip
MLA = {**SMALL, "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4, "n_shared_experts": 1,
       "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "v_head_dim": 8,
       "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "first_k_dense_replace": 1}  # fmt: skip
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "n_positions": 64}
BOTH = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 99,
        "max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
        "decoder_start_token_id": 2}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4, "vocab_size": 99}
IMAGE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
         "image_size": 16, "patch_size": 8, "num_labels": 3}  # fmt: skip

CAUSAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "starcoder2", "olmo2", "cohere"), KV),
    **dict.fromkeys(("granite", "gemma3_text", "smollm3", "glm", "nemotron", "ernie4_5"), KV),
    "gemma2": {**KV, "query_pre_attn_scalar": 8},
    **{key: {**SMALL, "num_key_value_heads": 4} for key in ("stablelm", "phi", "persimmon")},
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"), MOE),
    "deepseek_v3": MLA,
    "gpt2": GPT,
    "gpt_neox": SMALL,
    **{key: {**GPT, "rotary_dim": 4} for key in ("gptj", "codegen")},
    "opt": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "vocab_size": 99,
            "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 99, "state_size": 8},
}  # fmt: skip
CLASSES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "deberta-v2", "modernbert", "mpnet"), SMALL),
    **{key: {**SMALL, "embedding_size": 32} for key in ("electra", "albert")},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 99},
}
PAIRS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("t5", "mt5"), T5),
    **dict.fromkeys(("bart", "mbart", "pegasus", "marian", "m2m_100"), BOTH),
}
IMAGES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("vit", "dinov2", "beit"), IMAGE),
    "swin": {"image_size": 16, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4],
             "window_size": 2, "num_labels": 3},
    "convnext": {"depths": [1, 1], "hidden_sizes": [8, 16], "num_stages": 2, "image_size": 16, "num_labels": 3},
}  # fmt: skip
GROUPS = {
    "CausalLM": (CAUSAL, "CAUSAL_LM"),
    "SequenceClassification": (CLASSES, "SEQ_CLS"),
    "Seq2SeqLM": (PAIRS, "SEQ_2_SEQ_LM"),
    "ImageClassification": (IMAGES, None),
}
LEFT = {"distilbert": ["pre_classifier"], "mamba": ["out_proj"]}  # a head; what peft's LoRA can't be at
TOLD = {"distilbert": (32, 2, 4), "mamba": (32, 2, 1)}  # width, layers and heads
ALL, FRONT = {"target_modules": "all-linear"}, {"num_virtual_tokens": 4}
METHODS: dict[str, Callable[..., Any]] = {
    "LoRA": lambda **task: peft.LoraConfig(r=4, **ALL, **task),
    "DoRA": lambda **task: peft.LoraConfig(r=4, use_dora=True, **ALL, **task),
    "(IA)³": lambda **task: peft.IA3Config(**ALL, feedforward_modules=[], **task),
    "LoHa": lambda **task: peft.LoHaConfig(r=2, **ALL, **task),
    "LoKr": lambda **task: peft.LoKrConfig(r=2, **ALL, **task),
    "VeRA": lambda **task: peft.VeraConfig(r=4, **ALL, **task),
    "prompt": lambda **task: peft.PromptTuningConfig(**FRONT, **task),
    "prefix": lambda **task: peft.PrefixTuningConfig(**FRONT, **task),
}


def families() -> Iterator[tuple[str, str]]:
    """(model type, group)."""
    for group, (types, _) in GROUPS.items():
        for kind in types:
            yield kind, group


def made(kind: str, group: str) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **GROUPS[group][0][kind])
    return getattr(transformers, f"AutoModelFor{group}").from_config(config).eval()


def inputs(group: str) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(1)
    if group == "ImageClassification":
        return {"pixel_values": torch.randn(3, 3, 16, 16, generator=source)}
    text = torch.randint(3, 90, (3, 7), generator=source)
    more = {"decoder_input_ids": text[:, :5]} if group == "Seq2SeqLM" else {}
    return {"input_ids": text, "attention_mask": torch.ones_like(text), **more}


def run(model: nn.Module, group: str) -> Tensor:
    with torch.no_grad():
        return model(**inputs(group)).logits


def cell(base: Any, group: str, method: str) -> tuple[str, str]:
    """(the error, or a word; why)."""
    config = METHODS[method](**({"task_type": task} if (task := GROUPS[group][1]) else {}))
    config.exclude_modules = LEFT.get(base.config.model_type)
    if hasattr(config, "token_dim"):  # peft can't tell it of all
        config.token_dim, config.num_layers, config.num_attention_heads = TOLD.get(base.config.model_type, [None] * 3)
    with tempfile.TemporaryDirectory() as folder:
        try:
            torch.manual_seed(1)
            theirs = peft.get_peft_model(copy.deepcopy(base), config)
            with torch.no_grad():
                for p in theirs.parameters():
                    if p.requires_grad:
                        p.add_(0.1 * torch.randn_like(p))
            wanted = run(theirs.eval(), group)
            theirs.save_pretrained(f"{folder}/theirs")
        except Exception as error:  # whatever peft says: it has no such adapter
            return "–", f"peft: {type(error).__name__}: {error}"
        ours = copy.deepcopy(base)
        try:
            bay = mb.load(ours, Path(folder, "theirs"))["peft"]
            got = run(ours, group)
            text = got.ndim == 3
            assert float((got - run(base, group)).abs().max()) > 1e-5
            first = float((got - (wanted[:, -got.shape[1] :] if text else wanted)).abs().max())
            bay.export(f"{folder}/ours")
        except ModbayError as error:
            return "refused", str(error).replace(folder, "FOLDER")
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), f"{folder}/ours").eval()
        second = float((run(again, group) - wanted).abs().max())
        return f"{max(first, second) / float(wanted.abs().max()):.0e}", ""


def rows(only: Sequence[str] = (), methods: Sequence[str] = ()) -> tuple[list[str], dict[str, str]]:
    """(a table in Markdown, why something is refused)."""
    columns = [method for method in METHODS if not methods or method in methods]
    out, why = [f"| model | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"], {}
    for kind, group in families():
        if only and kind not in only:
            continue
        base, cells = made(kind, group), []
        for method in columns:
            text = method in ("prompt", "prefix")
            said, reason = ("–", "") if text and GROUPS[group][1] is None else cell(base, group, method)
            cells.append(said)
            if reason:
                why[f"{kind}, {method}"] = reason
        out.append(f"| {kind} | {' | '.join(cells)} |")
        print(out[-1], flush=True)
    return out, why


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--only", nargs="*", default=[], help="model types")
    asked.add_argument("--methods", nargs="*", default=[], choices=list(METHODS))
    given = asked.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    _, why = rows(given.only, given.methods)
    for what, reason in why.items():
        print(f"{what}: {reason.splitlines()[0]:.300}")


if __name__ == "__main__":
    main()
