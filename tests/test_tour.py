"""docs/tour.py: it runs as it stands, and stays short enough to be read in ten minutes."""

import re
import runpy
from pathlib import Path

import pytest

TOUR = Path(__file__).parents[1] / "docs" / "tour.py"


def test_tour_runs(capsys):
    """Its own assertions are the test; what it prints at the end are the figures of section 11."""
    pytest.importorskip("transformers")
    runpy.run_path(str(TOUR), run_name="__main__")
    said = re.findall(r"\d\.\d{4}", capsys.readouterr().out)
    few, scratch = map(float, said)
    assert few < scratch / 5


def test_tour_is_short():
    lines = TOUR.read_text().splitlines()
    assert len(lines) <= 300
    assert sum(line.startswith("# %%") for line in lines) >= 10  # cells, for an editor that runs them one by one


def test_tour_uses_public_names_only():
    """A reader can do all of it with `import modbay as mb`."""
    text = TOUR.read_text()
    assert re.findall(r"(?:from|import) modbay\S*.*", text) == ["import modbay as mb"]
    assert not re.findall(r"mb\.\w*\._\w+", text)
