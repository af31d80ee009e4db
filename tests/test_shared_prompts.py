"""A prompt that tasks share, each scaling its entries (MPT), and the distillation that it starts with."""

import pytest
import torch
from peft import MultitaskPromptTuningConfig
from peft.tuners.multitask_prompt_tuning import MultitaskPromptEmbedding
from torch import nn
from torch.testing import assert_close

import modbay as mb
from modbay import losses, methods
from modbay.errors import CompositionError, LabelError
from tiny import llama, tokens


def shared(rank: int = 2, **more) -> tuple[nn.Module, mb.Bay]:
    model = llama().eval()
    modules = {"p": mb.Prompt(3, "uniform"), **dict.fromkeys("ab", mb.FactoredPrompt(3, rank, std=1.0, **more))}
    return model, mb.attach(model, modules=modules, aggregator=mb.PromptProduct("p"), name="task")


def factors(bay: mb.Bay, name: str) -> torch.Tensor:
    u, v = bay.parameters(name)
    return u @ v


def test_a_prompt_is_shared_and_scaled_by_its_tasks():
    model, bay = shared()
    ids, rows = tokens(4, 5), ["a", None, "b", "p"]
    with torch.no_grad():
        p = next(iter(bay.parameters("p")))
        fronts = {"a": p * factors(bay, "a"), "b": p * factors(bay, "b"), "p": p, None: p[:0]}
        both = p * (0.3 * factors(bay, "a") - 2 * factors(bay, "b") + 0.5)
        mixed = model(ids, task=rows).logits
        by_index = model(ids, task=torch.tensor([1, -1, 2, 0])).logits
        weighed = bay.use({"a": 0.3, "b": -2.0, "p": 0.5}) and model(ids).logits
        bay.use("p")
        alone = model(ids[3:]).logits
        bay.detach()
        plain = lambda front, i: model(inputs_embeds=torch.cat([front, x[i]])[None]).logits[0, len(front) :]
        x = model.get_input_embeddings()(ids)
        for i, row in enumerate(rows):
            assert_close(mixed[i], plain(fronts[row], i), atol=1e-5, rtol=1e-5)
            assert_close(weighed[i], plain(both, i), atol=1e-5, rtol=1e-5)
        assert_close(by_index, mixed, atol=1e-5, rtol=1e-5)
        assert_close(alone[0], mixed[3], atol=1e-5, rtol=1e-5)


def test_multitask_prompts_are_peft_s():
    config = MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, token_dim=32, num_tasks=2, num_ranks=2, num_layers=2,
        num_attention_heads=4, num_transformer_submodules=1,
    )  # fmt: skip
    theirs = MultitaskPromptEmbedding(config, nn.Embedding(50, 32))
    model, bay = shared()
    with torch.no_grad():
        next(iter(bay.parameters("p"))).copy_(theirs.embedding.weight)
        for i, name in enumerate("ab"):
            u, v = bay.parameters(name)
            u.copy_(theirs.prefix_task_cols[i])
            v.copy_(theirs.prefix_task_rows[i])
        fronts = theirs(torch.arange(3).expand(2, 3), torch.tensor([1, 0]))
        ids = tokens(2, 5)
        mixed = model(ids, task=["b", "a"]).logits
        bay.detach()
        x = model.get_input_embeddings()(ids)
        assert_close(mixed, model(inputs_embeds=torch.cat([fronts, x], 1)).logits[:, 3:], atol=1e-6, rtol=1e-5)
    made = mb.FactoredPrompt(1000, 2).init([bay.modulars[""].site])[""]
    assert_close(made["U"].std(), torch.tensor(0.02), rtol=0.1, atol=0)


def test_a_shared_prompt_learns_from_all_and_is_kept(tmp_path):
    model, bay = shared()
    twin, ids = llama().eval(), tokens(2, 5)
    twin.load_state_dict(model.state_dict())
    model(ids, task=["a", "a"]).logits.square().sum().backward()
    grads = [[q.grad for q in bay.parameters(name)] for name in "pab"]
    assert all(g.abs().sum() > 0 for g in (*grads[0], *grads[1])) and grads[2] == [None, None]
    bay.freeze("p")
    model(ids, task=["b", "a"]).logits.square().sum().backward()
    assert next(iter(bay.parameters("p"))).grad is None
    bay.add("c", mb.FactoredPrompt(3, 2, start="ones"))
    assert_close(model(ids, task="c").logits, model(ids, task="p").logits)
    bay.save(tmp_path)
    loaded = mb.load(twin, tmp_path)["task"]
    assert_close(twin(ids, task=["c", "b"]).logits, model(ids, task=["c", "b"]).logits)
    bay.remove("c")
    assert_close(twin(ids, task=["a", "b"]).logits, model(ids, task=["a", "b"]).logits)
    loaded.remove("p")
    with pytest.raises(CompositionError, match="no such module; there are 'a', 'b', 'c'"):
        twin(ids, task="a")


def test_what_can_t_be_shared_raises():
    with pytest.raises(CompositionError, match="is no prompt"):
        mb.attach(llama(), "*.q_proj", {"a": mb.LoRA(2)}, aggregator=mb.PromptProduct("a"))
    for bad in ({"length": 0}, {"rank": 0}, {"start": "zeros"}, {"std": 0.0}):
        with pytest.raises(CompositionError, match="FactoredPrompt"):
            mb.FactoredPrompt(**bad)
    model, bay = shared()
    bay.add("long", mb.FactoredPrompt(4))
    with pytest.raises(CompositionError, match="has 3 places"):
        model(tokens(2), task="long")


def test_distillation_is_written_out():
    z, t = torch.randn(2, 3, 5, requires_grad=True), torch.randn(2, 3, 5, requires_grad=True)
    p, q = (t / 2).softmax(-1), (z / 2).softmax(-1)
    each = 4 * (p * (p / q).log()).sum(-1)
    assert_close(losses.distillation(z, t, temperature=2.0), each.mean())
    targets = torch.tensor([[1, -100, 2], [-100, -100, 4]])
    got = losses.distillation(z, t, targets, 2.0)
    assert_close(got, (each[0, 0] + each[0, 2] + each[1, 2]) / 3)
    got.backward()
    assert t.grad is None and (z.grad[0, 1] == 0).all()
    assert_close(z.grad[0, 0], 2 * (q - p)[0, 0] / 3)


def test_prompts_are_mixed_by_what_they_answer():
    model = llama().eval()
    bay = mb.attach(model, modules=dict.fromkeys("abc", mb.Prompt(3)), name="prompt")
    ids, w = tokens(2, 5), torch.randn(2, 2)
    each = torch.stack([model(ids, prompt=name).logits.softmax(-1) for name in "ca"], 1)
    mixed = lambda p: (p.view(-1, 2, 1, 1) * each).sum(1).log()
    got = methods.prompt_mixture(model, ["c", "a"], w, input_ids=ids, attention_mask=torch.ones_like(ids))
    assert_close(got, mixed(w.softmax(-1)), atol=1e-5, rtol=1e-5)
    got = methods.prompt_mixture(model, ["c", "a"], w[0], input_ids=ids)
    assert_close(got, mixed(w[0].softmax(-1)), atol=1e-5, rtol=1e-5)
    for names, weights in (("ca", w[0]), (["a"], w), ([], w), (["c", "a"], torch.zeros(3, 2))):
        with pytest.raises(LabelError, match="prompt_mixture"):
            methods.prompt_mixture(model, names, weights, input_ids=ids)
    bay.detach()


def test_the_mixture_of_prompts_learns():
    """The gradient of each prompt is its responsibility times the gradient of its own log-likelihood."""
    model = llama().eval()
    bay = mb.attach(model, modules=dict.fromkeys("ab", mb.Prompt(3)), name="prompt")
    ids, w = tokens(1, 5), torch.tensor([0.3, -0.2], requires_grad=True)
    prompts = [next(iter(bay.parameters(name))) for name in "ab"]
    loss = -methods.prompt_mixture(model, ["a", "b"], w, input_ids=ids)[0, -1, 7]
    got = torch.autograd.grad(loss, [w, *prompts])
    own = [model(ids, prompt=name).logits.log_softmax(-1)[0, -1, 7] for name in "ab"]
    grads = [torch.autograd.grad(one, prompt)[0] for one, prompt in zip(own, prompts, strict=True)]
    with torch.no_grad():
        share = (w.log_softmax(0) + torch.stack(own)).softmax(0)
        assert_close(got[0], w.softmax(0) - share)
        for i in range(2):
            assert_close(got[1 + i], -share[i] * grads[i], atol=1e-6, rtol=1e-4)
