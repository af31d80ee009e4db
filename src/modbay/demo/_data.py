"""The demo's data: one voice assistant, twelve languages of unequal size, and two that arrive later.

An intent's *templates* are divided into training, development and test before anything is drawn for use, since two
strings of one template are near copies: a split by string would test memory. Settings are chosen on development; test
is for the figures that are reported, once.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from math import sqrt
from random import Random

from ._grammar import draw, templates

SIZES = {
    "en": 800, "de": 500, "fr": 400, "es": 300, "ru": 300, "it": 200,
    "nl": 200, "pl": 150, "fi": 100, "el": 100, "bg": 60, "eu": 60,
}  # fmt: skip
"""Training utterances of the twelve: unequal on purpose, as sharing can matter only to a language that lacks data."""

ARRIVALS = ("pt", "hu")
"""Languages that come later: Portuguese has kin among the twelve, Hungarian has none close by."""

DRAWS = 6  # strings a template: with more, long templates would only repeat themselves
PARTS = {"test": 0.25, "dev": 0.15}  # share of an intent's templates; what is left trains


@dataclass(frozen=True)
class Utterance:
    """One request to the assistant; `template` is kept so that leaks can be looked for."""

    text: str
    intent: str
    language: str
    template: str


@dataclass(frozen=True)
class Split:
    """One language's utterances. No template and no string of one part occurs in another."""

    train: tuple[Utterance, ...]
    dev: tuple[Utterance, ...]
    test: tuple[Utterance, ...]


@dataclass(frozen=True)
class Data:
    """Everything the demo reads. `arrivals[...].train` is the whole pool, from which `few_shot` takes its k."""

    intents: tuple[str, ...]
    languages: dict[str, Split]
    arrivals: dict[str, Split]

    def joint(self, part: str) -> list[Utterance]:
        """One part ("train", "dev" or "test") of all the languages that learn together."""
        return list(chain.from_iterable(getattr(split, part) for split in self.languages.values()))


def load(
    seed: int = 0,
    *,
    sizes: Mapping[str, int] = SIZES,
    arrivals: Sequence[str] = ARRIVALS,
    heard_in: float = 2 / 3,
    held_out: int = 150,
) -> Data:
    """Sample, split and cut to size; the same seed gives the same data on any machine.

    **Arguments:** `sizes`: training utterances a language; `arrivals`: languages that come later; `heard_in`: keep the
    intents that at least this share of `sizes`' languages can test (8 of 12), as an intent that two languages have
    says little about sharing; `held_out`: most utterances of a language in development and in test, each.
    """
    pools = {language: _pool(language, seed) for language in (*sizes, *arrivals)}
    heard: dict[str, int] = defaultdict(int)
    for language in sizes:
        for intent in {u.intent for u in pools[language].test}:
            heard[intent] += 1
    intents = tuple(sorted(intent for intent, count in heard.items() if count >= heard_in * len(sizes)))

    def cut(language: str, train: int | None) -> Split:
        rng, pool = Random(f"cut-{seed}-{language}"), pools[language]
        return Split(
            train=_cut(pool.train, intents, train, rng),
            dev=_cut(pool.dev, intents, held_out, rng),
            test=_cut(pool.test, intents, held_out, rng),
        )

    return Data(
        intents=intents,
        languages={language: cut(language, size) for language, size in sizes.items()},
        arrivals={language: cut(language, None) for language in arrivals},
    )


def few_shot(pool: Iterable[Utterance], k: int, seed: int = 0) -> list[Utterance]:
    """k utterances an intent (fewer where the pool ends), from as many templates as there are; k = 4 holds k = 1."""
    rng = Random(f"few-{seed}")
    by_intent: dict[str, dict[str, list[Utterance]]] = defaultdict(lambda: defaultdict(list))
    for u in pool:
        by_intent[u.intent][u.template].append(u)
    chosen: list[Utterance] = []
    for by_template in by_intent.values():
        rows = [rng.sample(row, len(row)) for row in by_template.values()]
        rng.shuffle(rows)
        columns = chain.from_iterable(zip_longest(*rows))  # the first of each template, then the second of each …
        chosen += [u for u in columns if u is not None][:k]
    return chosen


def _pool(language: str, seed: int) -> Split:
    """All that is drawn from a language, split by template within each intent."""
    rng = Random(f"pool-{seed}-{language}")
    drawn = [
        Utterance(text, template.intent, language, template.text)
        for template in templates(language)
        for text in dict.fromkeys(draw(template, rng) for _ in range(DRAWS))
    ]
    meanings: dict[str, set[str]] = defaultdict(set)
    by_intent: dict[str, dict[str, list[Utterance]]] = defaultdict(lambda: defaultdict(list))
    for u in drawn:
        meanings[u.text].add(u.intent)
        by_intent[u.intent][u.template].append(u)

    parts: dict[str, list[Utterance]] = {"train": [], "dev": [], "test": []}
    for by_template in by_intent.values():
        order = rng.sample(list(by_template), len(by_template))
        for part, count in _counts(len(order)).items():
            taken, order = order[:count], order[count:]
            parts[part] += [u for name in taken for u in by_template[name]]

    seen = {text for text, intents in meanings.items() if len(intents) > 1}  # a string with two labels has none
    kept = {part: tuple(_unseen(utterances, seen)) for part, utterances in parts.items()}  # in the order of `parts`
    return Split(**kept)


def _counts(n: int) -> dict[str, int]:
    """How many of n templates go to each part: test and development get one as soon as training has one too."""
    test = max(round(PARTS["test"] * n), int(n > 1))
    dev = max(round(PARTS["dev"] * n), int(n > 2))
    return {"test": test, "dev": dev, "train": n - test - dev}


def _unseen(utterances: Iterable[Utterance], seen: set[str]) -> Iterable[Utterance]:
    """Those whose string has not been seen before, which then have been."""
    for u in utterances:
        if u.text not in seen:
            seen.add(u.text)
            yield u


def _cut(pool: Sequence[Utterance], intents: Sequence[str], size: int | None, rng: Random) -> tuple[Utterance, ...]:
    """`size` utterances of the kept intents, an intent's share ∝ √(what it has): frequent ones lead, none drowns."""
    rows = {intent: [u for u in pool if u.intent == intent] for intent in intents}
    if size is None:
        return tuple(chain.from_iterable(rows.values()))
    weights = {intent: sqrt(len(row)) for intent, row in rows.items()}
    for row in rows.values():
        rng.shuffle(row)
    chosen: list[Utterance] = []
    while len(chosen) < size and (left := [intent for intent in intents if rows[intent]]):
        intent = rng.choices(left, [weights[intent] for intent in left])[0]
        chosen.append(rows[intent].pop())
    return tuple(chosen)
