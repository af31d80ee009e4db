"""What is known of languages: the typological features of URIEL, as lang2vec holds them.

Littell, Mortensen, Lin, Kairis, Turner and Levin, "URIEL and lang2vec: Representing Languages as Typological,
Geographical, and Phylogenetic Vectors", 2017 (EACL).
"""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import ConfigError, listed

PREFIXES = {"syntax": "S_", "phonology": "P_", "inventory": "INV_"}


def typology(
    languages: Sequence[str], of: Sequence[str] = ("syntax", "phonology", "inventory")
) -> dict[str, tuple[float, ...]]:
    """The features t (k,) of each language, as mb.Hyper(…, table=typology(("en", "sw"))) takes them: k = 289.

    languages: ISO 639-1 or 639-3 codes. of: which features: "syntax" (103), "phonology" (28) or "inventory" (158), each
    0 or 1; where a language's own is not known, it is predicted from its neighbours' (URIEL's knn features), as MAD-G
    and UDapter have them. Its files are read where the package lang2vec lies; none of its code runs.
    Raises ConfigError without lang2vec, for a language that it does not know, or other features.
    """
    unknown = [name for name in of if name not in PREFIXES]
    if unknown or not of:
        raise ConfigError(f"typology(of={tuple(of)!r}): some of {listed(PREFIXES)}.")
    found = importlib.util.find_spec("lang2vec")
    if found is None or not found.submodule_search_locations:
        raise ConfigError("typology: the features are in the package lang2vec: pip install lang2vec.")
    folder = Path(next(iter(found.submodule_search_locations))) / "data"
    codes = json.loads((folder / "letter_codes.json").read_text(encoding="utf-8"))
    with np.load(folder / "feature_predictions.npz", allow_pickle=False) as file:
        names, known, values = file["feats"].tolist(), file["langs"].tolist(), file["data"][..., 0]
    columns = [i for part in of for i, name in enumerate(names) if name.startswith(PREFIXES[part])]
    rows = {name: codes.get(name, name) for name in languages}
    lacking = [name for name, code in rows.items() if code not in known]
    if lacking:
        raise ConfigError(f"typology: URIEL does not know {listed(lacking)}; languages are ISO 639-1 or 639-3 codes.")
    return {name: tuple(map(float, values[known.index(code), columns])) for name, code in rows.items()}
