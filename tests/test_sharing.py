"""docs/sharing.py runs as it stands: its own assertions are the test."""

import runpy
from pathlib import Path

import pytest


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_modules_are_shared(capsys):
    pytest.importorskip("peft")
    runpy.run_path(str(Path(__file__).parents[1] / "docs" / "sharing.py"), run_name="__main__")
    assert "all equal" in capsys.readouterr().out
