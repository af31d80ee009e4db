"""Routing by position: spans of a sequence to modules of their own."""

import pytest
import torch
import transformers
from torch import nn
from torch.testing import assert_close

import modbay as mb
from modbay.errors import CallError, CompositionError, LabelError, SiteError
from tiny import gpt2, llama, tokens


def shaken(model: nn.Module, spans, lengths, at="*.mlp.down_proj", names="abc", **more) -> mb.Bay:
    bay = mb.attach(model, at, dict.fromkeys(names, mb.Bottleneck(3)), mb.Split(spans, lengths), name="span", **more)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_bay" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.eval()
    return bay


def test_each_span_has_its_module():
    net, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 7, 8)
    bay = shaken(net, ["b", (), ["c", "a"]], [2, 1], "0")
    alone = lambda name: (bay.use(name), net(x))[1]
    base = alone(None)
    a, b, c = (alone(name) for name in "abc")
    bay.use()
    got = net(x)
    assert_close(got[:, :2], b[:, :2])
    assert_close(got[:, 2:3], base[:, 2:3])
    assert_close(got[:, 3:], (c + a - base)[:, 3:])
    assert_close(net(x[:, :1]), b[:, :1])  # shorter than the first span
    assert_close(torch.compile(net, backend="aot_eager")(x), got)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_padding_and_a_cache_move_nothing(make):
    model, ids = make(), tokens(2, 6)
    at = "*.mlp.down_proj" if make is llama else "*.mlp.c_proj"
    shaken(model, ["a", "b", "c"], [3, 4], at)
    want = model(ids).logits
    padded = torch.cat([torch.zeros(2, 2, dtype=torch.long), ids], 1)
    mask = (padded != 0).long()
    places = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    assert_close(model(padded, attention_mask=mask, **places).logits[:, 2:], want)
    mask[1, :4] = 0  # another start in each row
    places = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    got = model(padded, attention_mask=mask, **places).logits
    assert_close(got[0, 2:], want[0])
    assert_close(got[1, 4:], model(padded[1:, 4:]).logits[0])
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": 49}
    cached = model.generate(padded, attention_mask=mask, **how)
    assert torch.equal(cached, model.generate(padded, attention_mask=mask, use_cache=False, **how))
    first = model(ids[:, :4], use_cache=True)
    steps = [first.logits]
    for t in (4, 5):
        seen = torch.ones(2, t + 1, dtype=torch.long)
        out = model(ids[:, t : t + 1], attention_mask=seen, past_key_values=first.past_key_values)
        steps.append(out.logits)
    assert_close(torch.cat(steps, 1), want)
    with pytest.raises(CallError, match="a cache and no mask"):
        model(ids[:, :1], past_key_values=first.past_key_values)


def test_an_encoder_has_positions_and_a_decoder_its_own():
    config = transformers.T5Config(
        vocab_size=50, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model, ids, target = transformers.T5ForConditionalGeneration(config).eval(), tokens(2, 6), tokens(2, 4)
    bay = shaken(model, ["a", "b"], [2], "encoder.*.wo", "ab")
    x, got = [], model(ids, labels=target).encoder_last_hidden_state
    for name in "ab":
        bay.use(name)
        x.append(model(ids, labels=target).encoder_last_hidden_state)
    assert not torch.allclose(got, x[0]) and not torch.allclose(got, x[1])
    bay.detach()
    shared = shaken(model, ["a", "b"], [2], "decoder.*.wo", "ab")
    with pytest.raises(SiteError, match="rows"):
        model(ids, labels=target)
    shared.detach()
    modules = dict.fromkeys("ab", mb.Bottleneck(3))
    bay = mb.attach(model, "decoder.*.wo", modules, lambda: mb.Split(["a", "b"], [2]), name="span")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_bay" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    got = model(ids, decoder_input_ids=target).logits
    bay.use("a")
    assert_close(got[:, :2], model(ids, decoder_input_ids=target).logits[:, :2])
    assert not torch.allclose(got[:, 2:], model(ids, decoder_input_ids=target).logits[:, 2:])


def test_a_split_is_kept_and_learns(tmp_path):
    net, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 7, 8)
    bay = shaken(net, ["b", (), ["c", "a"]], [2, 1], "0")
    want = net(x)
    want.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for n, p in net.named_parameters() if "_bay" in n and n.endswith("down"))
    bay.rename("c", "z")
    assert_close(net(x), want)
    bay.save(tmp_path)
    bay.detach()
    bay = mb.load(net, tmp_path)["span"]
    assert_close(net(x), want)
    without = net(x)
    bay.remove("b")
    with bay.disable():
        base = net(x)
    assert_close(net(x), torch.cat([base[:, :3], without[:, 3:]], 1))


def test_what_a_split_can_t_do_raises():
    for spans, lengths in (("ab", [1]), (["a"], [1]), (["a", "b"], [0]), (["a", "b"], [])):
        with pytest.raises(CompositionError, match="Split"):
            mb.Split(spans, lengths)
    net = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(LabelError, match="lacks 'd'"):
        shaken(net, ["a", "d"], [2], "0")
    shaken(net, ["a", "b"], [2], "0")
    with pytest.raises(SiteError, match="no positions"):
        net(torch.randn(4, 8))
    router = mb.Split(["a", "b"], [2])
    router.build(["a", "b"], None)
    with pytest.raises(SiteError, match="mask is"):
        router(torch.randn(2, 5, 8), mb.Context(arguments={"attention_mask": torch.ones(2, 3)}))
    prompts = dict.fromkeys("ab", mb.Prompt(3))
    model = llama()
    mb.attach(model, modules=prompts, router=mb.Split(["a", "b"], [2]), name="span")
    with pytest.raises(CompositionError, match="tokens of one example were routed apart"):
        model(tokens())
