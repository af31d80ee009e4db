"""How the demo's learning rates were chosen: every way alike, on the development split, which the demo never scores.

    python benchmarks/_demo_settings.py                  # joint training, then arrivals; some ten minutes
    python benchmarks/_demo_settings.py --steps 200      # as many as the demo takes

The best of each way is what src/modbay/demo/_write.py and _arrivals.py hold. It is `modbay compare` with the
development rows as test, and `modbay extend` with those of the newcomers.
"""

import argparse
import tempfile
from dataclasses import replace
from itertools import product
from pathlib import Path

from modbay import training
from modbay.demo._arrivals import Arrivals
from modbay.demo._write import FULL, METHODS, comparison, write

RATES = (3e-3, 1e-3)  # of modules; 6e-3 did worse for the shared one
HEADS = (3e-4, 2e-3)  # of the head that the twelve share, which starts where the probe left it; tried with `shared`
NEW_HEADS = (1e-3, 3e-3, 1e-2)  # of a newcomer's head
GATES = (3e-2, 1e-1)  # of a newcomer's gates
SHOTS = 4


def joint(folder: Path, steps: int, seed: int) -> None:
    """Each way at each rate, as variants of one comparison, judged on development."""
    scale = replace(FULL, steps=steps)
    trained = {name: own for name, own in METHODS.items() if name not in ("probe", "tfidf", "tfidf-each", "majority")}
    methods = {
        "shared": {},
        "polytropon": {},
        "shared fast head": {"method": "shared", "head_lr": HEADS[1]},
        "probe": {},
    }
    for (name, own), lr in product(trained.items(), RATES):
        methods[f"{name} {lr:g}"] = {"method": name, **own, "lr": lr}
    given = comparison(folder / "data", scale, seed) | {"methods": methods, "validation": 0.0}
    given["test"] = str(folder / "data/validation.csv")
    done = training.compare(training.comparison(given), folder / "joint")
    for row in done.facts["compare"]["rows"]:
        print(f"{row['method']:32} {row['estimate']:.4f}", flush=True)


def arrivals(folder: Path, seed: int) -> None:
    """Each way of taking newcomers in, at each pair of rates; the mean over the newcomers."""
    (folder / "data/new-test.csv").write_bytes((folder / "data/new-validation.csv").read_bytes())
    one = Arrivals(folder / "data", folder / "joint", folder / "arrivals", replace(FULL, shots=(SHOTS,)), seed)
    tried = [("shared", "both", lr, head, None) for lr, head in product(RATES, NEW_HEADS)]
    tried += [("shared", "head", RATES[0], head, None) for head in NEW_HEADS]
    tried += [("polytropon", "head", RATES[0], head, gates) for head, gates in product(NEW_HEADS, GATES)]
    for place, (method, ways, lr, head, gates) in enumerate(tried):
        one.out = folder / "arrivals" / str(place)
        more = {"ways": ways, "lr": lr, "head_lr": head} | ({"router_lr": gates} if gates else {})
        way = one.extended(method, method, more)
        mean = sum(cell.estimate for cell in way.cells.values()) / len(way.cells)
        print(f"{method} {ways:6} lr {lr:g}, head {head:g}, gates {gates or 0:g}: {mean:.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="of joint training")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / "data", FULL, args.seed)
        joint(folder, args.steps, args.seed)
        arrivals(folder, args.seed)


if __name__ == "__main__":
    main()
