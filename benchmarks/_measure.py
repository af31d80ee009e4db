"""How everything here is timed: contenders in turn in one process, many rounds, medians, ratios against the first.

    make bench        or        python benchmarks/mixed_batch.py [--rounds N] [--json FILE]

One thread, gc off, after a warm-up. Absolute times say little on a shared machine: only ratios are quoted.
"""

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def arguments(description: str, more: Mapping[str, str] | None = None) -> argparse.Namespace:
    """The options that all benchmarks share, and more of one's own: what each says of itself."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11, help="timed rounds of each contender (default 11)")
    parser.add_argument("--json", type=Path, help="write the raw figures here")
    parser.add_argument("--quick", action="store_true", help="two rounds: only to see that it runs")
    for option, says in (more or {}).items():
        parser.add_argument(option, help=says)
    options = parser.parse_args()
    options.rounds = 2 if options.quick else options.rounds
    torch.set_num_threads(1)
    return options


def interleaved(
    contenders: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each call, the contenders in turn: A B C A B C …; time.process_time leaves a noisy neighbour out."""
    for call in contenders.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, call in contenders.items():
                start = clock()
                call()
                times[name].append(clock() - start)
    finally:
        gc.enable()
    return times


def ratios(times: Mapping[str, list[float]]) -> dict[str, float]:
    """Each contender's median over the first one's."""
    first = statistics.median(next(iter(times.values())))
    return {name: statistics.median(several) / first for name, several in times.items()}


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    found = {"python": platform.python_version(), "machine": f"{platform.machine()}, {torch.get_num_threads()} thread"}
    for package in ("torch", "transformers", "peft", "modbay"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def table(title: str, rows: list[dict[str, object]]) -> None:
    """A table that a person can read."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(column), *(len(line[i]) for line in cells)) for i, column in enumerate(columns)]
    print(f"\n{title}")
    for line in [columns, *cells]:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def finish(options: argparse.Namespace, rows: list[dict[str, object]], raw: object = None) -> None:
    """Name the machine, and write the raw figures if they are wanted."""
    print("\n" + ", ".join(f"{key} {value}" for key, value in machine().items()))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "rows": rows, "raw": raw}, indent=1))
