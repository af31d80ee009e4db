"""Retrieval-augmented generation: each of the documents found is tried by itself, to be marginalised.

Lewis, Perez, Piktus, Petroni, Karpukhin, Goyal, Küttler, Lewis, Yih, Rocktäschel, Riedel and Kiela,
"Retrieval-Augmented Generation for Knowledge-Intensive NLP Tasks", 2020 (arXiv 2005.11401).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LabelError
from ..routing import BM25
from ..types import System, systems


@systems(
    System(
        (31,),
        "methods.rag(model, mb.BM25(documents, k=5), queries, **batch)",
        ("tests/test_retrieval.py::test_rag_is_a_loop_over_documents", "tests/test_retrieval.py::test_marginals"),
        "RAG",
        "log Σ_z p(z | x) p(y | x, z), z the k documents found, [z, x] the input",
        section="3.2",
    )
)
def rag(
    model: nn.Module, retriever: BM25, queries: Sequence[str], label: str = "document", **batch: Any
) -> tuple[Tensor, Tensor]:
    """(logits (b, k, t, v) of f([z, x]) for each document z found for a row, log p(z | x) (b, k)), to be marginalised.

        modules = {name: mb.Prompt.of(text, tokenizer, learn=False) for name, text in documents.items()}
        mb.attach(model, modules=modules, name="document")
        logits, log_prob = methods.rag(model, mb.BM25(documents, k=5), queries, **batch)
        losses.marginal_tokens(logits, log_prob)                  # RAG-token: log p(y_t | x, y_<t), (b, t, v)
        losses.marginal_sequence(logits, log_prob, targets)       # RAG-sequence: log p(y | x), (b,)

    queries: a text a row. label: the keyword by which the documents' bay is routed. batch: the call's tensors, a row
    first; each row runs k times in one batch. p(z | x) is the softmax of the k scores; a row with fewer than k
    documents has zeros for the rest, and one without any is the base alone. Differs: the paper's retriever is a trained
    encoder of queries (DPR). Raises LabelError if there is not one query a row.
    """
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor) and value.ndim}
    short = [key for key, value in tensors.items() if len(value) != len(queries)]
    if short:
        raise LabelError(f"rag: {len(queries)} queries, but {short[0]!r} has {len(tensors[short[0]])} rows.")
    k, names, scores = retriever.k, [], []
    for query in queries:
        found = retriever.retrieve(query) or [(None, 0.0)]
        names += [*(name for name, _ in found), *[None] * (k - len(found))]
        scores.append([*(score for _, score in found), *[float("-inf")] * (k - len(found))])
    rows = {key: value.repeat_interleave(k, 0) if key in tensors else value for key, value in batch.items()}
    logits: Tensor = model(**rows, **{label: names}).logits
    log_prob = torch.tensor(scores, device=logits.device).log_softmax(-1)
    return logits.unflatten(0, (len(queries), k)), log_prob
