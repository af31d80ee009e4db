"""Modules as files: load ∘ save = identity, each module apart from the others, and errors before any change."""

import copy
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import modbay as mb
from modbay.errors import BaseMismatch, BayError, CompositionError, FileError

LABELS = ["a", "b", None, "a"]


class Net(nn.Module):
    """Two linear layers in a trunk, and a head outside it, as transformers has them."""

    base_model_prefix = "trunk"

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))


@pytest.fixture
def net() -> Net:
    return Net().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 8)


def pair(make: Callable[[], mb.Kind] = lambda: mb.LoRA(2)) -> dict[str, mb.Kind]:
    return {"a": make(), "b": make()}


def learned(bay: mb.Bay) -> list[nn.Parameter]:
    return [p for group in bay.parameter_groups(1.0) for p in group["params"]]


def train(bay: mb.Bay) -> None:
    """As if something had been learned."""
    with torch.no_grad():
        for p in learned(bay):
            p.add_(0.3 * torch.randn_like(p))


def attached(net: nn.Module, **more) -> mb.Bay:
    bay = mb.attach(net, **{"at": "trunk.*", "modules": pair(), "name": "task", **more})
    train(bay)
    return bay


@pytest.fixture
def saved(net, x, tmp_path) -> tuple[Path, Tensor]:
    """(a folder with a bay of two LoRAs, what the model gave with them)."""
    work = copy.deepcopy(net)
    attached(work, at="trunk.[02]").save(tmp_path)
    return tmp_path, work(x, task=LABELS)


def unchanged(net: nn.Module, before: dict[str, Tensor]) -> bool:
    after = net.state_dict()
    plain = not any("_bay" in name for name, _ in net.named_modules()) and type(net) is Net
    return plain and after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)


# Identity

PARTS: dict[str, dict] = {
    "by label": {},
    "by table": {"router": lambda: mb.ByLabel("task", {"a": ["a", "b"], "b": "b"})},
    "skills": {"router": lambda: mb.Skills("task", ["b", "a", "c"]), "aggregator": lambda: mb.ParameterAverage()},
    "top-k": {"router": lambda: mb.TopK(1), "each": True},
    "fixed": {"router": lambda: mb.Fixed({"b": 0.3})},
    "fixed, learned": {"router": lambda: mb.Fixed([0.3, 0.7], learned=True, softmax=True)},
    "fusion": {"kind": lambda: mb.Bottleneck(3), "router": lambda: mb.Uniform(), "aggregator": mb.AdapterFusion},
    "fusion each": {
        "kind": lambda: mb.Bottleneck(3),
        "router": lambda: mb.Uniform(),
        "aggregator": mb.AdapterFusion,
        "each": True,
    },
    "sequence": {
        "kind": lambda: mb.Bottleneck(3),
        "router": lambda: mb.Uniform(),
        "aggregator": lambda: mb.Sequence(["b", "a"]),
    },
    "mixture": {
        "kind": lambda: mb.FeedForward(5),
        "router": lambda: mb.TopK(2),
        "aggregator": lambda: mb.Mixture(),
        "each": True,
    },
    "sparse": {"kind": lambda: mb.SparseDelta(mask={f"trunk.{i}": torch.rand(8, 8) > 0.5 for i in (0, 2)})},
    "full": {"kind": lambda: mb.Full()},
    "generated": {"kind": lambda: mb.Hyper(mb.LoRA(2), "task", ("a", "b"), size=4), "router": lambda: mb.Uniform()},
}


@pytest.mark.parametrize("case", PARTS.values(), ids=PARTS.keys())
def test_load_after_save_is_identity(net, x, tmp_path, case):
    router, aggregator = (
        part and (part if case.get("each") else part()) for part in map(case.get, ("router", "aggregator"))
    )
    work, fresh = copy.deepcopy(net), copy.deepcopy(net)
    modules = pair(case.get("kind", lambda: mb.LoRA(2)))
    bay = attached(work, at="trunk.[02]", modules=modules, router=router, aggregator=aggregator)
    labels = {"task": ["a", "b", "b", "a"]} if bay.state.keywords or ("kind" in case and bay.state.read) else {}
    want = work(x, **labels)
    bay.save(tmp_path / "first")

    state = torch.get_rng_state()
    again = mb.load(fresh, tmp_path / "first")["task"]
    assert torch.equal(torch.get_rng_state(), state)  # what is overwritten at once is not drawn from the user's numbers
    assert again.names() == bay.names()
    assert torch.equal(fresh(x, **labels), want)

    own = learned(again)
    with torch.no_grad():
        for p in own:
            p.zero_()
    again.load(tmp_path / "first")  # in place
    assert torch.equal(fresh(x, **labels), want)
    assert all(p is q for p, q in zip(own, learned(again), strict=True))

    again.save(tmp_path / "second")
    for path in (tmp_path / "first").rglob("*.safetensors"):
        other = load_file(tmp_path / "second" / path.relative_to(tmp_path / "first"))
        assert all(torch.equal(tensor, other[key]) for key, tensor in load_file(path).items())
    again.detach()
    assert unchanged(fresh, net.state_dict())


def test_the_folder(net, tmp_path):
    attached(net, at="trunk.[02]").save(tmp_path)
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {"task/bay.json"} | {f"task/{m}/module.{end}" for m in "ab" for end in ("json", "safetensors")}
    module = json.loads((tmp_path / "task/a/module.json").read_text())
    assert module["kinds"][0]["class"] == "LoRA" and module["kinds"][0]["arguments"]["rank"] == 2
    assert module["sites"]["trunk.0"] == {"kind": 0, "form": "linear", "inputs": 8, "outputs": 8}
    assert set(load_file(tmp_path / "task/a/module.safetensors")) == {f"trunk.{i}/{p}" for i in (0, 2) for p in "AB"}
    bay = json.loads((tmp_path / "task/bay.json").read_text())
    assert set(bay["base"]["tensors"]) == {f"{i}.{p}" for i in (0, 2) for p in ("weight", "bias")}  # the trunk alone


def test_saving_one_module_never_touches_another(saved, net, x):
    folder, want = saved
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}
    bay = mb.load(net, folder)["task"]
    bay.add("c", mb.LoRA(3))
    train(bay)
    bay.save(folder, "c")
    for path, (content, time) in before.items():
        if path.name != "bay.json":
            assert path.read_bytes() == content and path.stat().st_mtime_ns == time
    bay.load(folder, "a", "b")
    assert torch.equal(net(x, task=LABELS), want)
    again = mb.load(copy.deepcopy(bay.detach()), folder)["task"]
    assert again.names() == ["a", "b", "c"]


def test_two_bays_come_back_in_order(net, x, tmp_path):
    work = copy.deepcopy(net)
    for name in ("z", "a"):
        attached(work, at="trunk.0", name=name, modules={"m": mb.LoRA(2)}).use("m").save(tmp_path)
    bays = mb.load(net, tmp_path)
    assert list(bays) == ["z", "a"] == list(mb.bays(net))
    for bay in bays.values():
        bay.use("m")
    assert torch.equal(net(x), work(x))


def test_dtype_and_freezing_come_back(net, tmp_path):
    work = copy.deepcopy(net)
    bay = attached(work, at="trunk.0")
    for p in bay.parameters("a"):
        p.data = p.data.double()
    bay.freeze("b")
    bay.save(tmp_path)
    again = mb.load(net, tmp_path)["task"]
    assert {p.dtype for p in again.parameters("a")} == {torch.float64}
    assert all(p.requires_grad for p in again.parameters("a"))
    assert not any(p.requires_grad for p in again.parameters("b"))


def test_routers_follow_the_names(net, x, tmp_path):
    """What was learned for a module is found by its name, in a bay that has others, or the same in another order."""
    gates = lambda: mb.Skills("task", ["a", "b"])
    work = copy.deepcopy(net)
    attached(work, at="trunk.0", router=gates()).save(tmp_path)
    bay = attached(net, at="trunk.0", router=gates(), modules=dict(reversed(pair().items())))
    bay.load(tmp_path)
    assert bay.names() == ["b", "a"]
    torch.testing.assert_close(net(x, task=["a", "b", "b", "a"]), work(x, task=["a", "b", "b", "a"]))


# In place


def test_a_module_that_the_bay_lacks_is_added_only_if_asked(saved, net, x):
    folder, want = saved
    bay = attached(net, at="trunk.[02]", modules={"b": mb.LoRA(2)})
    b = [p.clone() for p in bay.parameters("b")]
    with pytest.raises(BayError, match=r"has no modules 'a'.*add=True adds them"):
        bay.load(folder)
    assert bay.names() == ["b"] and all(torch.equal(p, q) for p, q in zip(bay.parameters("b"), b, strict=True))
    bay.load(folder, "a", add=True)
    assert bay.names() == ["b", "a"]
    bay.load(folder)
    assert torch.equal(net(x, task=LABELS), want)


def test_another_kind_raises(saved, net):
    folder, _ = saved
    bay = attached(net, at="trunk.[02]", modules={"a": mb.LoRA(3), "b": mb.LoRA(2)})
    with pytest.raises(FileError, match=r"module 'a' is LoRA\(.*rank=2.*in the file, and LoRA\(.*rank=3.* here"):
        bay.load(folder)
    bay.load(folder, "b")


def test_another_router_raises(saved, net):
    bay = attached(net, at="trunk.[02]", router=mb.Uniform())
    with pytest.raises(FileError, match=r"the router is ByLabel\(.*\) .* in the file, and Uniform"):
        bay.load(saved[0])


def test_a_module_alone_loads_without_its_bay(saved, net, x):
    folder, want = saved
    (folder / "task" / "bay.json").unlink()
    bay = attached(net, at="trunk.[02]")
    bay.load(folder, "a", "b")
    assert torch.equal(net(x, task=LABELS), want)
    other = Net().eval()
    with pytest.raises(BaseMismatch, match=r"tensors differ: 'one digest for all'"):
        attached(other, at="trunk.[02]").load(folder, "a")


# Sites that are no whole call, and kinds that share


@pytest.mark.parametrize(
    "at",
    [
        [mb.part("trunk.0", 0, 2), mb.part("trunk.0", 4, 8)],
        mb.at("trunk", features=8),
        mb.before("trunk.2"),
        "",
    ],
    ids=["slices", "width", "before", "root"],
)
def test_sites(net, x, tmp_path, at):
    work = copy.deepcopy(net)
    modules = pair(lambda: mb.Bottleneck(3)) if not isinstance(at, list) else pair()
    attached(work, at=at if at else mb.at("", features=3), modules=modules).save(tmp_path)
    mb.load(net, tmp_path)
    assert torch.equal(net(x, task=LABELS), work(x, task=LABELS))


def test_a_span(net, x, tmp_path):
    work = copy.deepcopy(net)
    attached(work, at=mb.span("trunk.0", "trunk.2"), modules=pair(lambda: mb.Bottleneck(3))).save(tmp_path)
    mb.load(net, tmp_path)
    assert torch.equal(net(x, task=LABELS), work(x, task=LABELS))


@dataclass(frozen=True)
class Twin(mb.ParameterComposition):
    """LoRA with one A for all sites."""

    rank: int = 2

    def init(self, sites: Sequence[mb.Site]) -> dict[str, dict[str, Tensor]]:
        a = torch.randn(self.rank, 8)
        return {site.name: {"A": a, "B": site.zeros(8, self.rank)} for site in sites}

    def delta(self, params, site):
        from modbay.deltas import LowRank

        return LowRank(params["A"], params["B"])


def test_what_is_shared_is_stored_once(net, x, tmp_path):
    work = copy.deepcopy(net)
    bay = attached(work, at="trunk.[02]", modules=pair(Twin))
    bay.save(tmp_path)
    assert set(load_file(tmp_path / "task/a/module.safetensors")) == {"trunk.0/A", "trunk.0/B", "trunk.2/B"}
    again = mb.load(net, tmp_path)["task"]
    assert len(again.parameters("a")) == 3
    assert torch.equal(net(x, task=LABELS), work(x, task=LABELS))


def test_a_network_of_ones_own_loads_only_in_place(net, x, tmp_path):
    work = copy.deepcopy(net)
    own = {"a": nn.Linear(8, 8)}
    attached(work, at="trunk.0", modules=own).save(tmp_path)
    with pytest.raises(FileError, match="is a network of your own"):
        mb.load(net, tmp_path)
    attached(net, at="trunk.0", modules={"a": nn.Linear(8, 8)}).load(tmp_path)
    assert torch.equal(net(x, task="a"), work(x, task="a"))


# The base


def test_one_changed_weight_is_named(saved, net):
    with torch.no_grad():
        net.trunk[2].weight[3, 4] += 1e-6
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(BaseMismatch) as told:
        mb.load(net, saved[0])
    text = str(told.value)
    assert "module 'a'" in text and "tensors differ: '2.weight'" in text and 'base="any"' in text
    assert unchanged(net, before)


def test_a_change_through_data_is_seen(saved, net):
    mb.load(net, saved[0])["task"].detach()  # the digests are remembered now
    net.trunk[0].bias.data[0] += 1.0  # which does not move the version on
    with pytest.raises(BaseMismatch, match=r"tensors differ: '0\.bias'"):
        mb.load(net, saved[0])


def test_heads_are_outside(saved, net, x):
    nn.init.normal_(net.head.weight)
    mb.load(net, saved[0])


def test_a_bfloat16_copy_is_the_same_base_and_float16_is_not_told(saved, net):
    mb.load(copy.deepcopy(net).to(torch.bfloat16), saved[0])
    with pytest.raises(BaseMismatch, match=r"float16, whose rounding.*then call \.half\(\)"):
        mb.load(copy.deepcopy(net).half(), saved[0])
    other = Net().to(torch.bfloat16)
    with pytest.raises(BaseMismatch, match=r"tensors differ"):
        mb.load(other, saved[0])


def test_a_record_is_read_by_people_too(tmp_path):
    """An embedding is one line of it; what stands in a text is as it was."""
    net = Net()
    about = {"embedding": [0.25, -1.5e-07, 3], "notes": "[\n 1\n]", "licence": "MIT"}
    mb.attach(net, at="trunk.0", modules={"a": mb.LoRA(2)}).save(tmp_path, about={"a": about})
    text = (tmp_path / "modules" / "a" / "module.json").read_text()
    assert '"embedding": [0.25, -1.5e-07, 3]' in text
    said = json.loads(text)["about"]
    assert {key: said[key] for key in about} == about


def test_another_base_is_recorded(saved, tmp_path, x):
    folder, _ = saved
    other = Net()
    made_on = json.loads((folder / "task/a/module.json").read_text())["base"]["digest"]
    mb.load(other, folder, base="any")["task"].save(tmp_path / "other")
    assert json.loads((tmp_path / "other/task/a/module.json").read_text())["made_on"] == made_on
    with pytest.raises(BaseMismatch, match="base='some'"):
        mb.load(Net(), folder, base="some")


def test_modules_of_two_bases_do_not_share_a_folder(saved):
    bay = attached(Net(), at="trunk.[02]")
    with pytest.raises(BaseMismatch, match="save 'a' into a folder of their own"):
        bay.save(saved[0], "a")


# Files that are not sound: each is told, and the model stays as it was


def cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def rewrite_json(path: Path, **change) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def _kind(path: Path, **change) -> None:
    kinds = json.loads(path.read_text())["kinds"]
    rewrite_json(path, kinds=[{**kinds[0], **change}])


def _pickle(path: Path) -> None:
    path.unlink()
    torch.save({"A": torch.zeros(1)}, path.with_name("pytorch_model.bin"))


def _linked(path: Path) -> None:
    outside = path.parent.parent.parent.parent / "outside.safetensors"
    shutil.move(path, outside)
    path.symlink_to(outside)


BROKEN: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "truncated": (
        lambda tensors, record: cut(tensors, 0.9),
        r"safetensors is not a sound .*it is truncated.*save it again",
    ),
    "cut in its header": (lambda tensors, record: cut(tensors, 0.1), r"is not a sound safetensors file.*truncated"),
    "empty": (lambda tensors, record: cut(tensors, 0.0), r"is not a sound safetensors file \(0 bytes"),
    "extra tensor": (
        lambda tensors, record: rewrite(tensors, lambda t: t.update(payload=torch.zeros(3))),
        r"Extra tensors \(1\): 'payload'",
    ),
    "missing tensor": (
        lambda tensors, record: rewrite(tensors, lambda t: t.pop("trunk.0/A")),
        r"Missing tensors \(1\): 'trunk\.0/A'",
    ),
    "another shape": (
        lambda tensors, record: rewrite(tensors, lambda t: t.update({"trunk.0/A": torch.zeros(3, 8)})),
        r"Other shapes \(1\): 'trunk\.0/A' is \(3, 8\), not \(2, 8\)",
    ),
    "integers": (
        lambda tensors, record: rewrite(tensors, lambda t: t.update({"trunk.0/A": torch.zeros(2, 8).long()})),
        r"Other types \(1\): 'trunk\.0/A' is torch\.int64",
    ),
    "NaN": (
        lambda tensors, record: rewrite(tensors, lambda t: t["trunk.2/B"].flatten()[3:5].fill_(float("nan"))),
        r"NaN or infinite, in 1 tensors: 'trunk\.2/B' \(2 of 16\).*allow_nan=True",
    ),
    "infinite": (
        lambda tensors, record: rewrite(tensors, lambda t: t["trunk.2/B"].fill_(float("inf"))),
        r"NaN or infinite",
    ),
    "changed": (lambda tensors, record: rewrite(tensors, lambda t: t["trunk.2/B"].zero_()), r"its SHA-256 differs"),
    "pickle beside": (
        lambda tensors, record: _pickle(tensors),
        r"pytorch_model\.bin is a pickle, which runs whatever code",
    ),
    "pickle inside": (
        lambda tensors, record: torch.save({"A": torch.zeros(1)}, tensors),
        r"module\.safetensors is a pickle, which runs whatever code.*weights_only=True",
    ),
    "nothing": (lambda tensors, record: tensors.unlink(), r"module\.safetensors is missing\. There are module\.json"),
    "no record": (lambda tensors, record: record.unlink(), r"module\.json is missing"),
    "half a record": (lambda tensors, record: cut(record, 0.5), r"module\.json is not JSON .*cut short"),
    "list": (lambda tensors, record: record.write_text("[]"), r"module\.json holds a list"),
    "newer": (lambda tensors, record: rewrite_json(record, format=2), r"has format 2; this modbay reads 1 … 1"),
    "field": (lambda tensors, record: rewrite_json(record, sites=3), r"sites is 3, but must be an object"),
    "site": (
        lambda tensors, record: rewrite_json(
            record, sites={"no": {"kind": 0, "form": "linear", "inputs": 8, "outputs": 8}}
        ),
        r"this model has no site 'no'",
    ),
    "kind": (
        lambda tensors, record: rewrite_json(record, kinds=[]),
        r"site 'trunk\.0' says no kind of the 0 in the file",
    ),
    "class": (
        lambda tensors, record: _kind(record, **{"class": "Bomb", "module": "os"}),
        r"no kind 'Bomb' is known here\. Files name classes, and load none: import 'os' first",
    ),
    "argument": (
        lambda tensors, record: _kind(record, arguments={"ranks": 2}),
        r"LoRA can't be made from the arguments in the file, \{'ranks': 2\}",
    ),
    "link": (lambda tensors, record: _linked(tensors), r"is a link out of .*, to .*outside\.safetensors"),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_module_is_told(net, x, tmp_path, broken):
    breaks, message = broken
    folder = tmp_path / "modules"
    attached(copy.deepcopy(net), at="trunk.[02]").save(folder)
    own = attached(work := copy.deepcopy(net), at="trunk.[02]")
    before, out = copy.deepcopy(net.state_dict()), work(x, task=LABELS)
    breaks(folder / "task/b/module.safetensors", folder / "task/b/module.json")
    with pytest.raises(FileError, match=f"(?s){message}"):
        mb.load(net, folder)
    assert unchanged(net, before)
    if broken[1] not in (BROKEN["class"][1], BROKEN["argument"][1]):  # there, the bay's own kinds are at hand
        with pytest.raises(FileError):
            own.load(folder)
        assert torch.equal(work(x, task=LABELS), out)


@pytest.mark.parametrize("name", ["../a", "..", "a/b", "/tmp", "", "a\\b"])
def test_a_name_that_leads_elsewhere_is_refused(saved, net, name):
    rewrite_json(saved[0] / "task/bay.json", modules=[name])
    with pytest.raises(FileError, match="can't be the name of a file"):
        mb.load(net, saved[0])


def test_allow_nan(saved, net):
    path = saved[0] / "task/a/module.safetensors"
    rewrite(path, lambda tensors: tensors["trunk.0/A"].fill_(float("nan")))
    record = path.with_name("module.json")
    said = json.loads(record.read_text())
    del said["sha256"]  # the way out that the message names, for a file that was changed on purpose
    record.write_text(json.dumps(said))
    bay = mb.load(net, saved[0], allow_nan=True)["task"]
    assert any(p.isnan().any() for p in bay.parameters("a"))


def test_what_is_no_folder_of_bays(net, saved, tmp_path):
    torch.save({}, tmp_path / "module.pt")
    (tmp_path / "empty").mkdir()
    for folder, message in (
        (tmp_path / "module.pt", "is a pickle"),
        (tmp_path / "nowhere", "is no folder"),
        (tmp_path / "empty", "holds no bay"),
        (saved[0] / "task", f"It is a bay's own folder: pass {saved[0]}"),
    ):
        with pytest.raises(FileError, match=message):
            mb.load(net, folder)
    with pytest.raises(FileError, match="has no bay 'other'; there are 'task'"):
        attached(net, at="trunk.0", name="other").load(saved[0])


def test_a_write_that_fails_leaves_the_old_file(net, tmp_path, monkeypatch):
    bay = attached(net, at="trunk.[02]")
    bay.save(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    train(bay)
    monkeypatch.setattr(os, "replace", lambda a, b: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        bay.save(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_router_that_forgets_its_arguments_is_told(net, tmp_path):
    class Forgetful(mb.Router):
        def __init__(self, gain: float):
            super().__init__()

        def forward(self, x, c):
            return mb.Routing(index=torch.tensor([0]))

    bay = attached(net, at="trunk.0", router=Forgetful(2.0))
    with pytest.raises(CompositionError, match=r"Forgetful does not keep its arguments \['gain'\]"):
        bay.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_unknown_names_are_told(net, tmp_path):
    with pytest.raises(BayError, match="has no modules 'c'"):
        attached(net, at="trunk.0").save(tmp_path, "a", "c")
