"""Prompts: the call of the model rewritten, so that learned tokens stand in front of its input."""

import inspect
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from ..abstract import Context, Generator
from ..core import Function, Modular, base_type, extended
from ..errors import CallError, CompositionError
from ._seat import Seam
from ._sides import two_sided

CACHES = ("cache", "past_key_values")
AHEAD = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")


class PromptSeam(Seam):
    """The root's call as inputs_embeds = [P, E(ids)], all that goes with it lengthened, and the virtual positions cut.

    mask: ones for P, zeros where a row has no prompt, so that it equals the base alone. Positions: counted over what
    the mask shows, so that the distance from P to the text does not depend on padding. Labels −100. With a cache that
    holds P already, only the mask and positions are shifted. An encoder-decoder has P in front of the encoder.
    Where position is a bias of the distance in the row (T5, MPT), padding on the left stands between P and the text.
    """

    prepares = True
    place = "input"

    def __init__(self, target: nn.Module):
        base = base_type(target)
        self.names = tuple(inspect.signature(base.forward).parameters)[1:]
        self.two = two_sided(target)
        self.generating = False
        if "inputs_embeds" not in self.names or "input_ids" not in self.names or _table(target, self.two) is None:
            raise CompositionError(
                f"Prompt at the model itself: {base.__name__} takes no inputs_embeds in the place of input_ids, or has "
                f"no get_input_embeddings(). Attach the prompt at the module that makes the embedded sequence instead: "
                f"at='*.embeddings' in a vision transformer, with Prompt(after=1) to keep [CLS] first."
            )
        places = [(n.rpartition(".")[2], m) for n, m in target.named_modules()]
        places = [(n, m) for n, m in places if "position" in n and "relative" not in n]
        padding = [m.padding_idx for _, m in places if isinstance(m, nn.Embedding) and m.padding_idx is not None]
        self.padding: int | None = padding[0] if padding else None  # RoBERTa: positions are counted from it
        self.absolute = bool(places)
        self.shifts = getattr(target, "loss_type", None) == "ForCausalLM"
        self.pad = getattr(getattr(target, "config", None), "pad_token_id", None)
        self.pools = "pad_token_id" in inspect.unwrap(base.forward).__code__.co_names

    def through(self, modular: Modular, run: Callable, target: nn.Module, args: tuple, kwargs: dict, c: Context,
                route: Any, aggregator: Any) -> Any:  # fmt: skip
        k = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if self.two and k.get("encoder_outputs") is not None:
            if not self.generating:
                raise CallError(
                    "a prompt is put in front of the encoder's input, but encoder_outputs were made before this call, "
                    "without it: pass input_ids, or use generate."
                )
            return run(*args, **kwargs)
        x = self._embedded(target, k)
        made = extended(modular, x, c, route, aggregator)
        if made is None:
            return run(*args, **kwargs)
        prompt, has = made
        first, n = _after(modular), prompt.shape[1]
        fresh = self._lengthen(k, x, prompt.to(x.dtype), has, first)
        out = run(**k)
        return self._cut(out, first, n, x.shape[1] + n) if fresh else out

    def generate(self, modular: Modular, run: Callable, target: nn.Module, c: Context, route: Any, aggregator: Any,
                 *args: Any, **kwargs: Any) -> Any:  # fmt: skip
        """An encoder runs once in generation, and by itself: its input is lengthened here."""
        config = kwargs.get("generation_config")
        ahead = [name for name in AHEAD if kwargs.get(name) or getattr(config, name, None)]
        if ahead or _seen(kwargs) != 0:
            raise CallError(
                f"generate({ahead[0] if ahead else 'cache'}=…) with a prompt: the cache would hold the prompt, which "
                f"those who count its tokens do not know of. Generate without it."
            )
        if not self.two:
            return run(*args, **kwargs)
        k = dict(kwargs)
        given = args[0] if args else k.pop("inputs", None)
        args = (None, *args[1:]) if args else args
        if given is not None:
            k["input_ids"] = given
        if k.get("encoder_outputs") is not None:
            raise CallError("generate(encoder_outputs=…) with a prompt: they were made without it. Pass input_ids.")
        ids, x = k.get("input_ids"), self._embedded(target, k)
        made = extended(modular, x, c, route, aggregator)
        if made is not None:
            if k.get("attention_mask") is None and ids is not None:
                k["attention_mask"] = _unpadded(ids, config or target.generation_config)
            self._lengthen(k, x, made[0].to(x.dtype), made[1], _after(modular))
            del k["input_ids"]
        self.generating = True
        try:
            return run(*args, **k)
        finally:
            self.generating = False

    def _embedded(self, target: nn.Module, k: Mapping[str, Any]) -> Tensor:
        x = k.get("inputs_embeds")
        if x is not None:
            return x
        if k.get("input_ids") is None:
            raise CallError("a prompt needs input_ids or inputs_embeds in the call, to be put in front of them.")
        return _table(target, self.two)(k["input_ids"])  # type: ignore[misc]

    def _lengthen(self, k: dict, x: Tensor, prompt: Tensor, has: Tensor | None, first: int) -> bool:
        """Rewrite the call's arguments in place; whether the prompt goes into it, or is in the cache."""
        b, t, n = x.shape[0], x.shape[1], prompt.shape[1]
        held = 0 if self.two else _seen(k)
        if held is None:
            raise CallError(
                "a static cache was made without room, or masks, for the prompt: use a dynamic cache (the default)."
            )
        past, fresh = (held - n if held else 0), not held
        mask = k.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            raise CallError(
                "a prompt lengthens the attention mask, which must be (batch, tokens); this one was made for every "
                "query already (4D: packed sequences). Give a 2D mask, one row a sequence."
            )
        if self.pools and not torch.compiler.is_compiling() and not bool(self._last(k, mask).all()):
            raise CallError(
                "this model classifies by the last token that is not padding, which it can't tell behind a prompt: pad "
                "on the left (tokenizer.padding_side = 'left')."
            )
        if has is not None and self.absolute and "position_ids" not in self.names:
            raise CallError(
                "rows of this batch have prompts of different lengths (or none), and the model counts positions "
                "itself, so that the shorter would be moved. Run them in batches of their own."
            )
        if "position_ids" in self.names:
            self._place(k, mask, has, (b, t, n, past, first), fresh, x.device)
        if mask is not None or has is not None:
            mask = torch.ones(b, past + t, dtype=torch.long, device=x.device) if mask is None else mask
            front = mask.new_ones(b, n) if has is None else has.to(mask)
            k["attention_mask"] = _insert(mask, front, first)
        keep = k.get("logits_to_keep")
        if fresh and isinstance(keep, Tensor):
            k["logits_to_keep"] = keep + n
        if fresh:
            k["inputs_embeds"], k["input_ids"] = _insert(x, prompt, first), None
            self._targets(k, has, b, t, n, first)
        return fresh

    def _last(self, k: dict, mask: Tensor | None) -> Tensor:
        """Whether the last position of each row is text."""
        if mask is not None:
            return mask[:, -1]
        ids = k.get("input_ids")
        return torch.ones(1) if ids is None or self.pad is None else ids[:, -1] != self.pad

    def _place(self, k: dict, mask: Tensor | None, has: Tensor | None, sizes: tuple, fresh: bool, device: Any) -> None:
        """position_ids: of the text, moved behind the prompt of its row; of the prompt, from 0."""
        b, t, n, past, first = sizes
        given, ids = k.get("position_ids"), k.get("input_ids")
        if given is not None and mask is None and not torch.compiler.is_compiling() and _restarts(given):
            raise CallError(
                "position_ids that start again say that sequences are packed in one row, of which only the first "
                "would see the prompt. Give each a row of its own."
            )
        if given is None and mask is None and has is None and (self.padding is None or ids is None):
            return  # counted by the model itself, over all that it sees
        start = 0 if self.padding is None else self.padding + 1
        count = torch.tensor([[n]], device=device) if has is None else has.sum(1, keepdim=True)
        if given is not None:
            if given.ndim != 2:
                raise CallError(f"position_ids {tuple(given.shape)}: a prompt needs them as (batch, tokens).")
            text = given + count
        else:
            text = torch.arange(past, past + t, device=device)[None]  # as the base alone would count
            if self.padding is not None and ids is not None:
                real = ids != self.padding
                text = real.cumsum(1) * real - 1
            if mask is not None and self.padding is None:
                seen = (mask.cumsum(1) - 1).clamp(min=0)[:, -t:]  # a row with a prompt: padding does not count
                text = seen if has is None else torch.where(has.any(1, keepdim=True), seen, text)
            text = text + start + count
        if fresh and first:
            text = torch.cat([(text - count)[:, :first], text[:, first:]], 1)
        text = text.expand(b, -1)
        if fresh:
            front = torch.arange(n, device=device)[None] if has is None else (has.cumsum(1) - 1).clamp(min=0)
            text = _insert(text, (front + start + first).expand(b, -1).to(text), first)
        k["position_ids"] = text

    def _targets(self, k: dict, has: Tensor | None, b: int, t: int, n: int, first: int) -> None:
        """What else goes by token: types, labels, and the places that labels name."""
        types, labels = k.get("token_type_ids"), k.get("labels")
        if types is not None:
            k["token_type_ids"] = _insert(types, types.new_zeros(len(types), n), first)
        if isinstance(labels, Tensor) and self._by_token(labels, b, t):
            if self.shifts and has is not None:  # no prompt tells the first token: nor does the base alone
                told = has.any(1) if not first else has.new_ones(b)
                labels = torch.cat([labels[:, :1].masked_fill(~told[:, None], -100), labels[:, 1:]], 1)
            k["labels"] = _insert(labels, labels.new_full((b, n), -100), first)
        for name in ("start_positions", "end_positions"):
            if k.get(name) is not None:
                k[name] = k[name] + n * (k[name] >= first)

    def _by_token(self, labels: Tensor, b: int, t: int) -> bool:
        return not self.two and not labels.is_floating_point() and tuple(labels.shape) == (b, t)

    def _cut(self, out: Any, first: int, n: int, whole: int) -> Any:
        """The output without the virtual positions; attention weights keep them."""
        cut = lambda v: torch.cat([v[:, :first], v[:, first + n :]], 1) if first else v[:, n:]

        def trim(name: str, v: Any) -> Any:
            if isinstance(v, Tensor):
                by_token = v.ndim == 3 or (v.ndim == 2 and name in ("start_logits", "end_logits"))
                return cut(v) if by_token and v.shape[1] == whole else v
            return type(v)(trim(name, each) for each in v) if type(v) in (tuple, list) else v

        if isinstance(out, MutableMapping):
            for name in list(out.keys()):
                if out[name] is not None and (not self.two or name.startswith("encoder_")):
                    out[name] = trim(name, out[name])
            return out
        return out if self.two else trim("", out)


class InsertSeam(Seam):
    """P in the output of a module that makes an embedded sequence: a vision transformer's embeddings."""

    place = "input"

    def through(self, modular: Modular, run: Callable, target: nn.Module, args: tuple, kwargs: dict, c: Context,
                route: Any, aggregator: Any) -> Any:  # fmt: skip
        f = Function(run, args, kwargs, target, modular.site.name)
        y = f(f.x)
        made = extended(modular, y, c, route, aggregator)
        if made is None:
            return f.finish(y)
        if made[1] is not None:
            raise CallError(
                f"site {modular.site.name!r}: rows of this batch have prompts of different lengths (or none), and no "
                f"mask could hide the rest here. Run them in batches of their own."
            )
        return f.finish(_insert(y, made[0].to(y.dtype), _after(modular)))


def _insert(v: Tensor, front: Tensor, first: int) -> Tensor:
    return torch.cat([v[:, :first], front, v[:, first:]], 1) if first else torch.cat([front, v], 1)


def _restarts(position_ids: Tensor) -> bool:
    return bool((position_ids.diff(dim=-1) != 1).any())


def _after(modular: Modular) -> int:
    """How many of the input's own positions stay in front: one number for all prompts of a bay."""
    kinds = [part.kind for part in modular.order if part is not None]
    said = {getattr(kind.kind if isinstance(kind, Generator) else kind, "after", 0) for kind in kinds}
    if len(said) > 1:
        raise CompositionError(f"prompts with after={sorted(said)} in one bay: in one batch they must go to one place.")
    return said.pop() if said else 0


def _table(target: nn.Module, two: bool) -> nn.Module | None:
    """The module that embeds token ids; an encoder's own, for the model's may be a mere holder of the weight."""
    try:
        found = (target.get_encoder() if two else target).get_input_embeddings()  # type: ignore[operator, union-attr]
    except (AttributeError, NotImplementedError):
        return None
    weight = getattr(found, "weight", None)
    return found if isinstance(weight, Tensor) and weight.ndim == 2 else None


def _seen(k: Mapping[str, Any]) -> int | None:
    """How many positions the call's cache holds; None if it is static."""
    cache = next((k[name] for name in CACHES if k.get(name) is not None), None)
    if cache is None:
        return 0
    return None if getattr(cache, "is_compileable", False) else int(cache.get_seq_length())


def _unpadded(ids: Tensor, config: Any) -> Tensor:
    """The mask that generate would infer from the ids."""
    pad, end = config.pad_token_id, config.eos_token_id
    known = pad is not None and pad not in (end if isinstance(end, list) else [end])
    return (ids != pad).long() if known else torch.ones_like(ids)
