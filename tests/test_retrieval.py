"""Retrieval as composition of input: documents as modules, BM25 as router, concatenated or marginalised."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import modbay as mb
from modbay import losses, methods
from modbay.errors import CompositionError, LabelError
from tiny import llama, tokenizer, tokens

transformers = pytest.importorskip("transformers")

TOKENIZER = tokenizer()
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
DOCUMENTS = {"praise": "a good , good review", "blame": "not good at all", "short": "great ?"}
QUERIES = ["is this review Good?", "is this bad", "great, at all", "good"]


def by_hand(query, k1=1.2, b=0.75):
    """The formula, written out over words."""
    split = lambda text: [w for w in text.lower().replace("?", " ").replace(",", " ").split() if w]
    texts = {name: split(text) for name, text in DOCUMENTS.items()}
    mean = sum(map(len, texts.values())) / len(texts)
    scores = {}
    for name, words in texts.items():
        scores[name] = 0.0
        for word in split(query):
            n, tf = sum(word in other for other in texts.values()), words.count(word)
            idf = math.log(1 + (len(texts) - n + 0.5) / (n + 0.5))
            scores[name] += idf * tf * (k1 + 1) / (tf + k1 * (1 - b + b * len(words) / mean))
    return sorted(((name, score) for name, score in scores.items() if score), key=lambda pair: -pair[1])


@pytest.mark.parametrize("query", QUERIES)
def test_bm25_by_hand(query):
    found, want = mb.BM25(DOCUMENTS, k=3).retrieve(query), by_hand(query)
    assert [name for name, _ in found] == [name for name, _ in want]
    assert [score for _, score in found] == pytest.approx([score for _, score in want])
    best, want = mb.BM25(DOCUMENTS, k1=0.9, b=0.4).retrieve(query), by_hand(query, 0.9, 0.4)[:1]
    assert dict(best) == pytest.approx(dict(want))


def modules():
    return {name: mb.Prompt.of(text, TOKENIZER, learn=False) for name, text in DOCUMENTS.items()}


def test_documents_in_front_of_the_input(tmp_path):
    """[d₁, d₂, x] by row, as if the words stood in the call's own ids; in generation, and kept as files."""
    model, ids = llama().eval(), tokens(4)
    router = mb.BM25(DOCUMENTS, k=2)
    bay = mb.attach(model, modules=modules(), router=router, aggregator=mb.Concatenate())
    queries = [*QUERIES[:3], None]
    out = model(ids, query=queries).logits
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    new = model.generate(ids, query=queries, **how)[:, -4:]
    bay.save(tmp_path)
    bay.detach()
    for i, query in enumerate(queries):
        names = [] if query is None else [name for name, _ in by_hand(query)[:2]]
        front = [j for name in names for j in modules()[name].start]
        row = torch.cat([torch.tensor([front], dtype=torch.long), ids[i : i + 1]], 1)
        assert_close(model(row).logits[0, len(front) :], out[i], **CLOSE)
        assert model.generate(row, **how)[0, -4:].tolist() == new[i].tolist()
    mb.load(model, tmp_path)
    assert_close(model(ids, query=queries).logits, out)


def test_documents_come_and_go():
    model, ids = llama().eval(), tokens(1)
    router = mb.BM25(DOCUMENTS)
    bay = mb.attach(model, modules=modules(), router=router, aggregator=mb.Concatenate())
    assert router.retrieve("good")[0][0] == "praise"
    bay.rename("praise", "thanks")
    assert router.retrieve("good")[0][0] == "thanks"
    bay.remove("thanks")
    assert router.retrieve("good")[0][0] == "blame"
    bay.add("more", mb.Prompt.of("great good", TOKENIZER, learn=False))
    router.put("more", "great good")
    assert [name for name, _ in router.retrieve("good")] == ["more"]
    found = model(ids, query=["good"]).logits
    bay.detach()
    assert_close(found, model(torch.cat([torch.tensor([[11, 8]]), ids], 1)).logits[:, 2:], **CLOSE)


def test_rag_is_a_loop_over_documents():
    """Each row with each of its documents, weighed by their scores; a row that finds none is the base alone."""
    model, ids = llama().eval(), tokens(3)
    base = model(ids).logits
    bay = mb.attach(model, modules=modules(), name="document")
    queries = ["good review", "great, at all", "nothing"]
    logits, log_prob = methods.rag(model, mb.BM25(DOCUMENTS, k=2), queries, input_ids=ids)
    assert logits.shape == (3, 2, 6, 50)
    token = losses.marginal_tokens(logits, log_prob)
    targets = torch.cat([ids[:, 1:], torch.full((3, 1), -100)], 1)
    sequence = losses.marginal_sequence(logits, log_prob, targets)
    for i, query in enumerate(queries):
        found = by_hand(query)[:2] or [(None, 0.0)]
        p = torch.tensor([score for _, score in found]).softmax(0)
        each = torch.stack([model(ids[i : i + 1], document=[name]).logits[0].softmax(-1) for name, _ in found])
        assert_close(token[i].exp(), (p[:, None, None] * each).sum(0), **CLOSE)
        words = each[:, torch.arange(5), ids[i, 1:]]
        assert_close(sequence[i], (p * words.prod(-1)).sum().log(), atol=1e-4, rtol=1e-4)
    assert_close(token[2], base[2].log_softmax(-1), **CLOSE)
    bay.detach()


def test_marginals():
    """transformers' own, of its RAG models, on the same logits and scores."""
    logits, scores, targets = torch.randn(2, 3, 5, 7), torch.randn(2, 3), torch.randint(1, 7, (2, 6))
    targets[1, 4:] = 0  # padding
    own = SimpleNamespace(
        config=SimpleNamespace(
            n_docs=3, generator=SimpleNamespace(pad_token_id=0, bos_token_id=None), bos_token_id=None
        )
    )
    log_prob, flat = scores.log_softmax(-1), logits.flatten(0, 1)
    theirs = transformers.RagTokenForGeneration.marginalize(own, flat, scores)
    assert_close(losses.marginal_tokens(logits, log_prob), theirs)
    # there logits at t predict the target at t + 1, and the last one padding
    shifted = targets[:, 1:].masked_fill(targets[:, 1:] == 0, -100)
    theirs = transformers.RagSequenceForGeneration.get_nll(own, flat, scores, targets[:, :-1])
    ours = losses.marginal_sequence(logits, log_prob, torch.cat([shifted[:, :4], torch.full((2, 1), -100)], 1))
    assert_close(-ours, theirs)


def test_what_is_refused():
    with pytest.raises(CompositionError, match="k=0"):
        mb.BM25(DOCUMENTS, k=0)
    model = llama()
    with pytest.raises(LabelError, match="lacks the modules 'short'"):
        mb.attach(model, modules={n: mb.Prompt(2) for n in ("praise", "blame")}, router=mb.BM25(DOCUMENTS))
    router = mb.BM25(DOCUMENTS)
    mb.attach(model, modules=modules(), router=router)
    with pytest.raises(LabelError, match="a query is a text"):
        model(tokens(), query=torch.tensor([0, 1, 2]))
    with pytest.raises(LabelError, match="no such module"):
        router.put("nobody", "good")
    with pytest.raises(LabelError, match="2 queries, but 'input_ids' has 3 rows"):
        methods.rag(model, router, ["a", "b"], input_ids=tokens())
