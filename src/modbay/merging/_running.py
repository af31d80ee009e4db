"""Running means of a model's weights along its training: stochastic weight averaging, exponential moving averages.

SWA: Izmailov, Podoprikhin, Garipov, Vetrov and Wilson, "Averaging Weights Leads to Wider Optima and Better
Generalization", 2018 (arXiv 1803.05407). EMA: Polyak and Juditsky, 1992.
"""

from typing import ClassVar

import torch
from torch import Tensor

from ..errors import MergeError
from ..types import System
from ._models import State, wide

TESTS = (
    "tests/test_merging.py::test_a_running_mean_is_the_mean",
    "tests/test_merging.py::test_running_means_are_torch_s_bit_for_bit",
)


class RunningMean:
    """θ̄ ← θ̄ + (θ − θ̄)/(n + 1), the mean of all that it was given, in place; with `decay` d, θ̄ ← d θ̄ + (1 − d) θ.

        mean = merging.RunningMean()            # SWA; RunningMean(0.999): an EMA
        mean.update(model.state_dict())         # at the end of an epoch, or of each step
        model.load_state_dict(mean.average())

    Kept in float32 at least, since a step of 1 − d is lost in bfloat16. Tensors not of floating point are the latest's.
    Batch norm's statistics are averaged as others are; SWA's authors run the data once more through the model for them
    (`torch.optim.swa_utils.update_bn`). The numbers are those of torch's `AveragedModel`, to the bit.
    decay: 0 to 1; None for the plain mean. mean, count: where to go on from, of an earlier one.
    Raises MergeError for a decay that is none, and for other names or shapes than before.
    """

    systems: ClassVar[tuple[System, ...]] = (
        System((122,), "merging.RunningMean()", TESTS, "SWA", "θ̄ ← θ̄ + (θ − θ̄)/(n + 1)", section="5.1"),
        System(
            (), "merging.RunningMean(decay=0.999)", TESTS, "exponential moving average", "θ̄ ← d θ̄ + (1 − d) θ",
            section="5.1",
        ),
    )  # fmt: skip

    def __init__(self, decay: float | None = None, mean: State | None = None, count: int = 0):
        if decay is not None and not 0 <= decay <= 1:
            raise MergeError(f"RunningMean(decay={decay!r}): the share of the past that is kept, 0 to 1, or None.")
        if (mean is None) != (count == 0):
            raise MergeError(f"RunningMean(count={count!r}): a mean to go on from has its count of models, 1 or more.")
        self.decay = decay
        self.count = count
        self.mean = {} if mean is None else {name: _kept(t) for name, t in mean.items()}
        self._dtypes: dict[str, torch.dtype] = {}

    @torch.no_grad()
    def update(self, model: State) -> None:
        """Take the weights of one more model into the mean."""
        if not self.count:
            self.mean = {name: _kept(t) for name, t in model.items()}
        elif {n: t.shape for n, t in model.items()} != {n: t.shape for n, t in self.mean.items()}:
            odd = [n for n in {**model, **self.mean} if n not in model or n not in self.mean]
            odd = odd or [n for n in model if model[n].shape != self.mean[n].shape]
            raise MergeError(f"RunningMean.update: {odd[0]!r} is not there, or not as large, as in earlier models.")
        else:
            share = 1 / (self.count + 1) if self.decay is None else 1 - self.decay
            for name, mean in self.mean.items():
                if mean.is_floating_point():
                    mean.lerp_(model[name].to(mean), share)
                else:
                    mean.copy_(model[name])
        self.count += 1
        self._dtypes = {name: t.dtype for name, t in model.items()}

    def average(self) -> dict[str, Tensor]:
        """The mean, a copy, in the dtypes of the model given last. Raises MergeError before the first."""
        if not self.count:
            raise MergeError("RunningMean.average: there is no model yet. Call update(model.state_dict()) first.")
        return {name: t.to(self._dtypes.get(name, t.dtype), copy=True) for name, t in self.mean.items()}


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().to(wide(tensor) if tensor.is_floating_point() else tensor.dtype, copy=True)
