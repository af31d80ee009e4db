"""Fusion in the decoder: each passage is read alone, and the decoder attends over what was read of all.

Izacard and Grave, "Leveraging Passage Retrieval with Generative Models for Open Domain Question Answering", 2021 (arXiv
2007.01282).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..abstract import Routing
from ..attach import Bay, bays
from ..errors import CallError, CompositionError, LabelError, listed
from ..types import Labels, System, systems

TESTS = "tests/test_fid.py::"


@systems(
    System(
        (144,),
        "methods.fid(t5, input_ids, attention_mask, labels=targets)",
        (
            TESTS + "test_each_passage_is_read_alone",
            TESTS + "test_labels_are_the_questions",
            TESTS + "test_an_answer_is_generated",
        ),
        "Fusion-in-Decoder (FiD)",
        "g(y, [E(x_1); …; E(x_k)]): E the encoder, x_i the question with passage i, g the decoder",
        section="5.3",
    )
)
def fid(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    call: Callable | None = None,
    **batch: Any,
) -> Any:
    """What an encoder–decoder gives when each of k inputs is encoded alone, and the decoder attends over all.

        texts = [f"question: {q} title: {t} context: {p}" for t, p in found]         # k of each question, as the paper
        methods.fid(t5, ids, mask, labels=targets, task=["nq", "tqa"]).loss
        methods.fid(t5, ids, mask, t5.generate, max_new_tokens=20)

    input_ids, attention_mask: (b, k, t); a question with fewer passages has masks of nothing but zeros; None: all is
    text. call: the model if None, or its generate. batch: the rest of the call, labels of bays too, a row a question.
    The encoder is run in a call of its own, a passage a row, with one token for its decoder, so that every module in it
    sees passages as it always sees inputs; the cost grows with k, not k².
    Raises LabelError for shapes that do not fit, CompositionError for a router of all sites that reads x, since the
    second call has none (give each site its own), CallError for a prompt at the model itself (a Prefix has the like),
    or in training for bays that add losses, which the one token would add to: attach them with add_losses=False.
    """
    if input_ids.ndim != 3 or (attention_mask is not None and attention_mask.shape != input_ids.shape):
        shape = None if attention_mask is None else tuple(attention_mask.shape)
        raise LabelError(f"fid: input_ids {tuple(input_ids.shape)}, attention_mask {shape}: both are (b, k, t).")
    (b, k, t), own = input_ids.shape, bays(model)
    _refuse(own)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    rows = mask.flatten(0, 1)
    rows = torch.where(rows.any(-1, keepdim=True), rows, 1)  # a passage that is not there is read, and not attended
    words = {word for bay in own.values() for word in (*bay.state.keywords, *bay.state.read)}
    labels = {word: _repeated(batch[word], k) for word in words if word in batch}
    start = input_ids.new_zeros(b * k, 1)
    read = model(input_ids=input_ids.flatten(0, 1), attention_mask=rows, decoder_input_ids=start, **labels)
    if model.training:
        _lossless(own)
    from transformers.modeling_outputs import BaseModelOutput  # noqa: PLC0415 (an optional dependency)

    encoded = BaseModelOutput(last_hidden_state=read.encoder_last_hidden_state.reshape(b, k * t, -1))
    return (call or model)(encoder_outputs=encoded, attention_mask=mask.flatten(1), **batch)


def _refuse(own: Mapping[str, Bay]) -> None:
    """Raise for what would be wrong in a call of which the encoder has run before."""
    for name, bay in own.items():
        state = bay.state
        if (
            state.enabled
            and state.router is not None
            and state.router.reads_x
            and not isinstance(state.chosen, Routing)
        ):
            raise CompositionError(
                f"fid: bay {name!r} has one {type(state.router).__name__} for all sites, which reads the call's input; "
                f"the decoder's call has none. Pass router=lambda: …, for a router at each site, or bay.use(…)."
            )
        prompts = [part for m in bay.modulars.values() for part in m.order if part is not None and part.kind.place]
        if state.enabled and any(part.kind.place == "input" for part in prompts):
            raise CallError(
                f"fid: bay {name!r} puts a prompt in front of the model's input, whose place in what the decoder reads "
                f"is lost. Use mb.Prefix, which every passage sees."
            )


def _lossless(own: Mapping[str, Bay]) -> None:
    """Raise CallError if the call that has just been made had losses that a second one would not have."""
    several = [name for bay in own.values() if bay.state.add_losses for name in bay.losses()
               if name.startswith(f"{bay.state.name}.")]  # fmt: skip
    if several:
        raise CallError(
            f"fid: in training the bays add losses of their own ({listed(several)}), which would be of the one token "
            f"that the decoder sees while the encoder reads. Attach them with add_losses=False."
        )


def _repeated(label: Labels, k: int) -> Labels:
    """The labels of b questions, for the k passages of each."""
    if isinstance(label, Tensor):
        return label.repeat_interleave(k, 0) if label.ndim else label
    return label if isinstance(label, str) else [one for one in label for _ in range(k)]
