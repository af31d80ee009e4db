"""LoRA in GGUF beside llama.cpp itself: what it tells of the next token, with our file and without, and what we tell.

    python benchmarks/llama_cpp.py PYTHON

PYTHON is an interpreter that has llama.cpp: `pip install xllamacpp` in an environment of its own. For each architecture
a small model of random weights is written as GGUF, and a LoRA at every linear layer (and, where it says so, at the
embedding and the output) by `bay.export(format="gguf")`; llama.cpp loads both and tells the log-probabilities of all
next tokens, in float32. Told is the largest difference from transformers' with modbay's module.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import gguf
import torch
import transformers

import modbay as mb
from modbay.library._gguf import ARCHITECTURES, neighbours

SPECIAL = ["<unk>", "<s>", "</s>"]
VOCABULARY = len(SPECIAL) + 256  # and all bytes
FIRST, LAST = (len(SPECIAL) + ord(letter) for letter in " ~")
HEADS, KEYS, LAYERS = 4, 2, 2
CONFIG = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": KEYS, "intermediate_size": 96, "max_position_embeddings": 128, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
LINEAR = ["*_proj"]
CASES = {
    "llama": ("llama", LINEAR),
    "llama, embedding and output": ("llama", [*LINEAR, "model.embed_tokens", "lm_head"]),
    "mistral": ("mistral", LINEAR),
    "qwen2": ("qwen2", LINEAR),
    "qwen3": ("qwen3", LINEAR),
}


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("python", metavar="PYTHON")
    given = asked.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as where:
        for name, (model_type, at) in CASES.items():
            torch.manual_seed(0)
            base, lora = Path(where) / "base.gguf", Path(where) / "lora.gguf"
            model = small(model_type)
            write_base(model, model_type, base)
            prompts = torch.randint(len(SPECIAL), VOCABULARY, (200, 12))
            bare = told(model, prompts)
            bay = mb.attach(model, at, {"de": mb.LoRA(4)})
            with torch.no_grad():
                for parameter in bay.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            bay.use("de").export(lora, "de", format="gguf")
            changed = told(model, prompts)
            # Of a token that is no letter llama.cpp tells nothing: a prompt after which there is one, both times.
            letters = [(t.argmax(-1) >= FIRST) & (t.argmax(-1) <= LAST) for t in (bare, changed)]
            row = int((letters[0] & letters[1]).nonzero()[0])
            ids, bare, changed = prompts[row], bare[row], changed[row]
            call = json.dumps({"base": str(base), "lora": str(lora), "ids": ids.tolist(), "n": VOCABULARY})
            command = [given.python, str(Path(__file__).with_name("_llama_cpp.py")), call]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            theirs = json.loads(done.stdout.splitlines()[-1])
            without, with_it = (float((torch.tensor(theirs[key]) - ours).abs().max())
                                for key, ours in (("bare", bare), ("lora", changed)))  # fmt: skip
            moved = float((changed - bare).abs().max())
            print(f"{name}: bare {without:.1g}, with the LoRA {with_it:.1g}; it changes {moved:.2g}", flush=True)
    print(f"xllamacpp {theirs['version']}, transformers {transformers.__version__}, gguf {version('gguf')}")


def small(model_type: str) -> transformers.PreTrainedModel:
    """Weights so large that each layer matters."""
    more = {"head_dim": 16} if model_type == "qwen3" else {}
    config = transformers.AutoConfig.for_model(model_type, **CONFIG, **more)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.15)
    return model


@torch.no_grad()
def told(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits[:, -1].log_softmax(-1)


def write_base(model: transformers.PreTrainedModel, model_type: str, path: Path) -> None:
    """As llama.cpp's conversion has it: names, and the rows of queries and keys where it turns neighbours."""
    own, turned = ARCHITECTURES[model_type]
    architecture, config = gguf.MODEL_ARCH[own], model.config
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEYS)
    writer.add_key_length(config.hidden_size // HEADS)
    writer.add_value_length(config.hidden_size // HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // HEADS)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(VOCABULARY)
    writer.add_file_type(int(gguf.LlamaFileType.ALL_F32))
    writer.add_tokenizer_model("llama")
    writer.add_token_list([one.encode() for one in SPECIAL] + [f"<0x{i:02X}>".encode() for i in range(256)])
    writer.add_token_scores([0.0] * VOCABULARY)
    kinds = gguf.TokenType
    writer.add_token_types([kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL] + [kinds.BYTE] * 256)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(architecture, LAYERS)
    for name, tensor in model.state_dict().items():
        rows = next((n for key, n in (("q_proj", HEADS), ("k_proj", KEYS)) if turned and key in name), None)
        values = tensor if rows is None else neighbours(tensor, rows)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), values.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
