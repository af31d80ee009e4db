"""Adapting a run to few rows: the mathematics by hand, a planted answer, old bits, and errors."""

import json
from collections import Counter

import numpy
import pytest
import torch
from typer.testing import CliRunner

from conftest import tiny_rows, write_csv
from modbay import training
from modbay.attach import bays
from modbay.cli import app
from modbay.data import Row
from modbay.errors import CompositionError, ConfigError, DataError
from modbay.library import Library
from modbay.methods import search_weights
from modbay.training.adapting._bench import copied
from modbay.training.adapting._head import probe, probed
from modbay.training.adapting._mix import (
    alike,
    choose,
    folds,
    mean_and_error,
    mixed,
    sigmoid_weights,
    softmax_weights,
    stacked,
)

# The mathematics


def test_weights_by_hand():
    z = torch.tensor([0.0, 1.0, -2.0])
    gates = 1 / (1 + numpy.exp(-z.numpy()))
    numpy.testing.assert_allclose(sigmoid_weights(z).numpy(), gates / gates.sum(), rtol=1e-6)
    powers = numpy.exp(z.numpy())
    numpy.testing.assert_allclose(softmax_weights(z).numpy(), powers / powers.sum(), rtol=1e-6)


def test_a_mixed_module_is_the_weighted_sum_of_each_parameter():
    modules = {"a": {"A": torch.tensor([[1.0, 2.0]]), "B": torch.tensor([3.0])},
               "b": {"A": torch.tensor([[10.0, 20.0]]), "B": torch.tensor([-1.0])}}  # fmt: skip
    made = mixed(stacked(modules), torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(made["A"], torch.tensor([[7.75, 15.5]]))
    torch.testing.assert_close(made["B"], torch.tensor([0.0]))
    with pytest.raises(CompositionError, match="'a' and 'b'"):
        alike({"a": modules["a"], "b": {"A": torch.zeros(1, 3), "B": torch.zeros(1)}})


def test_the_search_finds_a_minimum_within_its_bounds():
    wanted = numpy.array([0.8, -0.3])
    found = search_weights(lambda w: float(((numpy.array(w) - wanted) ** 2).sum()), 2, 80, l1=0.0)
    numpy.testing.assert_allclose(found, wanted, atol=0.05)
    assert search_weights(lambda w: -10 * w[0], 2, 80)[0] == pytest.approx(1.5)  # the bound
    assert search_weights(lambda w: 0.0, 3, 10) == [0.0, 0.0, 0.0]  # the penalty alone


def test_folds_share_out_classes_and_never_part_a_unit():
    strata, units = ["a"] * 8 + ["b"] * 4 + ["c"], [0, 0, *range(2, 8), *range(10, 14), 20]
    fold = folds(strata, units, 4, seed=0)
    assert fold[0] == fold[1] and fold[-1] == -1  # the same text; a class of one row is never held out
    assert Counter(fold[8:12]) == {0: 1, 1: 1, 2: 1, 3: 1}
    assert fold == folds(strata, units, 4, seed=0) != folds(strata, units, 4, seed=1)
    assert folds(["a", "b"], [0, 1], 4, 0) == [-1, -1]


def test_the_cheapest_within_one_standard_error_is_chosen():
    scores = {"cheap": (0.85, 0.05), "dear": (0.9, 0.06), "bad": (0.5, 0.05)}
    costs = {"cheap": 10, "dear": 1000, "bad": 1}
    assert choose(scores, costs) == ("cheap", "dear")
    assert choose({**scores, "cheap": (0.8, 0.05)}, costs) == ("dear", "dear")
    assert choose({"one": (0.8, 0.1), "other": (0.85, 0.0)}, {"one": 5, "other": 5}) == ("other", "other")
    assert mean_and_error([0.0, 1.0, 1.0, 1.0]) == (0.75, pytest.approx(0.25))


def test_probes_learn_together_as_alone():
    x, target = torch.randn(12, 5), torch.tensor([0.0, 1.0, 2.0] * 4)
    shares = torch.rand(3, 12)
    shares = shares / shares.sum(1, keepdim=True)
    head = probe(x, target, shares, 3, measured=False)
    alone = probe(x, target, shares[1:2], 3, measured=False)
    torch.testing.assert_close(head["weight"][1], alone["weight"][0])
    said = probed(head, x, target, False)
    by_hand = torch.nn.functional.cross_entropy(
        x @ head["weight"][2].T + head["bias"][2], target.long(), reduction="none"
    )
    torch.testing.assert_close(said[2], by_hand)


# Runs

TURNED = {"weather": "music", "music": "timer", "timer": "weather"}


def turned(language, each, seed):
    """English rows whose classes are turned: what another language's module can't tell."""
    return [(text, TURNED[target], language) for text, target, _ in tiny_rows(("en",), each, seed)]


@pytest.fixture(scope="module")
def trained(tiny_base, tmp_path_factory):
    """Runs by method, of the languages en, de and odd, each trained once."""
    folder, made = tmp_path_factory.mktemp("runs"), {}
    data = write_csv(folder / "said.csv", [*tiny_rows(each=12), *turned("odd", 12, 1)])

    def run(method, **more):
        if method not in made:
            given = {"base": str(tiny_base), "data": str(data), "by": "language", "method": method, "steps": 60,
                     "batch": 16, "lr": 0.02, "probe": 100, "layers": 1, "evaluate_every": 60, "seed": 1,
                     "licence": "CC-BY-4.0"}  # fmt: skip
            made[method] = training.train(training.config({**given, **more}), folder / method)
        return made[method]

    return run


@pytest.fixture
def rows(tmp_path):
    """Rows of a language that is `odd` under another name, in a file without its column."""
    return str(write_csv(tmp_path / "pt.csv", [row[:2] for row in turned("pt", 8, 9)], ("text", "target")))


def bits(run, names):
    """The modules of a run's bay and its heads, as they are."""
    there = bays(run.network().model)
    return {(bay, name): copied(there[bay], name) for bay, several in names.items() for name in several}


def test_what_an_old_module_does_is_found(trained, rows, tmp_path):
    run = trained("private")
    made = training.adapt(run, rows, tmp_path / "new", value="language=pt", folds=2, steps=12, lr=1e-4, test=0.4)
    facts = made.facts
    scores = {row["method"]: row["estimate"] for row in facts["compare"]["rows"]}
    assert list(scores) == list(training.WAYS)
    assert min(scores["nearest"], scores["lorahub"], scores["routing-softmax"]) > scores["scratch"] + 0.3
    came = facts["adapt"]
    assert not came["way"].startswith(("scratch", "average")) and came["way"] in facts["compare"]["verdict"]
    assert max(came["from"], key=came["from"].get) == "odd"
    # the row of proof, and the module: exactly the weighted sum of the old ones
    assert facts["proof"][-1]["rows"] > 10 and facts["proof"][-1]["changed"] == 0
    old = {"language": ["en", "de", "odd"], "heads": ["said"]}
    before, after = bits(run, old), bits(made, {**old, "arrivals": ["pt"]})
    for key, tensors in before.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, after[key][name])
    for name, tensor in after["arrivals", "pt"].items():
        wanted = sum(w * before["language", one][name] for one, w in came["from"].items())
        torch.testing.assert_close(tensor, wanted)
    # it serves both, in one pass, and its figures are there
    assert {row["value"] for row in facts["results"] if row["label"] == "language"} >= {"en", "de", "odd", "pt"}
    assert len({(row["way"] if "way" in row else row["method"]) for row in facts["compare"]["rows"]}) == 6
    # once more: the new run is a run
    other = training.adapt(made, rows, tmp_path / "newer", value="language=br", steps=2, ways=["nearest"])
    assert other.routes.of(read_row(other, "br"), other.network().keywords)["arrival"] == "br"
    assert other.routes.of(read_row(other, "pt"), other.network().keywords)["arrival"] == "pt"
    assert len(other.facts["proof"]) == 2 and "compare" not in other.facts
    assert other.facts["adapt"]["head"] == "said-br"  # a way that tunes has a head of its own


def record(run, module):
    return json.loads((run.folder / "modules" / module / "module.json").read_text(encoding="utf-8"))


def test_the_files_say_what_was_made_of_what(trained, rows, tmp_path):
    run = trained("private")
    made = training.adapt(run, rows, tmp_path / "new", value="language=pt", folds=2, steps=2, test=0.4, seed=3,
                          ways=["average", "lorahub"])  # fmt: skip
    came, data = made.facts["adapt"], made.facts["data"][-2:]
    told = [json.loads(line) for line in (made.folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    mine = [one for one in told if one["labels"]["language"] == "pt"]
    assert {one["split"]: one["rows"] for one in data} == {"few": came["rows"], "test": len(mine)}
    trial = next(row for row in made.facts["compare"]["rows"] if row["method"] == came["way"])
    for module in ("arrivals/pt", "heads/said-pt"):
        about = record(made, module)["about"]
        assert about["labels"] == {"task": ["said"], "language": ["pt"]} and about["licence"] == "CC-BY-4.0"
        right = sum(one["prediction"] == one["target"] for one in mine) / len(mine)
        assert about["metrics"]["accuracy"] == pytest.approx(right, abs=1e-6)
        assert [one.pop("name") for one in about["data"]] == ["pt.csv", "pt.csv"]
        assert about["data"] == [{key: one[key] for key in ("sha256", "rows", "split")} for one in data]
        figure = f"accuracy {trial['estimate']:.3f} ± {trial['error']:.3f} on {came['rows']} rows"
        assert f"adapt: {came['way']}, cross-validated {figure}, seed 3; metrics of {len(mine)} test" in about["notes"]
        assert len(about["embedding"]) == 32 and str(tmp_path) not in json.dumps(about)
    wanted = [record(run, f"language/{name}")["content"] for name, weight in came["from"].items() if weight]
    assert record(made, "arrivals/pt")["about"]["parents"] == wanted
    assert record(made, "heads/said-pt")["about"]["parents"] == [record(run, "heads/said")["content"]]
    for module in ("language/en", "language/odd", "heads/said"):  # these are what they were
        assert record(made, module)["about"] == record(run, module)["about"]
    found = Library(made.folder / "modules").search(labels={"language": "pt"})
    assert [one.name for one in found] == ["arrivals/pt", "heads/said-pt"]
    later = training.adapt(made, rows, tmp_path / "later", value="language=br", steps=1, ways=["scratch"], head="kept")
    assert record(later, "arrivals/br")["about"].keys() == {"labels", "data", "licence", "notes", "embedding"}
    assert "adapt: scratch, seed 0; metrics of 0 test rows" in record(later, "arrivals/br")["about"]["notes"]
    for module in ("arrivals/pt", "heads/said-pt"):
        assert record(later, module)["about"] == record(made, module)["about"]


def read_row(run, language):
    return Row("rain sun", None, "music", "said", {"task": "said", "language": language}, "x:1")


def test_a_new_task_gets_a_head_of_its_own(trained, tmp_path):
    run = trained("polytropon", options={"skills": 3})
    rows = [(f"{text} a", "out" if target == "weather" else "in") for text, target, _ in tiny_rows(("en",), 8, 5)]
    file = write_csv(tmp_path / "where.csv", rows, ("text", "target"))
    made = training.adapt(run, str(file), tmp_path / "new", shots=6, folds=2, steps=6,
                          ways=["scratch", "routing-sigmoid"])  # fmt: skip
    came = made.facts["adapt"]
    assert (came["label"], came["task"], came["rows"], came["tested"]) == ("task", "where", 12, 0)
    assert made.known["kinds"] == {"said": "classification", "where": "classification"}
    assert made.known["classes"]["where"] == ["in", "out"] and made.facts["proof"][-1]["changed"] == 0
    trials = {row["method"]: row for row in made.facts["compare"]["rows"]}
    assert trials["routing-sigmoid"]["parameters"] == 3 + 2 * 32 + 2
    assert trials["routing-sigmoid"]["n"] == 12
    assert made.network().model(**batch(made, "where")).shape == (1, 2)
    about = record(made, "heads/where")["about"]  # which was made of nothing
    assert about["labels"] == {"task": ["where"]} and "parents" not in about and "metrics" not in about


def batch(run, task):
    network = run.network()
    row = Row("rain sun", None, "in", task, {"task": task}, "x:1")
    example = network.encoder.encode([row], [network.routes.of(row, network.keywords)])
    made = network.encoder.collate(example)
    del made["labels"]
    return made


def test_what_all_rows_share_stays_under_the_new_module(trained, rows, tmp_path):
    run = trained("shared+private", steps=2)
    made = training.adapt(run, rows, tmp_path / "new", value="language=pt", steps=1, ways=["average"], head="kept")
    assert made.facts["adapt"]["head"] == "said" and "said-pt" not in bays(made.network().model)["heads"].names()
    assert made.facts["adapt"]["always"] == ["shared"]
    assert set(made.facts["adapt"]["from"]) == {"en", "de", "odd"}
    contents = [record(run, f"language/{name}")["content"] for name in made.facts["adapt"]["from"]]
    assert record(made, "arrivals/pt")["about"]["parents"] == contents
    network = made.network()
    said = network.routes.of(read_row(made, "pt"), network.keywords)
    assert bays(network.model)["language"].state.router.table[said["language"]] == ["shared"]
    assert made.facts["proof"][-1]["changed"] == 0


def test_a_new_task_that_is_measured(trained, tmp_path):
    rows = [(text, str(5 + len(text) / 10)) for text, *_ in tiny_rows(("en",), 4, 5)]
    file = write_csv(tmp_path / "length.csv", rows, ("text", "target"))
    made = training.adapt(trained("private"), str(file), tmp_path / "new", kind="regression", folds=2, steps=2,
                          test=0.5, ways=["lorahub", "nearest"])  # fmt: skip
    assert made.known["kinds"]["length"] == "regression" and "length" not in made.known["classes"]
    assert made.facts["compare"]["metric"].startswith("1 − |error| / deviation")
    assert {row["metric"] for row in made.facts["results"] if row["task"] == "length"} >= {"rmse"}
    assert made.facts["proof"][-1]["changed"] == 0


@pytest.mark.parametrize("kind", ["masked", "tagging", "causal", "seq2seq"])
def test_other_kinds(tiny_base, tiny_generators, tmp_path, kind):
    heads, tags = (
        ("text", "target", "language"),
        lambda text: " ".join("NAME" if w < "m" else "O" for w in text.split()),
    )
    rows = [(text, tags(text), language) for text, _, language in tiny_rows(each=3)]
    data = write_csv(tmp_path / "said.csv", rows, heads)
    new = write_csv(tmp_path / "fr.csv", [(text, tags(text), "fr") for text, *_ in tiny_rows(("fr",), 3, 2)], heads)
    base = str(tiny_generators.get(kind, tiny_base))
    given = {"base": base, "data": str(data), "by": "language", "method": "private", "kind": kind, "steps": 1}
    more = {} if kind in tiny_generators else {"layers": 1, "probe": 5}
    run = training.train(training.config({**given, **more}), tmp_path / "run")
    made = training.adapt(run, str(new), tmp_path / "new", value="language=fr", folds=2, steps=2)
    assert len(made.facts["compare"]["rows"]) == 6 and made.facts["proof"][-1]["changed"] == 0
    assert made.facts["compare"]["metric"].startswith("accuracy" if kind == "tagging" else "− loss")
    about = record(made, "arrivals/fr")["about"]
    assert about["labels"]["language"] == ["fr"] and len(about["embedding"]) == 32


@pytest.mark.parametrize(
    "given, error, says",
    [
        ({"ways": ["nearist"]}, ConfigError, "no 'nearist'"),
        ({"folds": 1}, ConfigError, "folds=1"),
        ({"shots": 0}, ConfigError, "shots=0"),
        ({"head": "own"}, ConfigError, "head='own'"),
        ({"test": 1.5}, ConfigError, "test=1.5"),
        ({"value": "language=en"}, ConfigError, "knows that language already"),
        ({"value": "colour=red"}, ConfigError, "'language'"),
        ({"value": "language=pt", "task": "news"}, ConfigError, "task that the run knows"),
        ({"value": None, "task": "said"}, ConfigError, "the run has it already"),
        ({"value": None, "task": "new", "kind": "tagging"}, ConfigError, "can't share one network"),
        ({"target": "text"}, ConfigError, "has no classes"),
        ({"text": "txt"}, DataError, "Did you mean 'text'"),
        ({"shots": 1}, ConfigError, "nothing can be held out"),
    ],
)
def test_errors_leave_nothing_behind(trained, rows, tmp_path, given, error, says):
    with pytest.raises(error, match=says):
        training.adapt(trained("private"), rows, tmp_path / "new", **{"value": "language=pt", "steps": 1, **given})
    assert [path.name for path in tmp_path.iterdir()] == ["pt.csv"]


@pytest.mark.parametrize(
    "method, says", [("shared", "one alone|whatever the label"), ("mixture", "TopK"), ("probe", "none")]
)
def test_runs_without_modules_to_choose_among(trained, rows, tmp_path, method, says):
    with pytest.raises(ConfigError, match=says):
        training.adapt(trained(method, steps=1), rows, tmp_path / "new", value="language=pt")


def test_the_command(trained, rows, tmp_path):
    run = str(trained("private").folder)
    given = ["adapt", run, rows, "--value", "language=pt", "--steps", "2", "--folds", "2", "--shots", "4"]
    ways = ["--ways", "lorahub,nearest"]
    done = CliRunner().invoke(app, [*given, *ways, "--out", str(tmp_path / "new"), "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert [row["method"] for row in said["compare"]["rows"]] == ["lorahub", "nearest"]
    assert "Weights by search" in (tmp_path / "new" / "report.html").read_text(encoding="utf-8")
    done = CliRunner().invoke(app, [*given, "--ways", "average", "--test", "0.5", "--out", str(tmp_path / "other")])
    assert done.exit_code == 0, done.output
    assert "average is the one way" in done.stdout and "accuracy" in done.stdout
    done = CliRunner().invoke(app, [*given, "--out", str(tmp_path / "new")])
    assert done.exit_code == 1 and "exists" in done.output


def test_the_command_takes_a_task_by_name(trained, rows, tmp_path):
    given = ["adapt", str(trained("private").folder), f"orders={rows}", "--steps", "1", "--ways", "scratch"]
    done = CliRunner().invoke(app, [*given, "--out", str(tmp_path / "new"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["adapt"]["task"] == "orders"
    done = CliRunner().invoke(app, [*given, "--task", "mails", "--out", str(tmp_path / "other")])
    assert done.exit_code == 1 and "two names for one task" in done.output
