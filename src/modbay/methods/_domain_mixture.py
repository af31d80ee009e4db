"""Mixtures of domain experts: which domain a text is of is inferred as it is read.

Gururangan, Lewis, Holtzman, Smith and Zettlemoyer, "DEMix Layers: Disentangling Domains for Modular Language Modeling",
2021 (arXiv 2108.05036); Li, Gururangan, Dettmers, Lewis, Althoff, Smith and Zettlemoyer, "Branch-Train-Merge:
Embarrassingly Parallel Training of Expert Language Models", 2022 (arXiv 2208.03306).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..attach import Bay
from ..errors import BayError, CompositionError, LabelError
from ..losses import marginal_tokens, posterior


class DomainMixture:
    """log p(x_t | x_<t) = log Σ_D p(D | x_<t) p(x_t | x_<t, D), with p(D | x_<t) ∝ p(D) p(x_<t | D).

        bay = mb.attach(model, at=mb.role.ffn, modules={"news": mb.Full(), "law": mb.Full()}, name="domain")   # DEMix
        mixture = methods.DomainMixture(bay)
        mixture.update(**batch)                        # on development data: the cached prior
        log_p, log_posterior = mixture(**batch)        # (b, t, v) and (b, n, t + 1)

    bay: routed by one label; whole models as modules are Branch-Train-Merge's. names: the domains, its modules if None.
    prior: p(D) (n,), uniform if None. last: how many of the tokens before t tell of D: all if None, as in the papers;
    1 in DEMix's code. k: only the k domains that are likeliest before t count, renormalised; None: all.
    The model runs once a domain. Raises CompositionError for bad arguments, LabelError for a bay without one label.
    """

    def __init__(
        self,
        bay: Bay,
        names: Sequence[str] | None = None,
        prior: Sequence[float] | Tensor | None = None,
        last: int | None = None,
        k: int | None = None,
        decay: float = 0.3,
    ):
        self.bay, self.last, self.k, self.decay = bay, last, k, decay
        self.names = list(bay.names() if names is None else names)
        n = len(self.names)
        given = torch.ones(n) if prior is None else torch.as_tensor(prior, dtype=torch.float32).detach()
        if len(bay.state.keywords) != 1:
            raise LabelError(
                f"DomainMixture: bay {bay.state.name!r} reads the labels {list(bay.state.keywords)}, and must read one "
                f"that says the domain: router=mb.ByLabel('domain')."
            )
        if not n or given.shape != (n,) or bool((given < 0).any()) or not float(given.sum()) > 0:
            raise CompositionError(f"DomainMixture(prior={prior!r}): a probability for each of {self.names}.")
        if (last is not None and last < 1) or (k is not None and not 1 <= k <= n) or not 0 < decay <= 1:
            raise CompositionError(
                f"DomainMixture(last={last}, k={k}, decay={decay}): positive numbers, k no more than the {n} domains, "
                f"decay no more than 1."
            )
        self.prior = given / given.sum()

    def __call__(self, targets: Tensor | None = None, **batch: Any) -> tuple[Tensor, Tensor]:
        """(log p(x_t | x_<t) (b, t, v) of each word, log p(D | x_<s) (b, n, t + 1), s = 0 … t).

        batch: the call's arguments. targets: (b, t), what logits at t predict, −100 for what does not count; if None,
        the input_ids that follow, without padding.
        """
        targets = _following(batch) if targets is None else targets
        (label,) = self.bay.state.keywords
        logits = torch.stack([self.bay.model(**batch, **{label: name}).logits for name in self.names], 1)
        after = posterior(logits, targets.to(logits.device), self.prior.log().to(logits.device), self.last)
        now = after[..., :-1]  # before each target
        if self.k is not None and self.k < len(self.names):
            best = now.topk(self.k, 1)
            now = torch.full_like(now, float("-inf")).scatter(1, best.indices, best.values.log_softmax(1))
        return marginal_tokens(logits.to(now.dtype), now), after

    @torch.no_grad()
    def update(self, targets: Tensor | None = None, **batch: Any) -> Tensor:
        """p(D) ← (1 − decay) p(D) + decay p(D | x), by every sequence x of the batch in turn; returns it (n,).

        p(D | x) is what the whole of x tells. The papers run it over 100 development sequences, with 0.3, and keep what
        comes out (a cached prior); or go on with it in test (an updating prior). Differs: the average starts from the
        prior, theirs from the first sequence, after which a domain at nought could never come back.
        """
        whole = [len(v) for v in batch.values() if isinstance(v, Tensor) and v.ndim]
        for row in range(max(whole, default=0)):
            one = {key: v[row : row + 1] if isinstance(v, Tensor) and v.ndim else v for key, v in batch.items()}
            told = self(None if targets is None else targets[row : row + 1], **one)[1][0, :, -1].exp()
            self.prior = (1 - self.decay) * self.prior + self.decay * told.to(self.prior)
        return self.prior


def _following(batch: dict[str, Any]) -> Tensor:
    """The token after each, −100 for the last, and where either is padding."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not isinstance(ids, Tensor):
        raise BayError("DomainMixture without targets: the words are read from input_ids=…, which is missing.")
    targets = torch.cat([ids[:, 1:], ids.new_full((len(ids), 1), -100)], 1)
    if isinstance(mask, Tensor):
        here = mask.bool()
        targets = targets.masked_fill(~(here & torch.cat([here[:, 1:], here[:, :1]], 1)), -100)
    return targets
