"""LoRA in GGUF, as llama.cpp loads it: `llama-cli --lora FILE`.

A file has general.type "adapter", general.architecture as the base's own file has it, adapter.type "lora",
adapter.lora.alpha α, and for each weight that is changed two tensors, ΔW = α/r · B A: NAME.lora_a, A (r, i), and
NAME.lora_b, B (o, r), NAME being what the gguf package calls that weight in this architecture. Two things are
llama.cpp's own. Where it turns neighbouring features by rotary positions and transformers features half a head apart,
the rows of the queries' and keys' B are put in its order, as its conversion does with those of W. And A of the token
embeddings is (vocabulary, r), as its rows are looked up.

llama.cpp passes over what it doesn't know how to change, or fails only when it is run: so all of that is refused here.

Source: ggml-org/llama.cpp, convert_lora_to_gguf.py, conversion/ and src/llama-adapter.cpp (2026).
"""

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CompositionError, listed
from ..merge import Plain
from ..seams import Fitting
from ._files import inside, replaced
from .peft import plain_parts

# transformers' model_type: (gguf's name of the architecture, whether q and k are turned by neighbouring features).
# Only those whose weights llama.cpp otherwise keeps as they are.
ARCHITECTURES = {
    "llama": ("LLAMA", True),
    "mistral": ("LLAMA", True),
    "mixtral": ("LLAMA", True),
    "granite": ("GRANITE", True),
    "smollm3": ("SMOLLM3", True),
    "olmo": ("OLMO", True),
    "olmo2": ("OLMO2", False),
    "olmo3": ("OLMO2", False),
    "qwen2": ("QWEN2", False),
    "qwen2_moe": ("QWEN2MOE", False),
    "qwen3": ("QWEN3", False),
    "qwen3_moe": ("QWEN3MOE", False),
    "gemma": ("GEMMA", False),
    "gemma2": ("GEMMA2", False),
    "gemma3_text": ("GEMMA3", False),
    "phi": ("PHI2", False),
    "phi3": ("PHI3", False),
    "gpt2": ("GPT2", False),
    "bert": ("BERT", False),
}
EMBEDDING, OUTPUT = "token_embd", "output"
SUFFIX = ".gguf"


def write_gguf(path: Path, fitting: Fitting, name: str, rank: int | None, error: float) -> dict[str, float]:
    """Write PATH, or PATH/NAME.gguf where PATH does not end in .gguf; return the relative error of each site's update.

    Numbers are float32, or float16 where the base's are all float16. Raises CompositionError for what llama.cpp can't
    load, or an error that is too large, and ModuleNotFoundError without the gguf package.
    """
    gguf = _package()
    config: Any = getattr(fitting.model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type not in ARCHITECTURES:
        raise CompositionError(
            f"export as gguf: {model_type or type(fitting.model).__name__!r} is none of the models that modbay knows "
            f"llama.cpp's weights of: {listed(sorted(ARCHITECTURES))}. Fold the module into the base, and convert that."
        )
    made, heads = plain_parts(fitting, name, rank, error, "gguf")
    if heads:
        raise CompositionError(
            f"export of module {name!r} as gguf: llama.cpp loads no heads with a LoRA, and it has {listed(heads)}. "
            f'Fold the module into the base, and convert that, or export(format="lora").'
        )
    names = _Names(gguf, fitting, *ARCHITECTURES[model_type])
    tensors: dict[str, Tensor] = {}
    for site, one in made.items():
        tensors |= names.tensors(site, one)
    half = all(fitting.places[site].site.dtype == torch.float16 for site in made)
    own = {key: t.detach().to("cpu", torch.float16 if half else torch.float32) for key, t in tensors.items()}
    if half and not all(bool(torch.isfinite(t).all()) for t in own.values()):
        raise CompositionError(f"export of module {name!r} as gguf: it has values that float16 can't hold.")
    rank = next(iter(made.values())).b.shape[-1]

    def write(temporary: Path) -> None:
        writer = gguf.GGUFWriter(temporary, names.architecture)
        writer.add_type("adapter")
        writer.add_name(name)
        writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_F16 if half else gguf.LlamaFileType.ALL_F32))
        if base := getattr(config, "_name_or_path", None):
            writer.add_base_model_count(1)
            writer.add_base_model_name(0, str(base))
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))  # α/r = 1: the scale is in B
        for key, tensor in own.items():
            writer.add_tensor(key, tensor.contiguous().numpy())
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()

    replaced(path if path.suffix == SUFFIX else inside(path, name + SUFFIX), write)
    return {site: one.error for site, one in made.items()}


def _package() -> Any:
    try:
        return importlib.import_module("gguf")
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise ModuleNotFoundError(
            "export as gguf: this needs the gguf package: pip install 'modbay[gguf]'.", name="gguf"
        ) from None


class _Names:
    """What llama.cpp calls the weights of a model, and the order that it has their rows in."""

    def __init__(self, gguf: Any, fitting: Fitting, architecture: str, turned: bool):
        own = gguf.MODEL_ARCH[architecture]
        self.architecture: str = gguf.MODEL_ARCH_NAMES[own]
        self.fitting, self.turned = fitting, turned
        self.config: Any = fitting.model.config
        self.map = gguf.get_tensor_name_map(own, self.config.num_hidden_layers)

    def tensors(self, site: str, one: Plain) -> dict[str, Tensor]:
        """A and B of one weight, as llama.cpp has them."""
        place = self.fitting.places[site]
        if not place.whole:
            raise self._refuse(site, "it is at a part of a layer, and llama.cpp's are at whole ones")
        if place.site.form not in ("linear", "transposed", "embedding"):
            raise self._refuse(site, f"llama.cpp loads no LoRA of weights such as these ({place.site.form})")
        name = self._name(site)
        own = "token embeddings" if name == EMBEDDING else "output" if name == OUTPUT else ""
        if own and self.architecture != "bert" and self.config.tie_word_embeddings:
            raise self._refuse(site, f"the {own} are tied in this model, and llama.cpp would change both, or fails")
        a, b = one.a, one.b
        if name == EMBEDDING:
            a = a.mT
        if self.turned and name.endswith(("attn_q", "attn_k")):
            heads = self.config.num_attention_heads
            b = neighbours(b, heads if name.endswith("q") else self.config.num_key_value_heads or heads)
        return {f"{name}.weight.lora_a": a, f"{name}.weight.lora_b": b}

    def _name(self, site: str) -> str:
        prefix = getattr(self.fitting.model, "base_model_prefix", "")
        for name in (site, f"{prefix}.{site}", site.removeprefix(f"{prefix}.")):
            found = self.map.get_name(name)
            block = found is not None and found.startswith("blk.")
            if found and (block or found in (EMBEDDING, OUTPUT)):
                return found
        raise self._refuse(site, "llama.cpp changes no such weight")

    def _refuse(self, site: str, why: str) -> CompositionError:
        return CompositionError(
            f"export as gguf at site {site!r}: {why}. Fold the module into the base, and convert that."
        )


def neighbours(rows: Tensor, heads: int) -> Tensor:
    """Rows (heads · d, …), of which j and j + d/2 of a head are turned together, so that these are neighbours."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)
