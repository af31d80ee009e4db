"""What a table of routing says, as numbers: how evenly modules are used, and whether they are told apart by a label.

Collapse, mutual information, alignment and adaptation: Mittal, Bengio and Lajoie, "Is a Modular Architecture Enough?",
2022 (arXiv 2206.02713; code: sarthmit/Mod_Arch). Selection entropies: Kirsch, Kunze and Barber, "Modular Networks",
2018 (1811.05249). Specialise and reuse: Csordás, van Steenkiste and Schmidhuber, "Are Neural Nets Modular?", 2021
(2010.02066). The effective number exp H: Hill, 1973; Jost, "Entropy and diversity", 2006. Gini, 1912.

A table is (v, n): how much each of v values of a label (a rule, a task, a language) uses each of n modules, in counts
or in weights, none below nought. As in the authors' tables every value counts alike, however many examples it has.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from torch import Tensor

LITTLE = 10  # a module with less than 1 / (LITTLE n) of the use is out of use


def array(given: Any) -> np.ndarray:
    """Numbers on the host, in float64."""
    return np.asarray(given.detach().double().cpu() if isinstance(given, Tensor) else given, dtype=float)


def use(weights: Any) -> np.ndarray:
    """The share of each module (n,) in weights (…, n): their sums over rows, as parts of one."""
    w = array(weights)
    total = w.reshape(-1, w.shape[-1]).sum(0)
    return total / total.sum() if total.sum() > 0 else np.zeros_like(total)


def entropy(shares: Any) -> float:
    """H = −Σ p log p, in nats, of shares (n,)."""
    p = array(shares)
    return float(-(p[p > 0] * np.log(p[p > 0])).sum()) + 0.0  # never minus nought


def effective_modules(shares: Any) -> float:
    """exp H: n if all n modules are used alike, 1 if only one is."""
    return float(np.exp(entropy(shares)))


def conditional(table: Any) -> np.ndarray:
    """P(m | v), (v, n): each row as parts of one; rows that use nothing are left out."""
    w = array(table)
    w = w.reshape(-1, w.shape[-1])
    total = w.sum(1, keepdims=True)
    return (w / np.where(total > 0, total, 1))[total[:, 0] > 0]


def joint(table: Any) -> np.ndarray:
    """P(v, m) = P(m | v) / v: it sums to one, and every value has the same part of it."""
    p = conditional(table)
    return p / max(len(p), 1)


def collapse_average(table: Any) -> float:
    """n / (n − 1) Σ_m max(0, 1/n − p(m)): 0 if modules are used alike, 1 if one alone is."""
    p = joint(table).sum(0)
    n = len(p)
    return float(n / (n - 1) * np.maximum(1 / n - p, 0).sum()) if n > 1 else 0.0


def collapse_worst(table: Any) -> float:
    """1 − n min_m p(m): 0 if modules are used alike, 1 if one at least is never used."""
    p = joint(table).sum(0)
    return float(1 - len(p) * p.min())


def mutual_information(table: Any) -> float:
    """I(v; m) = Σ P log(P / (p(v) p(m))), in nats: 0 if all values route alike, log min(v, n) at most."""
    p = joint(table)
    return max(0.0, entropy(p.sum(0)) + entropy(p.sum(1)) - entropy(p))


def inverse_mutual_information(table: Any) -> float:
    """1 − I(v; m) / log min(v, n): 0 if the module tells the value, 1 if all values route alike; NaN of one value.

    The authors have as many values as modules, and so log R.
    """
    most = min(joint(table).shape)
    return 1 - mutual_information(table) / float(np.log(most)) if most > 1 else float("nan")


def matching(table: Any) -> list[int]:
    """The module that each value is matched with, so that the most use is on the matched ones (Hungarian method).

    With at most as many values as modules no two share one; with more, each module takes up to ⌈v/n⌉ values.
    """
    p = array(table)
    p = p / np.where(p.sum(1, keepdims=True) > 0, p.sum(1, keepdims=True), 1)
    v, n = p.shape
    from scipy.optimize import linear_sum_assignment  # noqa: PLC0415 (slow to import)

    rows, columns = linear_sum_assignment(-np.tile(p, (1, -(-v // n))))
    return [int(columns[np.argmax(rows == i)] % n) for i in range(v)]


def alignment(table: Any) -> float:
    """min over matchings of Σ |matching − P(m | v)| / (2v): 0 if each value has a module of its own, and uses it alone.

    The authors' Hungarian score for as many values as modules; for more values see `matching`.
    """
    p = conditional(table)
    return float(1 - p[np.arange(len(p)), matching(p)].mean()) if len(p) else float("nan")


def adaptation(table: Any, draws: int = 100, seed: int = 0) -> float:
    """E over p ~ Dirichlet(1) of ½ Σ |sort(p) − sort(u)|, u = Σ_v p_v P(m | v): whether use follows the values' share.

    0 if each value has a module of its own. The authors call it specialisation, and route new examples drawn by p,
    where this takes their expectation. With other numbers of values and modules the shorter list is padded with nought.
    """
    p = conditional(table)
    v, n = p.shape
    if not v:
        return float("nan")
    drawn = np.random.default_rng(seed).dirichlet(np.ones(v), draws)
    used = np.sort(drawn @ p, 1)[:, ::-1]
    drawn = np.sort(drawn, 1)[:, ::-1]
    wide = max(v, n)
    drawn, used = (np.pad(x, ((0, 0), (0, wide - x.shape[1]))) for x in (drawn, used))
    return float(np.abs(drawn - used).sum(1).mean() / 2)


def selection_entropies(weights: Any) -> tuple[float, float]:
    """(H_a, H_b): the mean entropy of each row of weights (…, n), and the entropy of their mean, in nats.

    H_a low and H_b high is what is wanted: each example is sure of its modules, and all modules are used.
    """
    p = conditional(weights)
    return float(np.mean([entropy(row) for row in p])) if len(p) else 0.0, entropy(p.mean(0)) if len(p) else 0.0


def gini(shares: Any) -> float:
    """Σ_ij |p_i − p_j| / (2n): the load's Gini, 0 if modules are used alike, (n − 1) / n if one alone is."""
    p = use(shares)
    return float(np.abs(p[:, None] - p).sum() / (2 * len(p)))


def utilisation(shares: Any) -> float:
    """The part of the modules that have at least a tenth of an equal share."""
    p = use(shares)
    return float((p >= 1 / (LITTLE * len(p))).mean())


def overlap(first: Any, second: Any) -> tuple[float, float]:
    """(IoU, IoMin): what two functions share of the units they use, over all that either uses, and over the smaller.

    first, second: (…), masks or weights: Σ min / Σ max and Σ min / min(Σ first, Σ second).
    """
    a, b = (np.abs(array(x)).ravel() for x in (first, second))
    both, either, smaller = np.minimum(a, b).sum(), np.maximum(a, b).sum(), min(a.sum(), b.sum())
    return float(both / either) if either else 0.0, float(both / smaller) if smaller else 0.0


def specialise_reuse(table: Any, functions: Sequence[Any] | None = None) -> tuple[float, float]:
    """(P_specialise, P_reuse): 1 − the mean IoMin of pairs of other functions, and the mean IoMin of pairs of the same.

    table: (v, …), the modules, or the masked weights, that each of v rows uses. functions: what each row computes; by
    default each computes something of its own, and then reuse is NaN, as there is no pair of the same.
    The authors show both as overlaps, by layer, and give the two properties no formula; this is the mean of them.
    """
    rows = array(table)
    functions = list(range(len(rows)) if functions is None else functions)
    pairs = [(functions[i] == functions[j], overlap(rows[i], rows[j])[1]) for i, j in combinations(range(len(rows)), 2)]
    same, other = ([x for alike, x in pairs if alike is wanted] for wanted in (True, False))
    return (1 - float(np.mean(other)) if other else float("nan")), float(np.mean(same)) if same else float("nan")


def transfer(together: Any, alone: Any) -> np.ndarray:
    """T[i, j] = score of task j, trained together with i (or in setting i), − its score alone, (s, t).

    together: (s, t), higher is better. alone: (t,). Above nought i helps j; below, it interferes with it.
    """
    return array(together) - array(alone)


def interference(stages: Any) -> np.ndarray:
    """I[i, j] = R[i, j] − R[i − 1, j], (t, t): what learning task i did to task j, learned before; NaN where j ≥ i.

    stages: R (t, t), the score of task j after tasks 0 … i were learned one by one, higher being better. The sum
    of all of it over t − 1 is backward transfer (Lopez-Paz and Ranzato, 2017, arXiv 1706.08840).
    """
    r = array(stages)
    out = np.full(r.shape, np.nan)
    out[1:] = np.where(np.tril(np.ones_like(r), -1)[1:] > 0, r[1:] - r[:-1], np.nan)
    return out
