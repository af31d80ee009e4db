"""The library of modules on disk: what a record keeps, a folder of many, its commands, and what a crash leaves."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import modbay as mb
from modbay.errors import FileError
from modbay.library import json_schema, schema_text

ROOT = Path(__file__).parents[1]
FORMAT1 = Path(__file__).parent / "fixtures" / "format1"
ABOUT = {
    "labels": {"language": ["en", "en-GB"]},
    "metrics": {"accuracy": 0.93, "rows": 12},
    "data": [{"name": "mail.csv", "sha256": "0" * 64, "rows": 1200, "split": "train"}],
    "parents": ["a" * 64],
    "licence": "CC-BY-4.0",
    "notes": "Trained on mail.",
    "embedding": [0.5, -1, 0.25],
}


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


def attached(net: nn.Module, *names: str, kind: mb.Kind | None = None, bay: str = "task") -> mb.Bay:
    """A bay of modules that have learned something."""
    modules = {name: mb.LoRA(2) if kind is None else kind for name in names or ("a", "b")}
    made = mb.attach(net, at="trunk.[02]", modules=modules, name=bay)
    train(made)
    return made


def train(bay: mb.Bay, *names: str) -> None:
    with torch.no_grad():
        for p in bay.parameters(*names):
            p.add_(0.3 * torch.randn_like(p))


def record(folder: Path, name: str = "task/a") -> dict:
    return json.loads((folder / name / "module.json").read_text(encoding="utf-8"))


# The record


def test_about_is_kept(net, tmp_path):
    bay = attached(copy.deepcopy(net))
    bay.save(tmp_path, about={"a": ABOUT})
    assert record(tmp_path)["about"] == ABOUT and "about" not in record(tmp_path, "task/b")
    again = mb.load(net, tmp_path)["task"]
    again.save(tmp_path / "again")
    assert record(tmp_path / "again")["about"] == ABOUT
    assert record(tmp_path / "again")["content"] == record(tmp_path)["content"]


def test_what_learned_more_has_a_parent(net, tmp_path):
    attached(copy.deepcopy(net)).save(tmp_path, about={"a": ABOUT})
    parent = record(tmp_path)["content"]
    bay = mb.load(net, tmp_path)["task"]
    train(bay)
    want = {"labels": ABOUT["labels"], "licence": ABOUT["licence"], "parents": [parent]}
    for _ in range(2):  # parents are what was loaded, not each stop on the way
        bay.save(tmp_path / "more")
        assert record(tmp_path / "more")["about"] == want
        train(bay)
    bay.save(tmp_path / "more", "a", about={"a": {"licence": "MIT", "metrics": {"accuracy": 1}}})
    assert record(tmp_path / "more")["about"] == {**want, "licence": "MIT", "metrics": {"accuracy": 1}}


def test_about_follows_the_name(net, tmp_path):
    attached(copy.deepcopy(net)).save(tmp_path, about={"a": ABOUT})
    bay = mb.load(net, tmp_path)["task"]
    bay.rename("a", "c").add("a", mb.LoRA(2))
    bay.reset("b")
    bay.save(tmp_path / "again")
    assert record(tmp_path / "again", "task/c")["about"] == ABOUT
    assert "about" not in record(tmp_path / "again") and "about" not in record(tmp_path / "again", "task/b")
    bay.remove("c").add("c", mb.LoRA(2))
    bay.save(tmp_path / "more")
    assert "about" not in record(tmp_path / "more", "task/c")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"c": {}}, r"about=\{'c': …\}: no module of that name is saved; there are \['a', 'b'\]"),
        ({"a": {"labels": ["en"]}}, r"about\['a'\].labels is \['en'\], but must be an object"),
        ({"a": {"metrics": {"f1": "high"}}}, r"about\['a'\].metrics.f1 is 'high', but must be int or float"),
        ({"a": {"metrics": {"f1": float("nan")}}}, r"metrics.f1 is nan, but must be a finite number"),
        ({"a": {"metrics": {"f1": True}}}, r"metrics.f1 is True, but must be int or float"),
        ({"a": {"parents": ["abc"]}}, r"parents\[0\] is 'abc', but must be a SHA-256"),
        ({"a": {"data": [{"rows": 3}]}}, r"data\[0\].name is None, but must be there"),
        ({"a": {"license": "MIT"}}, r"has 'license'; it may have labels, metrics, .*licence.*into 'notes'"),
    ],
)
def test_about_that_no_file_may_hold(net, tmp_path, said, message):
    bay = attached(net)
    with pytest.raises(FileError, match=message):
        bay.save(tmp_path / "new", about=said)
    assert not (tmp_path / "new").exists()


def test_content_is_what_a_module_does(net, tmp_path):
    """It depends on kinds, sites and tensors; not on name, date, bay, base or order."""
    bay = attached(copy.deepcopy(net))
    bay.save(tmp_path / "one")
    first = record(tmp_path / "one")["content"]
    assert re.fullmatch("[0-9a-f]{64}", first) and first != record(tmp_path / "one", "task/b")["content"]
    other = Net().eval()  # another base
    again = mb.load(other, tmp_path / "one", base="any")["task"]
    again.rename("a", "z")
    again.save(tmp_path / "two", about={"z": ABOUT})
    assert record(tmp_path / "two", "task/z")["content"] == first

    def changed(**parts) -> str:
        said = {key: copy.deepcopy(record(tmp_path / "one")[key]) for key in ("kinds", "sites", "shared")}
        tensors = load_file(tmp_path / "one/task/a/module.safetensors")
        for key, change in parts.items():
            change(tensors if key == "tensors" else said[key])
        return mb.library.content(said, tensors)

    assert changed() == first
    assert changed(kinds=lambda k: k[0].update(module="elsewhere")) == first
    assert changed(sites=lambda s: s.update(dict(reversed(list(s.items()))))) == first
    assert changed(kinds=lambda k: k[0]["arguments"].update(alpha=3)) != first
    assert changed(sites=lambda s: s.pop("trunk.0")) != first
    assert changed(tensors=lambda t: t["trunk.0/A"][0, 0].add_(1e-6)) != first
    assert changed(tensors=lambda t: t.update({"trunk.0/A": t["trunk.0/A"].double()})) != first


def test_content_of_shared_tensors(net):
    one, two = torch.ones(2), torch.ones(2)
    said = {"kinds": [], "sites": {}, "shared": {"b": "a"}}
    joined = mb.library.content(said, {"a": one})
    assert joined == mb.library.content({**said, "shared": {"a": "b"}}, {"b": one})
    assert joined == mb.library.content(said, {"a": one, "b": one})
    assert joined != mb.library.content({**said, "shared": {}}, {"a": one, "b": two})


def test_a_folder_of_format_1_loads(net, tmp_path):
    """Of version 0.1.0, before there was anything about a module, or its content."""
    was = load_file(FORMAT1 / "base.safetensors")
    x, y = was.pop("x"), was.pop("y")
    net.load_state_dict(was)
    bay = mb.load(net, FORMAT1)["task"]
    torch.testing.assert_close(net(x, task=["x", "y"]), y)
    bay.save(tmp_path)
    for name in ("a", "b"):
        old, new = record(FORMAT1, f"task/{name}"), record(tmp_path, f"task/{name}")
        assert "content" not in old and old["sha256"] == new["sha256"] and "about" not in new


def test_the_schema_is_in_the_docs():
    """docs/format.md has what the code checks; `modbay library schema` prints it."""
    page = (ROOT / "docs/format.md").read_text(encoding="utf-8")
    text = re.search(r"```json\n(.*?)\n```", page, re.DOTALL)[1]
    assert text == schema_text()
    said = json.loads(text)
    assert said == json_schema()
    for example in FORMAT1.rglob("module.json"):
        known = said["$defs"]["module"]
        assert set(known["required"]) <= set(json.loads(example.read_text())) <= set(known["properties"])


# Killed at any moment: a process that does nothing else is stopped by SIGKILL, and what it left is looked at

KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import modbay as mb

operation, folder, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
rng = random.Random(0)

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    def forward(self, x):
        return self.trunk(x)

torch.manual_seed(0)
net = Net()

def fill(bay, k):
    with torch.no_grad():
        for p in bay.parameters():
            p.fill_(k)

def save(first):
    bay = mb.attach(net, at="trunk.*", modules={"a": mb.LoRA(2), "b": mb.IA3()}, router=mb.Skills("task", ["x"]))
    for k in range(first, first + 100_000):
        fill(bay, k)
        bay.save(folder, about={name: {"metrics": {"k": k}} for name in bay.names()})

def saved():
    if not (folder / "modules" / "bay.json").exists():
        return
    bay = mb.load(net, folder)["modules"]
    for name, known in bay.state.about.items():
        values = {float(v) for p in bay.parameters(name) for v in p.flatten()}
        assert values == {float(known["about"]["metrics"]["k"])}, (name, values, known)
    bay.detach()
"""

LOOP = """
for moment in range(count):
    child = os.fork()
    if child == 0:
        try:
            globals()[operation](100_000 * moment)
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(1)
    time.sleep(0.002 + rng.random() * 0.06)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"the child failed by itself, moment {moment}"
    {"save": saved}.get(operation, lambda: None)()
print("moments", count)
"""

MOMENTS = [10, pytest.param(200, marks=pytest.mark.slow)]


def killed(operation: str, folder: Path, count: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED + LOOP, operation, folder, str(count)], capture_output=True, text=True
    )
    assert done.returncode == 0 and f"moments {count}" in done.stdout, done.stderr


@pytest.mark.parametrize("count", MOMENTS)
def test_save_killed_at_any_moment(tmp_path, count):
    """Each module is the old or the new: its tensors are all of one save, and its record is of that one."""
    killed("save", tmp_path, count)
