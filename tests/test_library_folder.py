"""The library of modules on disk: what a record keeps, a folder of many, its commands, and what a crash leaves."""

import copy
import fnmatch
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

import modbay as mb
from modbay.cli import app
from modbay.errors import FileError
from modbay.library import Library, _cache, _index, _sketch, json_schema, schema_text
from modbay.library._alike import Changes, alike
from modbay.library._locks import locked

yaml = pytest.importorskip("yaml")

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


# A folder of many


def call(*args: object, code: int = 0) -> str:
    """What a command printed; on standard error if it was to fail."""
    result = CliRunner().invoke(app, ["library", *map(str, args)])
    assert result.exit_code == code, result.output
    return result.stderr if code and result.stderr else result.stdout


def said(*args: object, code: int = 0) -> Any:
    return json.loads(call(*args, "--json", code=code))


@pytest.fixture
def runs(net, tmp_path) -> Path:
    """A run's folder with the bays "language" (en, de) and "task" (ner)."""
    bay = attached(net, "en", "de", bay="language")
    about = {
        "en": {**ABOUT, "labels": {"language": ["en"]}},
        "de": {"labels": {"language": ["de"]}, "metrics": {"accuracy": 0.71}, "embedding": [1, 0, 0]},
    }
    bay.save(tmp_path / "runs", about=about)
    mb.attach(net, at="trunk.2", modules={"ner": mb.Bottleneck(2)}, name="task").save(tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def lib(runs, tmp_path, monkeypatch) -> Library:
    """A library with all of it, at $MODBAY_LIBRARY."""
    monkeypatch.setenv("MODBAY_LIBRARY", str(tmp_path / "library"))
    made = Library(tmp_path / "library")
    made.add(runs)
    return made


def files(folder: Path) -> dict[str, bytes]:
    """All that is in a folder, but for the cache."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".index" not in path.parts
    }


def test_add_and_list(lib, runs, net):
    assert [one.name for one in lib.entries()] == ["language/de", "language/en", "task/ner"]
    assert lib.verify() == lib.verify("language/en") == []
    assert lib.add(runs) == {one.name: one.content for one in lib.entries()}  # what is there is left alone
    assert files(lib.folder).keys() == files(runs).keys()
    bays = mb.load(copy.deepcopy(Net()), lib.folder, base="any")  # a library is a folder of bays
    assert bays["language"].names() == ["en", "de"] and bays["task"].names() == ["ner"]
    alone = lib.add(runs / "language/en", "english", about={"notes": "Mine."})
    assert alone == {"english": lib.find("language/en").content}
    assert lib.find("english").about == {**lib.find("language/en").about, "notes": "Mine."}
    (named,) = lib.add(runs / "language/de", by_content=True)
    assert named == lib.find("language/de").content[:16]
    assert lib.entries() and Library(runs).find("en").name == "language/en"  # so is a run's own folder


def test_add_over_another(lib, runs, net):
    bay = mb.load(Net(), runs, base="any")["language"]
    before = files(lib.folder)
    train(bay, "en")
    bay.save(runs.parent / "new")
    for source in ("new", "new/language"):
        with pytest.raises(FileError, match=r"another bay.*'en' differ.*--replace"):
            lib.add(runs.parent / source)
    with pytest.raises(FileError, match=r"another module.*give it another name"):
        lib.add(runs.parent / "new/language/en", "language/en")
    with pytest.raises(FileError, match="another module"):
        lib.add(runs.parent / "new/language/en", "language/en", about={"notes": "Not this one."})
    assert files(lib.folder) == before
    lib.add(runs.parent / "new", replace=True)
    after = files(lib.folder)
    assert {name for name in after if after[name] != before.get(name)} == {
        "language/en/module.json", "language/en/module.safetensors",
    }  # fmt: skip
    assert lib.find("language/en").about["parents"] == [Library(runs).find("en").content] and lib.verify() == []


def test_names(lib, runs):
    content = lib.find("language/en").content
    assert lib.find("en").name == lib.find(content[:8]).name == "language/en"
    with pytest.raises(FileError, match=r"no module 'fr'; there are 'language/de', 'language/en', 'task/ner'"):
        lib.find("fr")
    lib.add(runs / "language/en", "old/en")
    with pytest.raises(FileError, match=r"several modules 'en': 'language/en', 'old/en'"):
        lib.find("en")
    assert lib.find(content).name == "language/en"  # one content, under two names
    for name in ("../x", "a/../b", ".hidden", "a/.b", "", "language/en/inner"):
        with pytest.raises(FileError):
            lib.add(runs / "language/de", name)
    (lib.folder / "link").symlink_to(runs, target_is_directory=True)
    assert not [one for one in lib.entries() if one.name.startswith("link")]


def test_search(lib):
    names = lambda *words, **more: [one.name for one in lib.search(*words, **more)]
    assert names() == ["language/de", "language/en", "task/ner"]
    assert names(labels={"language": "en"}) == names(labels=["en"]) == ["language/en"]
    assert names(labels={"task": "en"}) == names(labels=["fr"]) == []
    assert names(kind="lora") == names(kind="LoRA(rank=2") == ["language/de", "language/en"]
    assert names(kind="Bottleneck", base="Net") == ["task/ner"]
    digest = lib.find("en").facts["base"]["digest"]
    assert names(base=digest[:8]) == names() and names(base="Bert") == []
    assert names(metrics=["accuracy>0.8"]) == ["language/en"]
    assert names(metrics=["accuracy <= 0.93", "accuracy!=0.93"]) == ["language/de"]
    assert names(metrics=["f1>0"]) == []
    assert names("mail TRAINED") == names("cc-by") == ["language/en"] and names("ner") == ["task/ner"]
    assert names(limit=1) == ["language/de"]
    with pytest.raises(FileError, match=r"'accuracy'\]?: a comparison is NAME>NUMBER"):
        lib.search(metrics=["accuracy"])
    near = lib.search(near=[0.5, -1.0, 0.25])
    assert [one.name for one in near] == ["language/en", "language/de"]
    want = torch.cosine_similarity(torch.tensor([0.5, -1, 0.25]), torch.tensor([1.0, 0, 0]), dim=0)
    assert [one.score for one in near] == pytest.approx([1.0, float(want)])
    assert lib.search(near="de")[0].name == "language/de"
    with pytest.raises(FileError, match="no 'embedding'"):
        lib.search(near="ner")


DENSE = {
    "LoRA": lambda: mb.LoRA(3, alpha=6),
    "LoRA, of another rank": lambda: mb.LoRA(2, bias=True),
    "Kronecker": lambda: mb.LoKr(2),
    "sparse": lambda: mb.SparseDelta(mask={f"trunk.{i}": torch.rand(8, 8) > 0.5 for i in (0, 2)}),
    "bias": lambda: mb.BitFit(),
}


@pytest.mark.parametrize("one", DENSE)
@pytest.mark.parametrize("two", DENSE)
def test_likeness_is_that_of_dense_updates(net, tmp_path, one, two):
    """Cosine over all sites, of ΔW and Δb as the model would have them, from the files alone."""
    bay = attached(net, "x", kind=DENSE[one]())
    bay.add("y", DENSE[two]())
    train(bay, "y")
    bay.save(tmp_path)
    found = Library(tmp_path).diff("x", "y")
    dense = []
    for i in range(2):
        rows = []
        for name, modular in bay.modulars.items():
            part = modular.order[i]
            weight, bias = part.kind.delta(part.tensors(), bay.fitting.places[name].view()).dense(
                bay.fitting.places[name].view()
            )
            rows.append(torch.cat([weight.flatten(), torch.zeros(8) if bias is None else bias]).double())
        dense.append(torch.stack(rows).detach())
    # What only one of the two changes, weight or bias, is not in common.
    common = torch.stack([torch.cat([d[:, :64].abs().sum(0) > 0, d[:, 64:].abs().sum(0) > 0]) for d in dense])
    parts = torch.cat(
        [common[:, :64].any(1, keepdim=True).expand(2, 64), common[:, 64:].any(1, keepdim=True).expand(2, 8)], 1
    )
    both = parts.all(0)
    if not both.any():
        assert found["cosine"] is None
        return
    a, b = (d[:, both] for d in dense)
    assert found["of"] == "deltas"
    assert found["cosine"] == pytest.approx(float((a * b).sum() / (a.norm() * b.norm())), abs=1e-5)
    assert found["norms"] == pytest.approx([float(a.norm()), float(b.norm())], rel=1e-5)
    assert [row["cosine"] for row in found["sites"]] == pytest.approx(torch.cosine_similarity(a, b).tolist(), abs=1e-5)


def test_likeness_that_needs_the_base_is_of_parameters(net, tmp_path):
    bay = attached(net, kind=mb.DoRA(2))
    bay.save(tmp_path)
    found = Library(tmp_path).diff("a", "b")
    flat = [torch.cat([p.detach().flatten() for p in bay.parameters(name)]) for name in "ab"]
    assert found["of"] == "parameters"
    assert found["cosine"] == pytest.approx(float(torch.cosine_similarity(*flat, dim=0)), abs=1e-5)


def test_search_by_likeness(lib, runs):
    bay = mb.load(Net(), runs, base="any")["language"]
    with torch.no_grad():
        for p in bay.parameters("en"):
            p.add_(0.01 * torch.randn_like(p))
    bay.rename("en", "nearly")
    bay.save(runs.parent / "more", "nearly")
    lib.add(runs.parent / "more/language/nearly")
    found = lib.search(like="en")
    assert [one.name for one in found[:2]] == ["language/en", "nearly"]
    assert found[0].score == pytest.approx(1) and 0.9 < found[1].score < 1
    assert lib.search(like=runs.parent / "more/language/nearly")[0].name == "nearly"


def test_search_by_embedding_is_the_cosine(net, tmp_path):
    """Of those as long as the vector, as float32; the same whether it comes from the files or from the cache."""
    bay = attached(net, *"abcdef")
    rows = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).tolist()
    told = dict(zip("abcd", rows, strict=True)) | {"e": [0.0, 0.0, 0.0], "f": [1.0, 2.0]}
    bay.save(tmp_path, about={name: {"embedding": row} for name, row in told.items()})
    vector = [0.5, -2.0, 1.0]
    close = torch.cosine_similarity(torch.tensor(rows).double(), torch.tensor(vector).double(), dim=-1)
    scores = dict(zip("abcd", close.tolist(), strict=True)) | {"e": 0.0}
    wanted = sorted(scores, key=lambda name: -scores[name])
    for _ in range(2):
        found = Library(tmp_path).search(near=vector)
        assert [one.name.removeprefix("task/") for one in found] == wanted
        assert [one.score for one in found] == pytest.approx([scores[name] for name in wanted], abs=1e-12)
        assert [one.name for one in Library(tmp_path).search(near=vector, limit=2)] == [one.name for one in found[:2]]
    assert [one.name for one in Library(tmp_path).search(near=[1.0, 0.0])] == ["task/f"]
    assert Library(tmp_path).search(near=[1.0] * 7) == []


def test_the_most_alike_of_many_are_found_by_sketches(net, tmp_path, monkeypatch):
    """What a sketch chooses is then compared exactly; sketches are kept by content."""
    bay = attached(net, *[f"m{i}" for i in range(12)])
    with torch.no_grad():
        for part, other in zip(bay._parts("m3"), bay._parts("m7"), strict=True):
            for p, q in zip(part.parameters(), other.parameters(), strict=True):
                p.copy_(q + 0.05 * torch.randn_like(q))
    bay.save(tmp_path)
    lib = Library(tmp_path)
    exact = lib.search(like="m7")
    monkeypatch.setattr(_sketch, "FEW", 4)
    monkeypatch.setattr(_sketch, "CHOSEN", 2)
    assert [(one.name, one.score) for one in lib.search(like="m7")] == [(one.name, one.score) for one in exact[:2]]
    assert [one.name for one in exact[:2]] == ["task/m7", "task/m3"]
    made = []
    monkeypatch.setattr(_sketch, "sketch", lambda changes, real=_sketch.sketch: made.append(changes) or real(changes))
    lib.search(like="m7")
    assert len(made) == 1
    cache = tmp_path / ".index/likeness.bin"
    sound = cache.read_bytes()
    for broken in (b"", sound[:-1], sound[:-1] + bytes([sound[-1] ^ 1])):
        made.clear()
        cache.write_bytes(broken)
        assert lib.search(like="m7", limit=1)[0].name == "task/m7" and len(made) == 13
        assert cache.read_bytes() == sound


@pytest.mark.parametrize("make", DENSE.values(), ids=DENSE)
def test_a_sketch_keeps_cosines(net, tmp_path, make):
    """On average over many, to about the tenth that it promises."""
    bay = attached(net, *[f"m{i}" for i in range(8)], kind=make())
    for name in bay.names()[1:]:
        with torch.no_grad():
            for p, q in zip(bay.parameters(name), bay.parameters("m0"), strict=True):
                p.copy_(q + 0.5 * torch.randn_like(q))
    bay.save(tmp_path)
    several = [Changes(Library(tmp_path).read(one.path)) for one in Library(tmp_path).entries()]
    of, kept = zip(*[_sketch.sketch(one) for one in several], strict=True)
    assert set(of) == {"deltas"}
    errors = [float(kept[i] @ kept[j]) - alike(several[i], several[j]).cosine for i in range(8) for j in range(i)]
    assert torch.tensor(errors).square().mean().sqrt() < 0.12


def test_remove(lib, net):
    assert lib.remove("de") == "language/de"
    assert lib.verify() == [] and [one.name for one in lib.entries()] == ["language/en", "task/ner"]
    assert mb.load(net.__class__(), lib.folder, base="any")["language"].names() == ["en"]
    assert lib.remove("language") == "language"
    assert list(files(lib.folder)) == [f"task/{x}" for x in ("bay.json", "ner/module.json", "ner/module.safetensors")]


def damage(path: Path, change: str) -> None:
    tensors, known = path / "module.safetensors", path / "module.json"
    if change == "json":
        known.write_text(known.read_text()[:40])
    elif change == "bytes":
        whole = bytearray(tensors.read_bytes())
        whole[-1] ^= 1
        tensors.write_bytes(bytes(whole))
    elif change == "gone":
        tensors.unlink()
    elif change == "content":
        known.write_text(json.dumps({**json.loads(known.read_text()), "content": "0" * 64}))
    elif change == "about":
        known.write_text(json.dumps({**json.loads(known.read_text()), "about": {"labels": 3}}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("json", "is not JSON"),
        ("bytes", "its SHA-256 differs"),
        ("gone", "module.safetensors is missing"),
        ("content", "its record says 000000"),
        ("about", "about.labels is 3, but must be an object"),
    ],
)
def test_verify(lib, change, message):
    damage(lib.folder / "language/en", change)
    (found,) = lib.verify()
    assert found["name"] == "language/en" and message in found["problem"]
    assert message in call("verify", code=1)
    assert said("verify", code=1) == [found]
    with pytest.raises(FileError, match=message):
        lib.add(lib.folder / "language/en", "copy")
    lib.search("language"), lib.search(like="ner")  # what is broken is in nobody's way
    call("list")
    shutil.rmtree(lib.folder / "language/en")
    assert "lists 'en', which are not there" in lib.verify()[0]["problem"]


def test_verify_with_a_model(net, tmp_path):
    net.load_state_dict({k: v for k, v in load_file(FORMAT1 / "base.safetensors").items() if k not in "xy"})
    other = Library(shutil.copytree(FORMAT1, tmp_path / "library"))
    assert other.verify(model=net) == []
    with torch.no_grad():
        net.trunk[0].weight[0, 0] += 1
    assert all("was made on another base" in one["problem"] for one in other.verify(model=net))
    assert len(other.verify("a", model=nn.Linear(2, 2))) == 1


def test_the_cache_is_nothing_but_that(lib, runs, monkeypatch):
    cache = lib.folder / ".index/modules.bin"
    first = [one.as_dict() for one in lib.entries()]
    assert cache.exists()
    read = []
    monkeypatch.setattr(_index, "look", lambda path, look=_index.look: read.append(path.name) or look(path))
    assert [one.as_dict() for one in lib.entries()] == first and read == []
    sound = cache.read_bytes()
    flipped = [sound[:i] + bytes([sound[i] ^ 1]) + sound[i + 1 :] for i in (3, 20, 40, len(sound) // 2, len(sound) - 1)]
    for broken in (b"", b"[]", sound[:30], sound[:-1], sound + b"x", sound.replace(b"cache 2", b"cache 1"), *flipped):
        cache.write_bytes(broken)
        assert [one.as_dict() for one in lib.entries()] == first
        assert cache.read_bytes() == sound  # made again
    for head in ({}, [], {"names": ["x"]}, {"names": 3, "stamps": [], "contents": [], "texts": [], "vectors": ["a"]}):
        _cache.keep(cache, head, b"")  # whole, but not what is kept here
        assert [one.as_dict() for one in lib.entries()] == first
    shutil.rmtree(cache.parent)
    assert [one.as_dict() for one in lib.entries()] == first
    read.clear()
    lib.add(runs / "language/de", "new")
    lib.entries()
    assert read == ["new"]
    shutil.rmtree(lib.folder / "new")  # by hand
    assert [one.as_dict() for one in lib.entries()] == first
    cache.parent.rename(lib.folder / "gone")
    cache.parent.write_text("in the way")
    assert [one.as_dict() for one in lib.entries()] == first


def test_gc(lib):
    before = files(lib.folder)
    left = {
        ".old.0123456789ab.tmp/module.json": "x", "language/.en.0123456789ab.tmp/module.safetensors": "x",
        "language/en/.tmpa1B2c3": "x",
        "language/en/.module.json.0123456789ab.tmp": "x", "language/.bay.json.0123456789ab.tmp": "x",
        "language/en/.module.safetensors.0123456789abcdef": "x", "language/fr/.module.json.0123456789ab.tmp": "x",
        "half/module.safetensors": "x",
    }  # fmt: skip
    for name, text in left.items():
        (lib.folder / name).parent.mkdir(exist_ok=True)
        (lib.folder / name).write_text(text)
    (lib.folder / "mine").mkdir()
    (lib.folder / "mine/notes.txt").write_text("not yours")
    with locked(lib.folder / "language"):  # someone writes there
        call("gc")
    assert (lib.folder / "language/.bay.json.0123456789ab.tmp").exists() and not (lib.folder / "half").exists()
    assert len(said("gc")) == 7 and "nothing to remove" in call("gc")
    assert files(lib.folder) == {**before, "mine/notes.txt": b"not yours"} and lib.verify() == []


def test_gc_removes_caches_of_other_versions(lib, tmp_path):
    """The index was JSON once. What lies there and is no plain file, or lies elsewhere, is not touched."""
    lib.entries()
    index, own = lib.folder / ".index", tmp_path / "own.json"
    for path in (index / "modules.json", index / "likeness.json", index / "likeness.bin", own):
        path.write_text("[]")
    (index / "linked.json").symlink_to(own)
    (index / "folder").mkdir()
    (index / "folder/modules.json").write_text("[]")
    (lib.folder / "elsewhere").mkdir()
    (lib.folder / "elsewhere/modules.json").write_text("[]")
    kept = (index / "modules.bin").read_bytes()
    assert lib.gc() == [".index/likeness.json", ".index/modules.json"] and lib.gc() == []
    assert sorted(p.name for p in index.iterdir()) == ["folder", "likeness.bin", "linked.json", "modules.bin"]
    assert (index / "modules.bin").read_bytes() == kept and own.exists()
    assert (index / "folder/modules.json").exists() and (lib.folder / "elsewhere/modules.json").exists()


def test_what_was_all_but_done_is_finished(lib):
    """Killed between the record and the tensors' name: a reader finds them, and gc gives them their name."""
    path = lib.folder / "language/en"
    digest = record(lib.folder, "language/en")["sha256"]
    os.rename(path / "module.safetensors", path / f".module.safetensors.{digest[:16]}")
    (path / "module.safetensors").write_bytes((lib.folder / "language/de/module.safetensors").read_bytes())
    assert lib.verify() == []
    mb.load(Net(), lib.folder, base="any")
    assert lib.gc() == [] and lib.verify() == [] and not (path / f".module.safetensors.{digest[:16]}").exists()


# To other folders, and to hubs


def test_push_and_pull(lib, tmp_path):
    there = tmp_path / "there"
    assert sorted(call("push", there).splitlines()) == [f"{there}: {one.name}" for one in lib.entries()]
    pushed = {name: text for name, text in files(there).items() if not name.endswith("README.md")}
    assert pushed == files(lib.folder)
    card = (there / "language/en/README.md").read_text()
    assert yaml.safe_load(card.split("---")[1]) == {
        "library_name": "modbay", "tags": ["modbay", "LoRA"], "license": "cc-by-4.0",
    }  # fmt: skip
    for told in ("# en", "Trained on mail.", "LoRA(rank=2", "| accuracy | 0.93 |", "mail.csv, 1,200 rows", "a" * 64):
        assert told in card
    assert "[language/en](language/en)" in (there / "README.md").read_text()
    other = Library(tmp_path / "other")
    assert other.pull(there, "language/en") == ["language/en"]
    assert sorted(other.pull(there)) == [one.name for one in lib.entries()]
    assert {n: t for n, t in files(other.folder).items() if "README" not in n} == files(lib.folder)
    assert other.verify() == [] and said("pull", there, "--library", tmp_path / "third")
    with pytest.raises(FileError, match="is of a hub"):
        lib.push(there, revision="main")
    with pytest.raises(FileError, match=r"no folder; a hub's repository is hf://OWNER/NAME"):
        lib.pull(tmp_path / "nowhere")
    with pytest.raises(FileError, match="can't be the name"):
        lib.push(there, subfolder="../up")


METHODS = ("create_repo", "create_branch", "upload_folder", "snapshot_download")


def test_a_hub(lib, tmp_path, monkeypatch):
    """The calls that huggingface_hub gets; nothing is asked of a hub."""
    calls, hub = [], tmp_path / "hub"

    class HfApi:
        def __init__(self, token=None):
            calls.append(("HfApi", token))

        def create_repo(self, repo_id, **more):
            calls.append(("create_repo", repo_id, more))

        def create_branch(self, repo_id, **more):
            calls.append(("create_branch", repo_id, more))

        def upload_folder(self, *, repo_id, folder_path, path_in_repo, revision, commit_message, ignore_patterns):
            calls.append(("upload_folder", repo_id, path_in_repo, revision, commit_message))
            shutil.copytree(folder_path, hub / (path_in_repo or ""), ignore=shutil.ignore_patterns(*ignore_patterns))

        def snapshot_download(self, repo_id, *, revision, local_dir, allow_patterns):
            calls.append(("snapshot_download", repo_id, revision))
            for path in hub.rglob("*"):
                name = path.relative_to(hub).as_posix()
                if path.is_file() and any(fnmatch.fnmatch(name, one) for one in allow_patterns):
                    (Path(local_dir) / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, Path(local_dir) / name)

    huggingface_hub = pytest.importorskip("huggingface_hub")
    real = {name: inspect.signature(huggingface_hub.HfApi.__dict__[name]).parameters for name in METHODS}
    for name in METHODS:
        own = inspect.signature(getattr(HfApi, name)).parameters
        assert set(own) - {"more"} <= set(real[name])
    monkeypatch.setattr(huggingface_hub, "HfApi", HfApi)
    where = ("hf://me/mail", "--revision", "v1", "--subfolder", "m", "--token", "secret")
    call("push", *where, "--private", "--message", "First")
    assert calls == [
        ("HfApi", "secret"), ("create_repo", "me/mail", {"private": True, "exist_ok": True}),
        ("create_branch", "me/mail", {"branch": "v1", "exist_ok": True}),
        ("upload_folder", "me/mail", "m", "v1", "First"),
    ]  # fmt: skip
    assert (hub / "m/language/en/README.md").exists() and not list(hub.rglob(".index"))
    calls.clear()
    names = said("pull", *where, "--library", tmp_path / "again")
    assert sorted(names) == [one.name for one in lib.entries()]
    assert calls == [("HfApi", "secret"), ("snapshot_download", "me/mail", "v1")]
    assert files(tmp_path / "again") == files(lib.folder)
    with pytest.raises(FileError, match="OWNER/NAME"):
        lib.pull("hf://mail")


# Compositions


def test_a_composition_refers_to_a_library(net, tmp_path, monkeypatch):
    """Modules lie in the library once; the composition's folder has router and aggregator, and loads in one call."""
    fresh = [copy.deepcopy(net) for _ in range(6)]
    bay = mb.attach(
        net, at="trunk.[02]", modules={"a": mb.LoRA(2), "b": mb.IA3()}, router=mb.Skills("task", ["x", "y"])
    )
    train(bay)
    x = torch.randn(2, 8)
    want = net(x, task=["x", "y"])
    folder = tmp_path / "library"
    lib = Library(folder)
    bay.save(folder / "compositions/one", library=folder, about={"a": ABOUT})
    assert sorted(files(folder / "compositions")) == ["one/modules/bay.json", "one/modules/bay.safetensors"]
    assert [one.name for one in lib.entries()] == ["modules/a", "modules/b"]
    assert lib.read("a").record["about"] == ABOUT
    train(bay, "b")
    bay.save(folder / "compositions/two", library=folder)  # a is there already, and b is another
    assert [one.name for one in lib.entries()][:2] == ["modules/a", "modules/b"] and len(lib.entries()) == 3
    assert lib.verify() == []

    one = mb.load(fresh[0], folder / "compositions/one")["modules"]
    assert torch.equal(fresh[0](x, task=["x", "y"]), want)
    mb.load(fresh[1], folder / "compositions/two")
    assert torch.equal(fresh[1](x, task=["x", "y"]), net(x, task=["x", "y"]))
    one.load(folder / "compositions/two")
    assert torch.equal(fresh[0](x, task=["x", "y"]), net(x, task=["x", "y"]))

    with pytest.raises(FileError, match=r"'compositions/one/modules', 'compositions/two/modules' refer to 'modules/a'"):
        lib.remove("a")
    assert "--force" in call("remove", "--help") and lib.find("a")

    shutil.move(folder / "compositions", tmp_path / "elsewhere")  # out of its library
    with pytest.raises(FileError, match=r"refers to module 'a'.*set MODBAY_LIBRARY"):
        mb.load(fresh[2], tmp_path / "elsewhere/one")
    monkeypatch.setenv("MODBAY_LIBRARY", str(folder))
    mb.load(fresh[2], tmp_path / "elsewhere/one")
    assert torch.equal(fresh[2](x, task=["x", "y"]), want)
    (folder / "modules/a").rename(folder / "renamed")  # found by its content
    mb.load(fresh[3], tmp_path / "elsewhere/one")
    assert torch.equal(fresh[3](x, task=["x", "y"]), want)

    other = Library(tmp_path / "other")
    other.add(tmp_path / "elsewhere/one")  # a copy has its modules itself
    monkeypatch.delenv("MODBAY_LIBRARY")
    mb.load(fresh[4], other.folder)
    assert torch.equal(fresh[4](x, task=["x", "y"]), want) and "references" not in json.loads(
        (other.folder / "modules/bay.json").read_text()
    )


def test_a_composition_whose_module_is_another(net, tmp_path):
    bay = attached(copy.deepcopy(net))
    bay.save(tmp_path / "c", library=tmp_path)
    path = tmp_path / "task/a"
    shutil.copyfile(tmp_path / "task/b/module.safetensors", path / "module.safetensors")
    said = json.loads((path / "module.json").read_text())
    del said["sha256"]  # so that nothing but the content tells
    (path / "module.json").write_text(json.dumps(said))
    with pytest.raises(FileError, match=r"is not the module 'a' that .* refers to"):
        mb.load(net, tmp_path / "c")
    assert [one["name"] for one in Library(tmp_path).verify()] == ["task/a", "c/task"]
    bay_json = tmp_path / "c/task/bay.json"
    said = json.loads(bay_json.read_text())
    said["references"]["a"]["at"] = "../../etc"
    bay_json.write_text(json.dumps(said))
    with pytest.raises(FileError, match="can't be the name of a file"):
        mb.load(net, tmp_path / "c")


def test_saving_into_a_composition(net, tmp_path):
    """By name, into the library; or plainly, back into its own folder."""
    bay = attached(net)
    with pytest.raises(FileError, match="would lie where they are referred to"):
        bay.save(tmp_path, library=tmp_path)
    bay.save(tmp_path / "c")
    bay.save(tmp_path / "c", library=tmp_path)
    assert list(files(tmp_path / "c")) == ["task/bay.json"]
    bay.add("new", mb.LoRA(1))
    bay.save(tmp_path / "c", "new", library=tmp_path)
    head = lambda: json.loads((tmp_path / "c/task/bay.json").read_text())
    assert set(head()["references"]) == set(head()["modules"]) == {"a", "b", "new"}
    train(bay, "a")
    bay.save(tmp_path / "c", "a")
    assert set(head()["references"]) == {"b", "new"} and (tmp_path / "c/task/a/module.json").exists()
    bay.save(tmp_path / "c")
    assert "references" not in head() and mb.load(copy.deepcopy(bay.detach()), tmp_path / "c")["task"].names() == [
        "a", "b", "new",
    ]  # fmt: skip


def test_what_is_half_copied_is_no_bay(net, tmp_path):
    attached(net).save(tmp_path)
    shutil.copytree(tmp_path / "task", tmp_path / ".task.0123456789ab.tmp")
    assert list(mb.load(Net(), tmp_path, base="any")) == ["task"]


def test_a_number_that_is_none_is_refused(net, tmp_path):
    """JSON's NaN equals nothing, itself included."""
    attached(copy.deepcopy(net)).save(tmp_path, about={"a": {"metrics": {"k": 1}}})
    path = tmp_path / "task/a/module.json"
    path.write_text(path.read_text().replace('"k": 1', '"k": NaN'))
    with pytest.raises(FileError, match="finite"):
        mb.load(net, tmp_path)


# The commands


def test_commands(lib, runs, tmp_path):
    table = call("list")
    assert "language/en" in table and "accuracy 0.93" in table and "Bottleneck" in table
    assert [one["name"] for one in said("list")] == ["language/de", "language/en", "task/ner"]
    assert "language/en" in call("search", "accuracy>0.8", "--label", "language=en", "mail")
    assert [one["name"] for one in said("search", "--kind", "LoRA", "--label", "de")] == ["language/de"]
    assert said("search", "--like", "en", "-n", 1)[0]["score"] == pytest.approx(1)
    assert said("search", "--near", "[1, 0, 0]")[0]["name"] == "language/de"
    assert "no module answers" in call("search", "nothing")
    shown = call("show", "en")
    assert all(word in shown for word in ("LoRA(rank=2", "trunk.0, trunk.2", "CC-BY-4.0", "Trained on mail.", "a" * 64))
    assert said("show", "en")["about"]["metrics"] == ABOUT["metrics"]
    more = ("--label", "language=en", "--label", "language=en-US", "--metric", "f1=0.5", "--notes", "A copy.")
    call("add", runs / "language/en", "--name", "english", *more)
    assert said("show", "english")["about"]["labels"] == {"language": ["en", "en-US"]}
    assert "3 modules are sound" not in call("verify") and "4 modules are sound" in call("verify")
    compared = call("diff", "en", "de")
    assert "trunk.0" in compared and "of deltas" in compared
    assert said("diff", "en", "english")["cosine"] == pytest.approx(1)
    assert call("remove", "english") == "removed english\n"
    assert "has no module 'english'" in call("show", "english", code=1)
    assert json.loads(call("schema")) == json_schema()
    assert "holds no module" in call("list", "--library", tmp_path / "none")
    assert "NAME=NUMBER" in call("add", runs, "--metric", "f1", code=2)
    assert "is no folder" in call("add", tmp_path / "nowhere", code=1)


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

def source(k):
    # A folder with a bay of one module, whose tensors and metric are k.
    made = folder.parent / f"source-{operation}-{k}"
    if not made.exists():
        bay = mb.attach(net, at="trunk.*", modules={"m": mb.LoRA(2)})
        fill(bay, k)
        bay.save(made, about={"m": {"metrics": {"k": k}}})
        bay.detach()
    return made

lib = mb.library.Library(folder)

def add(first):
    # New modules, one replaced again and again, and a bay.
    for k in range(first, first + 100_000):
        lib.add(source(k % 5) / "modules" / "m", f"m{k}")
        lib.add(source(k % 5) / "modules" / "m", "same", replace=True)
        lib.add(source(k % 5), f"bay{k}") if k % 3 == 0 else lib.add(source(k % 5), "one", replace=True)

def push(first):
    for k in range(first, first + 100_000):
        mb.library.Library(source(k % 5)).push(folder, replace=True)
        mb.library.Library(source(k % 5)).push(folder, "modules/m", subfolder=f"at{k}")

def gc(first):
    # What gc removes and finishes is made on purpose, and by saves that were killed.
    for k in range(first, first + 100_000):
        lib.add(source(k % 5) / "modules" / "m", f"m{k}")
        path = folder / f"m{k}"
        if k % 2:
            os.rename(path / "module.safetensors", mb.library._files.pending(
                path / "module.safetensors", json.loads((path / "module.json").read_text())["sha256"]))
        for name in (f".x{k}.0123456789ab.tmp", f"m{k}/.module.json.0123456789ab.tmp", f"half{k}/module.safetensors"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("x")
        lib.gc()

def verified():
    # All is sound, and each module is of one source; what was whole before is there still.
    assert lib.verify() == []
    now = {one.name: one for one in lib.entries()}
    assert set(now) >= set(whole), set(whole) - set(now)
    whole.update(now)
    for one in now.values():
        file = lib.read(one.path)
        assert {float(v) for t in file.tensors.values() for v in t.flatten()} == {float(one.about["metrics"]["k"])}
    if len(now) > 60:  # it is looked at after every moment
        for name in list(now):
            lib.remove(name)
        whole.clear()

whole = {}
if operation != "save":
    for k in range(5):
        source(k)
"""

LOOP = """
for moment in range(count):
    child = os.fork()
    if child == 0:
        try:
            globals()[operation](1000 * moment)
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(1)
    time.sleep(0.002 + rng.random() * 0.06)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"the child failed by itself, moment {moment}"
    saved() if operation == "save" else verified()
if operation != "save":
    lib.gc()
    verified()
    left = [str(p) for p in folder.rglob(".*") if p.name != ".index"]
    assert not left, left
print("moments", count, len(whole))
"""

MOMENTS = [10, pytest.param(200, marks=pytest.mark.slow)]


def killed(operation: str, folder: Path, count: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED + LOOP, operation, folder, str(count)], capture_output=True, text=True
    )
    assert done.returncode == 0 and f"moments {count}" in done.stdout, done.stderr[-3000:]


@pytest.mark.parametrize("count", MOMENTS)
def test_save_killed_at_any_moment(tmp_path, count):
    """Each module is the old or the new: its tensors are all of one save, and its record is of that one."""
    killed("save", tmp_path / "saved", count)


@pytest.mark.parametrize("operation", ["add", "push", "gc"])
@pytest.mark.parametrize("count", MOMENTS)
def test_a_library_killed_at_any_moment(tmp_path, operation, count):
    """It always verifies, nothing that was in it is lost, and gc leaves nothing that is not a module."""
    killed(operation, tmp_path / "library", count)


# Two at once

WRITER = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import modbay as mb

folder, name, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
net = torch.nn.Sequential(torch.nn.Linear(4, 4))
torch.manual_seed(0)
torch.nn.init.ones_(net[0].weight), torch.nn.init.ones_(net[0].bias)
bay = mb.attach(net, at="0", modules={"m": mb.LoRA(1)}, name="shared")
alone = folder.parent / f"alone-{name}"
lib = mb.library.Library(folder)
while not (folder.parent / "go").exists():
    pass
for k in range(count):
    bay.rename(bay.names()[0], f"{name}{k}")
    with torch.no_grad():
        for p in bay.parameters():
            p.fill_(k if name == "a" else -k)
    if k % 2:
        bay.save(folder, f"{name}{k}")  # into one bay of both
    else:
        bay.save(alone / str(k))
        lib.add(alone / str(k) / "shared" / f"{name}{k}")
    if k % 16 == 0:
        lib.entries()
        lib.gc()
"""


@pytest.mark.parametrize("count", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_two_writers_lose_nothing(tmp_path, count):
    """Both save into one bay and add to one library, read it and tidy it, at the same time."""
    folder = tmp_path / "library"
    several = [
        subprocess.Popen([sys.executable, "-c", WRITER, folder, name, str(count)], stderr=subprocess.PIPE, text=True)
        for name in "ab"
    ]
    (tmp_path / "go").touch()
    for process in several:
        _, told = process.communicate()
        assert process.returncode == 0, told
    lib = Library(folder)
    found = {one.name: one for one in lib.entries()}
    want = {f"{'shared/' if k % 2 else ''}{name}{k}": k if name == "a" else -k for name in "ab" for k in range(count)}
    assert set(found) == set(want) and lib.verify() == []
    for name in list(want)[:: max(1, count // 20)]:
        tensors = lib.read(found[name].path).tensors
        assert {float(v) for t in tensors.values() for v in t.flatten()} == {float(want[name])}
    assert set(json.loads((folder / "shared/bay.json").read_text())["modules"]) == {
        name.removeprefix("shared/") for name in want if "/" in name
    }
    assert lib.gc() == []
