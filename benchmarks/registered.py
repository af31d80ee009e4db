"""1,000 modules registered, 16 of them active: what does each operation cost, beside 16 registered?

Llama-like, 8 layers of 512, rank-8 LoRAs on q and v. A forward of 64 examples by 16 modules; use, add, remove. And how
long it takes to attach 64 LoRAs to all seven linears.
"""

import statistics
import time

import torch
from _measure import arguments, finish, interleaved, ratios, table
from mixed_batch import ALL, BATCH, RANK, model
from torch import nn

import modbay as mb


def bay_of(n: int, targets: tuple[str, ...] = ("q_proj", "v_proj")) -> mb.Bay:
    return mb.attach(model(), [f"*.{t}" for t in targets], {f"m{i}": mb.LoRA(RANK) for i in range(n)}, name="which")


def timed(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    options = arguments(__doc__ or "")
    few, many = bay_of(16), bay_of(1000)
    ids, which = torch.randint(0, 1000, (BATCH, 1)), [f"m{i % 16}" for i in range(BATCH)]
    with torch.no_grad():
        sizes = {"16": lambda: few.model(ids, which=which), "1,000": lambda: many.model(ids, which=which)}
        forward = interleaved(sizes, options.rounds)
    rows: list[dict[str, object]] = [{"operation": "forward, 16 active", "1,000 ÷ 16": ratios(forward)["1,000"]}]
    operations = {
        "use": lambda bay: [bay.use("m3"), bay.use()],
        "add": lambda bay: bay.add("new", mb.LoRA(RANK)),
        "remove": lambda bay: bay.remove("new"),
    }
    times: dict[str, dict[str, list[float]]] = {name: {"16": [], "1,000": []} for name in operations}
    for _ in range(options.rounds):
        for name, operation in operations.items():
            for size, bay in (("16", few), ("1,000", many)):
                times[name][size].append(timed(lambda operation=operation, bay=bay: operation(bay)))
    for name, sizes in times.items():
        a, b = (statistics.median(several) for several in sizes.values())
        rows.append({"operation": name, "1,000 ÷ 16": b / a, "µs at 1,000": round(1e6 * b)})
    start = time.perf_counter()
    wide = bay_of(64, tuple(ALL))
    rows.append({"operation": "attach 64 LoRAs, 7 linears × 8 layers", "seconds": time.perf_counter() - start})
    assert isinstance(wide.model, nn.Module)
    table("Registered modules", rows)
    finish(options, rows, {"forward": forward, **times})


if __name__ == "__main__":
    main()
