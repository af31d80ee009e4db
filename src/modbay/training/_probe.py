"""A linear probe: heads learn on features that the frozen base computes once. Longer runs start from it.

Kumar, Raghunathan, Jones, Ma and Liang, "Fine-tuning can distort pretrained features and underperform
out-of-distribution", 2022 (arXiv 2202.10054): probe first, then tune.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..abstract import Context
from ..attach import bays
from ..data import Row
from ._base import TextModel
from ._build import Network
from ._config import Config
from ._encode import IGNORED, Example
from ._loss import row_losses
from ._plan import balance
from ._predict import batches, moved
from ._progress import Bar, Progress
from ._routes import HEAD, HEADS
from ._run import read_standard, write_standard
from ._sampling import order

RATE, SIZE, MOST = 2e-3, 32, 20_000  # of Adam; rows a step; rows whose features are kept, some hundred MiB


def prepare(
    network: Network, config: Config, rows: Sequence[Row], groups: Sequence, folder: Path, progress: Progress
) -> None:
    """Standardise the features and let the heads learn on them; the bays of a method must not be attached yet.

    What was found is kept in `folder`, so that a run that was stopped goes on from the same bits.
    """
    model = network.model
    if not isinstance(model, TextModel) or not (config.standardise or config.probe):
        return
    kept = folder / "probe"
    if (kept / "standard.safetensors").is_file():
        read_standard(model, kept)
        bays(model)[HEADS].load(kept)
        return
    examples = network.encoder.encode(rows[:MOST], [network.routes.of(row, (HEAD,)) for row in rows[:MOST]])
    with progress.stage("Features of the frozen base", len(examples)) as bar:
        features, owners, target = seen(network, examples, bar)
    if config.standardise:
        model.standardise(features)
    if config.probe:
        with progress.stage("Linear probe", config.probe) as bar:
            fit_heads(network, (features - model.mean) / model.scale, [examples[i] for i in owners], target,
                      [groups[i] for i in owners], config, bar)  # fmt: skip
    bays(model)[HEADS].save(kept)
    write_standard(model, kept)


def probe(network: Network, config: Config, rows: Sequence[Row], progress: Progress) -> None:
    """Let the heads that learn do so on what the network, its modules included, makes of these rows."""
    if not isinstance(network.model, TextModel) or not config.probe:
        return
    rows = rows[:MOST]
    examples = network.encoder.encode(rows, [network.routes.of(row, network.keywords) for row in rows])
    with progress.stage("Features of the frozen network", len(examples)) as bar:
        features, owners, target = seen(network, examples, bar)
    groups = balance(config, rows)
    with progress.stage("Linear probe", config.probe) as bar:
        fit_heads(network, features, [examples[i] for i in owners], target, [groups[i] for i in owners], config, bar)


@torch.no_grad()
def seen(network: Network, examples: Sequence[Example], bar: Bar) -> tuple[Tensor, list[int], Tensor]:
    """(the features (n, width) that heads see, whose example each is, its target): of tagged texts, one a word."""
    model, done, at_head = network.model, 0, []
    assert isinstance(model, TextModel)
    model.eval()
    out: list[Tensor] = [torch.empty(0)] * len(examples)
    hook = model.head.register_forward_pre_hook(lambda _, given: at_head.append(given[0]))
    try:
        for places in batches(examples, 64):
            batch = moved(network.encoder.collate([examples[i] for i in places]), network.device)
            labels = batch.pop("labels")
            batch.pop("measured", None)
            model(**batch)
            for i, one, told in zip(places, at_head.pop(), labels, strict=True):
                out[i] = one[told != IGNORED] if model.tokens else one.unsqueeze(0)
            done += len(places)
            bar.step(done)
    finally:
        hook.remove()
    owners = [i for i, one in enumerate(out) for _ in one]
    told = [t for e in examples for t in (e.target if model.tokens else [e.target]) if not model.tokens or t != IGNORED]
    return torch.cat(out), owners, torch.tensor([float(t) for t in told], device=network.device)


def fit_heads(
    network: Network, features: Tensor, examples: Sequence[Example], target: Tensor, groups: Sequence, config: Config,
    bar: Bar,
) -> None:  # fmt: skip
    """Adam on the heads, its rate falling to zero."""
    learned = [p for p in bays(network.model)[HEADS].parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(learned, RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / config.probe)
    places = order(groups, [0] * len(examples), config.probe, SIZE, sampling=config.sampling,
                   temperature=config.temperature, seed=config.seed)  # fmt: skip
    measured = torch.tensor([e.measured for e in examples], device=features.device)
    some = bool(measured.any())
    for step in range(config.probe):
        now = places[step * SIZE : (step + 1) * SIZE]
        logits = heads_of(network, features[now], [examples[i].routes[HEAD] for i in now])
        sums, counts = row_losses(logits, target[now], measured[now] if some else None, "classification")
        optimiser.zero_grad()
        (sums.sum() / counts.sum()).backward()
        optimiser.step()
        schedule.step()
        bar.step(step + 1)
    for parameter in learned:
        parameter.grad = None


def heads_of(network: Network, features: Tensor, heads: Sequence[str | None]) -> Tensor:
    """The logits of each row's head, those of smaller ones filled up with −inf."""
    bay = bays(network.model)[HEADS]
    modular, route = bay.modulars["head"], bay.state.router(None, Context({HEAD: list(heads)}))  # type: ignore[misc]
    return modular.run(None, features, Context(), route, bay.state.aggregator)
