"""fold = forward and unfold ∘ fold = identity, for each delta at each layer that takes it; what can't fold is told."""

import copy
import json

import pytest
import torch
from torch import Tensor, nn

import helpers
import modbay as mb
from modbay.errors import BayError, CompositionError, LabelError, MatchError

FOLDS = [(case, site) for case, site in helpers.cases(where=lambda case: case.folds) if site != "block"]
ROUTES = {"one": ("a",), "two": ("a", "b"), "weights": ({"a": 0.7, "b": -0.2},)}


def trained(bay: mb.Bay) -> mb.Bay:
    with torch.no_grad():
        for p in bay.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return bay


def bits(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("which", ROUTES.values(), ids=ROUTES.keys())
@pytest.mark.parametrize(("case", "site"), FOLDS, ids=helpers.ids)
def test_fold_is_forward_and_unfold_restores(case, site, which):
    net, x = nn.Sequential(helpers.SITES[site].make()), helpers.SITES[site].example(4)
    bay = trained(mb.attach(net, at="0", modules={"a": case.make(), "b": case.make()}))
    before = bits(net)
    bay.use(*which)
    want, plain = net(x), bay.use(None) and net(x)
    assert not torch.allclose(want, plain)
    bay.use(*which).fold(*which)
    torch.testing.assert_close(net(x), want, rtol=1e-5, atol=1e-5)
    assert not same(bits(net), before)
    bay.unfold()
    assert same(bits(net), before)
    assert torch.equal(net(x), want)


@pytest.mark.parametrize("site", ["linear", "conv1d", "conv2d", "embedding", "norm", "block"])
def test_a_full_copy_folds_by_copying(site):
    net, x = nn.Sequential(helpers.SITES[site].make()), helpers.SITES[site].example(4)
    bay = trained(mb.attach(net, at="0", modules={"a": mb.Full()}))
    before = bits(net)
    want = bay.use("a") and net(x)
    bay.fold("a")
    assert torch.equal(net(x), want)
    bay.unfold()
    assert same(bits(net), before)


@pytest.mark.parametrize("site", ["linear", "conv1d", "conv2d", "embedding", "norm"])
def test_a_full_copy_folds_beside_others(site):
    """Of an affine layer, a weighted copy is a weighted change."""
    net, x = nn.Sequential(helpers.SITES[site].make()), helpers.SITES[site].example(4)
    bay = trained(mb.attach(net, at="0", modules={"a": mb.Full(), "b": mb.BitFit()}))
    want = bay.use({"a": 0.5, "b": 2.0}) and net(x)
    bay.fold()  # what `use` has set
    torch.testing.assert_close(net(x), want, rtol=1e-5, atol=1e-5)


def test_slices_of_one_output():
    net, x = nn.Sequential(helpers.SITES["conv1d"].make()), helpers.SITES["conv1d"].example(4)
    at = [mb.part("0", 0, 2), mb.part("0", 4, 6)]
    bay = trained(mb.attach(net, at=at, modules={"a": mb.LoRA(2), "b": mb.BitFit()}))
    before = bits(net)
    want = bay.use("a", "b") and net(x)
    bay.fold("a", "b")
    torch.testing.assert_close(net(x), want, rtol=1e-5, atol=1e-5)
    bay.unfold()
    assert same(bits(net), before)


class Experts(nn.Module):
    """Three experts as one parameter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eoi,bi->bo", self.weight, x)


def test_fused_experts():
    net, x = nn.ModuleDict({"experts": Experts()}), torch.randn(4, 8)
    bay = trained(mb.attach(net, at="experts.weight", modules={"a": mb.LoRA(2)}))
    before = bits(net)
    want = bay.use("a") and net["experts"](x)
    bay.fold("a")
    torch.testing.assert_close(net["experts"](x), want, rtol=1e-5, atol=1e-5)
    bay.unfold()
    assert same(bits(net), before)


class Gate(nn.Module):
    """As those of mixtures of experts: a matrix that is read by hand, and more outputs than one."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 8)), nn.Parameter(torch.randn(3))
        self.in_features, self.out_features = 3, 8  # of whatever it calls so

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = x @ self.weight.mT + self.bias
        return logits, logits.argmax(-1)


def test_a_matrix_that_is_no_layer_s(tmp_path):
    net, x = nn.ModuleDict({"gate": Gate(), "other": nn.Linear(8, 3)}), torch.randn(4, 8)
    bare = net["gate"](x)[0]
    bay = trained(mb.attach(net, at="*.weight", modules={"a": mb.LoRA(2), "b": mb.DoRA(2)}))
    assert list(bay.modulars) == ["gate.weight"]  # a Linear's is changed at the Linear
    before, part = bits(net), bay.modulars["gate.weight"].order[0]
    want = bay.use("a") and net["gate"](x)[0]
    torch.testing.assert_close(want, bare + x @ (part.B @ part.A).mT)
    for name in ("a", "b"):
        want = bay.use(name) and net["gate"](x)[0]
        bay.fold(name)
        torch.testing.assert_close(net["gate"](x)[0], want, rtol=1e-5, atol=1e-5)
        bay.unfold()
    assert same(bits(net), before)
    bay.save(tmp_path)
    bay.detach()
    mb.load(net, tmp_path)["modules"].use("b")
    torch.testing.assert_close(net["gate"](x)[0], want)


def test_a_matrix_of_half_precision_and_a_module_of_single():
    net, x = nn.ModuleDict({"gate": Gate()}).bfloat16(), torch.randn(4, 8).bfloat16()
    bay = trained(mb.attach(net, at="gate.weight", modules={"a": mb.LoRA(2)})).use("a")
    part, bare = bay.modulars["gate.weight"].order[0], net["gate"].weight
    part.float()
    want = x @ (bare + part.B @ part.A).bfloat16().mT + net["gate"].bias
    assert torch.equal(net["gate"](x)[0], want)


def test_a_matrix_that_is_no_layer_s_has_no_bias():
    net, x = nn.ModuleDict({"gate": Gate()}), torch.randn(4, 8)
    trained(mb.attach(net, at="gate.weight", modules={"a": mb.LoRA(2, bias=True)})).use("a")
    with pytest.raises(CompositionError, match="no bias to move"):
        net["gate"](x)
    with pytest.raises(MatchError, match="without an output"):
        mb.attach(net, at=mb.part("gate.weight", 0, 2), modules={"a": mb.LoRA(2)}, name="part")


def test_half_precision_is_folded_in_float32():
    net = nn.Sequential(nn.Linear(8, 6)).to(torch.bfloat16)
    bay = trained(mb.attach(net, at="0", modules={"a": mb.LoRA(2)}))
    before, weight = bits(net), net[0].weight.float()
    part = bay.modulars["0"].order[0]
    change = part.B.float() @ part.A.float()
    bay.fold("a")
    assert torch.equal(net[0].weight, (weight + change).to(torch.bfloat16))
    bay.unfold()
    assert same(bits(net), before)


# Tied weights


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.embed(x))


def test_tied_weights_raise_unless_untied():
    net, x = Tied(), torch.randint(11, (4, 3))
    bay = trained(mb.attach(net, at="embed", modules={"a": mb.LoRA(2)}))
    before = bits(net)
    want = bay.use("a") and net(x)
    with pytest.raises(CompositionError, match=r"weight is tied, 'embed\.weight', 'out\.weight' are one.*untie=True"):
        bay.fold("a")
    assert same(bits(net), before)
    bay.fold("a", untie=True)
    assert net.out.weight is not net.embed.weight
    torch.testing.assert_close(net(x), want)
    bay.unfold()
    assert net.out.weight is net.embed.weight and same(bits(net), before)


# What can't fold


class Scaled(nn.Linear):
    """A Linear by class, but not affine."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


CANT = {
    "bottleneck": (lambda: nn.Linear(8, 6), lambda: mb.Bottleneck(3), "Bottleneck is no change of f's parameters"),
    "network": (lambda: nn.Linear(8, 6), lambda: nn.Linear(8, 6), "Network is no change of f's parameters"),
    "subclass": (lambda: Scaled(8, 6), lambda: mb.LoRA(2), r"\(Scaled\): only exactly"),
    "block": (lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU()), lambda: mb.BitFit(), r"\(Sequential\): only exactly"),
    "no bias": (lambda: nn.Linear(8, 6, bias=False), lambda: mb.BitFit(), "the base's Linear has none"),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: mb.LoRA(2), "a convolution with 2 groups"),
    "padding": (lambda: nn.Conv2d(4, 6, 3, padding_mode="reflect"), lambda: mb.LoRA(2), "padding_mode='reflect'"),
    "max_norm": (lambda: nn.Embedding(11, 6, max_norm=1.0), lambda: mb.LoRA(2), "max_norm=1.0"),
}  # fmt: skip


@pytest.mark.parametrize(("layer", "kind", "message"), CANT.values(), ids=CANT.keys())
def test_what_can_t_fold_is_told_before_anything_changes(layer, kind, message):
    net = nn.Sequential(nn.Linear(8, 8), layer())
    bay = trained(mb.attach(net, at="1", modules={"a": kind()}))
    also = trained(mb.attach(net, at="0", modules={"a": mb.LoRA(2)}, name="also"))
    before = bits(net)
    with pytest.raises(CompositionError, match=message):
        bay.fold("a")
    assert same(bits(net), before) and bay.state.enabled
    also.fold("a")


def test_an_aggregator_that_does_more_than_add_is_told():
    net, x = nn.Sequential(nn.Linear(8, 6)), torch.randn(4, 8)
    modules = {"a": mb.LoRA(2), "b": mb.LoRA(2)}
    bay = trained(mb.attach(net, at="0", modules=modules, aggregator=mb.ParameterAverage()))
    with pytest.raises(CompositionError, match=r"ParameterAverage does more than add .*\(a: 0\.5, b: 0\.5\)"):
        bay.fold({"a": 0.5, "b": 0.5})
    want = bay.use("a") and net(x)
    bay.fold("a")
    torch.testing.assert_close(net(x), want)


def test_input_and_output_together_are_told():
    net = nn.Sequential(nn.Linear(8, 6))
    bay = mb.attach(net, at="0", modules={"a": mb.IA3("input"), "b": mb.IA3()})
    with pytest.raises(CompositionError, match="in part on the input and in part on the output"):
        bay.fold("a", "b")


# The life of a folded bay


@pytest.fixture
def folded() -> tuple[nn.Module, mb.Bay, Tensor, Tensor]:
    net, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 6)), torch.randn(4, 8)
    bay = trained(mb.attach(net, at=nn.Linear, modules={"a": mb.LoRA(2), "b": mb.LoRA(2)}, name="task"))
    want = net(x, task="a")
    return net, bay.fold("a"), x, want


def test_labels_raise_while_folded(folded):
    net, bay, x, want = folded
    torch.testing.assert_close(net(x), want)
    with pytest.raises(LabelError, match=r"bay 'task' is folded into the base's weights \('a'\)"):
        net(x, task=["a", "b", "a", "b"])
    bay.unfold()
    assert torch.equal(net(x, task="a"), want)


def test_detach_waits_for_unfold_or_keeps(folded):
    net, bay, x, want = folded
    with pytest.raises(BayError, match="is folded: unfold it first, or keep=True"):
        bay.detach()
    plain = bay.detach(keep=True)
    assert (
        plain is net
        and type(net[0]) is nn.Linear
        and list(net.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    )
    torch.testing.assert_close(net(x), want)


def test_the_verbs_refuse_what_they_can_t_do(folded, tmp_path):
    _, bay, _, _ = folded
    with pytest.raises(BayError, match=r"is folded already \('a'\): unfold it first"):
        bay.fold("b")
    with pytest.raises(BayError, match="save: bay 'task' is folded"):
        bay.save(tmp_path)
    bay.unfold()
    bay.save(tmp_path)
    with pytest.raises(BayError, match="is not folded"):
        bay.unfold()
    with pytest.raises(BayError, match="nothing to keep"):
        bay.detach(keep=True)
    with pytest.raises(BayError, match=r"depends on the input.*Say which: fold\('a'\)"):
        bay.fold()
    with pytest.raises(BayError, match="has no such module; there are 'a', 'b'"):
        bay.fold("c")


def test_a_copy_of_a_folded_model_unfolds_by_itself(folded):
    net, bay, x, want = folded
    twin = copy.deepcopy(net)
    mb.bays(twin)["task"].unfold()
    assert torch.equal(twin(x, task="a"), want)
    assert bay.state.folded is not None
    torch.testing.assert_close(net(x), want)


def test_bays_fold_in_the_order_attached():
    net, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6)), torch.randn(4, 8)
    inner = trained(mb.attach(net, at="0", modules={"a": mb.IA3()}, name="inner")).use("a")
    outer = trained(mb.attach(net, at="0", modules={"a": mb.LoRA(2)}, name="outer")).use("a")
    before, want = bits(net), net(x)
    with pytest.raises(BayError, match="bay 'inner' is at work at '0' too"):
        outer.fold()
    inner.fold()
    torch.testing.assert_close(net(x), want)
    outer.fold()
    torch.testing.assert_close(net(x), want)
    with pytest.raises(BayError, match="bay 'outer' was folded after 'inner'"):
        inner.unfold()
    outer.unfold()
    inner.unfold()
    assert same(bits(net), before) and torch.equal(net(x), want)


def test_a_copy_around_the_site_is_told():
    net = nn.Sequential(nn.Sequential(nn.Linear(8, 8)))
    bay = trained(mb.attach(net, at="0.0", modules={"a": mb.LoRA(2)}, name="inside"))
    mb.attach(net, at="0", modules={"a": mb.Full()}, name="around")
    with pytest.raises(BayError, match="bay 'around' is at work at '0' too"):
        bay.fold("a")


# The command on a quantised base: BitNet's, whose layers transformers has itself


IDS = torch.tensor([[3, 8, 1, 40, 7, 9], [11, 2, 30, 4, 6, 5]])


@pytest.fixture
def bitnet(tmp_path):
    """A folder with a Llama of weights −1, 0 and 1, four to a byte; its layers round their inputs to int8 as well."""
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import save_file
    from transformers.integrations.bitnet import pack_weights

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    model, folder, tensors = transformers.LlamaForCausalLM(config), tmp_path / "bitnet", {}
    model.save_pretrained(folder)
    for name, weight in model.state_dict().items():
        if name.endswith("_proj.weight"):
            tensors[f"{name}_scale"] = 1 / weight.abs().mean()[None]
            weight = pack_weights((weight * tensors[f"{name}_scale"]).round().clamp(-1, 1))
        tensors[name] = weight
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said = json.loads((folder / "config.json").read_text())
    said["quantization_config"] = {
        "quant_method": "bitnet", "linear_class": "bitlinear", "quantization_mode": "offline",
        "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(said))
    with torch.compiler.set_stance("force_eager"):  # it compiles how weights are unpacked, for a minute
        yield folder


def command(*args, code=0):
    from typer.testing import CliRunner

    from modbay.cli import app

    result = CliRunner().invoke(app, ["fold", *(str(a) for a in args)])
    assert result.exit_code == code, result.output
    return result.stderr if code else result.stdout


def logits(net):
    with torch.no_grad():
        return net(IDS).logits


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.filterwarnings("ignore")  # transformers says that there is no GPU
def test_the_command_on_a_quantised_base(bitnet, tmp_path):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(bitnet).eval()
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "BitLinear"
    bay = trained(mb.attach(model, at="*.down_proj", modules={"en": mb.LoRA(2)}, name="language"))
    bay.save(tmp_path / "modules")
    bay.use("en")
    given = [bitnet, tmp_path / "modules", "-o", tmp_path / "out"]
    refused = command(*given, code=1)
    assert "quantised" in refused and "Here that is --dequantise" in refused and not (tmp_path / "out").exists()
    said = command(*given, "--dequantise", "--json")
    errors = json.loads(said)["dequantised"]
    assert len(errors) == 14 and 1e-4 < max(errors.values()) < 2e-2  # what int8 inputs cost
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(plain.model.layers[0].self_attn.q_proj) is nn.Linear
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert relative(logits(plain), logits(model)) < 0.02 < relative(logits(plain), logits(bay.use(None) and model))
    said = command(*given, "--dequantise", "--overwrite")
    assert "14 quantised layers became floats, and act otherwise by a relative" in said
    assert "14 quantised layers became floats" in (tmp_path / "out" / "README.md").read_text()


def test_a_flag_with_nothing_to_do_says_so(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    trained(mb.attach(model, at="*.q_proj", modules={"en": mb.LoRA(2)})).save(tmp_path / "modules")
    said = command(tmp_path / "base", tmp_path / "modules", "-o", tmp_path / "out", "--dequantise")
    assert "No layer of the base was quantised." in said and (tmp_path / "out" / "model.safetensors").exists()


def test_a_package_that_is_missing_is_named(bitnet, tmp_path, monkeypatch):
    said = json.loads((bitnet / "config.json").read_text())
    said["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (bitnet / "config.json").write_text(json.dumps(said))
    import transformers.quantizers.quantizer_gptq as gptq

    monkeypatch.setattr(gptq, "is_optimum_available", lambda: False)
    refused = command(bitnet, tmp_path / "modules", "-o", tmp_path / "out", code=1)
    assert "it needs a package that is not here" in refused and "optimum" in refused
