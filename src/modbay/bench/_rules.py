"""Data whose rules are known: each row, token or step follows one of R rules, and says which.

Mittal, Bengio and Lajoie, "Is a Modular Architecture Enough?", 2022 (arXiv 2206.02713), section 3, and its code.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError, listed

TASKS = ("regression", "classification")
LENGTH = 10  # of sequences


class Batch(NamedTuple):
    """x: (b, d) of numbers, or (b, t, d); rule: (b,) or (b, t), which of the R rules each follows; y: likewise."""

    x: Tensor
    rule: Tensor
    y: Tensor


@dataclass(frozen=True)
class Rules(ABC):
    """A family of R rules, whose coefficients N(0, 1) are those of the official code for `seed`.

    rules: R. task: "regression", or "classification" by the sign of what regression would predict.
    Raises ConfigError for fewer than two rules, or another task.
    """

    rules: int = 8
    task: str = "regression"
    seed: int = 0

    def __post_init__(self):
        if self.rules < 2:
            raise ConfigError(f"rules={self.rules}: with fewer than two there is nothing to route.")
        if self.task not in TASKS:
            raise ConfigError(f"task={self.task!r}: it is one of {listed(TASKS)}.")

    @abstractmethod
    def draw(
        self,
        n: int,
        generator: torch.Generator,
        ood: bool = False,
        prior: Sequence[float] | None = None,
        length: int | None = None,
    ) -> Batch:
        """n examples; the rules uniform, or by `prior` (R,); ood: inputs of twice the scale that training has.

        length: of sequences, 10 if None; numbers that stand alone have none."""

    def _coefficients(self, *shapes: tuple[int, ...]) -> list[Tensor]:
        """N(0, 1), in the order in which the official code draws them."""
        random = np.random.RandomState(self.seed)
        return [torch.from_numpy(random.randn(*shape)).float() for shape in shapes]

    def _which(self, shape: tuple[int, ...], generator: torch.Generator, prior: Sequence[float] | None) -> Tensor:
        p = torch.ones(self.rules) if prior is None else torch.as_tensor(prior, dtype=torch.float)
        count = int(np.prod(shape))
        return torch.multinomial(p, count, replacement=True, generator=generator).view(shape)

    def _said(self, value: Tensor) -> Tensor:
        return value if self.task == "regression" else (value >= 0).to(value.dtype)


class MLPRules(Rules):
    """x = (a, b) ~ N(0, 1); y = α_r a + β_r b."""

    def draw(self, n, generator, ood=False, prior=None, length=None) -> Batch:
        alpha, beta = self._coefficients((self.rules,), (self.rules,))
        rule, x = self._which((n,), generator, prior), torch.randn(n, 2, generator=generator) * (2 if ood else 1)
        return Batch(x, rule, self._said(alpha[rule] * x[:, 0] + beta[rule] * x[:, 1]))


class MHARules(Rules):
    """Sequences of tokens with four numbers a rule, x_r = (s, s', v, v').

    Each token looks, by its rule r, for the other token whose s is nearest its own, and for the one whose s' is; y =
    α_r v + β_r v' of what they hold.
    """

    def draw(self, n, generator, ood=False, prior=None, length=None) -> Batch:
        t = length or LENGTH
        alpha, beta = self._coefficients((self.rules,), (self.rules,))
        x = torch.randn(n, t, self.rules, 4, generator=generator) * (2 if ood else 1)
        rule = self._which((n, t), generator, prior)
        found = [self._found(x[..., s], x[..., 2 + s]) for s in (0, 1)]  # (b, t, R) each
        value = alpha * found[0] + beta * found[1]
        return Batch(x.flatten(2), rule, self._said(value.gather(-1, rule.unsqueeze(-1)).squeeze(-1)))

    def _found(self, searched: Tensor, held: Tensor) -> Tensor:
        """What the nearest other token holds, for each rule: (b, t, R)."""
        apart = (searched.unsqueeze(1) - searched.unsqueeze(2)).abs()  # (b, t, t, R)
        itself = torch.eye(searched.shape[1], dtype=torch.bool).unsqueeze(-1)
        return held.gather(1, apart.masked_fill(itself, float("inf")).argmin(2))


class RNNRules(Rules):
    """Sequences of states: s_l = A_r s_{l−1} + B_r x_l, with x_l ~ N(0, 1) and a rule drawn for each step; y = s_l."""

    def draw(self, n, generator, ood=False, prior=None, length=None) -> Batch:
        t = length or LENGTH
        a, b, *sign = self._coefficients((self.rules,), (self.rules,), *([(1,)] if self.task != "regression" else []))
        x, rule = torch.randn(n, t, generator=generator) * (2 if ood else 1), self._which((n, t), generator, prior)
        states, state = [], torch.zeros(n)
        for step in range(t):
            state = a[rule[:, step]] * state + b[rule[:, step]] * x[:, step]
            states.append(state)
        value = torch.stack(states, 1)
        return Batch(x.unsqueeze(-1), rule, self._said(value * sign[0] if sign else value))


FAMILIES: dict[str, type[Rules]] = {"mlp": MLPRules, "mha": MHARules, "rnn": RNNRules}


def one_hot(rule: Tensor, rules: int) -> Tensor:
    """(…, R) of floats."""
    return F.one_hot(rule, rules).to(torch.get_default_dtype())
