"""Adapter soups: what a domain that no module was trained on gets is the mean of the modules of domains like it.

Chronopoulou, Peters, Fraser and Dodge, "AdapterSoup: Weight Averaging to Improve Generalization of Pretrained Language
Models", 2023 (arXiv 2302.07027); clusters as in Aharoni and Goldberg, "Unsupervised Domain Clusters in Pretrained
Language Models", 2020 (arXiv 2004.02105).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CompositionError, listed
from ..types import System, systems

Vectors = Tensor | Sequence[Sequence[float]]
"""(m, d): a vector a text."""

TESTS = "tests/test_soups.py::"


@systems(
    System(
        (131,),
        "bay.use(methods.adapter_soup(domains, new))",
        (
            TESTS + "test_a_soup_is_of_the_nearest_domains",
            TESTS + "test_a_soup_averages_parameters",
            TESTS + "test_what_soup_can_t_be_made_raises",
        ),
        "AdapterSoup, by similarity",
        "φ = 1/l Σ_{i ∈ top-k} φ_i by s_i = mean_{z ∈ D_i, z' ∈ D} cos(z, z')",
        section="5.1",
    ),
    System(
        (131,),
        'bay.use(methods.adapter_soup(domains, new, by="clusters"))',
        (
            TESTS + "test_clusters_tell_whose_a_text_is",
            TESTS + "test_a_soup_by_clusters_is_of_the_domains_of_its_texts",
            TESTS + "test_a_soup_averages_parameters",
        ),
        "AdapterSoup, by clusters",
        "φ = 1/l Σ_{i ∈ top-k} φ_i by the share of D in clusters that are D_i's",
        section="5.1",
    ),
)
def adapter_soup(
    domains: Mapping[str, Vectors],
    new: Vectors,
    k: int = 5,
    by: str | Callable[[Mapping[str, Vectors], Vectors], Mapping[str, float]] = "similarity",
    least: float = 0.0,
) -> dict[str, float]:
    """φ = 1/l Σ_i φ_i over the l ≤ k domains that are most like the new one: weights for `bay.use`, by name.

        bay = mb.attach(model, modules={"news": kind, "law": kind, …}, aggregator=mb.ParameterAverage(), name="domain")
        bay.use(methods.adapter_soup({"news": z_news, "law": z_law, …}, z_new))

    domains: of each, by the name of its module, the sentence embeddings (m, d) of a hundred or so of its texts; new:
    those of the new domain, (m, d). Nothing is trained. by: "similarity", s = `similarities`; "clusters", s =
    `cluster_shares` with its defaults; or a function like these, as `functools.partial(cluster_shares, n=25)`. k,
    least: the k domains with the largest s > least; if there is none, the weights are {}, which is the base alone.
    Under ParameterAverage the modules' parameters are averaged (bottleneck adapters in the paper; of LoRA, A and B
    each), which wants modules of one start; a sum of outputs would be another method.
    Raises CompositionError for k < 1, another `by`, and for vectors that do not fit.
    """
    ways = {"similarity": similarities, "clusters": cluster_shares}
    if k < 1 or not (callable(by) or by in ways):
        raise CompositionError(f"adapter_soup(k={k}, by={by!r}): one module or more, by {listed(ways)} or a function.")
    said = (by if callable(by) else ways[by])(domains, new)
    best = sorted((name for name in said if said[name] > least), key=lambda name: -said[name])[:k]
    return {name: 1 / len(best) for name in best}


def similarities(domains: Mapping[str, Vectors], new: Vectors) -> dict[str, float]:
    """s_i = mean over z ∈ D_i and z' ∈ D of cos(z, z'): how like each domain's texts are to the new one's.

    domains, new: as for `adapter_soup`. The mean over pairs is the product of the means of ẑ = z / ‖z‖.
    """
    several, own = _vectors(domains, new)
    mean = lambda z: F.normalize(z, dim=-1).mean(0)
    return {name: float(mean(z) @ mean(own)) for name, z in several.items()}


def cluster_shares(
    domains: Mapping[str, Vectors],
    new: Vectors,
    n: int | None = None,
    dims: int = 50,
    covariance: str = "full",
    seed: int = 0,
) -> dict[str, float]:
    """s_i = the share of the new domain's texts whose cluster is D_i's: a Gaussian mixture over all domains' vectors.

    domains, new: as for `adapter_soup`; Aharoni and Goldberg's vectors are hidden states of a language model, averaged
    over a text. n: clusters, one a domain if None; each is the domain's most of whose texts it holds, and so a domain
    may have several, or none. dims: principal components of the domains' vectors in which they are fitted, at most as
    many as there are; the new texts take no part in either. covariance, seed: of scikit-learn's GaussianMixture;
    "diag" or "tied" where the texts are few. Wants scikit-learn.
    """
    from sklearn.decomposition import PCA  # noqa: PLC0415
    from sklearn.mixture import GaussianMixture  # noqa: PLC0415

    several, own = _vectors(domains, new)
    every = torch.cat(list(several.values())).numpy()
    n = len(several) if n is None else n
    if not 1 <= n <= len(every) or dims < 1:
        raise CompositionError(
            f"cluster_shares(n={n}, dims={dims}) of {len(every)} texts: from one cluster to one a text, in one "
            f"dimension or more."
        )
    pca: Any = PCA(min(dims, *every.shape), random_state=seed)
    mixture: Any = GaussianMixture(n, covariance_type=covariance, random_state=seed)  # type: ignore[arg-type]
    found = torch.from_numpy(mixture.fit_predict(pca.fit_transform(every)))
    counts = torch.stack([part.bincount(minlength=n) for part in found.split([len(z) for z in several.values()])])
    owner = counts.argmax(0)  # (n,): of equals the domain named first
    told = owner[torch.from_numpy(mixture.predict(pca.transform(own.numpy())))]
    share = told.bincount(minlength=len(several)) / len(own)
    return dict(zip(several, share.tolist(), strict=True))


def _vectors(domains: Mapping[str, Vectors], new: Vectors) -> tuple[dict[str, Tensor], Tensor]:
    """The vectors in float32 on the host; raises CompositionError for what are no (m, d) of one d."""
    made = lambda z: torch.as_tensor(z).detach().float().cpu()
    several, own = {name: made(z) for name, z in domains.items()}, made(new)
    shapes = {name: tuple(z.shape) for name, z in several.items()}
    odd = [name for name, shape in shapes.items() if len(shape) != 2 or not shape[0] or shape[1:] != own.shape[1:]]
    if not several or odd or own.ndim != 2 or not len(own):
        raise CompositionError(
            f"vectors of domains {shapes} and of the new one {tuple(own.shape)}: of each (m, d), a vector a text, with "
            f"one d for all; one domain and one text at least."
        )
    wrong = [name for name, z in {**several, "new": own}.items() if not bool(z.isfinite().all())]
    if wrong:
        raise CompositionError(f"the vectors of {listed(wrong)} are not finite.")
    return several, own
