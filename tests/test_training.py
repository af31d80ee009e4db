"""What training does to a model: checkpointing, compile, autocast, several processes. The numbers stay the same."""

import threading

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import modbay as mb

SMALL = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(**more):
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, use_cache=False, **more)
    return transformers.LlamaForCausalLM(config)


def attached(router=None, model=None, **options):
    torch.manual_seed(1)
    model = llama() if model is None else model
    kinds = {name: mb.LoRA(4) for name in ("en", "de", "fr")}
    options = {"name": "language", **options}
    bay = mb.attach(model, ["*.q_proj", "*.down_proj"], kinds, router, **options)
    with torch.no_grad():
        for parameter in bay.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train(), bay


def gradients(bay, loss):
    for parameter in bay.parameters():
        parameter.grad = None
    loss.backward()
    return [None if p.grad is None else p.grad.clone() for p in bay.parameters()]


def recompute(model, reentrant):
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


FIRST, SECOND = ["en", "de", None, "en"], ["de", "de", "en", None]


def preference(model, ids):
    """Two forwards with different labels before one backward, as DPO has them."""
    chosen, rejected = model(ids, language=FIRST).logits, model(ids, language=SECOND).logits
    return (chosen.square().mean() - rejected.square().mean()).square() + (chosen * rejected.detach()).mean()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("work", [preference, lambda model, ids: model(ids, language=FIRST).logits.square().mean()])
def test_checkpointing_recomputes_with_the_labels_of_its_own_forward(reentrant, work):
    model, bay = attached()
    ids = torch.randint(0, 99, (4, 6))
    plain = gradients(bay, work(model, ids))
    recompute(model, reentrant)
    again = gradients(bay, work(model, ids))
    for a, b in zip(plain, again, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


class Checkpointed(nn.Module):
    """A network of one's own that calls checkpoint itself."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        self.recompute = True

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return x


def test_checkpointing_in_a_network_of_ones_own():
    model = Checkpointed()
    bay = mb.attach(model, [nn.Linear], {"a": mb.LoRA(2), "b": mb.LoRA(2)}, name="task")
    for parameter in bay.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 8)

    def loss():
        one, two = model(x, task=["a", "b", None]), model(x, task=["b", "b", "a"])
        with torch.no_grad():
            model(x, task="a")  # an evaluation in between must not matter
        return (one - two).square().sum()

    again = gradients(bay, loss())
    model.recompute = False
    torch.testing.assert_close(again, gradients(bay, loss()))


def test_losses_are_counted_once_under_checkpointing():
    model, bay = attached(lambda: mb.TopK(2))
    ids = torch.randint(0, 99, (4, 6))
    plain = model(ids, labels=ids)
    recompute(model, False)
    again = model(ids, labels=ids)
    assert bay.losses() and torch.equal(plain.loss, again.loss)
    count = len(bay.session.last.losses)
    again.loss.backward()
    assert len(bay.session.last.losses) == count
    recompute(model, True)
    with pytest.raises(mb.errors.CallError, match="use_reentrant"):
        model(ids, labels=ids)


def test_auxiliary_losses_join_the_models_loss():
    model, bay = attached(lambda: mb.TopK(1))
    ids = torch.randint(0, 99, (4, 6))
    with_losses = model(ids, labels=ids).loss
    extra = sum(bay.losses().values())
    bay.state.add_losses = False
    torch.testing.assert_close(with_losses, model(ids, labels=ids).loss + extra)


def test_compile_reads_label_tensors_without_recompiling():
    model, bay = attached()
    ids = torch.randint(0, 99, (4, 6))
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for labels in ([0, 1, -1, 0], [1, 1, 1, 2], [2, 0, 1, -1]):
        labels = torch.tensor(labels)
        out = compiled(ids, language=labels).logits
        got = gradients(bay, out.square().mean())
        expected = model(ids, language=labels).logits
        torch.testing.assert_close(out, expected)
        for a, b in zip(got, gradients(bay, expected.square().mean()), strict=True):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)
    assert graphs.frame_count == 1


def test_autocast():
    model, bay = attached()
    ids = torch.randint(0, 99, (4, 6))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(ids, language=FIRST).logits
        alone = torch.cat([model(ids[i : i + 1], language=[label]).logits for i, label in enumerate(FIRST)])
    torch.testing.assert_close(mixed, alone, rtol=0.05, atol=0.05)
    mixed.float().square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in bay.parameters())


def test_a_second_thread_raises():
    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            inside.set()
            leave.wait(10)
            return self.linear(x)

    inside, leave = threading.Event(), threading.Event()
    model = Slow()
    mb.attach(model, "linear", {"a": mb.LoRA(2)}, name="task")
    thread = threading.Thread(target=lambda: model(torch.randn(2, 4), task="a"))
    thread.start()
    inside.wait(10)
    try:
        with pytest.raises(mb.errors.CallError, match="second thread"):
            model(torch.randn(2, 4), task="a")
    finally:
        leave.set()
        thread.join()


# Two processes (gloo). Each trains on its half of the batch; together they must do what one does on the whole.


def _step(model, bay, ids, labels):
    optimiser = torch.optim.AdamW(bay.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(2):
        loss = model(ids, language=labels).logits.square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def _worker(rank, file, how, ids, labels, expected):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    try:
        model, bay = attached()
        if how == "ddp":
            wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        else:
            from torch.distributed.fsdp import fully_shard

            for layer in model.model.layers:
                fully_shard(layer)
            wrapped = fully_shard(model)
        half = slice(2 * rank, 2 * rank + 2)
        _step(wrapped, bay, ids[half], labels[half])
        for parameter, value in zip(bay.parameters(), expected, strict=True):
            whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            torch.testing.assert_close(whole.detach(), value, rtol=1e-4, atol=1e-5)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes(how, tmp_path):
    ids, labels = torch.randint(0, 99, (4, 6)), ["en", "de", "de", "en"]
    model, bay = attached()
    _step(model, bay, ids, labels)
    expected = [p.detach().clone() for p in bay.parameters()]
    mp.spawn(_worker, (str(tmp_path / "rendezvous"), how, ids, labels, expected), nprocs=2)


def test_attach_after_sharding_raises(tmp_path):
    class FSDPModule:  # as torch marks a sharded module: a class of this name among its bases
        pass

    model = llama()
    layer = model.model.layers[0].self_attn.q_proj
    layer.__class__ = type("FSDPLinear", (FSDPModule, nn.Linear), {})
    with pytest.raises(mb.errors.BayError, match="before fully_shard"):
        mb.attach(model, "*.q_proj", {"a": mb.LoRA(2)}, name="task")
    assert "_bay" not in dict(model.named_modules())
