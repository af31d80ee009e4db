"""One checkpoint of several, a tensor at a time: what is in memory is one tensor's worth, whatever the models' size.

While it is written it is FOLDER.partial, without a config, so that nothing loads it. Whole, it takes its name.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, FileError
from ..library._files import write_json
from ._card import FILE, card, facts, hashes
from ._methods import Core
from ._plan import Plan, Step, prepare, room
from ._recipe import Recipe
from ._write import Place, Shard, Writer, write_index

PARTIAL, BEGUN = ".partial", "recipe.yaml"
PIECE = 1 << 17  # numbers: 512 KiB of float32, which the processor's cache holds with its like

Watch = Callable[[int, str], None]  # (bytes done, the tensor's name)


@dataclass
class Merged:
    """What was written."""

    folder: Path
    facts: dict[str, Any]


def unfinished(out: Path) -> Path:
    """Where a merge is while it is written."""
    return out.with_name(out.name + PARTIAL)


def merge(
    recipe: Recipe,
    out: str | Path,
    overwrite: bool = False,
    watch: Watch | None = None,
    command: str | None = None,
    plan: Plan | None = None,
) -> Merged:
    """Write the checkpoint that a recipe makes; all of it, or nothing that could be loaded.

    A merge that was killed is gone on with by the same call, from the last file that was whole; another recipe, or
    other inputs, begin anew. overwrite: replace a folder that a merge wrote. watch(bytes, name) is called after each.
    plan: what `ready` gave, if it was asked before.

    Raises ConfigError for a recipe that makes no sense, or a folder that is there; FileError for models that can't be
    merged, before a tensor of them is, and for a result that is not finite. A failure leaves no file.
    """
    out = Path(out)
    plan = plan if plan is not None else ready(recipe, out, overwrite)
    partial = unfinished(out)
    with _alone(partial), torch.no_grad():
        try:
            digest = plan.digest()
            done = _begun(partial, plan, digest)
            with ThreadPoolExecutor(max(1, min(4, os.cpu_count() or 1))) as pool:
                sums = hashes(plan, pool)
                try:
                    _shards(plan, partial, done, watch or (lambda size, name: None))
                except BaseException:
                    pool.shutdown(wait=True, cancel_futures=True)
                    raise
                said = facts(plan, {file: one.result() for file, one in sums.items()}, command)
            if plan.digest() != digest:
                raise FileError(f"{out}: an input changed while it was read: nothing was written. Merge again.")
            _finish(plan, partial, out, said)
        except BaseException as error:  # Ctrl-C keeps the files that are whole
            if isinstance(error, Exception) or not _whole(plan, partial):
                shutil.rmtree(partial, ignore_errors=True)
            raise
    return Merged(out, said)


def ready(recipe: Recipe, out: str | Path, overwrite: bool = False) -> Plan:
    """The plan, and everything checked; nothing is written."""
    out = Path(out)
    plan = prepare(recipe)
    _free(plan, out, overwrite)
    there = unfinished(out)  # is gone on with, or deleted
    room(out, plan.size - sum(file.stat().st_size for file in there.glob("*")))
    return plan


def _free(plan: Plan, out: Path, overwrite: bool) -> None:
    """Raise ConfigError if the output can't be put there."""
    target = out.resolve()
    for one in plan.inputs:
        folder = one.folder.resolve()
        if target == folder or target in folder.parents or folder in target.parents:
            raise ConfigError(f"out={str(out)!r}: it is where an input is ({one.name}): choose another folder.")
    if out.exists() and not overwrite:
        raise ConfigError(f"out={str(out)!r}: that is there already. Choose another name, or --overwrite.")
    if out.exists() and not (out / FILE).is_file():
        raise ConfigError(f"out={str(out)!r}: it was not written by a merge (it has no {FILE}): delete it yourself.")
    partial = unfinished(out)
    if partial.exists() and not (partial / BEGUN).is_file() and any(partial.iterdir()):
        raise ConfigError(f"{partial} is in the way, and no merge wrote it: move it, or choose another name.")


@contextmanager
def _alone(partial: Path) -> Iterator[None]:
    """Nobody else may write there; the lock goes with the process, however that ends."""
    partial.mkdir(parents=True, exist_ok=True)
    if os.name != "posix":
        yield
        return
    import fcntl  # noqa: PLC0415 (there is none elsewhere)

    folder = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"{partial}: another merge is writing there: wait, or choose another name.") from None
        yield
    finally:
        os.close(folder)


def _begun(partial: Path, plan: Plan, digest: str) -> set[str]:
    """The shards that are whole already; what an other merge left is deleted."""
    said = partial / BEGUN
    before = said.read_text(encoding="utf-8").split("\n")[0] if said.is_file() else ""
    if before != f"# {digest}":
        for path in partial.iterdir():
            path.unlink()
        aside = partial / "recipe.writing"
        aside.write_text(f"# {digest}\n{plan.recipe.text()}", encoding="utf-8")
        os.replace(aside, said)
    return _whole(plan, partial)


def _whole(plan: Plan, partial: Path) -> set[str]:
    """The shards that are written: a file has its name only when all of it is on disk."""
    return {shard.file for shard in plan.shards if (partial / shard.file).is_file()}


def _shards(plan: Plan, partial: Path, done: set[str], watch: Watch) -> None:
    at = 0
    for shard in plan.shards:
        if shard.file in done:
            at += shard.size
            watch(at, shard.file)
            continue
        at = _shard(plan, partial, shard, at, watch)


def _shard(plan: Plan, partial: Path, shard: Shard, at: int, watch: Watch) -> int:
    with Writer(partial, shard) as writer:
        for place in shard.places:
            for piece in pieces(plan, plan.steps[place.name]):
                writer.write(piece)
            for one in plan.inputs:
                if place.name in one.entries:
                    one.release(place.name)
            at += place.size
            watch(at, place.name)
    return at


def pieces(plan: Plan, step: Step) -> Iterator[Tensor]:
    """The values of one tensor of the output, flat, in order."""
    name = step.place.name
    if step.values is None:
        for piece in plan.donor.tensor(name).view(-1).split(PIECE):
            yield piece.to(step.place.dtype)
        return
    tensors = [one.tensor(name) for one in plan.sources]
    base = plan.base.tensor(name) if plan.base is not None else None
    everything = [*tensors, *([base] if base is not None else [])]
    core, at = plan.method.core(tensors, base, step.values), 0
    for parts in zip(*(t.view(-1).split(PIECE) for t in everything), strict=True):
        own = parts[: len(tensors)]
        yield _sound(plan, step.place, core, own, None if base is None else parts[-1], at)
        at += len(parts[0])


def _sound(plan: Plan, place: Place, core: Core, tensors: Sequence[Tensor], base: Tensor | None, at: int) -> Tensor:
    """The merged values, which must be finite unless all models have the same (a mask of −inf)."""
    if place.dtype != tensors[0].dtype:  # cores round to their first argument's type
        tensors = [t.to(torch.promote_types(place.dtype, torch.float32)) for t in tensors]
    out = core.run(tensors, base, at).to(place.dtype)
    total = out.sum(dtype=torch.promote_types(out.dtype, torch.float32))  # finite only if all are: one quick pass
    if not math.isfinite(float(total)) and not bool(out.isfinite().all()):
        alike = [*tensors, *([base] if base is not None else [])]
        if all(torch.equal(one.to(out.dtype), alike[0].to(out.dtype)) for one in alike):
            return alike[0].to(out.dtype)
        bad = [one.name for one, t in zip(plan.sources, tensors, strict=True) if not bool(t.isfinite().all())]
        why = (
            f"it is not in {', '.join(bad)}" if bad else "the weights are too large for it: --dtype float32 holds more"
        )
        raise FileError(f"{place.name!r} would not be finite in {str(place.dtype)[6:]}: {why}.")
    return out


def _finish(plan: Plan, partial: Path, out: Path, said: dict[str, Any]) -> None:
    """Everything beside the tensors, the config last; then the name."""
    write_index(partial, plan.shards)
    for path in plan.copied:
        if path.name != "config.json":
            shutil.copyfile(path, partial / path.name)
    (partial / "README.md").write_text(card(plan, said, out.name), encoding="utf-8")
    write_json(partial / FILE, said)
    if plan.donor.config:
        config = dict(plan.donor.config)
        if plan.recipe.dtype is not None:
            config["dtype" if "dtype" in config else "torch_dtype"] = plan.recipe.dtype
        (partial / "config.writing").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
        os.replace(partial / "config.writing", partial / "config.json")
    _publish(partial, out)


def _publish(partial: Path, out: Path) -> None:
    """The folder takes its name, and what had it goes."""
    if not out.exists():
        os.rename(partial, out)
        return
    old = out.with_name(out.name + ".old")
    if (old / FILE).is_file():  # a merge was killed just here
        shutil.rmtree(old)
    os.rename(out, old)
    try:
        os.rename(partial, out)
    except OSError:
        os.rename(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)
