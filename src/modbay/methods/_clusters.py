"""Fixed routes that are found before training: by clusters of tasks, domains or tokens, by frequency, or at random.

Clusters: Gururangan, Li, Lewis, Shi, Althoff, Smith and Zettlemoyer, "Scaling Expert Language Models with Unsupervised
Domain Discovery" (c-BTM), 2023 (arXiv 2303.14177). Hashes: Roller, Sukhbaatar, Szlam and Weston, 2021 (arXiv
2106.04426).
"""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import CompositionError
from ..types import System, systems

NEAR = "tests/test_tasks.py::test_like_tasks_share_a_module"


@systems(
    System(
        (73,),
        'router=mb.ByLabel("task", methods.clusters(embeddings, 8))',
        (NEAR, "tests/test_tasks.py::test_clusters_may_be_of_one_size"),
        "allocation by clusters",
        "A_t = e_{kmeans(z_t)}",
        section="4.1",
    )
)
def clusters(
    embeddings: Mapping[str, Tensor | Sequence[float]], n: int, balanced: bool = False, seed: int = 0
) -> dict[str, list[str]]:
    """A_t = e_k, k the k-means cluster of the task's embedding z_t: a table for `mb.ByLabel`, of modules cluster0 ….

        table = methods.clusters({"ner": z_ner, "pos": z_pos, "nli": z_nli}, 2)
        mb.attach(model, modules=dict.fromkeys(["cluster0", "cluster1"], kind), router=mb.ByLabel("task", table))

    embeddings: a vector a label: a mean of its texts' features, a gradient, a module's parameters. balanced: clusters
    of one size, to one, as c-BTM's: the centres are k-means' own, and vectors go to them so that the squared distances
    sum to the least. Wants scikit-learn, and scipy if balanced. Raises CompositionError for n above the number of
    labels.
    """
    labels = list(embeddings)
    if not 1 <= n <= len(labels):
        raise CompositionError(f"clusters(n={n}) of {len(labels)} labels: from one to a cluster for each.")
    vectors = torch.stack([torch.as_tensor(embeddings[label]).detach().float().cpu() for label in labels])
    found = _kmeans(vectors, n, balanced, seed)
    return {label: [f"cluster{k}"] for label, k in zip(labels, found, strict=True)}


def allocation(labels: Iterable[str], names: Iterable[str], k: int = 1, seed: int = 0) -> dict[str, list[str]]:
    """A_t: k of the modules for each label, at random and for good: a table for `mb.ByLabel`."""
    draw, several = torch.Generator().manual_seed(seed), list(names)
    return {label: [several[i] for i in torch.randperm(len(several), generator=draw)[:k].tolist()] for label in labels}


def balanced_hash(counts: Tensor | Sequence[int], n: int) -> Tensor:
    """The module of each token (vocabulary,), for `mb.Hash`: by falling frequency, each to the one with the least load.

    counts: (vocabulary,), how often each token occurs.
    """
    counts = torch.as_tensor(counts).cpu()
    table = torch.empty(len(counts), dtype=torch.long)
    loads = [(0.0, i) for i in range(n)]
    for token in torch.argsort(counts, descending=True, stable=True).tolist():
        load, i = heapq.heappop(loads)
        table[token] = i
        heapq.heappush(loads, (load + float(counts[token]), i))
    return table


def clustered_hash(embeddings: Tensor, n: int, dispersed: bool = False, seed: int = 0) -> Tensor:
    """The module of each token (vocabulary,), for `mb.Hash`: its k-means cluster.

    embeddings: (vocabulary, d), of a trained model. dispersed: like tokens go to different modules instead: there are
    as many clusters as make n tokens each, and the tokens of a cluster, nearest to its centre first, go to the modules
    in turn. Wants scikit-learn.
    """
    vectors = embeddings.detach().float().cpu()
    if not dispersed:
        return torch.tensor(_kmeans(vectors, n, False, seed))
    found = torch.tensor(_kmeans(vectors, max(1, len(vectors) // n), False, seed))
    table, turn = torch.empty(len(vectors), dtype=torch.long), 0
    for cluster in found.unique().tolist():
        inside = (found == cluster).nonzero()[:, 0]
        distance = (vectors[inside] - vectors[inside].mean(0)).square().sum(-1)
        inside = inside[distance.argsort(stable=True)]
        table[inside] = (turn + torch.arange(len(inside))) % n
        turn += len(inside)  # the next cluster goes on, so that loads stay even
    return table


def _kmeans(vectors: Tensor, n: int, balanced: bool, seed: int) -> list[int]:
    from sklearn.cluster import KMeans  # noqa: PLC0415

    kmeans: Any = KMeans
    fitted = kmeans(n, n_init=10, random_state=seed).fit(vectors.numpy())
    if not balanced:
        return fitted.labels_.tolist()
    from scipy.optimize import linear_sum_assignment  # noqa: PLC0415

    room = -(-len(vectors) // n)
    cost = torch.cdist(vectors, torch.as_tensor(fitted.cluster_centers_).to(vectors)).square()
    row, column = linear_sum_assignment(cost.repeat_interleave(room, 1).numpy())
    assert (row == range(len(vectors))).all()
    return (column // room).tolist()
