"""Layers that peft renames as it loads: of mixtures of experts, whose experts were layers before transformers 5.

For adapters from that time peft 0.21 takes targets of the experts' names for the fused experts, wherever they are: a
dense layer of the same name, or a shared expert's, would lose its LoRA without a word.
"""

from collections.abc import Iterable

from ._draft import Draft

MIXTRAL = ("mixtral", "minimax", "minimax_m2")
OTHERS = (
    "afmoe", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe",
    "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash", "mellum",
    "olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "sarvam_mla", "solar_open",
)  # fmt: skip
MOVED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(MIXTRAL, ("gate", "w1", "w2", "w3")),
    **dict.fromkeys(OTHERS, ("gate", "gate_proj", "up_proj", "down_proj")),
}  # names of targets, by the model's type


def kept(draft: Draft, sites: Iterable[str]) -> None:
    """Raise CompositionError for a LoRA at a layer that peft would rename."""
    kind = getattr(getattr(draft.model, "config", None), "model_type", "")
    for site in sites:
        if not draft.served and site.rpartition(".")[2] in MOVED.get(kind, ()):
            raise draft.refuse(site, f"is a layer that peft takes for the experts' in a {kind}, and drops its LoRA")
