"""transformers' Trainer, told four things: the order of the examples, the loss, the parameter groups, and that a
checkpoint is modules alone.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.data import Dataset, SequentialSampler

from ..attach import bays
from ._encode import Batch, Encoder, Example
from ._loss import logits_of, row_losses

STAGING = "writing"  # a checkpoint has this name until it is whole


class Ordered(Dataset):
    """The examples of a run in the order in which it sees them, each with its place, which seeds what is masked."""

    def __init__(self, examples: Sequence[Example], order: Sequence[int]):
        self.examples, self.order = examples, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> tuple[int, Example]:
        return place, self.examples[self.order[place]]


class Collator:
    """A batch of what `Ordered` gives."""

    def __init__(self, encoder: Encoder, seed: int):
        self.encoder, self.seed = encoder, seed

    def __call__(self, given: Sequence[tuple[int, Example]]) -> Batch:
        places, examples = zip(*given, strict=True)
        return self.encoder.collate(examples, hash((self.seed, places[0])))


class ModularTrainer(transformers.Trainer):
    """Trains the bays of a network.

    groups: parameter groups. evaluator: () → {"score": larger is better, …}, called at each evaluation. Checkpoints
    appear whole or not at all, and hold modules, the optimiser's state and where the run was.
    """

    def __init__(self, model: nn.Module, args, *, kind: str, encoder: Encoder, groups: Sequence[dict[str, Any]],
                 data: Dataset, evaluator: Callable[[], dict[str, float]] | None, seed: int, callbacks=()):  # fmt: skip
        self.network, self.kind, self.groups, self.evaluator = model, kind, groups, evaluator
        super().__init__(
            model, args, data_collator=Collator(encoder, seed), train_dataset=data, compute_loss_func=self.loss,
            eval_dataset=data if evaluator else None, callbacks=list(callbacks),
        )  # fmt: skip
        self.loss_is_scaled_for_ga = True
        self.pop_callback(transformers.PrinterCallback)
        self._measured = None

    def loss(self, out: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None):
        """The mean over all rows or pieces of the step, in whatever parts and processes it is computed."""
        sums, counts = row_losses(logits_of(out), labels, self._measured, self.kind)
        here = counts.sum()
        every = here if num_items_in_batch is None else num_items_in_batch
        total = sums.sum() / every
        for bay in bays(self.network).values():
            for value in bay.losses().values():
                total = total + value * (here / every)
        return total

    def compute_loss(self, model, inputs, *args, **kwargs):
        self._measured = inputs.pop("measured", None)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            decay = self.args.weight_decay
            self.optimizer = torch.optim.AdamW([{**group, "weight_decay": decay} for group in self.groups])
        return self.optimizer

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """What the evaluator says, as Trainer's callbacks expect it."""
        assert self.evaluator is not None
        said = {f"eval_{name}": value for name, value in self.evaluator().items()}
        self.log(dict(said))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, said)
        return said

    def _save(self, output_dir=None, state_dict=None) -> None:
        save_modules(self.network, output_dir or str(self.args.output_dir))

    def _save_checkpoint(self, model, trial) -> None:
        """Written aside and renamed: whoever is killed here leaves no half checkpoint behind."""
        final = Path(str(self.args.output_dir))
        aside = final / STAGING
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.args.output_dir, limit, self.args.save_total_limit = str(aside), self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.output_dir, self.args.save_total_limit = str(final), limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            name = f"{transformers.trainer_utils.PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            shutil.rmtree(final / name, ignore_errors=True)
            os.replace(aside / name, final / name)
            for old in checkpoints(final)[: -(limit or 1)]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        load_modules(self.network, resume_from_checkpoint)


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a folder, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def save_modules(model: nn.Module, folder: str | Path) -> None:
    """What learns in the bays of a model: where a thousand modules are frozen beside a new one, that one alone."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for bay in bays(model).values():
        names = [name for name in bay.names() if any(p.requires_grad for p in bay.parameters(name))]
        if names or bay.parameter_groups(1.0):
            bay.save(folder, *names)


def load_modules(model: nn.Module, folder: str | Path) -> None:
    """What `save_modules` wrote, into bays that are there: optimisers keep their references."""
    for bay in bays(model).values():
        if (Path(folder) / bay.state.name).is_dir():
            before = dict(bay.state.about)
            bay.load(folder)
            bay.state.about = before  # a checkpoint, which is soon gone, is no module's parent
