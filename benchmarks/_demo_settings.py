"""How the demo's learning rates were chosen: every way alike, on the development split, which the demo never scores.

    python benchmarks/_demo_settings.py                  # joint training, then arrivals; some ten minutes
    python benchmarks/_demo_settings.py --steps 200      # as many as the demo takes

The best of each way is what src/modbay/demo/_ways.py and _arrivals.py hold.
"""

import argparse
import copy
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from time import perf_counter

from modbay.demo._arrivals import ARRIVALS, Arrival, arrive
from modbay.demo._data import few_shot, load
from modbay.demo._encode import Assistant
from modbay.demo._run import FULL
from modbay.demo._task import Task, prepare
from modbay.demo._train import by_language, logits
from modbay.demo._ways import SHARED, WAYS, train

RATES = (3e-3, 1e-3)  # of modules; 6e-3 did worse for the shared one
SLOW = (3e-4, 2e-3)  # of the head that the twelve share, which starts where the probe left it
HEADS = (1e-3, 3e-3, 1e-2)  # of a newcomer's head
GATES = (3e-2, 1e-1)  # of a newcomer's gates
SHOTS = 4


def head_rate(task: Task, steps: int, seed: int) -> float:
    """The rate of the head, which all ways share: the better for one shared module."""
    found = {}
    for head_lr in SLOW:
        model = train(replace(SHARED, head_lr=head_lr), task.base, task.train, steps, seed)
        found[head_lr] = task.score(logits(model, task.test, call=by_language)).mean()
        print(f"{SHARED.title:32} lr {SHARED.lr:.0e}, head {head_lr:.0e}: {found[head_lr]:.4f}", flush=True)
    return max(found, key=lambda head_lr: found[head_lr])


def joint(task: Task, head_lr: float, steps: int, seed: int) -> dict[str, Assistant]:
    """Each way at each rate; returns the best model of each."""
    models: dict[str, Assistant] = {"base": task.base}
    for way in WAYS:
        best = -1.0
        for lr in RATES:
            before = perf_counter()
            model = train(replace(way, lr=lr, head_lr=head_lr), task.base, task.train, steps, seed)
            found = task.score(logits(model, task.test, call=by_language)).mean()
            print(
                f"{way.title:32} lr {lr:.0e}, head {head_lr:.0e}: {found:.4f} ({perf_counter() - before:.0f} s)",
                flush=True,
            )
            if found > best:
                best, models[way.name] = found, model
    return models


def rates(way: Arrival) -> Iterator[tuple[float, float]]:
    """(lr, head_lr) to try: only what the way has."""
    gates = way.name == "routing"
    yield from product(GATES if gates else RATES if way.lr else (0.0,), (0.0,) if gates else HEADS)


def arrivals(task: Task, models: dict[str, Assistant], seed: int) -> None:
    """Each way of taking a newcomer in, at each pair of rates; the mean over the newcomers."""
    for way in ARRIVALS:
        for lr, head_lr in rates(way):
            found = []
            for language, split in task.data.arrivals.items():
                few = task.rows(few_shot(split.train, SHOTS, seed))
                model = copy.deepcopy(models[way.start])
                arrive(replace(way, lr=lr, head_lr=head_lr), model, language, few, FULL.few_steps, seed)
                found.append(task.accuracy(model, split.dev))
            print(f"{way.title:32} lr {lr:.0e}, head {head_lr:.0e}: {sum(found) / len(found):.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="of joint training")
    parser.add_argument("--head", type=float, help="the rate of the head, if it is not to be looked for")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    task = prepare(load(args.seed), FULL.probe_steps, args.seed, part="dev")
    print(f"{'Linear probe':32}: {task.score(logits(task.base, task.test)).mean():.4f}", flush=True)
    head_lr = head_rate(task, args.steps, args.seed) if args.head is None else args.head
    arrivals(task, joint(task, head_lr, args.steps, args.seed), args.seed)


if __name__ == "__main__":
    main()
