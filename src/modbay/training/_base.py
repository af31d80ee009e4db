"""The base of a run: a transformers model, under one head for what is classified, tagged or measured.

Masked mean pooling: Reimers and Gurevych, "Sentence-BERT", 2019 (arXiv 1908.10084).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ..errors import ConfigError
from ._config import Config

FLOOR = 1e-2  # of a feature's deviation: the maximum over pieces is constant on some dimensions
AUTO = {
    "causal": transformers.AutoModelForCausalLM,
    "masked": transformers.AutoModelForMaskedLM,
    "seq2seq": transformers.AutoModelForSeq2SeqLM,
}


class TextModel(nn.Module):
    """logits = W z, z = (pool of the trunk's hidden states − mean) / scale.

    input_ids, attention_mask (b, t) → logits (b, classes); of each word piece, (b, t, classes), where tokens is set.
    The head is a place for modules, one a task: what stands there at first gives zeros.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, trunk: nn.Module, pool: Sequence[str] = ("mean",), hidden: Sequence[int] = (-1,), tokens=False):
        super().__init__()
        self.trunk: Any = trunk
        self.pool, self.hidden, self.tokens = tuple(pool), tuple(hidden), tokens
        self.config: Any = trunk.config
        width = self.config.hidden_size * len(self.hidden) * (1 if tokens else len(self.pool))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.head = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        return self.head(self.features(input_ids, attention_mask, token_type_ids))

    def features(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """z, (b, width) or (b, t, width), as the head sees it."""
        raw = self.raw(input_ids, attention_mask, token_type_ids)
        return ((raw - self.mean) / self.scale).to(raw.dtype)

    def raw(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """What is pooled, before it is standardised."""
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        inner = self.hidden != (-1,)
        said = self.trunk(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=inner, **types)
        layers = [said.hidden_states[i] for i in self.hidden] if inner else [said.last_hidden_state]
        if self.tokens:
            return torch.cat(layers, -1)
        return torch.cat([pooled(x, attention_mask, how) for x in layers for how in self.pool], -1)

    @torch.no_grad()
    def standardise(self, features: Tensor) -> None:
        """Set mean and scale from raw features (n, width)."""
        self.mean.copy_(features.mean(0))
        self.scale.copy_(features.std(0).clamp_min(FLOOR) if len(features) > 1 else torch.ones_like(self.scale))


def pooled(x: Tensor, mask: Tensor, how: str) -> Tensor:
    """One vector (b, d) of the pieces (b, t, d) that are not padding."""
    here = mask.bool().unsqueeze(-1)
    if how == "mean":
        return x.masked_fill(~here, 0.0).sum(1) / here.sum(1).clamp_min(1)
    if how == "max":
        return x.masked_fill(~here, float("-inf")).amax(1)
    places = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    which = places.masked_fill(~mask.bool(), -1).amax(1) if how == "last" else mask.int().argmax(1)
    return x.gather(1, which.view(-1, 1, 1).expand(-1, 1, x.shape[-1])).squeeze(1)


def open_base(config: Config, kind: str) -> tuple[nn.Module, Any]:
    """(the network for a kind of task, its tokenizer), in eval mode; raises ConfigError if there is no such base."""
    options: dict[str, Any] = {"trust_remote_code": False}
    if config.revision is not None:
        options["revision"] = config.revision
    folder = Path(config.base)
    if folder.exists() and not (folder / "config.json").is_file():
        raise ConfigError(
            f"base={config.base!r}: the folder has no config.json, so that it holds no transformers model."
        )
    with quiet(), reading(config.base):
        described = transformers.AutoConfig.from_pretrained(config.base, **options)
        if config.layers is not None:
            _cut(described, config)
        if config.dropout is not None:
            for name in [
                name
                for name in vars(described)
                if "dropout" in name or name in ("attn_pdrop", "resid_pdrop", "embd_pdrop")
            ]:
                if isinstance(getattr(described, name), float):
                    setattr(described, name, config.dropout)
        tokenizer = transformers.AutoTokenizer.from_pretrained(config.base, **options)
        auto = AUTO.get(kind, transformers.AutoModel)
        model = auto.from_pretrained(config.base, config=described, **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
    if config.checkpointing:
        model.gradient_checkpointing_enable()
    if kind not in AUTO:
        if getattr(model, "pooler", None) is not None:
            model.pooler = None  # the text's vector is pooled here, so that it would run for nothing
        if model.config.is_encoder_decoder:
            model = model.get_encoder()
        model = TextModel(model, config.pool, config.hidden, kind == "tagging")
    return model.eval(), tokenizer


def _cut(described: Any, config: Config) -> None:
    """Only the first layers."""
    have = getattr(described, "num_hidden_layers", None)
    if have is None or config.layers > have:  # type: ignore[operator]
        raise ConfigError(f"layers={config.layers}: base {config.base!r} has {have or 'no such number of'} layers.")
    described.num_hidden_layers = config.layers
    if getattr(described, "layer_types", None):
        described.layer_types = described.layer_types[: config.layers]


@contextmanager
def reading(base: str) -> Iterator[None]:
    """Say in one sentence what transformers says in many, about a base that can't be opened."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        where = "it can't be read" if Path(base).exists() else "there is no such folder, and the hub gave nothing"
        reason = " ".join(str(error).split("\n")[0].split())[:300]
        raise ConfigError(
            f"base={base!r}: {where} ({reason}). Give a folder with a transformers model, or, online, a hub id."
        ) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bars and its word on weights that a cut base leaves unread."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
