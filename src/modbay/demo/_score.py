"""How right a way is: accuracy a language, and macro-F1 over the intents that a language tests."""

from collections.abc import Sequence
from dataclasses import dataclass

from sklearn.metrics import f1_score

from ._data import Utterance


@dataclass(frozen=True)
class Scores:
    """Accuracy and macro-F1 by language, each from 0 to 1. A mean over languages counts each of them once."""

    accuracy: dict[str, float]
    f1: dict[str, float]

    def mean(self) -> float:
        """Mean accuracy over the languages."""
        return sum(self.accuracy.values()) / len(self.accuracy)

    def mean_f1(self) -> float:
        """Mean macro-F1 over the languages."""
        return sum(self.f1.values()) / len(self.f1)

    def over(self, languages: Sequence[str]) -> float:
        """Mean accuracy over some of the languages (the smallest, say)."""
        return sum(self.accuracy[language] for language in languages) / len(languages)


def score(predicted: Sequence[str], truth: Sequence[Utterance]) -> Scores:
    """Compare predicted intents with those of `truth`, in the same order."""
    accuracy, f1 = {}, {}
    for language in dict.fromkeys(u.language for u in truth):
        pairs = [(p, u.intent) for p, u in zip(predicted, truth, strict=True) if u.language == language]
        accuracy[language] = sum(p == m for p, m in pairs) / len(pairs)
        said, meant = [p for p, _ in pairs], [m for _, m in pairs]
        f1[language] = float(f1_score(meant, said, labels=sorted(set(meant)), average="macro"))
    return Scores(accuracy, f1)
