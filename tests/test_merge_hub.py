"""Inputs of `modbay merge` from the hub: a cache laid out as huggingface_hub lays it, and no network."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

import modbay as mb
from modbay import checkpoints
from modbay.checkpoints import _hub
from modbay.errors import FileError
from test_merge_command import call, read, same, tensors, write

COMMITS = ("0123456789" * 4, "abcdef0123" * 4)


def cached(cache: Path, name: str, made: dict[str, torch.Tensor], commit: str, branch: str = "main") -> Path:
    """A snapshot: blobs by their hash, links to them, and a branch that points at the commit."""
    repo = cache / f"models--{name.replace('/', '--')}"
    aside = write(cache / "aside", made)
    snapshot = repo / "snapshots" / commit
    for folder in (snapshot, repo / "blobs", repo / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    for file in aside.iterdir():
        blob = repo / "blobs" / checkpoints._card.file_hash(file)
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    shutil.rmtree(aside)
    (repo / "refs" / branch).write_text(commit)
    return snapshot


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The cache, with org/a (main and the branch `new`) and org/b; the present folder has a local model, c."""
    made = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(made))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    cached(made, "org/a", tensors(1), COMMITS[0])
    cached(made, "org/a", tensors(3), COMMITS[1], "new")
    cached(made, "org/b", tensors(2), COMMITS[0])
    write(tmp_path / "here" / "c", tensors(4))
    return made


def test_models_of_the_hub_are_merged_from_the_cache(cache):
    """As local ones are; what is written says which commit it was."""
    write(Path("x"), tensors(1))
    write(Path("y"), tensors(2))
    call("merge", "x", "y", "--out", "local")
    call("merge", "org/a", "hf://org/b", "--out", "ab")
    same(read("ab"), read("local"))
    said = json.loads(Path("ab/modbay_merge.json").read_text())
    assert [one["commit"] for one in said["models"]] == [COMMITS[0], COMMITS[0]]
    assert any("org/a of the hub at " + COMMITS[0] in note for note in said["notes"])
    page = Path("ab/README.md").read_text()
    assert "base_model:\n- org/a\n- org/b\n" in page and COMMITS[0] in page
    call("merge", "ab/recipe.yaml", "--out", "again")
    same(read("again"), read("ab"))


def test_a_revision_is_a_branch_or_a_commit(cache):
    for revision in ("new", COMMITS[1]):
        one = checkpoints.open_checkpoint(f"org/a@{revision}")
        assert one.commit == COMMITS[1] and one.repository == "org/a" and one.name == f"org/a@{revision}"
        assert torch.equal(one.tensor("embed.weight"), tensors(3)["embed.weight"])
    said = call("merge", "org/a@new", "c", "--dry-run")
    assert f"org/a@new is org/a of the hub at {COMMITS[1]}" in said
    call("merge", "org/a@new", "org/a", "--out", "ab")  # two revisions of one model
    assert "base_model:\n- org/a\n- org/a" not in Path("ab/README.md").read_text()


def test_local_folders_go_first(cache):
    """A folder of that name is meant, and nobody is asked about what looks like one; hf:// is the hub."""
    write(Path("org/a"), tensors(7))
    one = checkpoints.open_checkpoint("org/a")
    assert one.commit is None and torch.equal(one.tensor("embed.weight"), tensors(7)["embed.weight"])
    assert checkpoints.open_checkpoint("hf://org/a").commit == COMMITS[0]
    said = call("merge", "org/a", "org/b", "--out", "ab", code=1)
    assert "'org/b' does not exist" in said and "hf://ORG/NAME" in said
    for path in ("a", "./org/a", "/org/a", "org/a/b", "../org", "org/a@", ".org/a"):
        assert _hub.repository(path) is None, path


def test_what_is_not_in_the_cache_is_named_with_the_way_out(cache):
    said = call("merge", "org/a", "org/missing", "--out", "ab", code=1)
    assert said.count("\n") == 1 and "'org/missing'" in said and "hf download org/missing" in said
    assert "HF_HUB_OFFLINE" in said
    assert "'org/a@other'" in call("merge", "org/a@other", "c", "--out", "ab", code=1)
    assert not Path("ab").exists() and not Path("ab.partial").exists()


FAILS = {
    errors.GatedRepoError: "it is gated",
    errors.RepositoryNotFoundError: "no such model",
    errors.RevisionNotFoundError: "no such revision",
    OSError: "huggingface_hub could not get it (OSError: the disk is full)",
}


@pytest.mark.parametrize("kind", FAILS)
def test_what_the_hub_says(cache, monkeypatch, kind):
    def refuse(*_, **__):
        error = kind.__new__(kind)
        Exception.__init__(error, "\nthe disk is full.\nmore")
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(FileError) as caught:
        checkpoints.open_checkpoint("org/z")
    assert FAILS[kind] in str(caught.value) and "\n" not in str(caught.value)


def test_only_what_a_merge_needs_is_fetched(cache, monkeypatch):
    asked = {}

    def fetch(name, **more):
        asked.update(more, name=name)
        return str(cache / "models--org--a" / "snapshots" / COMMITS[0])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    checkpoints.open_checkpoint("org/new@v1")
    assert asked["name"] == "org/new" and asked["revision"] == "v1" and "token" not in asked  # the environment's
    from huggingface_hub.utils import filter_repo_objects

    files = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model", "config.json",
             "pytorch_model.bin", "onnx/model.onnx", "original/consolidated.00.safetensors", "consolidated.safetensors",
             "tokenizer.json", "README.md", "model.fp16.safetensors"]  # fmt: skip
    kept = filter_repo_objects(files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"])
    assert sorted(kept) == sorted([*files[:4], "tokenizer.json"])


def test_explained_from_the_hub(cache):
    cached(cache, "org/origin", tensors(0), COMMITS[1])
    said = json.loads(
        call("merge", "org/a", "org/b", "-b", "org/origin", "-m", "task_arithmetic", "--explain", "--json")
    )
    assert said["base"] == "org/origin" and [one["name"] for one in said["models"]] == ["a", "b"]


def test_without_huggingface_hub(cache, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(FileError, match=r"pip install 'modbay\[hf\]'"):
        checkpoints.open_checkpoint("org/a")


def test_a_model_with_an_adapter_names_the_way_out(cache):
    said = call("merge", "c+lora", "c", "--out", "ab", code=1)
    assert all(words in said for words in ("'c+lora'", "modbay fold c lora --out", "bay.fold(NAME)"))


def test_the_way_out_of_an_adapter_works(cache, minilm):
    """What the message says: load, fold, save; the checkpoint's weights have the module in them."""
    minilm.save_pretrained("plain")
    bay = mb.attach(minilm, at="*.attention.self.value", modules={"m": mb.LoRA(rank=2)}, router=mb.Fixed({"m": 1.0}))
    with torch.no_grad():
        for name, tensor in minilm.named_parameters():
            if tensor.requires_grad and "_bay" in name:
                tensor.normal_(std=0.1)
    bay.save("lora")
    bay.detach()
    for one in mb.load(minilm, "lora").values():
        one.fold("m")
    minilm.save_pretrained("folded")
    plain, folded = checkpoints.open_checkpoint("plain"), checkpoints.open_checkpoint("folded")
    assert plain.entries.keys() == folded.entries.keys()
    moved = {name for name in plain.entries if not torch.equal(plain.tensor(name), folded.tensor(name))}
    assert moved == {name for name in plain.entries if name.endswith("attention.self.value.weight")}
