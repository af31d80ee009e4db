"""modbay.data: every format reads the same, every bad input ends in one clear message, no part leaks into another."""

import csv
import gzip
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modbay.data import Columns, Row, Splits, digest, load, read, slug, slugs, split, stream, survey, write_rows
from modbay.errors import BayError, DataError

ROWS = [
    {"text": "turn on", "intent": "on", "lang": "en"},
    {"text": 'say "hi",\nplease', "intent": "say", "lang": "en"},
    {"text": "größer – 大", "intent": "on", "lang": "de"},
]
COLUMNS = Columns("text", "intent", {"language": "lang"})
ARGS = (COLUMNS, "classification", "intents")


def table(path: Path, rows=ROWS, delimiter: str = ",") -> Path:
    with gzip.open(path, "wt", newline="") if path.suffix == ".gz" else open(path, "w", newline="") as file:
        write = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        write.writeheader()
        write.writerows(rows)
    return path


def lines(path: Path, rows=ROWS) -> Path:
    said = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(said) if path.suffix == ".gz" else said)
    return path


def parquet(path: Path, rows=ROWS) -> Path:
    pa = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(rows), path)
    return path


def array(path: Path, rows=ROWS) -> Path:
    path.write_text(json.dumps(rows))
    return path


FORMATS = {
    "a.csv": table,
    "a.csv.gz": table,
    "a.tsv": lambda path, rows=ROWS: table(path, rows, "\t"),
    "a.jsonl": lines,
    "a.ndjson": lines,
    "a.jsonl.gz": lines,
    "a.json": array,
    "a.parquet": parquet,
}


def fails(text: str, source, *args, **kwargs) -> str:
    """`read` raises a DataError that says `text`; the whole message."""
    with pytest.raises(DataError, match=re.escape(text)) as caught:
        read(source, *(args or ARGS), **kwargs)
    return str(caught.value)


def put(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# What is read


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = FORMATS[name](tmp_path / name)
    rows = read(path, *ARGS)
    assert [(r.text, r.target, r.labels) for r in rows] == [
        (r["text"], r["intent"], {"task": "intents", "language": r["lang"]}) for r in ROWS
    ]
    assert list(stream(path, *ARGS)) == rows


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("a.csv", [":2", ":3", ":5"]),  # the second row has two lines
        ("a.csv.gz", [":2", ":3", ":5"]),
        ("a.jsonl", [":1", ":2", ":3"]),
        ("a.json", [", row 1", ", row 2", ", row 3"]),
        ("a.parquet", [", row 1", ", row 2", ", row 3"]),
    ],
)
def test_where_is_the_line_at_which_a_row_begins(tmp_path: Path, name: str, places: list[str]) -> None:
    path = FORMATS[name](tmp_path / name)
    assert [row.where for row in read(path, *ARGS)] == [f"{path}{place}" for place in places]


def test_a_byte_order_mark_empty_lines_and_windows_line_ends_are_no_matter(tmp_path: Path) -> None:
    path = put(tmp_path / "a.csv", b"\xef\xbb\xbftext,intent,lang\r\n\r\na,x,en\r\nb,y,en\r\n\r\n")
    assert [(row.text, row.where) for row in read(path, *ARGS)] == [("a", f"{path}:3"), ("b", f"{path}:4")]
    path = put(
        tmp_path / "a.jsonl",
        '\ufeff{"text": "a\u2028b", "intent": 1, "lang": "en"}\n\n{"text": "c", "intent": true, "lang": 7}',
    )
    assert [(row.text, row.target, row.labels["language"], row.where[-2:]) for row in read(path, *ARGS)] == [
        ("a\u2028b", "1", "en", ":1"),
        ("c", "true", "7", ":3"),
    ]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_a_text_of_a_megabyte_is_read(tmp_path: Path, name: str) -> None:
    long = "wörd " * 200_000
    path = FORMATS[name](tmp_path / name, [*ROWS, {"text": long, "intent": "on", "lang": "en"}])
    assert read(path, *ARGS)[-1].text == long


def test_pairs_numbers_fixed_labels_and_groups(tmp_path: Path) -> None:
    rows = [{"a": "x", "b": "y", "score": "1.5", "doc": "7"}, {"a": "x", "b": "z", "score": " -2e3", "doc": "8"}]
    columns = Columns(["a", "b"], "score", fixed={"language": "de"}, group="doc")  # type: ignore[arg-type]
    got = read(table(tmp_path / "a.csv", rows), columns, "regression", "sim")
    assert [(r.text, r.pair, r.target, r.group) for r in got] == [("x", "y", 1.5, "7"), ("x", "z", -2000.0, "8")]
    assert got[0].labels == {"task": "sim", "language": "de"}
    assert got[0].whole == "x\ny"


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_words_and_tags_are_lists_or_have_spaces_between(tmp_path: Path, name: str) -> None:
    inside = json.dumps if name == "a.csv" else lambda said: said
    rows = [{"w": inside(["New York", "is"]), "t": inside(["B-LOC", "O"])}]
    assert read(FORMATS[name](tmp_path / name, rows), Columns("w", "t"), "tagging", "ner")[0].text == ("New York", "is")
    got = read(
        FORMATS[name](tmp_path / name, [{"w": "[ hi  there", "t": "O O B-X"}]), Columns("w", "t"), "tagging", "ner"
    )
    assert (got[0].text, got[0].target) == (("[", "hi", "there"), ("O", "O", "B-X"))


def test_language_models_need_only_text_and_seq2seq_two_texts(tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv")
    for kind in ("causal", "masked"):
        assert [row.target for row in read(path, Columns("text"), kind, "lm")] == [None] * 3
    assert [row.target for row in read(path, Columns("text", "intent"), "seq2seq", "t")] == ["on", "say", "on"]


def test_prediction_wants_no_target(tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", [{"text": "a", "lang": "en"}])
    assert read(path, *ARGS, wanted_target=False)[0].target is None


# Folders, patterns, lists


def test_a_folder_is_read_in_order_and_its_names_mean_splits(tmp_path: Path) -> None:
    for name in ("b.csv", "a.jsonl", ".hidden.csv", "README.md"):
        FORMATS.get(name, table)(tmp_path / name)
    assert [Path(row.where).name for row in read(tmp_path, *ARGS)][::3] == ["a.jsonl:1", "b.csv:2"]
    parts = tmp_path / "parts"
    for name in ("train-00000-of-00001.csv", "dev.jsonl", "test/x.csv"):
        (parts / name).parent.mkdir(parents=True, exist_ok=True)
        (lines if name.endswith("jsonl") else table)(parts / name)
    got = load(parts, *ARGS)
    assert [len(rows) for _, rows in got.items()] == [3, 3, 3]
    assert read(parts, *ARGS, split="validation")[0].where == f"{parts}/dev.jsonl:1"
    fails("has no split 'dev'; it has 'test', 'train', 'validation'.", parts, *ARGS, split="dev")
    table(parts / "more.csv")
    fails("'more.csv' beside train.*: which split is that?", parts)


def test_a_list_and_a_pattern(tmp_path: Path) -> None:
    one, two = table(tmp_path / "1.csv"), lines(tmp_path / "2.jsonl")
    assert len(read([one, two], *ARGS)) == len(read(str(tmp_path / "[12].*"), *ARGS)) == 6
    fails("the pattern matches no file with data", str(tmp_path / "*.parquet"))
    fails("an empty list of files", [])


def test_parts_that_are_not_given_are_drawn_from_train(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "intent": "ab"[i % 2], "lang": "en"} for i in range(40)]
    train, test = (
        table(tmp_path / "train.csv", rows),
        table(tmp_path / "test.csv", [{"text": "q", "intent": "a", "lang": "en"}]),
    )
    for source in (tmp_path, {"train": train, "test": test}):
        got = load(source, *ARGS, seed=3)
        assert [len(rows) for _, rows in got.items()] == [36, 4, 1]
    with pytest.raises(DataError, match="the parts are 'train', 'validation', 'test', train among them"):
        load({"training": train}, *ARGS)


# What is refused


def test_a_missing_column_names_those_there_and_near_misses(tmp_path: Path) -> None:
    path = put(tmp_path / "a.csv", "Text,intnt,lang\na,b,en\n")
    said = fails("no columns 'text', 'intent'; there are 'Text', 'intnt', 'lang'.", path)
    assert "Did you mean 'Text' for 'text', 'intnt' for 'intent'?" in said
    path = put(tmp_path / "a.jsonl", '{"text": "a", "intent": "x", "lang": "en"}\n{"text": "a", "lang": "en"}\n')
    fails(f"{path}:2: no column 'intent'; there are 'text', 'lang'.", path)
    said = fails("Its fields seem to be separated by ';'", put(tmp_path / "b.csv", "text;intent;lang\na;b;en\n"))
    assert "say separator=';'" in said
    rows = read(tmp_path / "b.csv", Columns("text", "intent", separator=";"), "classification", "x", whole=False)
    assert rows[0].target == "b"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "", "the file is empty"),
        ("a.csv", "\n\n", "the file is empty"),
        ("a.csv", "text,intent,lang\n", "no rows below the names of the columns"),
        ("a.jsonl", "", "no rows."),
        ("a.json", "[]", "no rows."),
        ("a.csv", "text,text,intent,lang\na,b,c,d\n", "a.csv:1: columns named twice: 'text'"),
        (
            "a.csv",
            'text,"intent,lang\na,b,c\n',
            "a.csv:1: in the names of the columns, a quotation mark is opened here",
        ),
        ("a.json", '{"text": "a"}', "a JSON dict, where a list of objects is wanted"),
        ("a.json", '{"text": "a"}\n{"text": "b"}', "One object a line? Call it .jsonl."),
        ("a.json", "[1]", "a.json, row 1: a JSON int, where an object {…} with columns is wanted"),
        ("a.jsonl", "[1]\n", "a.jsonl:1: a JSON list, where an object {…} with columns is wanted"),
        ("a.jsonl", '{"text": \n', "a.jsonl:1: not JSON (Expecting value"),
        ("a.parquet", "PAR1", "not a sound Parquet file"),
        ("a.csv.gz", "text", "not a sound gzip file"),
        ("a.xlsx", "PK", "can't tell how it is written from its name"),
        ("a.csv", b"\xff\xfet\0e\0", "this is UTF-16, not UTF-8. Convert it: iconv -f UTF-16 -t UTF-8"),
    ],
)
def test_a_file_that_is_no_table(tmp_path: Path, name: str, text: str | bytes, said: str) -> None:
    fails(said, put(tmp_path / name, text))


def test_a_wrong_encoding_names_byte_and_line_and_the_way_to_convert(tmp_path: Path) -> None:
    path = put(tmp_path / "a.csv", "text,intent,lang\na,x,en\nça,y,fr\ncafé,y,fr\n".encode("cp1252"))
    said = fails(f"{path}:3: byte 0xE7 (byte 25 of the file) is not UTF-8.", path)
    assert f"iconv -f WINDOWS-1252 -t UTF-8 {path} > a.utf8.csv" in said
    big = b'{"text": "a", "intent": "x", "lang": "en"}\n' * 2000  # beyond the buffer
    fails(":2001: byte 0xE9", put(tmp_path / "a.jsonl", big + b'{"text": "\xe9"}\n'))


def test_no_such_file_names_near_ones(tmp_path: Path) -> None:
    table(tmp_path / "intents.csv")
    fails("no such file or folder. Did you mean 'intents.csv'?", tmp_path / "intent.csv")
    fails(f"Nor is there a folder {tmp_path / 'no'}.", tmp_path / "no" / "x.csv")
    (tmp_path / "empty").mkdir()
    put(tmp_path / "empty" / "notes.txt", "x")
    fails("a folder without data. It holds 'notes.txt'; what can be read: .csv", tmp_path / "empty")
    fails("only a dataset of the hub has revisions", tmp_path / "intents.csv", *ARGS, revision="main")


CSV = "text,intent,lang\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (",x,en\n", ":2: the text in column 'text' is empty"),
        ("  ,x,en\n", ":2: the text in column 'text' is empty"),
        ("a,,en\n", ":2: the target (column 'intent') is missing"),
        ("a,  ,en\n", ":2: the target (column 'intent') is blank"),
        ("a,NaN,en\n", ":2: the target (column 'intent') is 'NaN': no class. If it is one, say strict=False"),
        ("a,x,\n", ":2: the label 'language' (column 'lang') is missing"),
        ("a,x\n", ":2: 2 fields, where the first line has 3"),
        ("a,b,x,en\n", ":2: 4 fields, where the first line has 3; a text with ',' in it must stand in quotation marks"),
        (
            '"a\nb"c,x,en\n',
            ":2: wrong quotation marks (',' expected after '\"'): one inside a quoted text is written twice",
        ),
        ('a,x,en\n"b,x,en\nc,x,en\n', ":3: a quotation mark is opened here and never closed"),
    ],
)
def test_a_bad_row_of_a_table_is_told_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    path = put(tmp_path / "a.csv", CSV + text)
    told = fails(f"{path}{said}", path)
    assert told.startswith("1 row can't be used:") and "Mend it in the file, or take it out" in told
    with pytest.raises(DataError, match="A stream stops at the first bad row"):
        list(stream(path, *ARGS))


@pytest.mark.parametrize(
    ("kind", "record", "said"),
    [
        ("classification", {"text": 5, "target": "x"}, "column 'text' holds 5, a int, where a text is wanted"),
        ("classification", {"text": None, "target": "x"}, "no text in column 'text'"),
        ("classification", {"text": "\ud800", "target": "x"}, "holds half of a surrogate pair"),
        ("classification", {"text": "a", "target": None}, "the target (column 'target') is missing"),
        ("classification", {"text": "a", "target": float("nan")}, "the target (column 'target') is missing"),
        ("classification", {"text": "a", "target": 0.5}, "is 0.5, a fraction: names and whole numbers are wanted"),
        ("classification", {"text": "a", "target": ["x"]}, "is ['x'], a list: names and whole numbers are wanted"),
        ("regression", {"text": "a", "target": "good"}, "the target (column 'target') is 'good', no number"),
        ("regression", {"text": "a", "target": "3,5"}, "is '3,5', no number: write a decimal point"),
        ("regression", {"text": "a", "target": True}, "is True, no number"),
        ("regression", {"text": "a", "target": ""}, "the target (column 'target') is missing"),
        ("regression", {"text": "a", "target": float("nan")}, "is nan, where a finite number is wanted"),
        ("regression", {"text": "a", "target": "inf"}, "is inf, where a finite number is wanted"),
        ("seq2seq", {"text": "a", "target": ""}, "the text in column 'target' is empty"),
        ("tagging", {"text": "a b", "target": "O"}, "2 words but 1 tags: each word has one tag"),
        ("tagging", {"text": ["a", ""], "target": "O O"}, "item 2 of the list is '', where a string is wanted"),
        ("tagging", {"text": ["a", 1], "target": "O O"}, "item 2 of the list is 1, where a string is wanted"),
        ("tagging", {"text": [], "target": []}, "the list in column 'text' is empty"),
        ("tagging", {"text": 3, "target": "O"}, "holds 3, a int, where a list of strings is wanted"),
        ("tagging", {"text": "['a', 'b']", "target": "O O"}, "a list as Python prints it: write JSON"),
        ("tagging", {"text": None, "target": "O"}, "no words in column 'text'"),
    ],
)
def test_a_bad_value(tmp_path: Path, kind: str, record: dict, said: str) -> None:
    path = put(tmp_path / "a.jsonl", json.dumps(record))
    fails(f"{path}:1: ", path, Columns("text", "target"), kind, "t")
    fails(said, path, Columns("text", "target"), kind, "t")


def test_all_bad_rows_are_counted_and_ten_are_shown(tmp_path: Path) -> None:
    path = put(tmp_path / "a.csv", CSV + "a,x,en\n" + ",x,en\n" * 1234)
    said = fails("1,234 rows can't be used:\n", path)
    assert [int(n) for n in re.findall(r"a\.csv:(\d+):", said)] == list(range(3, 13))
    assert "… and 1,224 more\nMend them in the file, or take them out; nothing was left out." in said


def test_classes_and_labels_that_differ_only_by_case_or_space(tmp_path: Path) -> None:
    path = put(tmp_path / "a.csv", CSV + "a,Refund,en\nb,refund ,en\nc,refund ,en\nd,x,EN\n")
    fails("values of the label 'language' that differ only by case or space:\n  'en' (3 rows, first at", path)
    path = put(tmp_path / "a.csv", CSV + "a,Refund,en\nb,refund ,en\nc,refund ,en\nd,x,en\n")
    said = fails(f"'Refund' (1 rows, first at {path}:2), 'refund ' (2 rows, first at {path}:3)", path)
    assert "say strict=False" in said
    loose = Columns("text", "intent", strict=False)
    assert Counter(r.target for r in read(path, loose, "classification", "t"))["refund "] == 2
    (tmp_path / "parts").mkdir()
    put(tmp_path / "parts" / "train.csv", CSV + "a,x,en\nb,y,en\n")
    put(tmp_path / "parts" / "test.csv", CSV + "c,X,en\n")
    with pytest.raises(DataError, match="classes that differ only by case"):
        load(tmp_path / "parts", *ARGS)


def test_one_class_alone_teaches_nothing(tmp_path: Path) -> None:
    path = put(tmp_path / "a.csv", CSV + "a,x,en\nb,x,en\n")
    fails("all 2 rows of task 'intents' have the class 'x': with one class there is nothing to learn.", path)
    assert len(read(path, *ARGS, whole=False)) == len(read(path, *ARGS, classes=["x", "y"])) == 2


def test_a_class_that_the_model_does_not_know(tmp_path: Path) -> None:
    path = put(tmp_path / "a.csv", CSV + "a,refunds,en\nb,zzz,en\n")
    said = fails(
        f"{path}:2: class 'refunds' is not one that the model knows; did you mean 'refund'?",
        path,
        *ARGS,
        classes=["refund"],
    )
    assert "class 'zzz' is not one that the model knows; there are 'refund'" in said


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Columns(""), "text='': one column's name, or two"),
        (lambda: Columns(("a", "b", "c")), "one column's name, or two for a pair"),  # type: ignore[arg-type]
        (lambda: Columns("a", labels={"task": "t"}), "the label 'task' is always the task's name"),
        (lambda: Columns("a", labels={"x": "t"}, fixed={"x": "y"}), "given both a column and a fixed value"),
        (lambda: Columns("a", labels={"x": ""}), "labels 'x': each needs the name of a column"),
        (lambda: Columns("a", separator="ab"), "separator='ab': one character"),
        (lambda: read("x.csv", Columns("a"), "classify", "t"), "kind='classify': there are 'classification'"),
        (lambda: read("x.csv", Columns("a"), "regression", "t"), "kind 'regression' needs a target"),
        (lambda: read("x.csv", Columns("a", "b"), "masked", "t"), "kind 'masked' learns the text itself: leave out"),
        (
            lambda: read("x.csv", Columns(("a", "b"), "c"), "tagging", "t"),
            "kind 'tagging' reads one text, not the pair",
        ),
    ],
)
def test_columns_that_can_not_be_meant(make, said: str) -> None:
    with pytest.raises(DataError, match=re.escape(said)):
        make()


# The hub


def test_a_dataset_that_can_not_be_had_is_one_error(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    for source in ("owner/name-that-is-not-cached", "hf:owner/name-that-is-not-cached:config@v1"):
        said = fails("datasets.load_dataset could not get it", source)
        assert "save it elsewhere with dataset.to_parquet(…) and name that file" in said
        with pytest.raises(DataError, match="could not get it"):
            next(stream(source, *ARGS))
    fails("a dataset of the hub is hf:owner/name", "hf:a/b/c")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "intent": datasets.ClassLabel(names=["off", "on"]),
            "lang": datasets.Value("string"),
        }
    )
    rows = [{"text": f"t{i}", "intent": i % 2, "lang": "en"} for i in range(4)]
    one = datasets.Dataset.from_list(rows, features=features)

    def load_dataset(name, config, *, revision, streaming):
        assert (name, revision) == ("acme/x", "v2")
        part = one.to_iterable_dataset() if streaming else one
        return {"train": part, "dev": part}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_a_dataset_of_the_hub_gives_names_for_classes_and_its_splits(hub: None, tmp_path: Path) -> None:
    rows = read("acme/x", *ARGS, split="validation", revision="v2")
    assert [(row.target, row.where) for row in rows][1] == ("on", "hf:acme/x@v2 validation, row 2")
    assert list(stream("hf:acme/x@v2", *ARGS, split="validation")) == rows
    got = load("acme/x@v2", *ARGS, test=0)
    assert [len(rows) for _, rows in got.items()] == [4, 4, 0]
    fails("has no split 'test': it has 'train', 'validation'.", "acme/x@v2", *ARGS, split="test")
    write_rows(tmp_path / "o.jsonl", "acme/x@v2", {"said": list("abcd")}, split="train")
    assert json.loads((tmp_path / "o.jsonl").read_text().splitlines()[1]) == {
        "text": "t1",
        "intent": "on",
        "lang": "en",
        "said": "b",
    }


# Parts


def row(text: str, target="a", where: str = "", **more) -> Row:
    labels = {"task": more.pop("task", "t"), **more.pop("labels", {})}
    return Row(text, None, target, labels["task"], labels, where or f"f:{text}", **more)


some = st.lists(
    st.builds(
        lambda text, target, language, group: row(text, target, labels={"language": language}, group=group),
        st.text("abAB  ", min_size=1, max_size=4).filter(str.strip),
        st.sampled_from("xyz"),
        st.sampled_from(["en", "de"]),
        st.none() | st.sampled_from("12345678"),
    ),
    max_size=60,
)


@given(some, st.integers(0, 3), st.booleans(), st.sampled_from([(0.1, 0.1), (0, 0.5), (0.3, 0)]))
def test_no_text_and_no_group_is_in_two_parts(rows, seed, stratified, fractions) -> None:
    validation, test = fractions
    try:
        got = split(rows, validation=validation, test=test, seed=seed, stratified=stratified)
    except DataError as error:
        assert "too few for" in str(error)
        return
    assert Counter(map(id, rows)) == Counter(id(r) for _, part in got.items() for r in part)
    for what in (lambda r: r.normal, lambda r: r.group):
        homes = {}
        for name, part in got.items():
            for r in part:
                assert what(r) is None or homes.setdefault(what(r), name) == name
    again = split(rows[::-1], validation=validation, test=test, seed=seed, stratified=stratified)
    assert [Counter(r.where for r in p) for _, p in got.items()] == [
        Counter(r.where for r in p) for _, p in again.items()
    ]
    assert not survey(got).leaks
    if rows:
        assert all(bool(part) == bool(f) for (_, part), f in zip(got.items(), (1, validation, test), strict=True))


def test_parts_have_their_share_of_every_class_and_label_and_another_seed_parts_otherwise() -> None:
    rows = [
        row(f"{i} {c} {l}", c, labels={"language": l})
        for c, n in {"a": 500, "b": 100, "c": 30}.items()
        for l in ("en", "de")
        for i in range(n)
    ]
    got = split(rows, validation=0.1, test=0.2, seed=1)
    assert [len(part) for _, part in got.items()] == [882, 126, 252]
    counts = Counter((r.target, r.labels["language"]) for r in got.test)
    for (c, _), n in counts.items():
        assert abs(n - {"a": 100, "b": 20, "c": 6}[c]) <= 1
    assert {r.where for r in split(rows, validation=0.1, test=0.2, seed=2).test} != {r.where for r in got.test}


def test_rare_classes_stay_in_train_and_many_small_ones_count_together() -> None:
    rows = [row(f"{c} {i}", f"c{c}") for c in range(200) for i in range(2)]
    got = split(rows)
    assert {r.target for r in got.train} == {f"c{c}" for c in range(200)}
    assert abs(len(got.test) - 40) <= 1 and abs(len(got.validation) - 40) <= 8


def test_groups_are_shared_out_and_numbers_by_fifths() -> None:
    rows = [row(f"{g} {i}", float(i), group=str(g), kind="regression") for g in range(50) for i in range(10)]
    got = split(rows, test=0.2)
    assert [len(part) for _, part in got.items()] == [350, 50, 100]
    rows = [row(str(i), float(i), kind="regression") for i in range(1000)]
    assert [sum(1 for r in split(rows).test if a <= r.target < a + 200) for a in range(0, 1000, 200)] == [20] * 5


@pytest.mark.parametrize("bad", [{"test": 1.0}, {"validation": -0.1}, {"test": 0.6, "validation": 0.4}])
def test_fractions_that_leave_nothing(bad) -> None:
    with pytest.raises(DataError, match="fractions from 0 that leave something to train on"):
        split([row("a")], **bad)


def test_too_few_rows_to_part() -> None:
    with pytest.raises(DataError, match="task 't' has 2 rows or groups that can be parted"):
        split([row("a", group="1"), row("b", group="1"), row("c")])


# Survey


def test_a_survey_names_duplicates_leaks_conflicts_and_what_is_unseen() -> None:
    splits = Splits(
        [
            row("Hello  you", where="a:1"),
            row("hello you", "b", where="a:2"),
            *(row(f"{i}", "ab"[i % 2]) for i in range(12)),
        ],
        [row("HELLO you", where="v:1"), row("new", "c", where="v:2", labels={"language": "pt"})],
        [row("x" * 200_000, where="t:1"), row("hello you", "b", task="u", where="t:2")],
    )
    got = survey(splits)
    assert got.duplicates == [{"task": "t", "split": "train", "rows": 1, "examples": [["a:1", "a:2"]]}]
    assert got.leaks == [{"task": "t", "splits": ["train", "validation"], "rows": 1, "examples": [["a:1", "v:1"]]}]
    assert got.across == [{"tasks": ["t", "u"], "splits": ["train", "test"], "rows": 1, "examples": [["a:1", "t:2"]]}]
    assert got.conflicts == [{"task": "t", "texts": 1, "examples": [["a:1", "a", "a:2", "b"]]}]
    assert {(u["task"], u["what"], u["value"]) for u in got.unseen} == {
        ("t", "class", "c"),
        ("t", "language", "pt"),
        ("u", "class", "b"),
        ("u", "task", "u"),
    }
    assert got.longest[0] == {"where": "t:1", "characters": 200_000, "words": 1}
    assert {"task": "t", "split": "train", "label": "", "value": "", "rows": 14} in got.counts
    assert json.loads(json.dumps(got.as_dict())) == got.as_dict()
    said = "\n".join(got.lines())
    for part in (
        "task t: 14 train, 2 validation, 1 test",
        "  language pt: 0 train, 1 validation, 0 test",
        "warning: task 't': 1 validation row of which the text is in train, too (the same but for case and "
        "white space): figures on them flatter. a:1 and v:1.",
        "warning: task 't': 1 train row repeat a text",
        "1 text(s) with different targets, as a:1 ('a') and a:2 ('b'): no model can have both right.",
        "task 't': class 'c': in validation or test, never in train.",
        "t:1: a text of 200,000 characters",
    ):
        assert part in said, said


def test_a_class_with_few_rows_is_named() -> None:
    got = survey(Splits([*(row(str(i), "a") for i in range(9)), row("x", "b")], [], []))
    assert got.warnings == ["task 't': classes with fewer than 5 training rows: 'b' (1)."]


# Digests and names


def test_a_digest_is_of_the_bytes_or_of_the_rows(tmp_path: Path) -> None:
    one = table(tmp_path / "1.csv")
    assert digest(one) == digest(str(one)) != digest([one, lines(tmp_path / "2.jsonl")]) == digest(tmp_path)
    assert digest(read(one, *ARGS)) == digest(read(tmp_path / "2.jsonl", *ARGS)) != digest(read(one, *ARGS)[:2])
    with pytest.raises(DataError, match="no such file"):
        digest(tmp_path / "no.csv")
    with pytest.raises(DataError, match="a dataset of the hub is no file"):
        digest("hf:a/b")


@given(st.lists(st.text(min_size=1), unique=True))
def test_a_slug_is_a_name_that_a_module_can_have_and_the_table_leads_back(values) -> None:
    from modbay.core._modular import Inventory

    table = slugs(values)
    assert list(table.values()) == values
    for name, value in table.items():
        try:
            Inventory().check(name)
        except BayError:
            pytest.fail(f"{name!r} of {value!r}")
        assert len(name.encode()) <= 255 and not set('/\\:.\0"*?<>|') & set(name)


def test_slugs_keep_what_can_be_kept() -> None:
    assert [slug(v) for v in ("pt", "pt-BR", "Größe 2", "type")] == ["pt", "pt-BR", "Größe 2", "type"]
    assert slug("comp.os/x").startswith("comp-os-x-") and slug("comp.os/x") != slug("comp-os.x")
    assert slug(slug("comp.os/x")) != slug("comp.os/x")


# Files out


@pytest.mark.parametrize("name", FORMATS)
def test_predictions_are_added_in_the_format_that_came(tmp_path: Path, name: str) -> None:
    path, out = FORMATS[name](tmp_path / name), tmp_path / "out" / name
    assert write_rows(out, path, {"said": ["x", "y", "z, ö"], "sure": [0.5, 1.0, 1e-9]}) == [out]
    again = read(out, Columns("text", "said", {"language": "lang", "intent": "intent"}), "classification", "t")
    assert [(r.text, r.target, r.labels["intent"]) for r in again] == [
        (a["text"], b, a["intent"]) for a, b in zip(ROWS, ["x", "y", "z, ö"], strict=True)
    ]
    sure = read(out, Columns("text", "sure"), "regression", "t")
    assert [r.target for r in sure] == [0.5, 1.0, 1e-9]
    assert [p.name for p in out.parent.iterdir()] == [name]


def test_json_lines_keep_every_character_and_excel_its_mark(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", '{"n":1.50,  "b":12345678901234567890}\n{}\n')
    write_rows(tmp_path / "o.jsonl", path, {"p": [["a"], None]})
    assert (tmp_path / "o.jsonl").read_text() == '{"n":1.50,  "b":12345678901234567890, "p": ["a"]}\n{"p": null}\n'
    path = put(tmp_path / "a.csv", b'\xef\xbb\xbfa;b\r\n"x;";2\r\n')
    write_rows(tmp_path / "o.csv", path, {"p": [("u", "v")]}, separator=";")
    assert (tmp_path / "o.csv").read_bytes() == b'\xef\xbb\xbfa;b;p\r\n"x;";2;"[""u"", ""v""]"\r\n'


def test_several_files_go_into_a_folder_all_or_none(tmp_path: Path) -> None:
    table(tmp_path / "in1.csv"), lines(tmp_path / "in2.jsonl")
    source = [tmp_path / "in1.csv", tmp_path / "in2.jsonl"]
    with pytest.raises(DataError, match="4 values for more rows than that"):
        write_rows(tmp_path / "out", source, {"p": list("abcd")})
    with pytest.raises(DataError, match="7 values for the 6 rows of"):
        write_rows(tmp_path / "out", source, {"p": list("abcdefg")})
    assert not list((tmp_path / "out").iterdir())
    write_rows(tmp_path / "out", source, {"p": list("abcdef")})
    assert [r.target for r in read(tmp_path / "out", Columns("text", "p"), "seq2seq", "t")] == list("abcdef")
    with pytest.raises(DataError, match="2 files are written into a folder: name one"):
        write_rows(tmp_path / "out.csv", source, {"p": list("abcdef")})


def test_what_can_not_be_written(tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv")
    for out, columns, said in (
        ("o.jsonl", {"p": [1, 2, 3]}, "is written in its own format: call it o.csv"),
        ("o.csv", {"intent": [1, 2, 3]}, "has columns 'intent' already: give the new ones other names"),
        ("o.csv", {}, "give at least one, all of one length"),
        ("o.csv", {"p": [1], "q": []}, "give at least one, all of one length"),
        ("a.csv/o.csv", {"p": [1, 2, 3]}, "o.csv: can't be written ("),
    ):
        with pytest.raises(DataError, match=re.escape(said)):
            write_rows(tmp_path / out, path, columns)
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]
    (tmp_path / "there.csv").mkdir()
    with pytest.raises(DataError, match=re.escape("there.csv: can't be written (Is a directory)")):
        write_rows(tmp_path / "there.csv", path, {"p": [1, 2, 3]})


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(str.strip)


@given(rows=st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=8), name=st.sampled_from(list(FORMATS)))
def test_what_is_written_is_what_is_read(tmp_path_factory: pytest.TempPathFactory, rows, name: str) -> None:
    tmp_path = tmp_path_factory.mktemp("rows")
    path = FORMATS[name](tmp_path / name, [dict(zip(("text", "intent", "lang"), r, strict=True)) for r in rows])
    columns = Columns("text", "intent", {"language": "lang"}, strict=False)
    got = read(path, columns, "classification", "t", whole=False)
    assert [(r.text, r.target, r.labels["language"]) for r in got] == rows
    out = tmp_path / "out" / name
    write_rows(out, path, {"said": [r.target for r in got]})
    again = read(out, Columns("text", "said", {"language": "lang"}, strict=False), "classification", "t", whole=False)
    assert [(r.text, r.target, r.labels["language"]) for r in again] == rows
