"""`modbay merge` and `modbay.checkpoints`: one checkpoint of several; what is wrong is said before it starts."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from modbay import checkpoints, merging
from modbay.checkpoints import _card, _merge, _plan
from modbay.cli import app
from modbay.errors import ConfigError, FileError

CONFIG = {"model_type": "toy", "num_hidden_layers": 3, "vocab_size": 11, "dtype": "float32"}


def call(*args: object, code: int = 0) -> str:
    """What a command printed; on standard error if it was to fail."""
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == code, result.output
    return result.stderr if code else result.stdout


def tensors(seed: int, dtype=torch.float32) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    made = {"embed.weight": torch.randn(11, 6, generator=g)}
    for i in range(3):
        made[f"layers.{i}.mlp.weight"] = torch.randn(6, 7, generator=g)
        made[f"layers.{i}.attn.bias"] = torch.randn(5, generator=g)
    made["norm.scale"] = torch.randn((), generator=g)
    made = {name: t.to(dtype) for name, t in made.items()}
    return made | {"position_ids": torch.arange(5), "empty": torch.empty(0, 3, dtype=dtype)}


def write(folder: Path, made: dict[str, torch.Tensor], shards: int = 1, config=CONFIG, tokens: str = "abc") -> Path:
    """A checkpoint, cut by hand into shards."""
    folder.mkdir(parents=True)
    names = list(made)
    if shards == 1:
        save_file(made, folder / "model.safetensors", {"format": "pt"})
    else:
        where = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
        for file in set(where.values()):
            save_file({name: made[name] for name in names if where[name] == file}, folder / file, {"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps(config))
    vocab = {token: i for i, token in enumerate(tokens)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": []}))
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with three models, a, b and origin, which is the present one."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("origin", "a", "b")):
        write(tmp_path / name, tensors(seed))
    return tmp_path


def read(folder: Path | str) -> dict[str, torch.Tensor]:
    files = sorted(Path(folder).glob("*.safetensors"))
    return {name: t for file in files for name, t in load_file(file).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, t in one.items():
        assert t.dtype == other[name].dtype and t.shape == other[name].shape, name
        torch.testing.assert_close(t, other[name], rtol=0, atol=0)


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, t in one.items():
        torch.testing.assert_close(t, other[name], rtol=1e-6, atol=1e-6)


# Numbers


def test_linear_is_the_weighted_mean(here):
    call("merge", "a", "b", "--weight", "0.75,0.25", "--out", "ab")
    a, b, ab = read("a"), read("b"), read("ab")
    close(ab, {name: (0.75 * a[name] + 0.25 * b[name]).to(t.dtype) for name, t in a.items()})
    with safe_open("ab/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def floats(name: str) -> dict[str, torch.Tensor]:
    return {name: t for name, t in read(name).items() if t.is_floating_point()}


WAYS = {
    "linear": ([], lambda a, b, o: merging.average([a, b])),
    "linear, not normalised": (
        ["--set", "normalize=false", "-w", "0.5"],
        lambda a, b, o: merging.average([a, b], [0.5, 0.5], False),
    ),
    "task_arithmetic": (
        ["-b", "origin", "--lambda", "0.3", "-w", "1,-2"],
        lambda a, b, o: merging.task_arithmetic([a, b], o, [1.0, -2.0], 0.3),
    ),
    "ties": (["-b", "origin", "--density", "0.4"], lambda a, b, o: merging.ties([a, b], o, density=0.4)),
    "dare_linear": (
        ["-b", "origin", "--density", "0.4", "--seed", "3", "--set", "rescale=density"],
        lambda a, b, o: merging.dare([a, b], o, density=0.4, seed=3),
    ),
    "dare_ties": (
        ["-b", "origin", "--density", "0.4"],
        lambda a, b, o: merging.dare([a, b], o, density=0.4, rescale="l1", elect="mass"),
    ),
    "slerp": (["-t", "0.3"], lambda a, b, o: merging.slerp(a, b, 0.3)),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_method_is_merging_s(here, way):
    """The command reads and writes; the numbers are those of `modbay.merging`."""
    more, formula = WAYS[way]
    call("merge", "a", "b", "-m", way.split(",")[0], *more, "--out", "ab")
    expected = formula(floats("a"), floats("b"), floats("origin"))
    close({name: t for name, t in read("ab").items() if t.is_floating_point()}, expected)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties"])
def test_densities_of_their_own(here, method):
    """With one density for both, given twice, the numbers are those of one; another for one model changes them."""
    call("merge", "a", "b", "-m", method, "-b", "origin", "--density", "0.4", "--out", "one")
    call("merge", "a", "b", "-m", method, "-b", "origin", "--density", "0.4,0.40000001", "--out", "two")
    call("merge", "a", "b", "-m", method, "-b", "origin", "--density", "0.4,1", "--out", "other")
    close(read("one"), read("two"))
    assert not torch.equal(read("one")["embed.weight"], read("other")["embed.weight"])


def test_pieces_make_no_difference(here, monkeypatch):
    """A tensor larger than a piece is merged in several."""
    call("merge", "a", "b", "-m", "task_arithmetic", "-b", "origin", "--out", "one")
    call("merge", "a", "b", "-m", "slerp", "-t", "0.3", "--out", "arc")
    monkeypatch.setattr(_merge, "PIECE", 4)
    call("merge", "a", "b", "-m", "task_arithmetic", "-b", "origin", "--out", "two")
    call("merge", "a", "b", "-m", "slerp", "-t", "0.3", "--out", "arc-two")
    same(read("one"), read("two"))
    close(read("arc"), read("arc-two"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(tmp_path, dtype):
    a, b = tensors(1, dtype), tensors(2, dtype)
    write(tmp_path / "a", a)
    write(tmp_path / "b", b)
    recipe = checkpoints.Recipe("linear", [str(tmp_path / "a"), str(tmp_path / "b")])
    checkpoints.merge(recipe, tmp_path / "ab")
    same(read(tmp_path / "ab"), {n: ((a[n].double() + b[n].double()) / 2).to(t.dtype) for n, t in a.items()})


def test_sharded_is_unsharded(here):
    write(here / "cut", tensors(1), shards=3)
    call("merge", "a", "b", "--out", "whole")
    call("merge", "cut", "b", "--out", "of-cut", "--shard", "200")
    same(read("whole"), read("of-cut"))
    index = json.loads(Path("of-cut/model.safetensors.index.json").read_text())
    files = sorted(Path("of-cut").glob("*.safetensors"))
    assert len(files) > 2 and set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in read("whole").values())


def test_mixed_widths_lie_aligned(tmp_path):
    """Readers map tensors of four bytes at multiples of four, whatever stands before them."""
    made = {
        "a": torch.randn(3).bfloat16(),
        "b": torch.randn(2),
        "c": torch.arange(3, dtype=torch.uint8),
        "d": torch.randn(1),
    }
    for name in ("one", "two"):
        write(tmp_path / name, made)
    checkpoints.merge(checkpoints.Recipe("linear", [str(tmp_path / "one"), str(tmp_path / "two")]), tmp_path / "out")
    same(read(tmp_path / "out"), made)
    entries = checkpoints.open_checkpoint(str(tmp_path / "out")).entries
    assert all(entry.start % entry.dtype.itemsize == 0 for entry in entries.values())


def test_dtype(here):
    call("merge", "a", "b", "--dtype", "bfloat16", "--out", "ab")
    made = read("ab")
    assert made["embed.weight"].dtype == torch.bfloat16 and made["position_ids"].dtype == torch.int64
    assert json.loads(Path("ab/config.json").read_text())["dtype"] == "bfloat16"
    torch.testing.assert_close(
        made["embed.weight"], ((read("a")["embed.weight"] + read("b")["embed.weight"]) / 2).bfloat16()
    )


def test_dtypes_that_differ_need_a_word(here):
    write(here / "half", tensors(1, torch.bfloat16))
    said = call("merge", "half", "b", "--out", "ab", code=1)
    assert "bfloat16" in said and "float32" in said and "--dtype" in said and "embed.weight" in said
    call("merge", "half", "b", "--dtype", "float32", "--out", "ab")
    torch.testing.assert_close(
        read("ab")["embed.weight"], (read("half")["embed.weight"].float() + read("b")["embed.weight"]) / 2
    )


def test_a_mask_of_infinities_stays(tmp_path):
    made = tensors(1) | {"mask": torch.tensor([0.0, float("-inf")])}
    write(tmp_path / "a", made)
    write(tmp_path / "b", tensors(2) | {"mask": made["mask"]})
    checkpoints.merge(checkpoints.Recipe("linear", [str(tmp_path / "a"), str(tmp_path / "b")]), tmp_path / "ab")
    assert torch.equal(read(tmp_path / "ab")["mask"], made["mask"])


# Recipes


def recipe(text: str, name: str = "recipe.yaml") -> str:
    Path(name).write_text(text)
    return name


def test_mergekit_s_yaml_is_flags(here):
    call(
        "merge",
        "a",
        "b",
        "-m",
        "ties",
        "-b",
        "origin",
        "--density",
        "0.3,0.8",
        "-w",
        "0.5,0.7",
        "--set",
        "normalize=false",
        "-o",
        "flags",
    )
    call("merge", recipe("""
        models:
          - model: origin
          - model: a
            parameters: {density: 0.3, weight: 0.5}
          - model: b
            parameters: {density: 0.8, weight: 0.7}
        merge_method: ties
        base_model: origin
        parameters: {normalize: false, int8_mask: true}
        dtype: float32
        """), "--out", "yaml")  # fmt: skip
    same(read("flags"), read("yaml"))
    call("merge", "flags/recipe.yaml", "--out", "again")
    same(read("flags"), read("again"))


GRADIENT = """
slices:
  - sources:
      - {model: a, layer_range: [0, 3]}
      - {model: b, layer_range: [0, 3]}
merge_method: slerp
base_model: b
parameters:
  t:
    - {filter: attn, value: [0, 0.5, 1]}
    - {filter: mlp, value: [1, 0]}
    - value: 0.25
"""


def test_gradients_over_layers_and_filters(here):
    """mergekit's example: by filter, interpolated from the first layer to the last; t leads from the base."""
    call("merge", recipe(GRADIENT), "--out", "ab")
    a, b, made = read("a"), read("b"), read("ab")
    arc = lambda name, t: merging.slerp_tensor([b[name], a[name]], t)
    for i, (attn, mlp) in enumerate(zip((0.0, 0.5, 1.0), (1.0, 0.5, 0.0), strict=True)):
        torch.testing.assert_close(made[f"layers.{i}.attn.bias"], arc(f"layers.{i}.attn.bias", attn))
        torch.testing.assert_close(made[f"layers.{i}.mlp.weight"], arc(f"layers.{i}.mlp.weight", mlp))
    torch.testing.assert_close(made["embed.weight"], arc("embed.weight", 0.25))


def test_a_model_s_own_parameters_go_first(here):
    own = "{weight: [{filter: mlp, value: 3}]}"
    text = f"{{merge_method: linear, models: [{{model: a, parameters: {own}}}, b], parameters: {{weight: 1}}}}"
    call("merge", recipe(text), "--out", "ab")
    a, b, made = read("a"), read("b"), read("ab")
    torch.testing.assert_close(
        made["layers.1.mlp.weight"], (3 * a["layers.1.mlp.weight"] + b["layers.1.mlp.weight"]) / 4
    )
    torch.testing.assert_close(made["embed.weight"], (a["embed.weight"] + b["embed.weight"]) / 2)


BAD = {
    "an unknown key": ("{merge_method: linear, models: [a, b], metod: 3}", ["metod", "merge_method"]),
    "an unknown method": ("{merge_method: fuse, models: [a, b]}", ["'fuse'", "ties"]),
    "no method": ("{models: [a, b]}", ["merge_method"]),
    "no models": ("{merge_method: linear}", ["models"]),
    "no base": ("{merge_method: ties, models: [a, b]}", ["base"]),
    "a base that is no model": ("{merge_method: linear, models: [a, b], base_model: origin}", ["origin", "among"]),
    "the base alone": ("{merge_method: ties, models: [a], base_model: a}", ["base alone"]),
    "a model twice": ("{merge_method: linear, models: [a, a]}", ["twice"]),
    "an unknown parameter": ("{merge_method: linear, models: [a, b], parameters: {density: 1}}", ["density", "weight"]),
    "a parameter that is text": ("{merge_method: linear, models: [a, b], parameters: {weight: x}}", ["weight", "'x'"]),
    "a density of zero": (
        "{merge_method: ties, base_model: origin, models: [a, b], parameters: {density: 0}}",
        ["density=0"],
    ),
    "slerp of three": ("{merge_method: slerp, models: [a, b, origin], parameters: {t: 0.5}}", ["2 models"]),
    "slerp without t": ("{merge_method: slerp, models: [a, b]}", ["wants t"]),
    "weights that cancel": (
        "{merge_method: linear, models: [{model: a, parameters: {weight: -1}}, b]}",
        ["add up to 0"],
    ),
    "stacked layers": (
        "{merge_method: linear, slices: [{sources: [{model: a, layer_range: [0, 2]}]}, {sources: []}]}",
        ["slices"],
    ),
    "modules": ("{merge_method: linear, modules: {}, models: [a]}", ["modules"]),
    "union": ("{merge_method: linear, models: [a, b], tokenizer_source: union}", ["union"]),
    "not YAML": ("{a: [", ["YAML"]),
    "a list": ("[a, b]", ["keys"]),
    "a global of one model": (
        "{merge_method: linear, models: [{model: a, parameters: {normalize: 1}}, b]}",
        ["normalize"],
    ),
    "a pattern of nothing": ("{merge_method: linear, models: [a, b], keep: [x*]}", ["'x*'"]),
    "an unknown dtype": ("{merge_method: linear, models: [a, b], dtype: int4}", ["int4"]),
    "a hub id": ("{merge_method: linear, models: [a, some/model]}", ["some/model", "hf download"]),
}


@pytest.mark.parametrize("case", BAD)
def test_recipes_that_make_no_sense(here, case):
    text, wanted = BAD[case]
    said = call("merge", recipe(text), "--out", "ab", code=1)
    assert all(word in said for word in wanted), said
    assert not list(here.glob("ab*"))


def test_gradients_need_layers(here):
    for name in ("a", "b"):
        Path(name, "config.json").write_text(json.dumps({"model_type": "toy"}))
    said = call("merge", recipe(GRADIENT.replace("0.25", "0.5")), "--out", "ab", code=1)
    assert "no layers were found" in said and "filter" in said


# What can't be merged


def other(change, **more):
    """A model `odd` beside a and b, changed."""

    def make(here: Path) -> None:
        made = tensors(2)
        change(made)
        write(here / "odd", made, **more)

    return make


def quantised(here: Path) -> None:
    write(here / "odd", tensors(2), config=CONFIG | {"quantization_config": {"bits": 4}})


def damaged(change) -> object:
    def make(here: Path) -> None:
        path = write(here / "odd", tensors(2)) / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return make


def pickled(here: Path) -> None:
    write(here / "odd", tensors(2))
    (here / "odd/model.safetensors").rename(here / "odd/pytorch_model.bin")


def lost_shard(here: Path) -> None:
    write(here / "odd", tensors(2), shards=3)
    (here / "odd/model-00002-of-00003.safetensors").unlink()


def strange_index(here: Path) -> None:
    write(here / "odd", tensors(2), shards=3)
    path = here / "odd/model.safetensors.index.json"
    path.write_text(path.read_text().replace("model-00002", "../model-00002"))


REFUSED = {
    "a shape": (
        other(lambda t: t.update({"norm.scale": torch.ones(2)})),
        ["'norm.scale'", "()", "(2,)", "odd/model.safetensors", "keep"],
    ),
    "a vocabulary": (
        other(lambda t: t.update({"embed.weight": torch.ones(12, 6)}), config=CONFIG | {"vocab_size": 12}),
        ["11", "12", "tokens", "resize"],
    ),
    "a missing name": (other(lambda t: t.pop("norm.scale")), ["odd lacks 'norm.scale'", "keep"]),
    "one name more": (other(lambda t: t.update(new=torch.ones(2))), ["odd has 'new'", "(2,)", "keep"]),
    "integers": (
        other(lambda t: t.update(position_ids=torch.arange(1, 6))),
        ["'position_ids'", "int64", "no mean", "keep"],
    ),
    "integers for floats": (
        other(lambda t: t.update({"norm.scale": torch.tensor(1)})),
        ["'norm.scale'", "int64", "float32"],
    ),
    "an architecture": (other(lambda t: None, config=CONFIG | {"model_type": "other"}), ["'other'", "'toy'"]),
    "a tokenizer": (other(lambda t: None, tokens="acb"), ["odd/tokenizer.json", "'c'", "--any-tokenizer"]),
    "quantised": (quantised, ["quantised"]),
    "a truncated file": (damaged(lambda octets: octets[:-3]), ["truncated", "odd/model.safetensors"]),
    "a longer file": (damaged(lambda octets: octets + b"1"), ["longer"]),
    "a header of rubbish": (damaged(lambda octets: octets[:8] + b"x" * (len(octets) - 8)), ["not a sound safetensors"]),
    "an empty file": (damaged(lambda octets: b""), ["not a sound safetensors", "0 bytes"]),
    "a pickle": (pickled, ["pickle", "safe_serialization"]),
    "a lost shard": (lost_shard, ["model-00002-of-00003.safetensors", "missing"]),
    "an index that leads out": (strange_index, ["../model-00002", "plain file name"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_t_be_merged_is_said_first(here, case, monkeypatch):
    """Names, the file, and the way out; nothing is written, and no float was read."""
    make, wanted = REFUSED[case]
    make(here)
    monkeypatch.setattr(_merge, "pieces", lambda *_: pytest.fail("a tensor was merged"))
    said = call("merge", "a", "odd", "--out", "ab", code=1)
    assert all(word in said for word in wanted), said
    assert not list(here.glob("ab*"))


def test_keep_is_the_way_out(here):
    made = tensors(2) | {"position_ids": torch.arange(1, 6), "embed.weight": torch.ones(12, 6), "new": torch.ones(2)}
    write(here / "odd", made)
    call("merge", "a", "odd", "--keep", "position_ids", "--keep", "embed*", "--keep", "new", "--out", "ab")
    a, ab = read("a"), read("ab")
    assert "new" not in ab and torch.equal(ab["position_ids"], a["position_ids"])
    assert torch.equal(ab["embed.weight"], a["embed.weight"])
    torch.testing.assert_close(ab["norm.scale"], (a["norm.scale"] + made["norm.scale"]) / 2)


def test_any_tokenizer(here):
    write(here / "odd", tensors(2), tokens="acb")
    call("merge", "a", "odd", "--any-tokenizer", "--out", "ab")
    assert "differ" in Path("ab/README.md").read_text()


def test_padding_of_a_tokenizer_is_its_own_affair(here):
    path = Path("b/tokenizer.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding": {"length": 3}}))
    call("merge", "a", "b", "--out", "ab")


def test_no_room(here, monkeypatch):
    monkeypatch.setattr(_plan.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1 << 20})())
    said = call("merge", "a", "b", "--out", "ab", code=1)
    assert "GB are free" in said and "--out" in said and not list(here.glob("ab*"))


def test_values_that_are_not_finite(here):
    write(here / "odd", tensors(2) | {"norm.scale": torch.tensor(float("nan"))})
    said = call("merge", "a", "odd", "--out", "ab", code=1)
    assert "'norm.scale'" in said and "odd" in said and not list(here.glob("ab*"))
    said = call("merge", "a", "b", "--weight", "1e38,1e38", "--set", "normalize=false", "--out", "ab", code=1)
    assert "too large" in said and not list(here.glob("ab*"))


# The folder


def test_dry_run_writes_nothing(here):
    before = sorted(here.rglob("*"))
    said = call("merge", "a", "b", "-m", "ties", "-b", "origin", "--density", "0.5", "--out", "ab", "--dry-run")
    assert "density 0.5" in said and "9 tensors are merged" in said and "origin" in said
    plan = json.loads(call("merge", "a", "b", "-m", "slerp", "-t", "0.5", "--dry-run", "--json"))
    assert plan["kept"] == ["position_ids"] and plan["bytes"] > 0
    assert sorted(here.rglob("*")) == before


def test_the_card_and_what_lies_beside(here):
    Path("a/generation_config.json").write_text("{}")
    Path("a/notes.bin").write_bytes(b"1")
    call("merge", "a", "b", "--out", "ab")
    names = {path.name for path in Path("ab").iterdir()}
    assert names == {"README.md", "config.json", "generation_config.json", "model.safetensors", "modbay_merge.json",
                     "recipe.yaml", "tokenizer.json"}  # fmt: skip
    card, facts = Path("ab/README.md").read_text(), json.loads(Path("ab/modbay_merge.json").read_text())
    sums = [
        subprocess.run(["sha256sum", f"{name}/model.safetensors"], capture_output=True, text=True).stdout.split()[0]
        for name in "ab"
    ]
    assert [one["files"]["model.safetensors"]["sha256"] for one in facts["inputs"]] == sums
    assert all(one in card for one in (*sums, "merge_method: linear", "modbay", "torch"))
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["merge", "modbay"]
    assert yaml.safe_load(card.split("```yaml\n")[1].split("```")[0]) == facts["recipe"]


def test_a_hash_is_read_once(here, monkeypatch):
    """As long as nothing was written to the file; a file that is as new as the clock is read again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))
    path, read_of, true = Path("a/model.safetensors"), [], _card.sha256
    monkeypatch.setattr(_card, "sha256", lambda path: read_of.append(path) or true(path))
    assert _card.file_hash(path) == _card.file_hash(path) == true(path) and len(read_of) == 2
    monkeypatch.setattr(_card, "SETTLED", -60)
    assert _card.file_hash(path) == _card.file_hash(path) == true(path) and len(read_of) == 3
    octets, times = path.read_bytes(), path.stat()
    path.write_bytes(octets[:-1] + bytes([octets[-1] ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # the same size and time, another content
    assert _card.file_hash(path) == true(path) and len(read_of) == 4
    (note,) = [one for one in (here / "cache/modbay/sha256").iterdir() if one.read_text() == true(path)]
    note.write_text("damaged")
    assert _card.file_hash(path) == true(path) and len(read_of) == 5
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))  # it can't be written to
    assert _card.file_hash(path) == true(path)


def test_an_output_that_is_there(here):
    call("merge", "a", "b", "--out", "ab")
    first = read("ab")
    assert "--overwrite" in call("merge", "a", "origin", "--out", "ab", code=1)
    same(read("ab"), first)
    call("merge", "a", "origin", "--out", "ab", "--overwrite")
    assert not torch.equal(read("ab")["embed.weight"], first["embed.weight"])
    assert sorted(path.name for path in here.iterdir()) == ["a", "ab", "b", "origin"]
    assert "not written by a merge" in call("merge", "a", "b", "--out", "origin", "--overwrite", code=1)
    assert "where an input is" in call("merge", "a", "b", "--out", "a", "--overwrite", code=1)
    assert "where an input is" in call("merge", "a", "b", "--out", "a/b", code=1)
    Path("ab.partial").mkdir()
    Path("ab.partial/mine").write_text("")
    assert "in the way" in call("merge", "a", "b", "--out", "ab", "--overwrite", code=1)


def test_two_at_once(here):
    with _merge._alone(Path("ab.partial")):
        assert "another merge" in call("merge", "a", "b", "--out", "ab", code=1)


def interrupted(monkeypatch, after: int) -> None:
    """Ctrl-C when so many tensors are written."""
    true, count = _merge.pieces, iter(range(after))

    def pieces(plan, step):
        if next(count, None) is None:
            raise KeyboardInterrupt
        return true(plan, step)

    monkeypatch.setattr(_merge, "pieces", pieces)


def test_it_goes_on(here, monkeypatch):
    """After Ctrl-C whole files are kept, and not made again; --resume, or the same command, ends alike."""
    call("merge", "a", "b", "--shard", "200", "--out", "unbroken")
    with monkeypatch.context() as patch:
        interrupted(patch, 4)
        said = call("merge", "a", "b", "--shard", "200", "--out", "ab", code=130)
    assert "modbay merge --resume ab" in said and not Path("ab").exists()
    kept = {path: path.stat().st_mtime_ns for path in Path("ab.partial").glob("*.safetensors")}
    assert kept
    call("merge", "--resume", "ab")
    same(read("ab"), read("unbroken"))
    assert {Path("ab", path.name).stat().st_mtime_ns for path in kept} == set(kept.values())
    assert "finished" in call("merge", "--resume", "ab", code=1)


def test_another_recipe_begins_anew(here, monkeypatch):
    with monkeypatch.context() as patch:
        interrupted(patch, 4)
        call("merge", "a", "b", "--shard", "200", "--out", "ab", code=130)
    call("merge", "a", "b", "--shard", "200", "--weight", "1,3", "--out", "ab")
    call("merge", "a", "b", "--shard", "200", "--weight", "1,3", "--out", "unbroken")
    same(read("ab"), read("unbroken"))


def test_nothing_is_left_of_one_file(here, monkeypatch):
    interrupted(monkeypatch, 4)
    assert "Nothing was written" in call("merge", "a", "b", "--out", "ab", code=130)
    assert not list(here.glob("ab*"))


def test_inputs_that_change(here, monkeypatch):
    true = _merge.facts

    def facts(*args):
        os.utime("a/model.safetensors", (1, 1))
        return true(*args)

    monkeypatch.setattr(_merge, "facts", facts)
    assert "changed while" in call("merge", "a", "b", "--out", "ab", code=1)
    assert not list(here.glob("ab*"))


def test_transformers_loads_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        tie_word_embeddings=True,
    )  # fmt: skip
    models = []
    for name in ("a", "b"):
        models.append(transformers.LlamaForCausalLM(config).eval())
        models[-1].save_pretrained(tmp_path / name, max_shard_size="1KB")
    call("merge", tmp_path / "a", tmp_path / "b", "-m", "linear", "--out", tmp_path / "ab")
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ab").eval()
    with torch.no_grad():
        for ours, one, two in zip(made.parameters(), *(m.parameters() for m in models), strict=True):
            torch.testing.assert_close(ours, (one + two) / 2)
    assert made.lm_head.weight is made.model.embed_tokens.weight


@pytest.mark.slow
@pytest.mark.parametrize("there", [False, True], ids=["new", "overwritten"])
def test_killed_at_any_moment(tmp_path, there):
    """SIGKILL at ten moments of the whole span leaves the right folder, or what was there, or none that loads."""
    big = lambda seed: {
        f"layers.{i}.w": torch.randn(512, 512, generator=torch.Generator().manual_seed(seed + i)) for i in range(40)
    }
    for seed, name in ((0, "a"), (100, "b")):
        write(tmp_path / name, big(seed), shards=4)
    a, b = read(tmp_path / "a"), read(tmp_path / "b")
    wanted, out, partial = {n: a[n] * 0.5 + b[n] * 0.5 for n in a}, tmp_path / "ab", tmp_path / "ab.partial"
    go = lambda *more: [sys.executable, "-m", "modbay", "merge", "a", "b", "--shard", "5MB", "--out", "ab", *more]
    quiet = {"cwd": tmp_path, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    if there:
        subprocess.run(go("--weight", "1,0"), check=True, **quiet)
    spare, rng, span = tmp_path / "spare", random.Random(0), 0.0
    for moment in range(-1, 10):  # the first is left alone, to know the span
        for path in (partial, out, tmp_path / "ab.old"):
            shutil.rmtree(path, ignore_errors=True)
        if there and not spare.exists():
            subprocess.run(go("--weight", "1,0"), check=True, **quiet)
            shutil.copytree(out, spare)
        elif there:
            shutil.copytree(spare, out)
        process = subprocess.Popen(go(*(["--overwrite"] if there else [])), **quiet)
        while process.poll() is None and not partial.exists():
            time.sleep(0.0005)
        began = time.monotonic()
        if moment < 0:
            assert process.wait() == 0
            span = time.monotonic() - began
            continue
        time.sleep((moment + rng.random()) / 10 * span)  # hashes and the change of names are in it, too
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (partial / "config.json").exists() or (partial / "modbay_merge.json").exists(), moment
        for folder in (out, tmp_path / "ab.old", *([partial] if (partial / "config.json").exists() else [])):
            if folder.exists():
                found = read(folder)
                same(found, a if there and torch.equal(found["layers.0.w"], a["layers.0.w"]) else wanted)
        if moment % 3 == 0 and partial.exists():  # the same command goes on
            subprocess.run(go(*(["--overwrite"] if there else [])), check=True, **quiet)
            same(read(out), wanted)
            assert not partial.exists()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path):
    """Anonymous memory, at its peak, of models with 4 and with 40 tensors."""
    peaks = []
    for n in (4, 40):
        for name in ("a", "b"):
            write(tmp_path / f"{name}{n}", {f"layers.{i}.w": torch.randn(1 << 21) for i in range(n)})
        code = f"""
import re, threading, time
from pathlib import Path
from modbay import checkpoints
own = lambda: int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
torch = __import__("torch"); torch.set_num_threads(1)
before, seen = own(), [0]
checkpoints.merge(checkpoints.Recipe("linear", ["a{n}", "b{n}"]), "ab{n}", watch=lambda *_: seen.append(own()))
print(max(seen) - before)
"""
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout) / 1024)
    assert max(peaks) < 64, peaks


def test_python_and_errors(here):
    made = checkpoints.merge(checkpoints.Recipe("linear", ["a", checkpoints.Source("b", {"weight": 3})]), "ab")
    assert made.folder == Path("ab") and made.facts["merged"] == 9
    with pytest.raises(ConfigError, match="dtype='x'"):
        checkpoints.Recipe("linear", ["a", "b"], dtype="x")
    with pytest.raises(ConfigError, match="weight"):
        checkpoints.Recipe("linear", ["a", "b"], parameters={"weight": []})
    with pytest.raises(FileError, match="does not exist"):
        checkpoints.open_checkpoint("nowhere")
    with pytest.raises(ConfigError, match="shard"):
        checkpoints.recipe({"merge_method": "linear", "models": ["a"], "shard": "many"})
