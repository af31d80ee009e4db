"""Mutated files: each is refused by an error of modbay's own, or loads; none crashes, hangs, or takes much memory.

A few are tried here; `make fuzz` tries 20,000 (MODBAY_FUZZ=20000), as many in each format.
"""

import copy
import json
import os
import random
import resource
import shutil
import signal
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import modbay as mb
from modbay import checkpoints
from modbay.errors import ModbayError

MANY = int(os.environ.get("MODBAY_FUZZ", "0"))
MOST = 200 << 20  # bytes beyond what there was
LONGEST = 20  # seconds a load
SHARD = 50  # mutations a test


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def bay_folder(folder):
    net, kinds = Net(), {"a": mb.LoRA(2), "b": mb.IA3()}
    mb.attach(copy.deepcopy(net), at=["first", "second"], modules=kinds, router=mb.TopK(1), name="task").save(folder)
    return net


def peft_folder(folder):
    peft = pytest.importorskip("peft")
    net = Net()
    config = peft.LoraConfig(r=2, target_modules=["first"], modules_to_save=["second"], alpha_pattern={"first": 3})
    peft.get_peft_model(copy.deepcopy(net), config).save_pretrained(folder)
    return net


def poly_folder(folder, case="poly"):
    """Skills and a router of tasks."""
    there = pytest.importorskip("test_poly_files")
    there.theirs(there.CASES[case](), folder)
    return there.base()


def multitask_folder(folder):
    return poly_folder(folder, "multitask prompts")


def adapters_folder(folder, name="bert-fuse"):
    """A setup: two modules, and a fusion of them."""
    there = pytest.importorskip("test_adapters_files")
    shutil.copytree(there.FOLDER / name, folder)
    return there.base("bert")


def adapters_bin_folder(folder):
    return adapters_folder(folder, "bert-mam")


def sft_folder(folder):
    """A weight and its bias by differences, and a layer whole."""
    folder.mkdir()
    net = Net()
    diffs = {"first.weight": {"size": net.first.weight.shape, "index_steps": [1, 3, 9], "values": torch.ones(3)},
             "first.bias": {"size": net.first.bias.shape, "index_steps": [2], "values": torch.ones(1)}}  # fmt: skip
    whole = {f"second.{name}": p.detach() + 1 for name, p in net.second.named_parameters()}
    torch.save({"diffs": diffs, "abs": whole}, folder / "pytorch_diff.bin")
    return net


def checkpoint_folder(folder):
    folder.mkdir()
    net = Net()
    save_file(net.state_dict(), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "toy"}))
    return net


def load_bay(net, folder):
    model = copy.deepcopy(net)
    for bay in mb.load(model, folder).values():
        assert bay.names()


def read_checkpoint(net, folder):
    recipe = checkpoints.Recipe("linear", [str(folder), str(folder.parent / "other")])
    plan = checkpoints.prepare(recipe)
    assert plan.steps


MAKERS = {
    "bay": (bay_folder, load_bay),
    "peft": (peft_folder, load_bay),
    "poly": (poly_folder, load_bay),
    "multitask": (multitask_folder, load_bay),
    "adapters": (adapters_folder, load_bay),
    "adapters-bin": (adapters_bin_folder, load_bay),
    "sft": (sft_folder, load_bay),
    "checkpoint": (checkpoint_folder, read_checkpoint),
}


# What may happen to a file


def flip(path, draw):
    data = bytearray(path.read_bytes())
    for _ in range(draw.choice([1, 1, 8, 64])):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def cut(path, draw):
    data = path.read_bytes()
    path.write_bytes(data[: draw.randrange(len(data))])


def grow(path, draw):
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.choice([1, 100, 5000])))


def swap(path, draw):
    data = path.read_bytes()
    i, j = sorted(draw.randrange(len(data)) for _ in range(2))
    path.write_bytes(data[j:] + data[i:j] + data[:i])


def noise(path, draw):
    path.write_bytes(draw.randbytes(draw.choice([0, 1, 7, 8, 9, 1000])))


def header(path, draw):
    """The length that a safetensors file begins with, or a header of one's own."""
    data = path.read_bytes()
    if draw.random() < 0.5:
        path.write_bytes(struct.pack("<Q", draw.choice([0, 1, 1 << 20, 1 << 31, (1 << 64) - 1])) + data[8:])
        return
    offsets = draw.choice([[0, 1 << 62], [-4, 0], [0, 0], [8, 4], ["0", "4"], None])
    shape = draw.choice([[1 << 40], [-1], [0], [], [1 << 20, 1 << 20, 1 << 20], "2", [2.5]])
    said = {draw.choice(["x", "../x", "", "first.weight"]): {"dtype": draw.choice(["F32", "Q4", 7]), "shape": shape,
                                                            "data_offsets": offsets}}  # fmt: skip
    text = json.dumps(said).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[:64])


def reshaped(path, draw):
    """Tensors of other shapes, types and values, or other names."""
    try:
        tensors = load_file(path)
    except Exception:
        return flip(path, draw)
    if not tensors:
        return noise(path, draw)
    name = draw.choice(sorted(tensors))
    tensor = tensors[name]
    changed = [
        lambda: tensor.flatten(), lambda: tensor[:0], lambda: tensor.unsqueeze(0), lambda: tensor.movedim(0, -1),
        lambda: tensor.long(), lambda: tensor.half(), lambda: tensor.bool(), lambda: tensor * float("nan"),
        lambda: tensor * float("inf"), lambda: torch.zeros(()), lambda: tensor.repeat(2, *[1] * (tensor.ndim - 1)),
    ]  # fmt: skip
    if draw.random() < 0.3:
        del tensors[name]
        if draw.random() < 0.7:
            tensors[draw.choice([name + "x", "../" + name, name.rpartition(".")[0], "a" * 5000])] = tensor
    else:
        tensors[name] = draw.choice(changed)().contiguous()
    save_file(tensors, path)


VALUES = [
    None,
    True,
    -1,
    0,
    10**30,
    1e308,
    "",
    "../../x",
    "/etc/passwd",
    "a" * 10**5,
    [],
    {},
    [[]],
    {"": None},
    "nan",
    [1] * 3,
]


def said(path, draw):
    """A value of a JSON, or a key, or more of them than anyone wants."""
    try:
        record = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return cut(path, draw)
    kind = draw.random()
    if kind < 0.05:
        path.write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
        return None
    if kind < 0.1:
        path.write_text("[" * 50_000)
        return None
    at, spots = record, []

    def walk(value):
        if isinstance(value, dict):
            for key in value:
                spots.append((value, key))
                walk(value[key])
        elif isinstance(value, list):
            for i, item in enumerate(value):
                spots.append((value, i))
                walk(item)

    walk(at)
    if spots:
        where, key = draw.choice(spots)
        if isinstance(where, dict) and draw.random() < 0.3:
            value = where.pop(key)
            if draw.random() < 0.5:
                where[draw.choice(["../x", "", "a\0b", "x" * 1000, str(key) + "y"])] = value
        else:
            where[key] = draw.choice(VALUES)
    path.write_text(json.dumps(record))
    return None


def linked(path, draw):
    """A link out of the folder, or to itself."""
    path.unlink()
    path.symlink_to(draw.choice(["/etc/hostname", "/dev/zero", path.name, "../../outside"]))


def gone(path, draw):
    path.unlink()
    if draw.random() < 0.3:
        path.mkdir()


BINARY = [flip, flip, cut, grow, swap, noise, header, header, reshaped, reshaped, reshaped, linked, gone]
TEXT = [said, said, said, said, flip, cut, noise, linked, gone]


def resident():
    """Bytes of memory that are this process's now."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * resource.getpagesize()


def highest():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def late(signum, frame):
    raise TimeoutError(f"longer than {LONGEST} s")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the highest memory is told by Linux")
@pytest.mark.parametrize("shard", range(max(2, -(-MANY // (SHARD * len(MAKERS))))))
@pytest.mark.parametrize("format", MAKERS)
def test_mutated_files(format, shard, tmp_path):
    torch.manual_seed(0)
    make, load = MAKERS[format]
    whole = tmp_path / "whole"
    net = make(whole)
    inner = tmp_path / "in"
    inner.mkdir()
    if format == "checkpoint":
        shutil.copytree(whole, inner / "other")
    shutil.copytree(whole, inner / "case")
    load(net, inner / "case")  # as it is, it loads
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file() and path.suffix != ".md")
    before_signal = signal.signal(signal.SIGALRM, late)
    try:
        for i in range(SHARD if MANY else 15):
            draw = random.Random(f"{format} {shard} {i}")
            shutil.rmtree(inner / "case")
            shutil.copytree(whole, inner / "case")
            for _ in range(draw.choice([1, 1, 1, 2])):
                path = inner / "case" / draw.choice(files)
                if path.is_file() and not path.is_symlink() and path.stat().st_size:
                    change = draw.choice(TEXT if path.suffix == ".json" else BINARY)
                    change(path, draw)
            there = sorted(path for path in tmp_path.rglob("*"))
            Path("/proc/self/clear_refs").write_text("5")
            start, began = resident(), time.monotonic()
            signal.alarm(LONGEST)
            try:
                load(net, inner / "case")
            except ModbayError:
                pass
            except BaseException as error:
                raise AssertionError(f"{format} {shard} {i}, by {change.__name__} of {path.name}") from error
            finally:
                signal.alarm(0)
            grown = highest() - start
            assert grown < MOST, f"{format} {shard} {i}: {grown >> 20} MiB by {change.__name__} of {path.name}"
            assert time.monotonic() - began < LONGEST
            assert sorted(path for path in tmp_path.rglob("*")) == there
    finally:
        signal.signal(signal.SIGALRM, before_signal)
