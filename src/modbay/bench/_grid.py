"""A grid of runs: several processes, each finished run kept on disk, and one table of them all."""

import json
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from .. import metrics
from ..errors import ConfigError
from ._run import Setting, run
from ._ways import way

REFERENCE, IDEAL = "joint", "ground-truth"  # a gap closed is of that between these two
SAYS = ("score", "score_ood", "collapse", "worst", "information", "alignment")
PAPER = {  # sizes (encoder, dim), steps and learning rate of the paper's code
    "mlp": {"encoder": 32, "dim": 128, "steps": 100_000, "lr": 1e-4},
    "mha": {"encoder": 128, "dim": 512, "steps": 500_000, "lr": 1e-4},
    "rnn": {"encoder": 128, "dim": 128, "steps": 500_000, "lr": 1e-4},
}
SMALL = {  # what ends on two cores: with so few steps, at a rate that falls, or its noise is most of the error
    "mlp": {"encoder": 32, "dim": 128, "steps": 3000, "lr": 1e-3, "decay": True},
    "mha": {"encoder": 32, "dim": 128, "steps": 3000, "lr": 1e-3, "decay": True},
    "rnn": {"encoder": 32, "dim": 32, "steps": 2000, "lr": 1e-3, "decay": True},
}


def grid(
    rules: Iterable[int],
    ways: Iterable[str],
    seeds: int,
    family: str = "mlp",
    task: str = "regression",
    paper: bool = False,
    **sizes: Any,
) -> list[Setting]:
    """One setting for each number of rules, way and seed, where each seed is of the data and of the network.

    paper: the sizes, steps and learning rate of the paper's code; by default what a laptop can do. sizes: other
    arguments of Setting.
    """
    if family not in SMALL:
        raise ConfigError(f"family={family!r}: the data are mlp, mha or rnn.")
    said = {name: value for name, value in sizes.items() if value is not None}
    chosen = (PAPER if paper else SMALL)[family] | said
    made = [
        Setting(family=family, task=task, rules=n, way=name, data=seed, seed=seed, **chosen)
        for seed in range(seeds)
        for n in rules
        for name in ways
    ]
    for setting in made:  # before the first of them has run for an hour
        way(setting.way, setting.rules)
    return made


def modularity(
    settings: Sequence[Setting],
    out: Path | None = None,
    jobs: int | None = None,
    told: Callable[[int, Mapping[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Run all settings, those of `out`/runs.jsonl excepted that have run already; their results, in order.

    jobs: processes; one a core if None. told: called with the number of runs that are done and the newest's result.
    """
    kept = {} if out is None else _kept(out)
    left = [setting for setting in settings if setting not in kept]
    if left and out is not None:
        out.mkdir(parents=True, exist_ok=True)
    for result in _results(left, jobs or os.cpu_count() or 1):
        kept[_setting(result)] = result
        if out is not None:
            with (out / "runs.jsonl").open("a") as file:
                file.write(json.dumps(result) + "\n")
        if told is not None:
            told(len(kept), result)
    return [kept[setting] for setting in settings]


def _results(settings: Sequence[Setting], jobs: int) -> Iterable[dict[str, Any]]:
    if jobs == 1 or len(settings) < 2:
        yield from map(run, settings)
        return
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(run, setting) for setting in settings]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _setting(result: Mapping[str, Any]) -> Setting:
    return Setting(**{field.name: result[field.name] for field in fields(Setting)})


def _kept(out: Path) -> dict[Setting, dict[str, Any]]:
    """The runs of a folder; a last line that was cut off by a kill is not one."""
    file = out / "runs.jsonl"
    found = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            result = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[_setting(result)] = result
    return found


def judge(result: Mapping[str, Any]) -> dict[str, float | None]:
    """A run's scores, and what its joint table says; None of a network with one module."""
    table = torch.tensor(result["table"])
    said: dict[str, float | None] = {name: result.get(name) for name in SAYS}
    if table.shape[0] == table.shape[1]:
        said |= {
            "collapse": metrics.collapse_average(table), "worst": metrics.collapse_worst(table),
            "information": metrics.mutual_information(table) / float(torch.tensor(len(table)).log()),
            "alignment": metrics.alignment(table),
        }  # fmt: skip
    return said


def standings(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each number of rules and way: means and deviations over its seeds, and the share that it closes of the
    gap between joint scores and ground truth; the best first."""
    rows = []
    for n in dict.fromkeys(result["rules"] for result in results):
        here = [result for result in results if result["rules"] == n]
        mine = [
            _standing(name, [r for r in here if r["way"] == name]) for name in dict.fromkeys(r["way"] for r in here)
        ]
        by_way = {row["way"]: row for row in mine}
        for row in mine:
            for score in ("score", "score_ood"):
                row[f"{score}_closed"] = _closed(row[score], by_way, score)
        rows += sorted(mine, key=lambda row: row["score"])
    return rows


def _standing(name: str, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    judged = [judge(result) for result in results]
    row: dict[str, Any] = {"rules": results[0]["rules"], "way": name, "runs": len(results)}
    row["parameters"] = results[0]["parameters"]
    for key in SAYS:
        values = [value for one in judged if (value := one[key]) is not None]
        row[key] = statistics.fmean(values) if values else None
        row[f"{key}_sd"] = statistics.stdev(values) if len(values) > 1 else None
    row["seconds"] = statistics.fmean(result["seconds"] for result in results)
    return row


def _closed(score: float, rows: Mapping[str, Mapping[str, Any]], key: str) -> float | None:
    if REFERENCE not in rows or IDEAL not in rows:
        return None
    learned, ideal = rows[REFERENCE][key], rows[IDEAL][key]
    return (learned - score) / (learned - ideal) if learned > ideal else None
