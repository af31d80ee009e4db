"""Quantised bases: modules act on them and learn; folding into them raises, or is done in floats if asked for."""

import copy
import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import modbay as mb
from modbay.errors import BaseMismatch, CompositionError
from modbay.library import fingerprint

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


def whole(numbers, bits, order=None):
    """Numbers (n, m) packed along the first axis, 32 / bits to an int32, the first in the lowest bits."""
    rows = numbers.view(-1, 32 // bits, numbers.shape[1]).long()
    rows = rows if order is None else rows[:, order]
    shifted = rows << (bits * torch.arange(32 // bits).view(1, -1, 1))
    return shifted.sum(1).to(torch.uint32).view(torch.int32)


def numbers(packed, bits, order=None):
    """The inverse of `whole`."""
    rows = (packed.unsqueeze(1) >> (bits * torch.arange(32 // bits).view(1, -1, 1))) & (2**bits - 1)
    rows = rows if order is None else rows[:, torch.tensor(order).argsort()]
    return rows.flatten(0, 1)


class Gptq(nn.Module):
    """A stand-in for the layers that gptqmodel and auto-gptq put into a model, written by the format's definition.

        y = x W + b,   W[i, o] = scales[g, o] (q[i, o] − z[g, o]),   g = g_idx[i]

    q is packed along the inputs, z along the outputs; in version 1 of the format z is stored less one. All are buffers.
    """

    def __init__(self, linear, bits=4, group=16, version=1, act_order=False):
        super().__init__()
        self.in_features, self.out_features, self.bits, self.version = *linear.weight.shape[::-1], bits, version
        index = torch.arange(self.in_features) // group
        index = index[torch.randperm(self.in_features)] if act_order else index
        grouped = linear.weight.detach().mT  # (inputs, outputs)
        low, high = (
            torch.stack([getattr(grouped[index == g], end)(0) for g in range(int(index.max()) + 1)])
            for end in ("amin", "amax")
        )
        scales = (high - low) / (2**bits - 1)
        zeros = (-low / scales).round().clamp(1, 2**bits - 1)
        q = (grouped / scales[index] + zeros[index]).round().clamp(0, 2**bits - 1)
        self.register_buffer("qweight", whole(q, bits))
        self.register_buffer("qzeros", whole(zeros.mT.contiguous() - int(version == 1), bits).mT.contiguous())
        self.register_buffer("scales", scales)
        self.register_buffer("g_idx", index.int())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def dense(self):
        index = self.g_idx.long()
        zeros = numbers(self.qzeros.mT.contiguous(), self.bits).mT + int(self.version == 1)
        return self.scales[index] * (numbers(self.qweight, self.bits) - zeros[index])

    def forward(self, x):
        y = x @ self.dense().to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)


AWQ = [0, 2, 4, 6, 1, 3, 5, 7]  # which output the lowest bits hold, and so on


class Awq(nn.Module):
    """The same for AWQ: q and z packed along the outputs in that order, groups in order, nothing taken from z."""

    def __init__(self, linear, group=16):
        super().__init__()
        self.in_features, self.out_features = linear.weight.shape[::-1]
        made = Gptq(linear, 4, group, version=2)
        q, z = numbers(made.qweight, 4), numbers(made.qzeros.mT.contiguous(), 4).mT
        self.register_buffer("qweight", whole(q.mT.contiguous(), 4, AWQ).mT.contiguous())
        self.register_buffer("qzeros", whole(z.mT.contiguous(), 4, AWQ).mT.contiguous())
        self.register_buffer("scales", made.scales)
        self.register_buffer("bias", made.bias)

    def dense(self):
        q, z = (numbers(t.mT.contiguous(), 4, AWQ).mT for t in (self.qweight, self.qzeros))
        index = torch.arange(self.in_features) // (self.in_features // len(z))
        return self.scales[index] * (q - z[index])

    forward = Gptq.forward


def _standing_in(make):
    net = plain()
    for i in (0, 2):
        net[i] = make(net[i])
    return net


def gptq():
    return _standing_in(Gptq)


def gptq_act_order():
    return _standing_in(lambda layer: Gptq(layer, version=2, act_order=True))


def awq():
    return _standing_in(Awq)


BASES = {f.__name__: f for f in (little, torchao, four_bits, eight_bits, dynamic, gptq, gptq_act_order, awq)}
ROUND = {"dynamic": 0.05, "eight_bits": 0.05}  # activations are rounded as well, which floats don't
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
    for kind in (mb.DoRA(2), mb.LoRA(2, start="pissa"), mb.SparseDelta(0.1), mb.Grid(2, 2), mb.Full()):
        net = BASES[base]()
        with pytest.raises(CompositionError, match=r"quantised|no parameters"):
            mb.attach(net, "0", {"a": kind})


def trained(bay):
    with torch.no_grad():
        for p in bay.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return bay


@pytest.mark.parametrize("base", BASES)
def test_fold_raises(base):
    net = BASES[base]()
    bay = trained(mb.attach(net, ["0", "2"], {"a": mb.LoRA(2)}))
    bay.use("a")
    before = net(X)
    with pytest.raises(CompositionError, match=r"fold at site '0': the weight of this .* quantised.*dequantise=True"):
        bay.fold("a")
    assert torch.equal(net(X), before)


@pytest.mark.parametrize("base", BASES)
def test_fold_in_floats(base, caplog):
    net = BASES[base]()
    classes, states = [type(m) for m in net], [dict(m._parameters) | dict(m._buffers) for m in net]
    bay = trained(mb.attach(net, ["0", "2"], {"a": mb.LoRA(2), "b": mb.IA3()}))
    bay.use("a")
    before = net(X)
    bay.fold("a", dequantise=True)
    bound = ROUND.get(base, 1e-5)
    assert float((net(X) - before).norm() / before.norm()) < bound
    assert isinstance(net[0], nn.Linear) and type(net[0].weight) is nn.Parameter and net[0].weight.dtype == X.dtype
    errors = bay.state.folded.dequantised
    assert set(errors) == {"0", "2"} and max(errors.values()) < bound
    assert "fold: 2 quantised layers are Linears of floats now, and act otherwise by a relative" in caplog.text
    bay.unfold()
    assert torch.equal(net(X), before)
    bay.detach()
    assert [type(m) for m in net] == classes
    for module, state in zip(net, states, strict=True):
        now = module._parameters | module._buffers
        assert now.keys() == state.keys() and all(now[name] is state[name] for name in state)


@pytest.mark.parametrize("base", BASES)
def test_a_fold_that_is_refused_leaves_the_layers_packed(base):
    """LoRA(bias=True) moves a bias that the second layer has not; the first is a Linear by then."""
    net = BASES[base]()
    bay = trained(mb.attach(net, ["0", "2"], {"a": mb.LoRA(2, bias=True)}))
    bay.use("a")
    before, own = net(X), [type(m) for m in net]
    with pytest.raises(CompositionError, match=r"moves the bias, and the base's Linear has none"):
        bay.fold("a", dequantise=True)
    assert torch.equal(net(X), before) and [type(m) for m in net] == own


@pytest.mark.parametrize("base", BASES)
def test_dequantise(base):
    """A model of plain Linears, with or without a bay; what reads the weight works then."""
    net = BASES[base]()
    before = net(X)
    bay = trained(mb.attach(net, ["0", "2"], {"a": mb.LoRA(2)}))
    mixed = bay.use("a") and net(X)
    errors = mb.dequantise(net)
    bound = ROUND.get(base, 1e-5)
    assert set(errors) == {"0", "2"} and max(errors.values()) < bound
    assert float((net(X) - mixed).norm() / mixed.norm()) < bound
    bay.detach()
    assert float((net(X) - before).norm() / before.norm()) < bound
    assert type(net[0]) is nn.Linear and set(net.state_dict()) == {"0.weight", "0.bias", "2.weight"}
    mb.attach(net, "0", {"a": mb.DoRA(2)})
    assert mb.dequantise(net) == {}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_by_its_definition(bits, version, act_order):
    """The weight is scales · (q − z), entry by entry, however large the bias beside it."""
    layer = nn.Linear(32, 64)
    nn.init.normal_(layer.bias, std=1e4)
    packed = Gptq(layer, bits, 16, version, act_order)
    want = torch.empty(64, 32)
    for o in range(64):
        for i in range(32):
            g, row, column = int(packed.g_idx[i]), i * bits // 32, o * bits // 32
            q = int(packed.qweight[row, o]) >> (i * bits % 32) & (2**bits - 1)
            z = (int(packed.qzeros[g, column]) >> (o * bits % 32) & (2**bits - 1)) + (version == 1)
            want[o, i] = packed.scales[g, o] * (q - z)
    assert (want - layer.weight).abs().max() <= packed.scales.max() * 1.01
    net = nn.Sequential(packed)
    assert mb.dequantise(net)["0"] < 1e-6
    assert torch.equal(net[0].weight, want) and torch.equal(net[0].bias, layer.bias)


def test_what_is_no_linear_map_is_refused():
    class Squares(Gptq):
        def forward(self, x):
            return super().forward(x) ** 2

    net = nn.Sequential(nn.Linear(8, 32), Gptq(nn.Linear(32, 32)), Squares(nn.Linear(32, 32)))
    with pytest.raises(CompositionError, match=r"dequantise at '2': .* this Squares .* no linear map"):
        mb.dequantise(net)
    assert type(net[1]) is Gptq and net[1].qweight.dtype == torch.int32
    own = nn.Sequential(Gptq(nn.Linear(32, 32)))
    own[0].forward = own[0].forward  # as accelerate's hooks do
    with pytest.raises(CompositionError, match=r"another library's .*without device_map"):
        mb.dequantise(own)
    embedding = nn.Sequential(nn.Embedding(4, 8))
    embedding[0].weight = nn.Parameter(torch.ones(4, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(CompositionError, match="only linear layers can be dequantised"):
        mb.dequantise(embedding)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """Modules at a layer without float parameters are float32, and act on x of any dtype."""
    net = gptq().to(dtype)
    x = X.to(dtype)
    before = net(x)
    bay = trained(mb.attach(net, ["0", "2"], {"a": mb.LoRA(2), "b": mb.Bottleneck(4)}))
    out = net(x, modules=["a", "b", "a", None, "b"])
    assert out.dtype == dtype and torch.equal(out[3], before[3])
    assert mb.dequantise(net, dtype)["0"] < (2e-3 if dtype == torch.float16 else 2e-2)
    assert net[0].weight.dtype == dtype
    bay.detach()


def test_a_copy_of_a_folded_base_unfolds_by_itself():
    net = gptq()
    bay = trained(mb.attach(net, ["0", "2"], {"a": mb.LoRA(2)}))
    bay.use("a")
    before = net(X)
    bay.fold("a", dequantise=True)
    twin = copy.deepcopy(net)
    [theirs] = mb.bays(twin).values()
    theirs.unfold()
    assert torch.equal(twin(X), before) and type(net[0]).__name__ == "Linear"
    bay.unfold()
    assert torch.equal(net(X), before)


class Net(nn.Module):
    """A trunk under a prefix, with a config that names it, as transformers' models have."""

    base_model_prefix = "body"

    def __init__(self, body, name="org/net", revision="0a1b"):
        super().__init__()
        self.config = SimpleNamespace(_name_or_path=name, _commit_hash=revision)
        self.body = body

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize("base", BASES)
def test_the_fingerprint_is_of_the_weights(base, monkeypatch):
    """The same for two that are made alike, before, in and after use; another once a weight is."""
    net, twin = (Net(BASES[base]()).eval() for _ in range(2))
    first = fingerprint(net)
    assert first == fingerprint(twin) and set(first["tensors"]) == {"0.weight", "0.bias", "2.weight"}
    with torch.no_grad():
        net(X)
        net(X.bfloat16()) if base == "four_bits" else None  # packed otherwise from here on, on some processors
    assert fingerprint(net) == first
    attached = mb.attach(net, "body.0", {"a": mb.LoRA(2)})
    assert fingerprint(net)["digest"] == first["digest"]
    attached.detach()

    def other(make=plain):
        made = make()
        with torch.no_grad():
            made[0].weight[3, 5] += 0.05
        return made

    monkeypatch.setitem(globals(), "plain", other)
    changed = fingerprint(Net(BASES[base]()))["tensors"]
    assert [name for name in changed if changed[name] != first["tensors"][name]] == ["0.weight"]


def saved(net, folder):
    bay = trained(mb.attach(net, ["body.0", "body.2"], {"a": mb.LoRA(2)}, name="tasks"))
    bay.use("a")
    bay.save(folder)
    return net(X)


@pytest.mark.parametrize("base", BASES)
def test_saved_and_loaded(base, tmp_path, caplog):
    """On the base that it was made on, without a word."""
    out = saved(Net(BASES[base]()), tmp_path)
    again = Net(BASES[base]())
    bays = mb.load(again, tmp_path)
    bays["tasks"].use("a")
    assert torch.equal(again(X), out) and not caplog.records


@pytest.mark.parametrize("there", BASES)
def test_between_a_quantised_base_and_its_floats(there, tmp_path, caplog):
    """Name and revision say that it is one base; that is told, with the tensors. Other names are refused, with both."""
    quantised = lambda **said: Net(BASES[there](), **said)
    saved(Net(plain()), tmp_path / "floats")
    saved(quantised(), tmp_path / "packed")
    mb.load(quantised(), tmp_path / "floats")
    said = r"\d tensors are quantised here, and floats in the file \('0\.weight'.*are the same, \('org/net', '0a1b'\)"
    assert re.search(said, caplog.text)
    caplog.clear()
    mb.load(Net(plain()), tmp_path / "packed")
    assert re.search(r"\d tensors are floats here, and quantised in the file", caplog.text)
    for folder, net in (("floats", quantised(name="org/other")), ("packed", Net(plain(), revision="ffff"))):
        with pytest.raises(BaseMismatch, match=r"tensors are .*the base's name and revision must be the same"):
            mb.load(net, tmp_path / folder)
        mb.load(net, tmp_path / folder, base="any")


def test_between_two_ways_of_quantising(tmp_path, caplog):
    saved(Net(gptq()), tmp_path)
    mb.load(Net(awq()), tmp_path)
    assert "2 tensors are quantised otherwise ('0.weight', '2.weight')" in caplog.text
    with pytest.raises(BaseMismatch, match=r"quantised otherwise .*must be known and the same"):
        mb.load(Net(awq(), revision=None), tmp_path)
    local = tmp_path / "local"
    saved(Net(gptq(), "a/folder", None), local)
    with pytest.raises(BaseMismatch, match=r"quantised otherwise"):
        mb.load(Net(awq(), "a/folder", None), local)


@pytest.mark.parametrize("kind", [mb.DenseDelta(), mb.Intrinsic(8), mb.LoKr()], ids=lambda kind: type(kind).__name__)
@pytest.mark.parametrize("base", BASES)
def test_updates_have_the_shape_of_the_weight_as_it_acts(base, kind):
    """bitsandbytes packs it into one column, GPTQ has none of that name."""
    net = BASES[base]()
    bay = trained(mb.attach(net, ["0", "2"], {"a": kind}))
    plainly = bay.use(None) and net(X)
    out = bay.use("a") and net(X)
    assert not torch.allclose(out, plainly)
    bay.fold("a", dequantise=True)
    assert float((net(X) - out).norm() / out.norm()) < ROUND.get(base, 1e-5)


@pytest.mark.parametrize("base", [base for base in BASES if base != "little"])  # whose tensors can't be cut
def test_exports_that_need_the_weight_are_refused(base, tmp_path):
    net = Net(BASES[base]())
    bay = trained(
        mb.attach(net, "body.2", {"a": mb.LoRA(2), "b": mb.IA3(), "c": mb.IA3(), "d": mb.LoKr(), "e": mb.LoKr(2)})
    )
    assert set(bay.export(tmp_path / "a", "a", format="lora").values()) == {0.0}  # the update is the whole of it
    with pytest.raises(CompositionError, match=r"IA3 changes is told by the weight, .* is quantised"):
        bay.export(tmp_path / "b", "b", format="lora")
    assert not (tmp_path / "b").exists()
    with pytest.raises(CompositionError, match=r"weight is quantised \(.*mb.dequantise\(model\)"):
        bay.merge("m", ["b", "d"])
    mb.dequantise(net)
    assert max(bay.export(tmp_path / "b", "b", format="lora", error=0.9).values()) < 0.9


def test_a_layer_of_gptqmodel():
    """The real one, in float32 on the host, beside the definition that the stand-in is written by."""
    pytest.importorskip("gptqmodel")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    for act_order in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(64, 64)
        made = Gptq(layer, 4, 16, version=2, act_order=act_order)
        real = TorchLinear(
            bits=4, group_size=16, sym=False, desc_act=act_order, in_features=64, out_features=64, bias=True
        )
        real.load_state_dict({name: t.half() if t.is_floating_point() else t for name, t in made.state_dict().items()})
        with torch.compiler.set_stance("force_eager"):
            real.post_init()
            net = nn.Sequential(real.eval())
            before = net(X)
            assert_close(before, made(X), atol=2e-3, rtol=2e-3)  # its scales are float16
            bay = trained(mb.attach(net, "0", {"a": mb.LoRA(2), "b": mb.Bottleneck(4)}))
            out = net(X, modules=["a", "b", None, "a", "b"])
            assert torch.equal(out[2], before[2]) and not torch.allclose(out[0], before[0])
            bay.remove("b")
            alone = bay.use("a") and net(X)
            bay.fold("a", dequantise=True)
            assert_close(net(X), alone, atol=1e-5, rtol=1e-4)
            bay.unfold()
            assert torch.equal(net(X), alone) and fingerprint(Net(net))["dtypes"] == ["packed"]
            bay.detach()
            assert torch.equal(net(X), before) and type(net[0]) is TorchLinear
