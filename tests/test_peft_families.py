"""peft's checkpoints by architecture: what the table of docs/interop.md tells, of each cell."""

import runpy
import warnings
from pathlib import Path

import pytest

pytest.importorskip("transformers")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore:The following .*_pattern keys:RuntimeWarning"
)
BENCH = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "peft_families.py"))
REFUSED = {("bloom", "prefix"), ("m2m_100", "prefix"), ("deepseek_v3", "VeRA")}
OFTEN = ("cohere", "gemma", "mixtral", "t5", "distilbert", "mamba")  # each does something in a way of its own
FAMILIES = [
    pytest.param(*one, marks=[] if one[0] in OFTEN else pytest.mark.slow, id=one[0]) for one in BENCH["families"]()
]


@pytest.mark.parametrize(("kind", "group"), FAMILIES)
def test_there_and_back(kind, group):
    base = BENCH["made"](kind, group)
    for method in ("LoRA", "prefix") if kind in OFTEN else BENCH["METHODS"]:
        if group == "ImageClassification" and method in ("prompt", "prefix"):
            continue
        said, why = BENCH["cell"](base, group, method)
        assert said == "–" or (said == "refused") == ((kind, method) in REFUSED), f"{method}: {why}"
        if said not in ("–", "refused"):
            assert float(said) < 1e-5, method
        assert said != "–" or why.startswith("peft: ")
