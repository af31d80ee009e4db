"""One run of the benchmark: a network trained on batches that never repeat, and judged in and out of distribution."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError, listed
from ._nets import NETWORKS
from ._rules import FAMILIES, Batch, Rules
from ._ways import way


@dataclass(frozen=True)
class Setting:
    """What a run is of. family: "mlp", "mha" or "rnn". seed: of the network and its batches; data: of the rules."""

    family: str = "mlp"
    task: str = "regression"
    rules: int = 8
    way: str = "joint"
    data: int = 0
    seed: int = 0
    encoder: int = 32
    dim: int = 128
    steps: int = 5000
    batch: int = 256
    lr: float = 1e-3
    decay: bool = False  # the rate falls to nought, linearly

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise ConfigError(f"family={self.family!r}: the data are one of {listed(FAMILIES)}.")


def loss_of(task: str, y: Tensor, target: Tensor) -> Tensor:
    """Each row's loss: the absolute error of a regression, the cross-entropy of a class."""
    if task == "regression":
        return (y - target).abs()
    return F.binary_cross_entropy_with_logits(y, target, reduction="none")


def run(setting: Setting, told: Callable[[int, float], None] | None = None) -> dict[str, Any]:
    """Train and judge one network: its scores, its joint table of (rule, module), parameters, seconds."""
    data = FAMILIES[setting.family](setting.rules, setting.task, setting.data)
    torch.manual_seed(setting.seed)
    network = NETWORKS[setting.family](
        setting.rules, way(setting.way, setting.rules, setting.encoder), setting.encoder, setting.dim
    )
    start = perf_counter()
    train(network, data, setting, told)
    seconds = perf_counter() - start
    network.eval()
    generator = torch.Generator().manual_seed(10_000 + setting.seed)
    inside, table = judged(network, data, generator, setting.task)
    outside, _ = judged(network, data, generator, setting.task, ood=True)
    parameters = sum(p.numel() for p in network.parameters())
    return asdict(setting) | {
        "score": inside, "score_ood": outside, "table": table.tolist(), "parameters": parameters, "seconds": seconds,
    }  # fmt: skip


def train(network: nn.Module, data: Rules, setting: Setting, told: Callable[[int, float], None] | None = None) -> None:
    """Adam, gradients of an RNN cut at norm 1 as in the paper; the routers' own losses added."""
    generator = torch.Generator().manual_seed(setting.seed)
    optimiser = torch.optim.Adam(network.parameters(), lr=setting.lr)
    left = lambda step: 1 - step / setting.steps if setting.decay else 1.0
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, left)
    network.train()
    for step in range(setting.steps):
        batch = data.draw(setting.batch, generator)
        said = network(batch.x, batch.rule, batch.y)
        loss = loss_of(setting.task, said.y, batch.y).mean() + sum(said.losses.values())
        optimiser.zero_grad()
        loss.backward()
        if setting.family == "rnn":
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if told is not None and (step + 1) % 100 == 0:
            told(step + 1, float(loss.detach()))


@torch.no_grad()
def judged(
    network: nn.Module, data: Rules, generator: torch.Generator, task: str, ood: bool = False, batches: int = 20
) -> tuple[float, Tensor]:
    """(mean absolute error, or error rate; P (R, n), the joint table of rule and module) over new examples."""
    wrong, table = 0.0, torch.zeros(())
    for _ in range(batches):
        batch: Batch = data.draw(1000, generator, ood)
        said = network(batch.x, batch.rule)
        each = (said.y - batch.y).abs() if task == "regression" else ((said.y >= 0) != batch.y.bool()).float()
        wrong += each.mean().item() / batches
        rows, weights = batch.rule.flatten(), said.weights.flatten(0, -2)
        table = table + torch.zeros(data.rules, weights.shape[-1]).index_add_(0, rows, weights)
    return wrong, table / table.sum()
