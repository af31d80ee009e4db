"""The computation functions, one file each (survey section 3)."""

from ._lora import LoRA as LoRA
