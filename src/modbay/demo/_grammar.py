"""Draw strings from a sentence grammar: a random walk over hassil's expression tree.

hassil's own sampler enumerates every sentence of a template in order, so a capped run of it gives the first
alternatives only. Here each choice is drawn on the way down, and a string costs one walk.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from random import Random

from hassil.expression import Alternative, Expression, ListReference, Permutation, RuleReference, Sentence, TextChunk
from hassil.expression import Sequence as ExpressionSequence
from hassil.intents import Intents, RangeSlotList, SlotList, TextSlotList
from home_assistant_intents import get_intents

NAMES = ("alba", "boris", "clara", "dante", "elena", "felix", "greta", "hugo", "iris", "jonas", "lara", "milo")
"""What fills an open slot, the same in every language: real fillers (rooms, songs, shopping) would name the intent."""


@dataclass(frozen=True)
class Template:
    """One sentence template of one intent, with the rules and slot lists that it refers to."""

    intent: str
    text: str
    sentence: Sentence
    rules: Mapping[str, Sentence]
    lists: Mapping[str, SlotList]


@cache
def templates(language: str) -> tuple[Template, ...]:
    """All templates of a language; a text that an intent lists twice (under two slot combinations) comes once."""
    source = get_intents(language)
    if source is None:
        raise ValueError(f"language={language!r}: home-assistant-intents has no such file; use a code such as 'en'")
    grammar = Intents.from_dict(source)
    found: dict[tuple[str, str], Template] = {}
    for name, intent in grammar.intents.items():
        for block in intent.data:
            rules = {**grammar.expansion_rules, **block.expansion_rules}
            lists = {**grammar.slot_lists, **block.slot_lists}
            for text, sentence in zip(block.sentence_texts, block.sentences, strict=True):
                found.setdefault((name, text), Template(name, text, sentence, rules, lists))
    return tuple(found.values())


def draw(template: Template, rng: Random) -> str:
    """One random sentence of the template, lower-cased, with single spaces."""
    return " ".join(_walk(template.sentence.expression, template, rng).lower().split())


def _walk(expression: Expression, template: Template, rng: Random) -> str:
    """The text of one random path below `expression`."""
    match expression:
        case TextChunk():
            return expression.original_text
        case Alternative():  # an optional part is an alternative with an empty branch
            return _walk(rng.choice(expression.items), template, rng)
        case Permutation():
            return "".join(_walk(item, template, rng) for item in rng.sample(expression.items, len(expression.items)))
        case ExpressionSequence():
            return "".join(_walk(item, template, rng) for item in expression.items)
        case RuleReference():
            return _walk(template.rules[expression.rule_name].expression, template, rng)
        case ListReference():
            return _fill(expression, template, rng)
    raise TypeError(f"expression={expression!r}: hassil has a kind of expression that this walk does not know")


def _fill(slot: ListReference, template: Template, rng: Random) -> str:
    """A value for a slot: from its range, from its list, or one of NAMES where the grammar leaves it open."""
    if (bounds := slot.get_inline_range()) is not None:
        start, stop, step = bounds
        return str(rng.randrange(start, stop + 1, step))
    match template.lists.get(slot.list_name):
        case RangeSlotList() as numbers:
            return str(rng.randrange(numbers.start, numbers.stop + 1, numbers.step))
        case TextSlotList(values=[_, *_] as values):
            return _walk(rng.choice(values).text_in, template, rng)
    return rng.choice(NAMES)
