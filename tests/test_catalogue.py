"""`modbay methods`: every part is a row, every row says how to build it, and every test that it names is there."""

import ast
import json
from functools import cache
from pathlib import Path

import pytest
from typer.testing import CliRunner

import modbay as mb
from modbay.cli import app
from modbay.methods import AXES, METHODS, catalogue

ROOT = Path(__file__).parents[1]
ROWS = catalogue()


def call(*arguments, code: int = 0) -> str:
    said = CliRunner().invoke(app, ["methods", *arguments])
    assert said.exit_code == code, said.output
    return said.stdout if code == 0 else said.stderr


@cache
def known_tests(file: str) -> set[str]:
    """The tests of a file by name, without running it."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_part_is_a_row():
    bases = (mb.Kind, mb.Router, mb.Aggregator)
    abstract = {mb.ParameterComposition, mb.InputComposition, mb.FunctionComposition, mb.Replacement, mb.Generator}
    public = {n for n, v in vars(mb).items() if isinstance(v, type) and issubclass(v, bases)}
    names = [row.name for row in ROWS]
    assert public - {c.__name__ for c in (*bases, *abstract)} | set(METHODS) <= set(names)
    assert len(names) == len(set(names))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_says_what_it_is_and_what_proves_it(row):
    assert row.equation and row.doc and row.source and row.build and row.section and row.axis in AXES
    for test in row.tests:
        file, _, name = test.partition("::")
        assert name in known_tests(file), f"{row.name}: there is no {test}"
    assert row.tests or not row.systems, f"{row.name} is a system, and names no test that proves it"


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.build.startswith("mb.") and row.systems], ids=lambda row: row.name
)
def test_what_is_said_to_build_a_system_builds_it(row):
    assert eval(row.build, {"mb": mb}) is not None


def test_in_full_by_name_by_number_and_near():
    assert call("lora").startswith("mb.LoRA(8, alpha=16)\n") and "Hu, Shen, Wallis" in call("lora")
    assert "Pfeiffer adapter" in call("39")
    assert "Near: LoRA" in call("Lorra", code=1)


def test_as_a_table_by_axis_and_as_json():
    said = call()
    assert all(row.name.split()[0] in said for row in ROWS)
    assert "TopK" in call("--axis", "routing") and "LoRA" not in call("--axis", "routing")
    assert "parameter composition" in call("--axis", "sideways", code=1)
    rows = json.loads(call("--json"))
    assert set(rows[0]) >= {"name", "axis", "section", "systems", "equation", "build", "source", "tests"}
    lora = next(row for row in rows if row["name"] == "LoRA")
    assert lora["systems"] == [22] and lora["folds"] and lora["arxiv"][0] == "2106.09685"


def test_the_page_is_of_this_code():
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert page == call("--page"), "modbay methods --page > docs/methods.md"
