"""fusion_bench's own Fisher merging and RegMean, of models in files; run by benchmarks/fusion_bench_merging.py."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class MLP(nn.Sequential):
    """Two hidden layers, called as fusion_bench calls a transformer; units that never fire would stop its RegMean."""

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=super().forward(x))


def mlp(inputs: int) -> MLP:
    return MLP(nn.Linear(inputs, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 10))


class Rows:
    """What fusion_bench takes of a trainer: an example at a time, so that gradients are squared before their sum."""

    _train_batch_size = 1

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def get_train_dataloader(self) -> list[dict[str, Tensor]]:
        return [{"x": row[None]} for row in self.x]

    def _prepare_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return inputs


def main(asked: str) -> None:
    from importlib.metadata import version

    from fusion_bench.method.fisher_merging import fisher_merging as fisher  # type: ignore[import-not-found]
    from fusion_bench.method.regmean import regmean  # type: ignore[import-not-found]

    torch.set_num_threads(1)
    wanted, models, rows = json.loads(asked), [], []
    folder = Path(wanted["folder"])
    for i in range(wanted["models"]):
        state = load_file(folder / f"{i}.safetensors")
        x = state.pop("x")
        net = mlp(x.shape[1])
        net.load_state_dict(state)
        models.append(net)
        rows.append(Rows(x))
    numbers = [len(one.x) for one in rows]
    ways = {
        "fisher": (fisher, "merging_with_fisher_weights", "models_to_merge_fisher_weights_list",
                   lambda: fisher.fisher_merging(models, rows, [], numbers)),
        "regmean": (regmean, "merging_with_regmean_weights", "models_to_merge_regmean_weights_list",
                    lambda: regmean.regmean_merging(models, rows, [], numbers, wanted["alpha"])),
    }  # fmt: skip
    for name, (module, last, found, merge) in ways.items():
        true = getattr(module, last)

        def listens(*, true=true, name=name, found=found, **given):
            for i, one in enumerate(given[found]):
                save(one, folder / f"{name}{i}.safetensors")
            save(true(**doubled(given)), folder / f"{name}-float64.safetensors")
            return true(**given)

        setattr(module, last, listens)  # what it found of each model is written down on its way
        save(merge(), folder / f"{name}.safetensors")
    print(json.dumps({one: version(one) for one in ("fusion_bench", "torch")}))


def doubled(given):
    """The same in float64, in which its inverses do not round as far."""
    if isinstance(given, dict):
        return {key: doubled(one) for key, one in given.items()}
    if isinstance(given, list):
        return [doubled(one) for one in given]
    return given.detach().double() if isinstance(given, Tensor) else given


def save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, path)


if __name__ == "__main__":
    main(sys.argv[1])
