"""Fusion in the decoder: every passage is read alone, and the decoder attends over all."""

import pytest
import torch
import transformers
from torch import nn
from torch.testing import assert_close

import modbay as mb
from modbay import methods
from modbay.errors import CallError, CompositionError, LabelError

B, K, T = 2, 3, 5


def t5(**more) -> nn.Module:
    sizes = {"vocab_size": 50, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, **more)
    return transformers.T5ForConditionalGeneration(config).eval()


def bart() -> nn.Module:
    sizes = {"vocab_size": 50, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 32}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, **heads)).eval()


def passages() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids and masks (b, k, t), of unequal lengths, one passage not there; and answers."""
    mask = torch.ones(B, K, T, dtype=torch.long)
    mask[0, 1, 3:] = 0
    mask[1, 2] = 0
    return torch.randint(3, 50, (B, K, T)), mask, torch.randint(3, 50, (B, 4))


def by_hand(model: nn.Module, ids, mask, answers, **labels) -> torch.Tensor:
    """Logits of each question by itself, its passages encoded one by one, without any padding."""
    out = []
    for i in range(B):
        own = {name: [label[i]] for name, label in labels.items()}
        each = []
        for passage, seen in zip(ids[i], mask[i], strict=True):
            if seen.any():
                read = model(input_ids=passage[seen.bool()][None], decoder_input_ids=answers[:1, :1], **own)
                each.append(read.encoder_last_hidden_state)
        read = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=torch.cat(each, 1))
        out.append(model(encoder_outputs=read, decoder_input_ids=answers[i : i + 1], **own).logits)
    return torch.cat(out)


def shaken(model: nn.Module, at, router=None) -> mb.Bay:
    bay = mb.attach(model, at, dict.fromkeys("ab", mb.LoRA(2)), router, name="task")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_bay" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return bay


@pytest.mark.parametrize("make", [t5, bart])
def test_each_passage_is_read_alone(make):
    model, (ids, mask, answers) = make(), passages()
    got = methods.fid(model, ids, mask, decoder_input_ids=answers).logits
    assert_close(got, by_hand(model, ids, mask, answers), atol=1e-5, rtol=1e-4)
    one = methods.fid(model, ids[:, :1], mask[:, :1], labels=answers)
    plain = model(input_ids=ids[:, 0], attention_mask=mask[:, 0], labels=answers)
    assert_close(one.loss, plain.loss)
    assert_close(one.logits, plain.logits)
    ids[1, 2] = 7  # of the passage that is not there
    assert_close(methods.fid(model, ids, mask, decoder_input_ids=answers).logits, got)


def test_labels_are_the_questions():
    model, (ids, mask, answers) = t5(), passages()
    shaken(model, ["*.q", "*.wo"])
    for task in (["a", "b"], ["b", None]):
        got = methods.fid(model, ids, mask, decoder_input_ids=answers, task=task).logits
        want = by_hand(model, ids, mask, answers, task=task)
        assert_close(got, want, atol=1e-5, rtol=1e-4)
    learned = {n: p for n, p in model.named_parameters() if p.requires_grad}
    each = []
    for logits in (got, want):
        grads = torch.autograd.grad(logits.square().sum(), learned.values(), allow_unused=True)
        each.append(dict(zip(learned, grads, strict=True)))
    for name in learned:
        mine, theirs = each[0][name], each[1][name]
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert_close(mine, theirs, atol=1e-4, rtol=1e-3)
    index = methods.fid(model, ids, mask, decoder_input_ids=answers, task=torch.tensor([1, -1])).logits
    assert_close(index, got)


def test_an_answer_is_generated():
    model, (ids, mask, _) = t5(), passages()
    shaken(model, ["*.q", "*.wo"])
    how = {"max_new_tokens": 4, "do_sample": False}
    got = methods.fid(model, ids, mask, model.generate, task=["a", "b"], **how)
    answers = torch.zeros(B, 1, dtype=torch.long)
    for _ in range(4):
        best = by_hand(model, ids, mask, answers, task=["a", "b"])[:, -1:].argmax(-1)
        answers = torch.cat([answers, best], 1)
    ended = (answers == 1).cumsum(1).cumsum(1) > 1  # behind </s>
    assert torch.equal(got, answers.masked_fill(ended, 0)[:, : got.shape[1]])
    beams = methods.fid(model, ids, mask, model.generate, task=["a", "b"], num_beams=2, **how)
    assert len(beams) == B


def test_recomputed_passages_have_the_same_gradients():
    model, (ids, mask, answers) = t5(dropout_rate=0.0).train(), passages()
    shaken(model, ["*.q", "*.wo"])
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        methods.fid(model, ids, mask, labels=answers, task=["a", "b"]).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, again in zip(*found, strict=True):
        assert_close(again, plain)


def test_what_fid_can_t_do_raises():
    model, (ids, mask, answers) = t5(), passages()
    with pytest.raises(LabelError, match=r"both are \(b, k, t\)"):
        methods.fid(model, ids[:, 0], mask[:, 0])
    with pytest.raises(LabelError, match=r"both are \(b, k, t\)"):
        methods.fid(model, ids, mask[:, :2])
    bay = shaken(model, "*.wo", mb.TopK())
    with pytest.raises(CompositionError, match="one TopK for all sites"):
        methods.fid(model, ids, mask, labels=answers)
    bay.detach()
    bay = shaken(model, "*.wo", lambda: mb.TopK(balance=0.1))
    assert methods.fid(model, ids, mask, labels=answers).loss.isfinite()
    with pytest.raises(CallError, match="add losses of their own"):
        methods.fid(model.train(), ids, mask, labels=answers)
    bay.detach()
    mb.attach(model.eval(), modules={"a": mb.Prompt(2)}, name="prompt")
    with pytest.raises(CallError, match="puts a prompt in front"):
        methods.fid(model, ids, mask, labels=answers, prompt="a")
