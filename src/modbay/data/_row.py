"""What a row is: the columns that it is read from, and what is read."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import DataError, listed

KINDS = ("classification", "regression", "tagging", "causal", "masked", "seq2seq")
WITHOUT_TARGET = ("causal", "masked")  # the text itself is what they learn
PAIRED = ("classification", "regression")  # the kinds that may compare two texts


@dataclass(frozen=True)
class Columns:
    """Which columns hold what.

        Columns("utterance", "intent", {"language": "lang"})
        Columns(("premise", "hypothesis"), "label", group="document")

    text: a column, or two that are read as a pair. target: the column to predict; None for a language model. labels:
    the column of each label to route by. fixed: labels that are the same in all rows, as in a file for each language.
    group: a column whose equal values are never parted by `split`. separator: between the fields of a text table, if
    it isn't ',' (.csv) or a tab (.tsv). strict: classes and labels that differ only by case or surrounding space, and
    a class "nan", are errors; False takes them as they stand.
    Raises DataError for columns that can't be meant.
    """

    text: str | tuple[str, str]
    target: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    group: str | None = None
    fixed: Mapping[str, str] = field(default_factory=dict)
    separator: str | None = None
    strict: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.text, list):  # as YAML has it
            object.__setattr__(self, "text", tuple(self.text))
        if not self.text or not all(isinstance(c, str) and c for c in self.texts) or len(self.texts) > 2:
            raise DataError(f"text={self.text!r}: one column's name, or two for a pair of texts.")
        twice = {*self.labels} & {*self.fixed}
        if twice:
            raise DataError(f"labels {listed(sorted(twice))} are given both a column and a fixed value: keep one.")
        if "task" in {*self.labels, *self.fixed}:
            raise DataError("the label 'task' is always the task's name: call the column's label something else.")
        empty = [
            label for label, value in {**self.labels, **self.fixed}.items() if not isinstance(value, str) or not value
        ]
        if empty:
            raise DataError(f"labels {listed(empty)}: each needs the name of a column, or a fixed value, as a string.")
        if self.separator is not None and len(self.separator) != 1:
            raise DataError(f"separator={self.separator!r}: one character, such as ';'.")

    @property
    def texts(self) -> tuple[str, ...]:
        """The text columns: one or two."""
        return (self.text,) if isinstance(self.text, str) else self.text

    def needed(self, kind: str, wanted_target: bool) -> list[str]:
        """The columns that a table must have; raises DataError where the kind and the columns don't go together."""
        if kind not in KINDS:
            raise DataError(f"kind={kind!r}: there are {listed(KINDS)}.")
        if len(self.texts) == 2 and kind not in PAIRED:
            raise DataError(f"kind {kind!r} reads one text, not the pair {self.texts}: only {listed(PAIRED)} read two.")
        if wanted_target and kind in WITHOUT_TARGET and self.target is not None:
            raise DataError(f"kind {kind!r} learns the text itself: leave out target={self.target!r}.")
        if wanted_target and kind not in WITHOUT_TARGET and self.target is None:
            raise DataError(f"kind {kind!r} needs a target: name the column that holds what is to be predicted.")
        target = [self.target] if self.target is not None and wanted_target else []
        group = [self.group] if self.group is not None else []
        return list(dict.fromkeys([*self.texts, *target, *self.labels.values(), *group]))


@dataclass(frozen=True, slots=True)
class Row:
    """One example.

    text: a string; for tagging, its words. pair: the second text. target: a class, a number, tags (one a word), a text;
    None for a language model, or where it isn't wanted. labels: what may be routed by, "task" among them. where: the
    file and line it begins at, "data/intents.csv:17", or "file.parquet, row 17"; both from 1. group: rows of one group
    are never parted.
    """

    text: str | tuple[str, ...]
    pair: str | None
    target: str | float | tuple[str, ...] | None
    task: str
    labels: dict[str, str]
    where: str
    group: str | None = None
    kind: str = "classification"

    @property
    def whole(self) -> str:
        """All that is read, as one string: the words with spaces between, the pair on a line of its own."""
        text = self.text if isinstance(self.text, str) else " ".join(self.text)
        return text if self.pair is None else f"{text}\n{self.pair}"

    @property
    def normal(self) -> str:
        """`whole` for comparing: case folded, runs of white space as one space. Nothing else is taken as the same."""
        parts = [self.text if isinstance(self.text, str) else " ".join(self.text), self.pair]
        return "\n".join(" ".join(part.casefold().split()) for part in parts if part is not None)
