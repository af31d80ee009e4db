"""The README's example runs as it is printed."""

import re
from pathlib import Path


def test_the_example_runs_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "README.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(examples) == 1
    names: dict = {}
    exec(compile(examples[0], "README.md", "exec"), names)
    assert names["z"].shape == (3, 10, 64) and (tmp_path / "modules" / "language").is_dir()
