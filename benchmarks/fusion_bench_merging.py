"""Fisher merging and RegMean beside fusion_bench's own code, on MLPs that learned scikit-learn's digits.

    python benchmarks/fusion_bench_merging.py PYTHON

PYTHON is an interpreter that has fusion_bench: `pip install fusion_bench==0.2.33` in an environment of its own. Three
MLPs are trained from one start, each on a third of the examples; there fusion_bench merges them, by its own functions,
diagonals and Grams, and says what it had found of each model. Here the same is merged by modbay, from what fusion_bench
found, and from what modbay finds of the same examples. All is compared, in the largest difference relative to the
largest value, and scored on examples that none has seen.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import torch
from _fusion_bench import mlp
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor

from modbay import merging, sparsity

MODELS, ROWS, ALPHA = 3, 300, 0.9
FILES = ("fisher", "regmean", "regmean-float64")
State = dict[str, Tensor]


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("python", metavar="PYTHON")
    given = asked.parse_args()
    torch.set_num_threads(1)
    data, test = examples()
    models = trained(data)
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        for i, (model, (x, _)) in enumerate(zip(models, data, strict=True)):
            save_file(model | {"x": x[:ROWS].contiguous()}, folder / f"{i}.safetensors")
        call = {"folder": where, "models": MODELS, "alpha": ALPHA}
        command = [given.python, str(Path(__file__).with_name("_fusion_bench.py")), json.dumps(call)]
        versions = json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        )
        theirs = {name: load_file(folder / f"{name}.safetensors") for name in FILES}
        found = {name: [load_file(folder / f"{name}{i}.safetensors") for i in range(MODELS)] for name in FILES[:2]}
    print(json.dumps(versions))
    named = [{f"{layer}.weight": g for layer, g in one.items()} for one in found["regmean"]]
    fishers, grams = zip(*(measured(m, x[:ROWS]) for m, (x, _) in zip(models, data, strict=True)), strict=True)
    said = {
        "Fisher, of its diagonals": apart(merging.fisher(models, found["fisher"], floor="added"), theirs["fisher"]),
        "RegMean, of its Grams": apart(merging.regmean(models, named, ALPHA), theirs["regmean"]),
        "RegMean, of its Grams, beside its code in float64": apart(
            merging.regmean(models, named, ALPHA), theirs["regmean-float64"]
        ),
        "the Grams": max(apart(mine, its) for mine, its in zip(grams, named, strict=True)),
        "RegMean, of modbay's Grams, beside its code in float64": apart(
            merging.regmean(models, grams, ALPHA), theirs["regmean-float64"]
        ),
        "the diagonals": max(apart(mine, its) for mine, its in zip(fishers, found["fisher"], strict=True)),
        "the diagonals, with its products of classes": max(
            apart(crossed(m, x[:ROWS]), its) for m, (x, _), its in zip(models, data, found["fisher"], strict=True)
        ),
    }
    for what, far in said.items():
        print(f"{what}: {far:.2g}")
    whole = {"one model": models[0], "average": merging.average(models)}
    whole |= {"fusion_bench, Fisher": theirs["fisher"], "modbay, Fisher": merging.fisher(models, fishers)}
    whole |= {"fusion_bench, RegMean": theirs["regmean"], "modbay, RegMean": merging.regmean(models, grams, ALPHA)}
    for name, state in whole.items():
        print(f"{name}: {100 * right(state, test):.1f} % of {len(test[1])} right")


def examples() -> tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """(a third of the examples for each model, those for the test); pixels that are always 0 are left out."""
    x, y = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x = x[:, x.double().var(0) > 0.1].float()[order] / 16
    y = y[order]
    n = 400
    return [(x[i * n : (i + 1) * n], y[i * n : (i + 1) * n]) for i in range(MODELS)], (x[MODELS * n :], y[MODELS * n :])


def trained(data: list[tuple[Tensor, Tensor]]) -> list[State]:
    torch.manual_seed(0)
    start = mlp(data[0][0].shape[1]).state_dict()
    made = []
    for x, y in data:
        net = mlp(x.shape[1])
        net.load_state_dict(start)
        optimiser = torch.optim.Adam(net.parameters(), lr=2e-3)
        for _ in range(60):
            for rows in torch.randperm(len(x)).split(32):
                optimiser.zero_grad()
                torch.nn.functional.cross_entropy(net(x[rows]).logits, y[rows]).backward()
                optimiser.step()
        made.append({name: t.detach().clone() for name, t in net.state_dict().items()})
    return made


def measured(state: State, x: Tensor) -> tuple[State, State]:
    """(the Fisher diagonal by label, all labels as the model weighs them; Grams a row, by the name of the weight)."""
    net, inputs = loaded(state), {}
    for name, layer in net.named_modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_pre_hook(lambda _, given, key=f"{name}.weight": inputs.update({key: given[0]}))
    with torch.no_grad():
        net(x)
        grams = {name: merging.gram(rows) / len(rows) for name, rows in inputs.items()}
    weights = dict(net.named_parameters())
    total = {name: torch.zeros_like(w) for name, w in weights.items()}
    for y in range(10):  # E_y: every label, and how likely it is
        losses = (-(p.detach().sqrt() * p.log())[0, y] for p in (net(row[None]).logits.softmax(-1) for row in x))
        for name, diagonal in sparsity.fisher(losses, weights).items():
            total[name] += diagonal
    return total, grams


def crossed(state: State, x: Tensor) -> State:
    """1/N Σ_x (Σ_y √p_y ∂ log p_y)²: fusion_bench squares the sum over labels, which has the products of them, too."""
    net = loaded(state)
    losses = ((p.detach().sqrt() * p.log()).sum() for p in (net(row[None]).logits.softmax(-1) for row in x))
    return sparsity.fisher(losses, dict(net.named_parameters()))


def loaded(state: State) -> torch.nn.Module:
    net = mlp(state["0.weight"].shape[1])
    net.load_state_dict(state)
    return net


@torch.no_grad()
def apart(mine: State, theirs: State) -> float:
    """The largest difference, relative to the largest value of its tensor."""
    assert mine.keys() == theirs.keys()
    return max(float((mine[name] - t).abs().max() / t.abs().max()) for name, t in theirs.items())


@torch.no_grad()
def right(state: State, test: tuple[Tensor, Tensor]) -> float:
    x, y = test
    return float((loaded(state)(x).logits.argmax(-1) == y).float().mean())


if __name__ == "__main__":
    main()
