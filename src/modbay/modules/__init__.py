"""The computation functions, one file each (survey section 3)."""

from ._bottleneck import Bottleneck as Bottleneck
from ._ia3 import IA3 as IA3
from ._lora import LoRA as LoRA
from ._prefix import Prefix as Prefix
from ._prompt import Prompt as Prompt
