"""Quantised bases: modules act on them and learn; folding into them raises, or is done in floats if asked for."""

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import modbay as mb
from modbay.errors import CompositionError

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's and torchao's own
X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64, bias=False)).requires_grad_(False)


class Packed(Tensor):
    """Int8 and a scale a row, which look like floats from outside: what torchao's tensors are, in little."""

    @staticmethod
    def __new__(cls, whole):
        return Tensor._make_wrapper_subclass(cls, whole.shape, dtype=whole.dtype)

    def __init__(self, whole):
        self.scale = whole.abs().amax(1, keepdim=True) / 127
        self.data_ = (whole / self.scale).round().to(torch.int8)

    def dequantize(self):
        return self.data_.to(self.dtype) * self.scale

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            x, weight, bias = (*args, *(kwargs or {}).values(), None)[:3]
            return nn.functional.linear(x, weight.dequantize(), bias)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"Packed has no {func}")


def little():
    net = plain()
    for i in (0, 2):
        net[i]._parameters["weight"] = nn.Parameter(Packed(net[i].weight), requires_grad=False)
    return net


def torchao():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization = pytest.importorskip("torchao.quantization")
    net = plain()
    quantization.quantize_(net, quantization.Int8WeightOnlyConfig())
    return net


def _bitsandbytes(make):
    own = pytest.importorskip("bitsandbytes").nn
    net = plain()
    for i in (0, 2):
        layer = make(own, net[i].bias is not None)
        layer.load_state_dict(net[i].state_dict())
        net[i] = layer.to("cpu").requires_grad_(False)
    return net


def four_bits():
    return _bitsandbytes(lambda own, bias: own.Linear4bit(64, 64, bias, compute_dtype=torch.float32, quant_type="nf4"))


def eight_bits():
    return _bitsandbytes(lambda own, bias: own.Linear8bitLt(64, 64, bias, has_fp16_weights=False))


def dynamic():
    return torch.ao.quantization.quantize_dynamic(plain(), {nn.Linear}, dtype=torch.qint8)


BASES = {f.__name__: f for f in (little, torchao, four_bits, eight_bits, dynamic)}
FLOATS = ("little", "torchao")  # whose layers are Linears
KINDS = (mb.LoRA(4), mb.LoHa(2), mb.IA3(), mb.BitFit(), mb.Bottleneck(4))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: type(kind).__name__)
@pytest.mark.parametrize("base", BASES)
def test_modules_act_and_learn(base, kind):
    """As on the base in floats, but for what quantising costs; the base stays as it is, and comes back."""
    net = BASES[base]()
    before = net(X)
    bay = mb.attach(net, ["0", "2"], {"a": kind, "b": kind})
    assert_close(net(X, modules="a"), before)
    twin = plain()
    other = mb.attach(twin, ["0", "2"], {"a": kind, "b": kind})
    with torch.no_grad():
        for p in bay.parameters():
            p.add_(0.2 * torch.randn_like(p))
        for mine, theirs in zip(other.parameters(), bay.parameters(), strict=True):
            mine.copy_(theirs)
    rows = ["a", "b", None, "a", "b"]
    out = net(X, modules=rows)
    assert (out - twin(X, modules=rows)).abs().max() < 0.15 * max(1.0, float(out.abs().max()))
    out.square().mean().backward()
    reached = bay.parameters() if base != "dynamic" else bay.fitting.modulars["2"].parameters()  # it passes none back
    assert all(p.grad is not None and p.grad.any() for p in reached)
    bay.detach()
    assert torch.equal(net(X), before)


@pytest.mark.parametrize("base", BASES)
def test_what_reads_the_weight_is_refused(base):
    for kind in (mb.DoRA(2), mb.LoRA(2, start="pissa"), mb.SparseDelta(0.1), mb.Full()):
        net = BASES[base]()
        with pytest.raises(CompositionError, match=r"quantised|no parameters"):
            mb.attach(net, "0", {"a": kind})


@pytest.mark.parametrize("base", BASES)
def test_fold_raises(base):
    net = BASES[base]()
    bay = mb.attach(net, ["0", "2"], {"a": mb.LoRA(2)})
    bay.use("a")
    with torch.no_grad():
        for p in bay.parameters():
            p.add_(0.2)
    before = net(X)
    match = r"dequantise=" if base in FLOATS else r"takes no other.*dequantize\(\)"
    with pytest.raises(CompositionError, match=match):
        bay.fold("a")
    if base not in FLOATS:
        with pytest.raises(CompositionError, match=match):
            bay.fold("a", dequantise=True)
    assert torch.equal(net(X), before)


@pytest.mark.parametrize("base", FLOATS)
def test_fold_in_floats(base, caplog):
    net = BASES[base]()
    packed = [net[i].weight for i in (0, 2)]
    bay = mb.attach(net, ["0", "2"], {"a": mb.LoRA(2), "b": mb.IA3()})
    bay.use("a")
    with torch.no_grad():
        for p in bay.parameters():
            p.add_(0.2 * torch.randn_like(p))
    before = net(X)
    bay.fold("a", dequantise=True)
    assert_close(net(X), before, atol=1e-5, rtol=1e-4)
    assert type(net[0].weight) is nn.Parameter and net[0].weight.dtype == torch.float32
    errors = bay.state.folded.dequantised
    assert set(errors) == {"0", "2"} and max(errors.values()) < 1e-6
    assert "acts otherwise by a relative" in caplog.text
    bay.unfold()
    assert all(net[i].weight is own for i, own in zip((0, 2), packed, strict=True))
    assert torch.equal(net(X), before)
