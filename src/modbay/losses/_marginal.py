"""Likelihoods summed over what is not known: the document that tells, or the domain that a text is of.

Lewis et al., "Retrieval-Augmented Generation for Knowledge-Intensive NLP Tasks", 2020 (arXiv 2005.11401); Gururangan,
Lewis, Holtzman, Smith and Zettlemoyer, "DEMix Layers: Disentangling Domains for Modular Language Modeling", 2021 (arXiv
2108.05036).
"""

import torch
from torch import Tensor

from ..types import System, systems

TESTS = "tests/test_outputs.py::"


def marginal_tokens(logits: Tensor, log_prob: Tensor) -> Tensor:
    """log p(y_t | x, y_<t) = log Σ_z p(z | x) p(y_t | x, z, y_<t), (b, t, v): a document may explain each token.

    logits: (b, k, t, v), one for each of k documents. log_prob: of each document, (b, k), or (b, k, t) at each token.
    """
    each = log_prob.unsqueeze(-1) if log_prob.ndim == 2 else log_prob
    return torch.logsumexp(each.unsqueeze(-1) + logits.log_softmax(-1), 1)


def marginal_sequence(logits: Tensor, log_prob: Tensor, targets: Tensor) -> Tensor:
    """log p(y | x) = log Σ_z p(z | x) Π_t p(y_t | x, z, y_<t), (b,): one document explains all.

    targets: (b, t), what logits (b, k, t, v) at t predict; −100 does not count. log_prob: (b, k), of each document.
    """
    seen = targets != -100
    index = targets.masked_fill(~seen, 0)[:, None, :, None].expand(-1, logits.shape[1], -1, -1)
    each = logits.log_softmax(-1).gather(-1, index).squeeze(-1) * seen.unsqueeze(1)
    return torch.logsumexp(log_prob + each.sum(-1), 1)


@systems(
    System(
        (134,),
        "methods.DomainMixture(bay)",
        (
            TESTS + "test_the_posterior_is_bayes_rule",
            TESTS + "test_domains_are_mixed_by_their_posterior",
            TESTS + "test_the_prior_is_a_moving_average_of_posteriors",
        ),
        "mixture of domain experts (DEMix, BTM)",
        "Σ_D p(D | x_<t) p(x_t | x_<t, D), p(D | x_<t) ∝ p(D) p(x_<t | D)",
        "Gururangan et al., DEMix, 2021 (arXiv 2108.05036); Li et al., Branch-Train-Merge, 2022 (arXiv 2208.03306)",
        section="5.2",
    )
)
def posterior(logits: Tensor, targets: Tensor, log_prior: Tensor, last: int | None = None) -> Tensor:
    """log p(z | x_<s) ∝ log p(z) + Σ_{t<s} log p(x_t | x_<t, z), (b, k, t + 1): after s = 0, 1, … of the targets.

    logits: (b, k, t, v), one for each of k domains. targets: (b, t), what logits at t predict; −100 does not count.
    log_prior: log p(z), (k,) or (b, k). last: how many of the targets before s tell of z; None: all.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    seen = targets != -100
    index = targets.masked_fill(~seen, 0)[:, None, :, None].expand(-1, logits.shape[1], -1, -1)
    each = (wide.gather(-1, index).squeeze(-1) - wide.logsumexp(-1)) * seen.unsqueeze(1)
    evidence = torch.nn.functional.pad(each.cumsum(-1), (1, 0))  # (b, k, t + 1)
    if last is not None:
        count = torch.nn.functional.pad(seen.long().cumsum(-1), (1, 0))
        start = torch.searchsorted(count, count - last, right=True).sub(1).clamp(min=0)  # where so many are left
        evidence = evidence - evidence.gather(-1, start.unsqueeze(1).expand_as(evidence))
    return (log_prior.to(evidence).unsqueeze(-1) + evidence).log_softmax(1)
